"""Named tensors of a folder of weights, whichever files hold them.

    with open_tensors("models/gf") as tensors:
        tensors.shapes["bert.embeddings.word_embeddings.weight"]     # known without reading it
        tensors.get("bert.embeddings.word_embeddings.weight")        # mapped from the file, not copied

The first there is of: model.safetensors, its shards by model.safetensors.index.json, pytorch_model.bin, its shards
by pytorch_model.bin.index.json. Files of the last two kinds are pickles: torch's restricted reader admits names and
tensors only, so reading one runs none of its code.
"""

import io
import mmap
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cellformers.errors import UserError
from cellformers.io.files import atomic_path, read_json

WEIGHTS_FILE, PICKLED = "model.safetensors", "pytorch_model.bin"
KINDS = (WEIGHTS_FILE, f"{WEIGHTS_FILE}.index.json", PICKLED, f"{PICKLED}.index.json")

# What torch.load raises over files that are damaged, or that are no files of torch at all.
_UNREADABLE = (
    RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, AssertionError, ImportError,
    OSError, OverflowError, struct.error, zipfile.BadZipFile, SyntaxError,
)  # fmt: skip
# What torch's reader would call with any size.
_MAKERS = re.compile(r"(builtins|__builtin__)\.bytearray|torch(\.\w+)*\.\w*Tensor")
_OLD_PICKLES = 5  # of a file before torch 1.6: magic number, version, system, tensors, names of storages


class Tensors(NamedTuple):
    """What a folder holds: the file to name in messages, shapes by name, and a reader of single tensors."""

    path: Path
    shapes: dict[str, tuple[int, ...]]
    get: Callable[[str], Tensor]


def weight_files(folder: str | Path) -> list[Path]:
    """The files that hold the weights of a folder: one, or an index and its shards.

    Raises
    ------
    UserError
        If there are none, or an index is damaged or names files that are not there or outside the folder.
    """
    folder = Path(folder)
    path = next((folder / name for name in KINDS if (folder / name).is_file()), None)
    if path is None:
        raise UserError(
            "no such file", path=folder / WEIGHTS_FILE,
            fix=f"a model directory holds {WEIGHTS_FILE} or {PICKLED}",
        )  # fmt: skip
    shards = sorted(set(_index(path).values())) if path.suffix == ".json" else []
    for shard in shards:
        if not (folder / shard).is_file():
            raise UserError("no such file", path=folder / shard, fix=f"{path.name} names it: fetch it again")
    return [path, *(folder / shard for shard in shards)]


def _index(path: Path) -> dict[str, str]:
    """The file of each tensor, as an index of shards gives it."""
    content = read_json(path)
    found = content.get("weight_map") if isinstance(content, Mapping) else None
    if not isinstance(found, Mapping) or not found:
        raise UserError("no index of shards (it has no weight_map)", path=path, fix="fetch it again")
    for name, file in found.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", "..") or len(file) > 200:
            raise UserError(
                f"{name} is said to be in {file!r}, which is no file of this folder", path=path,
                fix="shards lie beside their index",
            )  # fmt: skip
    return dict(found)


@contextmanager
def open_tensors(folder: str | Path) -> Iterator[Tensors]:
    """Open the weights of a folder for reading; tensors stay valid behind the block.

    Raises
    ------
    UserError
        If files are missing or damaged, hold anything but named tensors, or don't match their index.
    """
    first, *shards = weight_files(folder)
    with ExitStack() as stack:
        if not shards:
            yield _open(first, stack)
            return
        shapes: dict[str, tuple[int, ...]] = {}
        getters: dict[str, Callable[[str], Tensor]] = {}
        index = _index(first)
        for shard in shards:
            part = _open(shard, stack)
            for name, shape in part.shapes.items():
                if index.get(name) != shard.name:
                    raise UserError(f"holds {name}, which {first.name} does not place there", path=shard)
                shapes[name], getters[name] = shape, part.get
        absent = next((name for name in index if name not in shapes), None)
        if absent is not None:
            raise UserError(
                f"lacks {absent}, which {first.name} places there", path=first.parent / index[absent]
            )
        yield Tensors(first, shapes, lambda name: getters[name](name))


def _open(path: Path, stack: ExitStack) -> Tensors:
    with path.open("rb") as file:
        if file.read(20).startswith(b"version https://git"):
            raise UserError(
                "is a pointer of git-lfs, not the weights", path=path, fix="run git lfs pull there"
            )
    if path.suffix == ".bin":
        tensors = _unpickle(path)
        return Tensors(
            path, {name: tuple(value.shape) for name, value in tensors.items()}, tensors.__getitem__
        )
    with _safetensors(path):
        opened = stack.enter_context(safe_open(path, framework="pt"))
        shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return Tensors(path, shapes, partial(_read, path, opened.get_tensor))


def _read(path: Path, get: Callable[[str], Tensor], name: str) -> Tensor:
    with _safetensors(path):
        return get(name)


@contextmanager
def _safetensors(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"not readable as safetensors ({error})", path=path, fix="fetch it again") from error


def _unpickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of torch.save; UserError for one that holds anything else."""
    # files of torch before 1.6 are no archives and can't be mapped into memory
    try:
        mapped = zipfile.is_zipfile(path)
        _check_pickles(path, mapped)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of pickle protocols that may not be readable
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except (pickle.UnpicklingError, *_UNREADABLE) as error:
        code = re.search(r"GLOBAL ([\w.]+)", str(error))
        if code:
            raise UserError(
                f"holds more than names and tensors ({code[1]}), so reading it could run code: refused", path=path,
                fix="where you trust it, save it as safetensors with the program that wrote it",
            ) from error  # fmt: skip
        reason = (str(error).splitlines() or [""])[0].partition(". ")[0][:200]
        if isinstance(error, pickle.UnpicklingError):  # its words advise to read the file without restriction
            reason = "damaged, or written by another program"
        raise UserError(
            f"not readable as weights of torch ({reason})", path=path, fix="fetch it again"
        ) from error
    if not isinstance(content, Mapping):
        raise UserError(f"holds a {type(content).__name__}, not named tensors", path=path)
    tensors = {}
    for name, value in content.items():
        if isinstance(name, str) and name.endswith("_extra_state"):
            continue  # TransformerEngine's, of any type; nothing here reads it
        plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout == torch.strided
        if not isinstance(name, str) or not plain or value.device.type != "cpu":
            raise UserError(
                f"{name!r} holds a {type(value).__name__}, not a tensor", path=path,
                fix="a file of weights maps names to tensors",
            )  # fmt: skip
        if value.numel() * value.element_size() > value.untyped_storage().nbytes():
            # one number may stand for a billion, until they are copied
            raise UserError(f"{name!r} has more numbers than the file", path=path, fix="fetch it again")
        tensors[name] = value.detach()
    return tensors


def _check_pickles(path: Path, archive: bool) -> None:
    """Refuse what would unpack to more than the file holds, before torch reads it; its rules are on what may be called.

    In an archive of torch nothing is compressed. Of what torch lets a pickle call, some functions make as much as they
    are asked for.
    """
    if archive:
        with zipfile.ZipFile(path) as members:
            found = members.infolist()
            size = sum(member.file_size for member in found)
            if size > path.stat().st_size or any(member.compress_type for member in found):
                raise RuntimeError("its archive is compressed")
            # torch takes a member of this name in capitals as well, and one of several
            pickles = [member for member in found if member.filename.lower().endswith("/data.pkl")]
            if len(pickles) > 1:
                raise RuntimeError("its archive has several pickles")
            for member in pickles:
                _check_calls(io.BytesIO(members.read(member)))
        return
    # mapped, a file gives no memory for lengths that it does not have
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for _ in range(_OLD_PICKLES):
            if data.tell() < len(data):
                _check_calls(cast(IO[bytes], data))


def _check_calls(file: IO[bytes]) -> None:
    for opcode, argument, _ in pickletools.genops(file):
        called = str(argument).replace(" ", ".") if opcode.name == "GLOBAL" else ""
        if _MAKERS.fullmatch(called):
            raise pickle.UnpicklingError(f"GLOBAL {called}")


def write_tensors(tensors: Mapping[str, Tensor], path: str | Path) -> None:
    """Write contiguous tensors as safetensors, whole or not at all."""
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()]
    if len(set(places)) < len(places):  # of a damaged pickle; safetensors has no place for such
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
