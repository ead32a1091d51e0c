"""The command line: one verb a step.

    cellformers --help
    cellformers tokenize --help

A mistake of the user ends with one line on stderr and exit status 2, and leaves nothing half-written behind.
"""

import errno
import signal
import sys
from types import FrameType
from typing import NoReturn

import typer

from cellformers.commands import counts, evaluation, genes, models, setup
from cellformers.errors import UserError

app = typer.Typer(
    name="cellformers",
    help="From raw single-cell counts to benchmarked embeddings of cell foundation models.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for group in (setup, counts, genes, models, evaluation):
    for name, verb in group.VERBS.items():
        app.command(name)(verb)


def _stop(signum: int, _frame: FrameType | None) -> NoReturn:
    """End as an exception would, so that temporary files are removed."""
    raise SystemExit(128 + signum)


def main() -> None:
    """Run a verb; the entry point of the `cellformers` command."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        app()
    except UserError as error:
        print(f"cellformers: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"cellformers: error: {where}{error.strerror}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
