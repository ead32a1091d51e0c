"""How training goes, as it goes: a table of tab-separated values and, if wanted, an event log for TensorBoard.

with Curve("loss.tsv", ("step", "train_loss"), tensorboard="logs/run1") as curve:
    curve.add({"step": 10, "train_loss": 6.3})
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from cellformers.errors import UserError
from cellformers.io.files import write_text

Row = Mapping[str, Any]


def as_tsv(rows: Iterable[Row], columns: Sequence[str]) -> str:
    """The rows as text with a header; floats with six significant digits, what is missing or None left empty."""
    lines = ["\t".join(columns), *(_line(row, columns) for row in rows)]
    return "\n".join(lines) + "\n"


def _line(row: Row, columns: Sequence[str]) -> str:
    values = [row.get(name) for name in columns]
    return "\t".join("" if v is None else f"{v:.6g}" if isinstance(v, float) else str(v) for v in values)


class Curve:
    """Rows of numbers, on disk as soon as they are added.

    Parameters
    ----------
    path
        The table, which can be followed while it grows; None for none.
    columns
        Their names; one is "step".
    tensorboard
        Folder of the event log; None for none. Every column but the step is a scalar there.
    rows
        What an interrupted training has added before.

    Raises
    ------
    UserError
        If an event log is wanted but the package tensorboard is not installed.
    """

    def __init__(
        self, path: str | Path | None, columns: Sequence[str], *, tensorboard: str | Path | None = None,
        rows: Iterable[Row] = (),
    ) -> None:  # fmt: skip
        self.columns = tuple(columns)
        self.rows: list[dict[str, Any]] = [dict(row) for row in rows]
        last = self.rows[-1]["step"] if self.rows else 0
        self._events = None if tensorboard is None else _event_log(Path(tensorboard), purge_from=last + 1)
        self._path = None if path is None else Path(path)
        if self._path is not None:
            write_text(as_tsv(self.rows, self.columns), self._path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, row: Row) -> None:
        """Append a row."""
        self.rows.append(dict(row))
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(_line(row, self.columns) + "\n")
        if self._events is not None:
            for name in self.columns:
                if name != "step" and row.get(name) is not None:
                    self._events.add_scalar(name, row[name], row["step"])
            self._events.flush()

    def tsv(self) -> str:
        """The whole table as text."""
        return as_tsv(self.rows, self.columns)

    def close(self) -> None:
        """End the event log."""
        if self._events is not None:
            self._events.close()


def _event_log(folder: Path, *, purge_from: int) -> Any:
    """A writer; events of steps from `purge_from` on, of a training that was interrupted, no longer count."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "a TensorBoard log was asked for, but the package tensorboard is not installed",
            fix="pip install tensorboard, or leave the log out",
        ) from error
    return SummaryWriter(str(folder), purge_step=purge_from)
