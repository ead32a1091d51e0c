"""What computed: versions of the package, of Python and of libraries, the code itself, and the processor.

Nothing that differs between two runs on one machine: no times, names of hosts or users, paths, cores or threads.
"""

import hashlib
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import cellformers

PACKAGES = (
    "snakemake", "numpy", "scipy", "pandas", "pyarrow", "h5py", "anndata", "scanpy", "scikit-learn", "umap-learn",
    "pynndescent", "numba", "llvmlite", "torch", "transformer-engine", "safetensors", "tokenizers", "transformers",
    "peft", "bitsandbytes", "optuna", "harmonypy", "scib-metrics", "scvi-tools", "jax", "zarr", "matplotlib", "pillow",
    "threadpoolctl",
)  # fmt: skip
FEATURES = (
    "sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl", "avx512_vnni",
    "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8", "asimd", "fphp", "sve", "sve2",
    "bf16",
)  # fmt: skip
"""Instructions that choose the kernel of a matrix product, and so the order in which it adds."""
SUFFIXES = (".py", ".j2", ".css", ".js", ".yaml")  # those of the registries say how deposits are read


def versions() -> dict[str, str]:
    """Versions by name; packages that are not installed are left out."""
    found = {"cellformers": cellformers.__version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def code_digest(package: Path) -> str:
    """sha256 of the source of the package and its registries: names and content of all files, in order."""
    sha = hashlib.sha256()
    for path in sorted(package.rglob("*"), key=lambda path: path.relative_to(package).as_posix()):
        if path.suffix in SUFFIXES and path.is_file():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            sha.update(f"{path.relative_to(package).as_posix()}\0{content}\n".encode())
    return sha.hexdigest()


def machine() -> dict[str, Any]:
    """System, architecture, instructions and linear algebra libraries: what sums of floats depend on."""
    return {
        "system": platform.system(),
        "architecture": platform.machine(),
        "features": _features(Path("/proc/cpuinfo")),
        "libraries": _libraries(),
    }


def _features(cpuinfo: Path) -> list[str] | None:
    """Those of `FEATURES` that every core has; None where the system does not say."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    words = [set(line.partition(":")[2].split()) for line in lines if line.startswith(("flags", "Features"))]
    if not words:
        return None
    common = set.intersection(*words)
    return [name for name in FEATURES if name in common]


def _libraries() -> list[str]:
    """The BLAS libraries of numpy and scipy with the kernels that they chose."""
    try:
        import scipy.linalg  # noqa: F401  (loads the library)
        from threadpoolctl import threadpool_info
    except ImportError:
        return []
    found = {
        " ".join(str(entry[key]) for key in ("internal_api", "version", "architecture") if entry.get(key))
        for entry in threadpool_info()
        if entry["user_api"] == "blas"
    }
    return sorted(found)
