"""What is installed, which devices and backends work, what is missing and how to get it."""

import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import NamedTuple


class Finding(NamedTuple):
    """One line of the doctor's report: `state` is "ok", "missing" or "note"."""

    state: str
    what: str
    advice: str = ""


PACKAGES = {
    "numpy": "pip install numpy",
    "h5py": "pip install h5py",
    "pyarrow": "pip install pyarrow",
    "numba": "pip install numba",
    "anndata": "pip install anndata",
    "scanpy": "pip install scanpy (maps and doublet scores need it)",
    "scikit-learn": "pip install scikit-learn (evaluation needs it)",
    "torch": "pip install torch (models need it)",
    "snakemake": "pip install 'cellformers[workflow]' (the workflow needs it, the other commands do not)",
}


def _packages() -> list[Finding]:
    findings = []
    for name, advice in PACKAGES.items():
        try:
            findings.append(Finding("ok", f"{name} {importlib.metadata.version(name)}"))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding("missing", name, advice))
    return findings


def _devices() -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [
            Finding("missing", f"torch can't be imported ({error})", "install it again: pip install torch")
        ]
    findings = [Finding("ok", f"CPU with {os.cpu_count()} cores, {torch.get_num_threads()} threads in torch")]
    if torch.cuda.is_available():
        findings += _gpus()
    elif shutil.which("nvidia-smi"):
        advice = "install the CUDA build: make demo TORCH=cuda, or pip install torch without the CPU index"
        findings.append(Finding("missing", "an NVIDIA driver is here, but this torch sees no GPU", advice))
    else:
        findings.append(Finding("note", "no NVIDIA GPU: models compute on the CPU (accelerator: cpu)"))
    return findings


def _gpus() -> list[Finding]:
    """Each visible GPU, its free memory where there are several, and whether a job has claimed it."""
    from cellformers.models.devices import claimed_by, free_memory, visible_gpus

    findings = []
    gpus = visible_gpus()
    free = free_memory(gpus)
    for gpu in gpus:
        memory = f"{gpu.total / 2**30:.0f} GiB"
        if gpu.key in free:
            memory += f", {free[gpu.key] / 2**30:.0f} GiB free"
        holder = claimed_by(gpu)
        claim = "free to claim" if holder is None else f"claimed by process {holder}"
        findings.append(Finding("ok", f"GPU {gpu.number}: {gpu.name}, {memory}, {claim} (accelerator: cuda)"))
    return findings


def _how_to_get(backend: str, cuda: str | None) -> str:
    """Advice for a backend that does not work on a machine with a GPU; `cuda` is the version torch was built for."""
    if backend == "varlen":
        return "install torch 2.10 or later, a build with CUDA"
    extras = f"pytorch,core-cu{cuda.partition('.')[0]}" if cuda else "pytorch"
    return (
        f"the GPU's fastest path, and fp8: pip install --no-build-isolation 'transformer_engine[{extras}]' "
        "(it is compiled for the torch that is there; see docs/gpu.md)"
    )


def _backends() -> list[Finding]:
    """Which backends of a model work, what "auto" takes, and whether fp8 does."""
    try:
        import torch

        from cellformers.models import attention
    except ImportError:
        return []
    capability = attention.compute_capability()
    device = torch.device("cpu" if capability is None else "cuda")
    findings = []
    for name, reason in attention.available_backends().items():
        # without a GPU there is nothing to get
        advice = "" if reason is None or capability is None else _how_to_get(name, torch.version.cuda)
        because = "" if reason is None else f": {reason}"
        findings.append(
            Finding("ok" if reason is None else "note", f"attention backend {name}{because}", advice)
        )
    refused = attention.fp8_refusal(device)
    if capability is not None:
        findings.append(Finding("ok", f"the GPU has compute capability {capability[0]}.{capability[1]}"))
    findings.append(
        Finding("ok", "fp8 works (dtype fp8)") if refused is None else Finding("note", f"no fp8: {refused}")
    )
    taken = {
        short: attention.choose("auto", device, dtype)
        for short, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32))
    }
    choices = ", ".join(f"{backend} for {short}" for short, backend in taken.items())
    findings.append(Finding("ok", f"backend auto takes on {device.type}: {choices}"))
    return findings


def _writable(folder: Path) -> Finding:
    if os.access(folder, os.W_OK):
        free = shutil.disk_usage(folder).free / 2**30
        return Finding("ok", f"working folder {folder}: writable, {free:.0f} GiB free")
    return Finding("missing", f"working folder {folder} is not writable", "run from a folder of your own")


def examine() -> list[Finding]:
    """Look at everything; never raises."""
    system = f"cellformers {importlib.metadata.version('cellformers')} on Python {platform.python_version()}"
    return [
        Finding("ok", f"{system}, {platform.system()} {platform.machine()}"),
        *_packages(),
        *_devices(),
        *_backends(),
        _writable(Path.cwd()),
    ]


def report(findings: list[Finding]) -> str:
    """The findings as text, one a line, with advice below what is missing."""
    marks = {"ok": "ok     ", "missing": "MISSING", "note": "note   "}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.state]}  {finding.what}")
        if finding.advice:
            lines.append(f"         -> {finding.advice}")
    return "\n".join(lines)
