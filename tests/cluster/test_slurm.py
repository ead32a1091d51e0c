"""The workflow through a real Slurm and profiles/slurm: Slurm's own records say what ran where, asking for what.

    make test-cluster      about five minutes on two cores; needs root and apt for the first time

The long runs start at once, and one test after another looks at them: much of their time is waiting.
"""

import hashlib
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import slurm
from conftest import Run, Start

GPU_RULES = {"pretrain_model", "embed_cells", "embed_genes"}
ACTIVE = {"PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED"}
COLUMNS = ("results/atlas/qc/columns.json", "results/second/qc/columns.json")
FEATURES = "results/second/features.parquet"
TIMES = {
    "report.html",
    "provenance.json",
    "runtime.png",
    "runtime.svg",
}  # hold the time or the place of the run
Record = dict[str, str]


@pytest.fixture(scope="session")
def runs(start: Start) -> dict[str, Run]:
    """The demo through Slurm and here, and a part of it under faults, all at the same time."""
    faults = {"simulate": 900, "-o results/atlas": 900, "results/second/metadata.parquet": "grow"}
    return {
        "faults": start("faults", "--", *COLUMNS, faults=faults),
        "demo": start("demo"),
        "local": start("local", local=True),
    }


def until(found: Callable[[], object], run: Run, seconds: float = 300) -> object:
    """What a function returns once it returns something; fails if the run ends before."""
    deadline = time.monotonic() + seconds
    while not (result := found()):
        assert run.process.poll() is None, run.log()[-4000:]
        assert time.monotonic() < deadline, run.log()[-4000:]
        time.sleep(0.3)
    return result


def of_rule(run: Run, name: str) -> list[Record]:
    """Slurm's records of the jobs of a rule, the first submitted first."""
    return [job for job in slurm.jobs(run.folder) if slurm.rule(job) == name]


def misbehaving(run: Run, name: str, number: int = 0) -> Record:
    """The record of a job of a rule, once the fault of a number has come upon it."""
    until((run.folder / "bin" / f"happened-{number}").exists, run)
    return of_rule(run, name)[-1]


def interrupt(run: Run) -> None:
    """Ctrl-C again until Snakemake says that it heard one: one that comes while it submits a job is lost at times."""
    for _ in range(10):
        for _ in range(100):
            if run.process.poll() is not None or "Terminating processes" in run.log():
                return
            time.sleep(0.2)
        run.process.send_signal(signal.SIGINT)


def megabytes(job: Record) -> int:
    """The memory a job asked for."""
    number, unit = re.fullmatch(r"([\d.]+)([MGT])", job["MinMemoryNode"]).groups()
    return round(float(number) * 1024 ** "MGT".index(unit))


def minutes(job: Record) -> int:
    """The time a job asked for."""
    days, _, rest = job["TimeLimit"].rpartition("-")
    hours, minute, _ = map(int, rest.split(":"))
    return int(days or 0) * 24 * 60 + hours * 60 + minute


def digests(run: Run) -> dict[str, str]:
    """SHA-256 of every result but logs, and what tells the time."""
    results = run.folder / "results"
    paths = [path for path in results.rglob("*") if path.is_file() and path.name not in TIMES]
    paths = [path for path in paths if path.relative_to(results).parts[0] not in ("logs", "runtime")]
    return {str(path.relative_to(results)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def local_digests(runs: dict[str, Run]) -> dict[str, str]:
    assert runs["local"].ended() == 0, runs["local"].log()[-4000:]
    return digests(runs["local"])


def assert_same_as_local(run: Run, runs: dict[str, Run]) -> None:
    """Every file of a run has the bytes of the local one."""
    expected, found = local_digests(runs), digests(run)
    assert found
    assert {name for name in found if found[name] != expected.get(name)} == set()


def test_cancelled_job_is_submitted_again(runs: dict[str, Run]) -> None:
    run = runs["faults"]
    job = misbehaving(run, "simulate")
    slurm.run("scancel", job["JobId"])
    until(lambda: len(of_rule(run, "simulate")) > 1, run)
    first, second = of_rule(run, "simulate")
    assert first["JobState"] == "CANCELLED"
    assert (megabytes(second), minutes(second)) == (2 * megabytes(first), 2 * minutes(first))


def test_restarted_controller_is_survived(runs: dict[str, Run]) -> None:
    run = runs["demo"]
    until(lambda: [job for job in slurm.jobs(run.folder) if job["JobState"] == "RUNNING"], run)
    slurm.stop("slurmctld")
    slurm.start_controller()
    assert run.process.poll() is None  # how it ends, others tell


def test_job_over_its_time_is_given_more(runs: dict[str, Run]) -> None:
    run = runs["faults"]
    job = misbehaving(run, "ingest_atlas", 1)
    asked = minutes(job)
    # rather than wait for half an hour
    slurm.run("scontrol", "update", f"JobId={job['JobId']}", "TimeLimit=1")
    until(lambda: len(of_rule(run, "ingest_atlas")) > 1, run)
    first, second = of_rule(run, "ingest_atlas")
    assert first["JobState"] == "TIMEOUT"
    assert (megabytes(second), minutes(second)) == (2 * megabytes(first), 2 * asked)


def test_job_over_its_memory_is_given_more(runs: dict[str, Run]) -> None:
    run = runs["faults"]
    until(lambda: len([job for job in of_rule(run, "columns") if "second" in job["Comment"]]) > 1, run)
    first, second = [job for job in of_rule(run, "columns") if "second" in job["Comment"]]
    assert first["JobState"] == "FAILED"  # the step is killed, and the job reports it
    assert "memory" in slurm_log(run, first)
    assert (megabytes(second), minutes(second)) == (2 * megabytes(first), 2 * minutes(first))


def slurm_log(run: Run, job: Record) -> str:
    """What a failed job said; of those that succeed nothing is kept."""
    return Path(job["StdOut"].replace("%j", job["JobId"])).read_text(encoding="utf-8").lower()


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGKILL"])
def test_stopped_snakemake_leaves_no_job_and_goes_on(runs: dict[str, Run], start: Start, name: str) -> None:
    run = start(name, "--", FEATURES, faults={"simulate": 15 if name == "SIGTERM" else 900})
    misbehaving(run, "simulate")
    run.process.send_signal(getattr(signal, name))
    if name == "SIGINT":
        interrupt(run)
    assert run.ended() != 0
    if name == "SIGKILL":  # nobody is left to cancel its jobs: docs/clusters.md says how
        (job,) = slurm.jobs(run.folder)
        assert job["JobState"] == "RUNNING"
        slurm.run("scancel", "--name", job["JobName"])
        assert start(name, "--unlock").ended() == 0
    slurm.wait_for(
        lambda: not {j["JobState"] for j in slurm.jobs(run.folder)} & ACTIVE, "the end of its jobs"
    )
    (job,) = slurm.jobs(run.folder)
    # after SIGTERM Snakemake waits for the jobs that run, and submits no other
    assert job["JobState"] == ("COMPLETED" if name == "SIGTERM" else "CANCELLED")
    again = start(name, "--", FEATURES)
    assert again.ended() == 0, again.log()[-4000:]
    assert_same_as_local(again, runs)


def test_run_under_faults_ends_with_the_same_bytes(runs: dict[str, Run]) -> None:
    run = runs["faults"]
    assert run.ended() == 0, run.log()[-4000:]
    assert (
        int((run.folder / "bin" / "calls").read_text(encoding="utf-8")) > 8
    )  # squeue failed at the first ones
    states = Counter((slurm.rule(job), job["JobState"]) for job in slurm.jobs(run.folder))
    assert states == {
        ("simulate", "CANCELLED"): 1,
        ("simulate", "COMPLETED"): 1,
        ("ingest_atlas", "TIMEOUT"): 1,
        ("ingest_atlas", "COMPLETED"): 1,
        ("ingest_second", "COMPLETED"): 1,
        ("columns", "FAILED"): 1,
        ("columns", "COMPLETED"): 2,
    }
    assert_same_as_local(run, runs)


@pytest.fixture
def demo(runs: dict[str, Run]) -> Run:
    """The demo through Slurm, ended."""
    assert runs["demo"].ended() == 0, runs["demo"].log()[-4000:]
    return runs["demo"]


def test_every_job_ran_in_slurm(demo: Run) -> None:
    log = demo.log()
    planned = {name: int(number) for name, number in re.findall(r"^(\w+) +(\d+)$", log, flags=re.MULTILINE)}
    here = {"total", "all", *re.findall(r"^localrule (\w+):$", log, flags=re.MULTILINE)}
    submitted = Counter(slurm.rule(job) for job in slurm.jobs(demo.folder))
    assert submitted == {name: number for name, number in planned.items() if name not in here}
    assert len(submitted) > 18
    assert here == {"total", "all", "config"}
    assert {job["JobState"] for job in slurm.jobs(demo.folder)} == {"COMPLETED"}
    assert {job["Account"] for job in slurm.jobs(demo.folder)} == {"ci"}


def test_gpu_jobs_have_one_gpu_and_others_none(demo: Run) -> None:
    seen = set()
    for job in slurm.jobs(demo.folder):
        gpu = slurm.rule(job) in GPU_RULES
        given = [job.get(key, "(null)") for key in ("Partition", "NodeList", "TresPerJob", "JOB_GRES")]
        assert given == (
            ["gpu", "gpu1", "gres:gpu:1", "gpu:1"] if gpu else ["cpu", "cpu1", "(null)", "(null)"]
        )
        seen.add(slurm.rule(job))
    assert seen > GPU_RULES


def test_jobs_ask_for_what_the_rules_say(demo: Run) -> None:
    asked, log = {}, demo.log()
    for block in re.split(r"^rule ", log, flags=re.MULTILINE)[1:]:
        number = re.search(r"^    jobid: (\d+)$", block, flags=re.MULTILINE)
        resources = re.search(r"^    resources: (.*)$", block, flags=re.MULTILINE)
        values = dict(item.split("=", 1) for item in resources[1].split(", "))
        threads = re.search(r"^    threads: (\d+)$", block, flags=re.MULTILINE)
        asked[number[1]] = int(values["mem_mb"]), int(values["runtime"]), int(threads[1]) if threads else 1
    numbers = dict(
        re.findall(r"^Job (\d+) has been submitted with SLURM jobid (\d+)", log, flags=re.MULTILINE)
    )
    found = {
        job["JobId"]: (megabytes(job), minutes(job), int(job["NumCPUs"])) for job in slurm.jobs(demo.folder)
    }
    assert found == {numbers[number]: values for number, values in asked.items() if number in numbers}
    assert len(found) == len(numbers)


def test_demo_has_the_bytes_of_a_local_run(demo: Run, runs: dict[str, Run]) -> None:
    assert_same_as_local(demo, runs)
    assert set(digests(demo)) == set(local_digests(runs))
    assert (demo.folder / "results" / "report.html").is_file()
