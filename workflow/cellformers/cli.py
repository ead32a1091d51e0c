"""The command line: one verb a step.

    cellformers --help
    cellformers tokenize --help

A mistake of the user ends with one line on stderr and exit status 2, and leaves nothing half-written behind; so does a
SIGTERM, with 143. An unfinished training, search or embed-file keeps what it goes on from.
"""

import errno
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import typer

from cellformers.commands import (
    counts,
    downloads,
    embedding,
    evaluation,
    finetuning,
    genes,
    mixing,
    models,
    pretraining,
    provenance,
    searching,
    setup,
)  # fmt: skip
from cellformers.errors import DISK_FULL, UserError, full_disk

app = typer.Typer(
    name="cellformers",
    help="From raw single-cell counts to benchmarked embeddings of cell foundation models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
GROUPS = (
    setup, downloads, counts, genes, models, pretraining, finetuning, searching, embedding, evaluation,
    mixing, provenance,
)  # fmt: skip
OF_THE_SYSTEM = (
    *DISK_FULL, errno.EACCES, errno.EIO, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENOENT, errno.ENOTDIR,
    errno.EPERM, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT,
)  # fmt: skip
IN_PLACE = ("convert",)  # reads its input whole before the output takes its place, and loses nothing
NAMED = ("cells", "input_files", "labels", "tokens")  # parameters that may be NAME=PATH
WRITTEN = ("output", "predictions", "report", "tensorboard")


def _sparing(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, refused where what it writes would take the place of what it reads."""

    @functools.wraps(verb)
    def run(**values: Any) -> None:
        inputs, outputs = list(_inputs(values)), list(_outputs(values))
        for path in [*inputs, *outputs]:
            _check_name(path)
        for number, output in enumerate(outputs):
            if output in outputs[:number]:
                raise UserError("is given for two things", path=output, fix="give each a file of its own")
            if os.path.exists(output):
                for path in inputs:
                    if os.path.exists(path) and (path.samefile(output) or _is_part(output, path)):
                        raise UserError(
                            "is the input, which is never changed", path=output,
                            fix="choose another --output",
                        )  # fmt: skip
        verb(**values)

    return run


def _check_name(path: Path) -> None:
    """Refuse what HDF5 and Arrow can't open: a name that is no UTF-8."""
    try:
        str(path).encode()
    except UnicodeError:
        raise UserError("is a name that is no UTF-8", path=path, fix="rename it") from None


def _is_part(output: Path, folder: Path) -> bool:
    """Whether a file is what a folder of a model, a vocabulary or counts is made of."""
    if not folder.is_dir() or not output.resolve().is_relative_to(folder.resolve()):
        return False
    if (folder / "config.json").is_file():
        return output.name in ("config.json", "model.safetensors") or output.parent.name == "vocabulary"
    if (folder / "vocabulary.json").is_file():
        return output.name in ("vocabulary.json", "tokens.parquet", "aliases.parquet")
    zarr = any((folder / name).is_file() for name in (".zgroup", "zarr.json", ".zmetadata"))
    return zarr or output.name.startswith(("matrix.mtx", "features.tsv", "genes.tsv", "barcodes.tsv"))


def _outputs(values: dict[str, Any]) -> Iterator[Path]:
    """What a verb writes."""
    output = values.get("output")
    if isinstance(output, Path):
        yield output
        if "raw_file" in values:  # ingest, whose output is a folder
            yield from (output / "metadata.parquet", output / "features.parquet")
            yield from sorted((output / "counts").glob("*.h5ad"))
    yield from (values[name] for name in ("predictions", "report") if isinstance(values.get(name), Path))


def _inputs(values: dict[str, Any]) -> Iterator[Path]:
    """The files and folders that a verb reads, as far as the values of its parameters name them."""
    for name, value in values.items():
        each = value if isinstance(value, list) else [value]
        if name == "model" and isinstance(value, str):  # a folder, or a registered name
            yield Path(value)
        elif name in NAMED:  # NAME=PATH, or a path
            yield from (
                Path(path) for word in each for path in {str(word), str(word).partition("=")[2]} if path
            )
        elif name not in WRITTEN:
            yield from (path for path in each if isinstance(path, Path))


for group in GROUPS:
    for name, verb in group.VERBS.items():
        app.command(name)(verb if name in IN_PLACE else _sparing(verb))


_stopped = False


def _stop(signum: int, _frame: FrameType | None) -> NoReturn:
    """End as an exception would, so that temporary files are removed; a second signal must not disturb that."""
    global _stopped
    _stopped = True
    signal.signal(signum, signal.SIG_IGN)
    raise SystemExit(128 + signum)


def _quiet_when_full() -> None:
    """Pass over what h5py prints about a file it can't finish on a full disk: the error itself is reported."""

    # Cython, in which h5py is written, shows an error that it can't raise by both hooks
    shown, ignored = sys.excepthook, sys.unraisablehook
    sys.excepthook = lambda kind, error, trace: None if full_disk(error) else shown(kind, error, trace)
    sys.unraisablehook = lambda found: None if full_disk(found.exc_value) else ignored(found)


def _open_streams() -> None:
    """Let closed streams lead nowhere: results would be opened under their numbers, and take what is printed."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # which gets the lowest number that is free
            setattr(sys, name, os.fdopen(number, "w" if number else "r"))


def _fail(line: str, cause: BaseException | None) -> NoReturn:
    print(f"cellformers: error: {line}", file=sys.stderr, flush=True)
    if full_disk(cause):
        # HDF5 would try again to write what the disk had no room for when the interpreter ends, and crash
        sys.stdout.flush()
        os._exit(2)
    raise SystemExit(2) from None


def main() -> None:
    """Run a verb; the entry point of the `cellformers` command."""
    global _stopped
    _stopped = False
    signal.signal(signal.SIGTERM, _stop)
    _open_streams()
    _quiet_when_full()
    try:
        typer.main.get_command(app)()  # app() would put a hook of its own in place of ours
    except BaseException as error:
        if (
            _stopped
        ):  # whatever has become of the exception: in an import that it cut off, libraries make it another
            print("cellformers: stopped (SIGTERM)", file=sys.stderr, flush=True)
            raise SystemExit(128 + signal.SIGTERM) from None
        if isinstance(error, UserError):
            _fail(str(error), error.__cause__)
        if isinstance(error, MemoryError):
            _fail("out of memory; give the job more, or the file more shards", error)
        if isinstance(error, OSError) and error.errno in OF_THE_SYSTEM:
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{os.strerror(error.errno)}", error)
        raise


if __name__ == "__main__":
    main()
