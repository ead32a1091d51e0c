"""Which device to compute on: of several GPUs a free one, claimed for the life of the process.

    device = pick_device("cuda")          # a GPU that no other job of this user has claimed
    gpus = pick_gpus(4)                   # four, for four processes

Snakemake hands out numbers of GPUs, not GPUs: two jobs on one workstation would both take the first. A claim is a
lock (flock) on a file of the GPU's UUID in a folder of the user's own, which the kernel drops when the process ends.
Only visible GPUs are looked at, so a scheduler's CUDA_VISIBLE_DEVICES decides; the freest comes first. Where all are
claimed a line says so and the GPU with the most free memory is shared: nothing waits, so nothing can wait for ever.
"""

import ctypes
import fcntl
import logging
import os
import stat
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cellformers.errors import UserError

ACCELERATORS = ("cpu", "cuda")
# not tempfile.gettempdir(): jobs may have TMPDIRs of their own, and need to meet
FOLDER = Path(f"/tmp/cellformers-gpus-{os.getuid()}")
SECONDS_BETWEEN_TRIES = 0.02  # `claimed_by` holds a lock for an instant

log = logging.getLogger(__name__)
_claims: dict[str, int] = {}  # open lock files by the keys of the GPUs that this process has claimed
_picked: list[torch.device] = []


class Gpu(NamedTuple):
    """A visible GPU."""

    number: int
    """Torch's number for it in this process."""
    key: str
    """Its UUID (of a MIG device its own), the same in every process."""
    name: str = "GPU"
    total: int = 0
    """Bytes of memory."""


def check_accelerator(accelerator: str) -> None:
    """UserError unless it is "cpu", or "cuda" and torch finds a GPU."""
    if accelerator not in ACCELERATORS:
        raise UserError(f"no accelerator {accelerator!r}", fix=f"give {' or '.join(ACCELERATORS)}")
    if accelerator == "cpu" or torch.cuda.is_available():
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    fix = "check the driver with nvidia-smi, or choose cpu"
    if torch.version.cuda is None:
        fix = "this torch is a CPU build: install one with CUDA, or choose cpu"
    elif visible is not None:
        fix = f"CUDA_VISIBLE_DEVICES is {visible!r}: name a GPU that is there, or choose cpu"
    raise UserError("accelerator cuda was asked for, but torch finds no CUDA device", fix=fix)


def pick_device(accelerator: str) -> torch.device:
    """The device for "cpu" or "cuda", the same each time it is asked for; UserError where it is not there."""
    check_accelerator(accelerator)
    if accelerator == "cpu":
        return torch.device("cpu")
    return use(_picked[0].index if _picked else pick_gpus(1)[0].number)


def pick_gpus(n: int) -> list[Gpu]:
    """Claim `n` of the visible GPUs for this process; UserError where there are fewer."""
    gpus = visible_gpus()
    if n > len(gpus):
        raise UserError(
            f"{n} processes on this machine, which has {len(gpus)} visible GPUs",
            fix="start one process a GPU (torchrun --nproc-per-node)",
        )
    return claim(gpus, n, free_memory(gpus))


def use(index: int) -> torch.device:
    """Make a GPU this process's own from now on."""
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    _picked[:] = [device]
    return device


# --- what is there ------------------------------------------------------------------------------------------


def visible_gpus() -> list[Gpu]:
    """The GPUs that CUDA shows to this process."""
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(Gpu(index, _key(properties, index), properties.name, properties.total_memory))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if len(found) == 1 and visible.startswith("MIG-"):  # some drivers give it the UUID of the whole GPU
        found = [found[0]._replace(key=visible.partition(",")[0])]
    return found


def _key(properties: Any, index: int) -> str:
    """UUID of a GPU; its place on the bus where torch does not tell; else its number."""
    uuid = str(getattr(properties, "uuid", "")).removeprefix("GPU-")
    if uuid:
        return uuid
    place = [getattr(properties, f"pci_{part}_id", None) for part in ("domain", "bus", "device")]
    return f"number-{index}" if None in place else "pci-" + "-".join(f"{part:02x}" for part in place)


def free_memory(gpus: Sequence[Gpu]) -> dict[str, int]:
    """Free bytes of GPUs by their keys, whoever uses the rest; of a single one nobody asks."""
    if len(gpus) < 2:
        return {}
    told = nvml_free_memory()
    if not all(gpu.key in told for gpu in gpus):
        told |= {gpu.key: _cuda_free_memory(gpu.number) for gpu in gpus if gpu.key not in told}
    return told


def _cuda_free_memory(index: int) -> int:
    """As CUDA tells, which costs a context of some 100 MB on the GPU; 0 where another process has it for itself."""
    try:
        return torch.cuda.mem_get_info(index)[0]
    except RuntimeError:
        return 0


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def nvml_free_memory(library: Any = None) -> dict[str, int]:
    """Free bytes of the machine's GPUs by UUID from the driver's own library; empty where it is not there."""
    found: dict[str, int] = {}
    try:
        nvml = library or ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2():
            return found
    except (OSError, AttributeError):
        return found
    n = ctypes.c_uint()
    if not nvml.nvmlDeviceGetCount_v2(ctypes.byref(n)):
        for index in range(n.value):
            handle, uuid, memory = ctypes.c_void_p(), ctypes.create_string_buffer(96), _Memory()
            if not (
                nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle))
                or nvml.nvmlDeviceGetUUID(handle, uuid, ctypes.c_uint(len(uuid)))
                or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory))
            ):
                found[uuid.value.decode().removeprefix("GPU-")] = memory.free
    nvml.nvmlShutdown()
    return found


# --- claims -------------------------------------------------------------------------------------------------


def claim(gpus: Sequence[Gpu], n: int, free: Mapping[str, int], *, folder: Path | None = None) -> list[Gpu]:
    """Claim `n` GPUs for this process: unclaimed ones first, then those with the most free memory (`free`, bytes).

    A line in the log says which are shared because all are claimed, or that claims can't be laid in `folder`.
    """
    order = sorted(gpus, key=lambda gpu: (-free.get(gpu.key, 0), gpu.number))
    taken: list[Gpu] = []
    try:
        claims = _open_folder(folder or FOLDER)
        try:
            for gpu in order:
                if len(taken) < n and _lock(claims, gpu.key):
                    taken.append(gpu)
        finally:
            os.close(claims)
    except OSError as error:
        if len(gpus) > n:  # else there is nothing to choose
            log.warning("GPUs can't be claimed (%s): taking the freest", error)
        return [*taken, *(gpu for gpu in order if gpu not in taken)][:n]
    shared = [gpu for gpu in order if gpu not in taken][: n - len(taken)]
    if shared:
        numbers = ", ".join(str(gpu.number) for gpu in shared)
        log.warning("other jobs have claimed all of %d GPUs: sharing GPU %s with them", len(gpus), numbers)
    return taken + shared


def claimed_by(gpu: Gpu, *, folder: Path | None = None) -> int | None:
    """Process that has claimed a GPU (0: not known), None for a free one."""
    try:
        claims = _open_folder(folder or FOLDER)
    except OSError:
        return None
    try:
        handle = os.open(_file(gpu.key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=claims)
    except OSError:
        return None
    finally:
        os.close(claims)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        text = os.pread(handle, 20, 0)
        return int(text) if text.isdigit() else 0
    finally:
        os.close(handle)
    return None


def _file(key: str) -> str:
    return "".join(c if c.isalnum() or c == "-" else "_" for c in key) + ".lock"


def _open_folder(path: Path) -> int:
    """Handle of the folder of claims, made if need be; OSError where it is not this user's alone.

    Anybody can make names in /tmp: a link there would have us lock, and write to, files of their choice.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    status = os.fstat(handle)
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(handle)
        raise PermissionError(f"{path} is not a folder that only you can write to")
    return handle


def _lock(folder: int, key: str) -> bool:
    """Hold the lock of a GPU until the process ends; False where another one holds it."""
    if key in _claims:
        return True
    handle = os.open(_file(key), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=folder)
    try:
        if not _try(handle):
            time.sleep(SECONDS_BETWEEN_TRIES)
            if not _try(handle):
                return False
        _claims[key] = handle
    finally:
        if key not in _claims:
            os.close(handle)
    with suppress(OSError):  # a full disk: the claim holds, only nobody can tell whose it is
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
    return True


def _try(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
