"""500 of the cases of benchmarks/fuzz.py, over all targets, and hypothesis on the structure of files."""

import random
from pathlib import Path

import hostile_cases
import hostile_examples
import pytest
from hostile_cases import Case, Runner, Target, Verdict, damage, load_targets, prepare, short, some_cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES, AT_ONCE = 500, 25
SCRATCH_CHECKS = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> Runner:
    return Runner(tmp_path_factory.mktemp("fuzz"))


def test_no_damaged_file_does_harm(runner):
    cases = sorted(some_cases(load_targets().values(), CASES, seed=1), key=lambda case: case.target)
    verdicts = [v for lo in range(0, CASES, AT_ONCE) for v in runner.run(cases[lo : lo + AT_ONCE])]
    bad = [short(verdict) for verdict in verdicts if verdict.verdict == "bad"]
    assert not bad, "\n".join(["again: python benchmarks/fuzz.py --case ...", *bad])
    assert len(verdicts) == CASES
    # the cases are worth something: some are read, many are refused
    assert sum(verdict.verdict == "equal" for verdict in verdicts) > CASES // 20
    assert sum(verdict.verdict == "refused" for verdict in verdicts) > CASES // 5


@pytest.mark.parametrize("name", ["h5ad-csr", "loom", "10x-h5", "model", "token-store", "split", "config"])
def test_no_odd_structure_does_harm(runner, name):
    """What a file is made of is drawn by hypothesis, choice by choice, so that a bad one is made as plain as it can."""

    @settings(
        max_examples=12, deadline=None, database=None, derandomize=True, suppress_health_check=SCRATCH_CHECKS
    )
    @given(drawn=st.randoms(use_true_random=False))
    def check(drawn):
        verdicts = runner.run([Case(name, "structure", 0)], drawn)
        assert not [short(verdict) for verdict in verdicts if verdict.verdict == "bad"]

    check()


@given(data=st.binary(max_size=200), seed=st.integers(0, 2**32))
@settings(max_examples=200, deadline=None, database=None)
def test_damage_is_reproduced_by_its_seed(data, seed):
    assert damage(data, random.Random(seed)) == damage(data, random.Random(seed))


def test_cases_are_spread_over_targets_and_named():
    targets = list(load_targets().values())
    cases = list(some_cases(targets, 3 * len(targets), seed=4))
    assert {case.target for case in cases} == set(load_targets())
    assert len(set(map(str, cases))) == len(cases)
    assert {case.kind for case in cases} == {"bytes", "structure"}


def _judged(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Verdict:
    """The verdict on a reader of `hostile_examples` whose file is damaged; its files are kept."""
    target = Target(name, hostile_examples.make, getattr(hostile_examples, name))
    monkeypatch.setitem(hostile_cases.TARGETS, name, target)
    runner = Runner(tmp_path / name, keep=tmp_path / f"{name}-kept")
    (tmp_path / name).mkdir()
    case = next(case for case in some_cases([target], 50) if _changes(case, tmp_path))
    (verdict,) = runner.run([case])
    return verdict


def test_a_bad_case_is_found_and_its_files_kept(tmp_path, monkeypatch):
    """The judge sees what it must: a wrong result, another exception, a file outside, a program started."""
    for name in ("wrong", "raises", "writes", "starts", "dies"):
        verdict = _judged(name, tmp_path, monkeypatch)
        assert verdict.verdict == "bad", name
        kept = tmp_path / f"{name}-kept" / str(verdict.case).replace(":", "-")
        assert (kept / "WHY").is_file()


def test_a_reader_that_hangs_is_bad(tmp_path, monkeypatch):
    monkeypatch.setattr(hostile_cases, "PATIENCE", 0.5)
    verdict = _judged("hangs", tmp_path, monkeypatch)
    assert verdict.verdict == "bad"
    assert "hang" in verdict.text


@pytest.mark.parametrize("name", ["takes", "takes_and_says_so"])
def test_a_reader_that_takes_too_much_memory_is_bad(tmp_path, monkeypatch, name):
    """Also where it catches that, and blames the file."""
    monkeypatch.setattr(hostile_cases, "MEMORY_MB", 200)
    verdict = _judged(name, tmp_path, monkeypatch)
    assert verdict.verdict == "bad"
    assert "MemoryError" in verdict.text or "took more than" in verdict.text


def _changes(case: Case, tmp_path: Path) -> bool:
    made = tmp_path / f"{case.target}-{case.seed}-made"
    made.mkdir()
    hostile_examples.make(made)
    folder = tmp_path / f"{case.target}-{case.seed}"
    prepare(case, made, folder)
    return (folder / "a.bin").read_bytes() != (made / "a.bin").read_bytes()
