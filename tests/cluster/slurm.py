"""A Slurm of our own on this machine, for tests: nodes cpu1 and gpu1 (with two fake GPUs), loopback only.

    python tests/cluster/slurm.py up      install Debian's packages where needed, start; again after a killed test too
    python tests/cluster/slurm.py down    cancel its jobs, stop its daemons, remove what it linked in /etc/slurm

Needs root, and apt for the first time; the packages stay installed. Everything else lies in FOLDER. There is no
accounting: `jobs()` reads what slurmctld remembers of jobs, which is all of them for an hour.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path("/tmp/cellformers-slurm")  # short: the path of a Unix socket has at most 107 characters
NAME = "cellformers-test"
NODES = ("cpu1", "gpu1")
PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
FILES = ("slurm.conf", "gres.conf")
SYSTEM = Path("/etc/slurm")
POLICY = Path("/usr/sbin/policy-rc.d")

# A GPU has to be a device file. Nodes claim more CPUs and memory than there are (config_overrides): jobs ask for what
# real data need, and those of the tests need little.
CONF = """\
ClusterName={name}
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/run/munge.sock
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/run/slurmctld.pid
SlurmdPidFile={folder}/run/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
MailProg=/bin/true
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
MinJobAge=3600
KillWait=3
ReturnToService=2
GresTypes=gpu
NodeName=cpu1 NodeHostname=cpu1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=8 RealMemory=64000
NodeName=gpu1 NodeHostname=gpu1 NodeAddr=127.0.0.1 Port={ports[2]} CPUs=8 RealMemory=64000 Gres=gpu:2
PartitionName=cpu Nodes=cpu1 MaxTime=1440 State=UP
PartitionName=gpu Nodes=gpu1 MaxTime=1440 State=UP
"""
GRES = "AutoDetect=off\nNodeName=gpu1 Name=gpu File={folder}/dev/nvidia[0-1]\n"


class SlurmError(Exception):
    """No Slurm could be brought up here; says why."""


def run(*words: str, timeout: float = 60) -> str:
    """Output of a command; SlurmError with the last line of what it said, if it fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise SlurmError(f"{words[0]}: {error}") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        raise SlurmError(f"{' '.join(words[:3])}: {said[-1]}")
    return done.stdout


def answers(*words: str) -> str | None:
    """Output of a command, None if it fails."""
    try:
        return run(*words, timeout=20)
    except SlurmError:
        return None


def wait_for(happened: Callable[[], bool], what: str, seconds: float = 30) -> None:
    """Wait until something is so, or raise SlurmError."""
    deadline = time.monotonic() + seconds
    while not happened():
        if time.monotonic() > deadline:
            raise SlurmError(f"{what} did not come about in {seconds:.0f} s, see {FOLDER}/log")
        time.sleep(0.1)


@contextmanager
def _no_services() -> Iterator[None]:
    """Keeps Debian's packages from starting daemons of their own."""
    ours = not POLICY.exists()
    if ours:
        POLICY.write_text("#!/bin/sh\nexit 101\n", encoding="utf-8")
        POLICY.chmod(0o755)
    try:
        yield
    finally:
        if ours:
            POLICY.unlink()


def install() -> None:
    """Install Debian's packages unless they are there; SlurmError says what is in the way."""
    if os.geteuid() != 0:
        raise SlurmError("bringing up a Slurm needs root")
    if all(shutil.which(name) for name in PROGRAMS):
        return
    if not shutil.which("apt-get"):
        raise SlurmError("Slurm is not installed, and there is no apt-get to install it with")
    os.environ["DEBIAN_FRONTEND"] = "noninteractive"
    install = ("apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES)
    with _no_services():
        try:
            run(*install, timeout=300)
        except SlurmError:  # the lists of packages may be old, or absent as in most images
            run("apt-get", "update", "-qq", timeout=300)
            run(*install, timeout=300)


def _free_ports(number: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(number)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _configure() -> None:
    """Write the configuration, and link it where Slurm looks: the plugin's job steps drop the variable SLURM_CONF."""
    for name in ("etc", "run", "log", "state", "dev", *(f"spool-{node}" for node in NODES)):
        (FOLDER / name).mkdir(parents=True, mode=0o755)
    for gpu in (0, 1):
        (FOLDER / "dev" / f"nvidia{gpu}").symlink_to("/dev/null")
    host = socket.gethostname().partition(".")[0]
    conf = CONF.format(name=NAME, host=host, folder=FOLDER, ports=_free_ports(3))
    for name, text in zip(FILES, (conf, GRES.format(folder=FOLDER)), strict=True):
        ours, link = FOLDER / "etc" / name, SYSTEM / name
        ours.write_text(text, encoding="utf-8")
        if link.exists() or (link.is_symlink() and link.readlink() != ours):
            raise SlurmError(f"{link} is there: this machine has a Slurm of its own")
        SYSTEM.mkdir(exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(ours)


def start_controller() -> None:
    """Start slurmctld, which goes on from the state it saved."""
    run("slurmctld", "-i", "-f", str(FOLDER / "etc" / "slurm.conf"))
    wait_for(lambda: "is UP" in (answers("scontrol", "ping") or ""), "an answer of slurmctld")


def start_node(node: str) -> None:
    """Start the slurmd of a node, and wait until jobs can run there."""
    run("slurmd", "-N", node, "-f", str(FOLDER / "etc" / "slurm.conf"))
    wait_for(lambda: node_state(node) in ("idle", "mixed", "allocated"), f"the node {node}")


def node_state(node: str) -> str:
    """As sinfo calls it: idle, mixed, allocated, down..."""
    return (answers("sinfo", "-h", "-n", node, "-o", "%T") or "").strip()


def up() -> None:
    """Bring it up; whatever an earlier one left is taken down first. SlurmError, and nothing up, if it can't be."""
    install()
    down()
    shutil.rmtree(FOLDER, ignore_errors=True)
    os.environ.pop("SLURM_CONF", None)
    try:
        _configure()
        _start_munge()
        start_controller()
        for node in NODES:
            start_node(node)
    except SlurmError:
        down()
        raise


def _start_munge() -> None:
    """Start munged, which vouches for who sends what, with a key of its own."""
    key = FOLDER / "etc" / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    places = {
        "key-file": key,
        "socket": FOLDER / "run" / "munge.sock",
        "pid-file": FOLDER / "run" / "munged.pid",
    }
    places |= {"log-file": FOLDER / "log" / "munged.log", "seed-file": FOLDER / "run" / "munge.seed"}
    run("munged", *(f"--{option}={path}" for option, path in places.items()))


def _alive(pid: int) -> bool:
    """Whether a process runs; one that only waits for its parent to take note does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def stop(daemon: str) -> None:
    """Stop a daemon by its pid file: munged, slurmctld, slurmd-cpu1, slurmd-gpu1. Only if it is indeed ours."""
    path = FOLDER / "run" / f"{daemon}.pid"
    try:
        pid = int(path.read_text(encoding="utf-8"))
        command = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except (OSError, ValueError):
        return
    if str(FOLDER) not in command:
        return  # the number is somebody else's by now
    for number, seconds in ((signal.SIGTERM, 8), (signal.SIGKILL, 8)):
        if _alive(pid):
            os.kill(pid, number)
        deadline = time.monotonic() + seconds
        while _alive(pid) and time.monotonic() < deadline:
            time.sleep(0.1)
    path.unlink(missing_ok=True)


def _stop_processes_of_jobs() -> None:
    """Kill what jobs of this Slurm still run: a slurmd whose slurmctld is gone lets them run on."""
    mark = f"SLURM_CLUSTER_NAME={NAME}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                os.kill(int(folder.name), signal.SIGKILL)
        except OSError:
            continue  # it ended meanwhile


def down() -> None:
    """Take it down. Nodes first: a slurmd whose slurmctld is gone does not end by itself."""
    ours = [SYSTEM / name for name in FILES if (SYSTEM / name).is_symlink()]
    ours = [link for link in ours if link.readlink() == FOLDER / "etc" / link.name]
    if ours and "is UP" in (answers("scontrol", "ping") or ""):
        answers("scancel", "--user=root")
        deadline = time.monotonic() + 20
        while answers("squeue", "-h") and time.monotonic() < deadline:
            time.sleep(0.2)
    for daemon in (*(f"slurmd-{node}" for node in NODES), "slurmctld", "munged"):
        stop(daemon)
    _stop_processes_of_jobs()
    for link in ours:
        link.unlink()


def jobs(folder: Path | None = None) -> list[dict[str, str]]:
    """What slurmctld remembers of all jobs, or of those submitted from a folder, by number: Slurm's own names."""
    text = run("scontrol", "show", "job", "--details", "--oneliner")
    lines = [line for line in text.splitlines() if line.startswith("JobId=")]
    records = [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]
    records.sort(key=lambda record: int(record["JobId"]))
    return [record for record in records if folder is None or record["WorkDir"] == str(folder)]


def rule(record: dict[str, str]) -> str:
    """The rule whose job a Slurm job was: the plugin keeps it in the comment, before the wildcards."""
    return record["Comment"].removeprefix("rule_").partition("_wildcards_")[0]


if __name__ == "__main__":
    try:
        {"up": up, "down": down}[sys.argv[1]]()
    except (IndexError, KeyError):
        sys.exit(__doc__)
    except SlurmError as error:
        sys.exit(f"slurm: {error}")
