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
    *DISK_FULL, errno.EACCES, errno.EIO, errno.ENOENT, errno.EPERM, errno.EROFS, errno.ESTALE, errno.ETIMEDOUT,
)  # fmt: skip
IN_PLACE = ("convert",)  # reads its input whole before the output takes its place, and loses nothing


def _sparing(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, refused where its output would take the place of what it reads."""

    @functools.wraps(verb)
    def run(**values: Any) -> None:
        output = values.get("output")
        if isinstance(output, Path) and output.exists():
            for path in _inputs(values):
                if path.exists() and (path.samefile(output) or _is_part(output, path)):
                    raise UserError(
                        "is the input, which is never changed", path=output,
                        fix="choose another --output",
                    )  # fmt: skip
        verb(**values)

    return run


def _is_part(output: Path, model: Path) -> bool:
    """Whether a file is what a model folder is made of."""
    inside = (model / "config.json").is_file() and output.resolve().is_relative_to(model.resolve())
    return inside and (
        output.name in ("config.json", "model.safetensors") or output.parent.name == "vocabulary"
    )


def _inputs(values: dict[str, Any]) -> Iterator[Path]:
    """The files and folders among the values of a verb's parameters, but for its output."""
    for name, value in values.items():
        if name == "model" and isinstance(value, str):  # a folder, or a registered name
            yield Path(value)
        elif name != "output":
            yield from (
                each for each in (value if isinstance(value, list) else [value]) if isinstance(each, Path)
            )


for group in GROUPS:
    for name, verb in group.VERBS.items():
        app.command(name)(verb if name in IN_PLACE else _sparing(verb))


def _stop(signum: int, _frame: FrameType | None) -> NoReturn:
    """End as an exception would, so that temporary files are removed; a second signal must not disturb that."""
    signal.signal(signum, signal.SIG_IGN)
    raise SystemExit(128 + signum)


def _quiet_when_full() -> None:
    """Pass over what h5py prints about a file it can't finish on a full disk: the error itself is reported."""

    # Cython, in which h5py is written, shows an error that it can't raise by both hooks
    shown, ignored = sys.excepthook, sys.unraisablehook
    sys.excepthook = lambda kind, error, trace: None if full_disk(error) else shown(kind, error, trace)
    sys.unraisablehook = lambda found: None if full_disk(found.exc_value) else ignored(found)


def _fail(line: str, cause: BaseException | None) -> NoReturn:
    print(f"cellformers: error: {line}", file=sys.stderr, flush=True)
    if full_disk(cause):
        # HDF5 would try again to write what the disk had no room for when the interpreter ends, and crash
        sys.stdout.flush()
        os._exit(2)
    raise SystemExit(2) from None


def main() -> None:
    """Run a verb; the entry point of the `cellformers` command."""
    signal.signal(signal.SIGTERM, _stop)
    _quiet_when_full()
    try:
        typer.main.get_command(app)()  # app() would put a hook of its own in place of ours
    except UserError as error:
        _fail(str(error), error.__cause__)
    except SystemExit as end:
        if end.code == 128 + signal.SIGTERM:
            print("cellformers: stopped (SIGTERM)", file=sys.stderr, flush=True)
        raise
    except OSError as error:
        if error.errno not in OF_THE_SYSTEM:
            raise
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{os.strerror(error.errno)}", error)


if __name__ == "__main__":
    main()
