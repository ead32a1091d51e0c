"""Tables and event logs of training."""

import sys

import pytest

from cellformers.errors import UserError
from cellformers.training.curves import Curve, as_tsv

COLUMNS = ("step", "train_loss", "heldout_loss")


def test_rows_are_there_as_soon_as_they_are_added(tmp_path):
    path = tmp_path / "loss.tsv"
    with Curve(path, COLUMNS) as curve:
        assert path.read_text() == "step\ttrain_loss\theldout_loss\n"
        curve.add({"step": 10, "train_loss": 1.23456789, "heldout_loss": None})
        assert path.read_text().splitlines()[1] == "10\t1.23457\t"
        curve.add({"step": 20, "train_loss": 1.0})
    assert path.read_text() == as_tsv(curve.rows, COLUMNS) == curve.tsv()


def test_an_interrupted_table_begins_with_what_was_there(tmp_path):
    path = tmp_path / "loss.tsv"
    path.write_text("what a killed training left\n")
    rows = [{"step": 10, "train_loss": 2.0, "heldout_loss": None}]
    with Curve(path, COLUMNS, rows=rows) as curve:
        curve.add({"step": 20, "train_loss": 1.0, "heldout_loss": 1.5})
    assert path.read_text().splitlines()[1:] == ["10\t2\t", "20\t1\t1.5"]


def test_the_event_log_holds_every_scalar(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Curve(None, COLUMNS, tensorboard=tmp_path / "log") as curve:
        curve.add({"step": 10, "train_loss": 2.0, "heldout_loss": None})
        curve.add({"step": 20, "train_loss": 1.0, "heldout_loss": 1.5})
    # a training that was killed after step 20 and goes on from a state of step 10
    with Curve(None, COLUMNS, tensorboard=tmp_path / "log", rows=curve.rows[:1]) as curve:
        curve.add({"step": 20, "train_loss": 1.25, "heldout_loss": 1.5})
    events = accumulator.EventAccumulator(str(tmp_path / "log")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("train_loss")] == [(10, 2.0), (20, 1.25)]
    assert [(e.step, e.value) for e in events.Scalars("heldout_loss")] == [(20, 1.5)]


def test_a_missing_tensorboard_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="tensorboard is not installed; pip install tensorboard"):
        Curve(None, COLUMNS, tensorboard=tmp_path / "log")
    assert not (tmp_path / "log").exists()
