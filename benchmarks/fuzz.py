"""Damaged and odd files for every reader: what they make of them, counted.

    python benchmarks/fuzz.py                              # 10,000 cases over all targets, 2 processes at a time
    python benchmarks/fuzz.py --targets h5ad-csr loom --cases 2000 --seed 1
    python benchmarks/fuzz.py --case loom:bytes:17 --keep /tmp/case       # one again; its files are kept

A line a target: cases, those read equal to the truth, those refused in one line, those with another sound result
(a flipped byte of a number, which no format without checksums can tell), and bad ones, which must be none: crashes,
hangs over 10 s, over 2 GB, other exceptions, files outside the folder, programs started, wrong results. What is
judged how: tests/hostile/hostile_cases.py.
"""

import sys

sys.path.pop(0)  # this folder: tokenize.py in it is not the standard library's

import argparse
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path[:0] = [str(TESTS / "hostile"), str(TESTS)]

from hostile_cases import Case, Runner, Verdict, load_targets, short, some_cases  # noqa: E402

AT_ONCE = 25
VERDICTS = ("equal", "refused", "sound", "bad")


def run_all(cases: list[Case], *, processes: int, keep: Path | None, root: Path) -> list[Verdict]:
    """All cases, some in one process each, `processes` at a time."""
    runner = Runner(root, keep=keep)
    for name in {case.target for case in cases}:
        runner.truth(name)
    ordered = sorted(cases, key=lambda case: case.target)  # stable: those of one target together
    batches = [ordered[lo : lo + AT_ONCE] for lo in range(0, len(ordered), AT_ONCE)]
    verdicts: list[Verdict] = []
    started = time.monotonic()
    with ThreadPoolExecutor(processes) as pool:
        for number, found in enumerate(pool.map(runner.run, batches), start=1):
            verdicts += found
            for verdict in found:
                if verdict.verdict == "bad":
                    print(f"BAD {short(verdict)}", flush=True)
            if number % 40 == 0:
                seconds = time.monotonic() - started
                print(
                    f"{len(verdicts):,} of {len(cases):,} cases, {seconds:.0f} s", file=sys.stderr, flush=True
                )
    return verdicts


def print_table(verdicts: list[Verdict]) -> None:
    """A line a target, and their sum."""
    rows = Counter((verdict.case.target, verdict.verdict) for verdict in verdicts)
    names = sorted({name for name, _ in rows})
    print(f"{'target':<28}{'cases':>8}" + "".join(f"{verdict:>9}" for verdict in VERDICTS))
    for name in [*names, "all"]:
        found = [
            sum(n for (t, v), n in rows.items() if v == verdict and name in (t, "all"))
            for verdict in VERDICTS
        ]
        print(f"{name:<28}{sum(found):>8,}" + "".join(f"{n:>9,}" for n in found))


def main() -> int:
    """Run the cases; 1 where one is bad."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", help="only these (default: all)")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--keep", type=Path, help="folder for the files of bad cases", default=Path("fuzz-failures")
    )
    parser.add_argument("--case", help="run this one, target:kind:seed")
    given = parser.parse_args()
    targets = load_targets()
    unknown = set(given.targets or ()) - set(targets)
    if unknown:
        parser.error(
            f"no such targets: {', '.join(sorted(unknown))}; there are: {', '.join(sorted(targets))}"
        )
    chosen = [targets[name] for name in given.targets or targets]
    cases = list(some_cases(chosen, given.cases, seed=given.seed))
    if given.case:
        name, kind, seed = given.case.split(":")
        cases = [Case(name, kind, int(seed))]
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        verdicts = run_all(cases, processes=given.processes, keep=given.keep, root=Path(root))
    if given.case:
        print(f"{verdicts[0].verdict}: {verdicts[0].text}")
    print_table(verdicts)
    print(f"{time.monotonic() - started:.0f} s, seed {given.seed}")
    return int(any(verdict.verdict == "bad" for verdict in verdicts))


if __name__ == "__main__":
    sys.exit(main())
