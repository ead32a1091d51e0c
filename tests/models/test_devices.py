"""Which GPU a process takes: claims of live and dead processes, hostile folders, what a scheduler shows.

There is no GPU in these tests: real processes claim among GPUs that are made up.
"""

# ruff: noqa: N802 (calls have the names of the driver's library)

import ctypes
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from cellformers.errors import UserError
from cellformers.models import devices
from cellformers.models.devices import Gpu, claim, claimed_by, nvml_free_memory, pick_device, visible_gpus

GPUS = [Gpu(i, f"uuid-{i}", "H200", 100) for i in range(3)]
FREE = {"uuid-0": 50, "uuid-1": 90, "uuid-2": 70}
HOLDER = """
import sys, time
from pathlib import Path
from cellformers.models.devices import Gpu, claim
gpus = [Gpu(i, f"uuid-{i}") for i in range(int(sys.argv[2]))]
found = claim(gpus, int(sys.argv[3]), {"uuid-0": 50, "uuid-1": 90, "uuid-2": 70}, folder=Path(sys.argv[1]))
print(*[gpu.number for gpu in found], flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def nothing_claimed(monkeypatch):
    monkeypatch.setattr(devices, "_claims", {})
    monkeypatch.setattr(devices, "_picked", [])


@pytest.fixture
def job(tmp_path):
    """Start another process that claims GPUs and lives on; it, and the numbers it has."""
    started = []

    def start(n=1, of=3):
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(tmp_path / "claims"), str(of), str(n)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        started.append(process)
        return process, [int(word) for word in process.stdout.readline().split()]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def indices(gpus):
    return [gpu.number for gpu in gpus]


def test_jobs_at_the_same_time_take_different_gpus_the_freest_first(tmp_path, job, caplog):
    first, taken = job()
    assert taken == [1]
    assert job()[1] == [2]
    assert indices(claim(GPUS, 1, FREE, folder=tmp_path / "claims")) == [0]
    assert caplog.text == ""
    assert claimed_by(GPUS[1], folder=tmp_path / "claims") == first.pid
    fourth, taken = job()
    assert taken == [1], "all are claimed: shared, and nobody waits"
    fourth.kill()
    assert "other jobs have claimed all of 3 GPUs: sharing GPU 1 with them" in fourth.communicate()[1]


def test_a_claim_ends_with_its_process_however_that_ends(tmp_path, job):
    first, taken = job()
    assert taken == [1]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert claimed_by(GPUS[1], folder=tmp_path / "claims") is None
    assert job()[1] == [1]


def test_several_gpus_are_claimed_and_shared_ones_are_still_different(tmp_path, job, caplog):
    assert job(2)[1] == [1, 2]
    assert indices(claim(GPUS, 2, FREE, folder=tmp_path / "claims")) == [0, 1]
    assert "sharing GPU 1" in caplog.text


def test_two_starting_together_never_take_the_same(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "claims"), "3", "1"]
    jobs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    try:
        assert sorted(int(job.stdout.readline()) for job in jobs) == [0, 1, 2]
    finally:
        for job in jobs:
            job.kill()
            job.communicate()


def test_a_look_at_a_claim_keeps_nobody_from_it(tmp_path):
    folder = tmp_path / "claims"
    assert claimed_by(GPUS[0], folder=folder) is None
    assert indices(claim(GPUS[:1], 1, {}, folder=folder)) == [0]
    assert claimed_by(GPUS[0], folder=folder) == os.getpid()
    assert indices(claim(GPUS[:1], 1, {}, folder=folder)) == [0], "our own claim stays"


def test_the_folder_is_the_users_alone(tmp_path):
    before = os.umask(0)
    try:
        claim(GPUS, 1, {}, folder=tmp_path / "claims")
    finally:
        os.umask(before)
    assert (tmp_path / "claims").stat().st_mode & 0o777 == 0o700
    (lock,) = (tmp_path / "claims").iterdir()
    assert lock.stat().st_mode & 0o777 == 0o600


def hostile_link(path):
    (path.parent / "theirs").mkdir()
    path.symlink_to(path.parent / "theirs")


def hostile_dangling(path):
    path.symlink_to(path.parent / "nowhere")


def open_to_all(path):
    path.mkdir()
    path.chmod(0o777)


@pytest.mark.parametrize(
    "trap", [hostile_link, hostile_dangling, open_to_all, lambda path: path.write_text("")]
)
def test_a_folder_that_is_a_trap_is_not_used(tmp_path, trap, caplog):
    path = tmp_path / "claims"
    trap(path)
    assert indices(claim(GPUS, 1, FREE, folder=path)) == [1], "the freest, unclaimed"
    assert "GPUs can't be claimed" in caplog.text
    assert claimed_by(GPUS[1], folder=path) is None
    assert [p.name for p in tmp_path.rglob("*") if p.name.endswith(".lock")] == []
    assert not (tmp_path / "nowhere").exists()


def test_a_link_in_place_of_a_lock_is_not_followed(tmp_path, caplog):
    folder = tmp_path / "claims"
    folder.mkdir(mode=0o700)
    (tmp_path / "precious").write_text("as it was")
    (folder / "uuid-1.lock").symlink_to(tmp_path / "precious")
    assert indices(claim(GPUS, 1, FREE, folder=folder)) == [1]
    assert "GPUs can't be claimed" in caplog.text
    assert (tmp_path / "precious").read_text() == "as it was"


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_temporary_folder_without_permission(tmp_path, caplog):
    tmp_path.chmod(0o500)
    assert indices(claim(GPUS, 1, FREE, folder=tmp_path / "claims")) == [1]
    assert "Permission denied" in caplog.text


def test_no_locks_at_all_is_no_reason_to_stop(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(devices.fcntl, "flock", refuse)
    assert indices(claim(GPUS, 2, FREE, folder=tmp_path / "claims")) == [1, 2]
    assert "No locks available" in caplog.text


# --- what is visible ----------------------------------------------------------------------------------------


class Properties:
    """As torch.cuda.get_device_properties."""

    name, total_memory = "H200", 100

    def __init__(self, uuid):
        self.uuid = uuid


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """GPUs of these UUIDs, in the order in which CUDA would show them; the devices that were set."""
    taken = []

    def put(*uuids):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(uuids))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(uuids))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties(uuids[index]))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (10 + index, 100))
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        monkeypatch.setattr(devices, "FOLDER", tmp_path / "claims")
        return taken

    return put


def test_one_gpu_in_sight_is_taken(pretend, monkeypatch, caplog):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    taken = pretend("abc")
    assert pick_device("cuda") == torch.device("cuda", 0)
    assert taken == [torch.device("cuda", 0)]
    assert caplog.text == ""


def test_the_same_device_is_given_each_time(pretend):
    pretend("a", "b")
    assert pick_device("cuda") == torch.device("cuda", 1)
    assert pick_device("cuda") == torch.device("cuda", 1)
    assert list(devices._claims) == ["b"]


@pytest.mark.parametrize("visible", ["1,3", "GPU-b,GPU-a", "1", "MIG-2/1/0", "MIG-b-c"])
def test_numbers_and_uuids_are_left_to_cuda(pretend, monkeypatch, visible):
    """Claims are known by UUID, so two jobs that number the same GPU differently meet."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    pretend("GPU-b", "a")
    assert [gpu.key for gpu in visible_gpus()] == ["b", "a"]
    assert pick_device("cuda").index == 1


def test_mig_devices_of_one_gpu_are_claimed_apart(pretend, monkeypatch):
    pretend("whole")  # what some drivers tell of each
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-11111111-2222-3333-4444-555555555555")
    first = visible_gpus()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-GPU-1/2/0")
    second = visible_gpus()
    assert first[0].key != second[0].key
    assert devices._file(second[0].key) == "MIG-GPU-1_2_0.lock"


def test_gpus_without_uuids_are_known_by_their_place():
    class Old:
        uuid, pci_domain_id, pci_bus_id, pci_device_id = "", 0, 23, 0

    assert devices._key(Old, 1) == "pci-00-17-00"
    assert devices._key(object(), 1) == "number-1"


@pytest.mark.parametrize("visible", ["", "-1"])
def test_no_gpu_in_sight_is_told(pretend, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    pretend()
    with pytest.raises(UserError, match=f"CUDA_VISIBLE_DEVICES is '{visible}': name a GPU that is there"):
        pick_device("cuda")


def test_accelerators():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="give cpu or cuda"):
        pick_device("cud")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA device"):
            pick_device("cuda")


def test_more_processes_than_gpus_are_refused(pretend):
    pretend("a", "b")
    with pytest.raises(UserError, match="4 processes on this machine, which has 2 visible GPUs"):
        devices.pick_gpus(4)


# --- memory -------------------------------------------------------------------------------------------------


class Nvml:
    """The driver's library, with its way of handing things back; a call named in `broken` fails."""

    uuids, free = (b"GPU-a", b"GPU-b"), (10, 90)

    def __init__(self, *broken):
        self.broken, self.open = broken, 0

    def __getattr__(self, name):
        def call(*arguments):
            return 999 if name in self.broken else getattr(self, "_" + name)(*arguments) or 0

        return call

    def _nvmlInit_v2(self):
        self.open += 1

    def _nvmlShutdown(self):
        self.open -= 1

    def _nvmlDeviceGetCount_v2(self, n):
        n._obj.value = len(self.uuids)

    def _nvmlDeviceGetHandleByIndex_v2(self, index, handle):
        handle._obj.value = index.value + 1

    def _nvmlDeviceGetUUID(self, handle, text, length):
        assert length.value == ctypes.sizeof(text)
        text.value = self.uuids[handle.value - 1]

    def _nvmlDeviceGetMemoryInfo(self, handle, memory):
        memory._obj.total, memory._obj.free = 100, self.free[handle.value - 1]


def test_free_memory_is_asked_of_the_driver():
    library = Nvml()
    assert nvml_free_memory(library) == {"a": 10, "b": 90}
    assert library.open == 0
    for broken in ("nvmlInit_v2", "nvmlDeviceGetCount_v2", "nvmlDeviceGetUUID", "nvmlDeviceGetMemoryInfo"):
        assert nvml_free_memory(Nvml(broken)) == {}


def test_where_the_driver_tells_nothing_cuda_is_asked(monkeypatch):
    def tell(index):
        if index == 0:
            raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")
        return (70, 100)

    monkeypatch.setattr(devices, "nvml_free_memory", dict)
    monkeypatch.setattr(torch.cuda, "mem_get_info", tell)
    assert devices.free_memory(GPUS[:2]) == {"uuid-0": 0, "uuid-1": 70}
    assert devices.free_memory(GPUS[:1]) == {}, "a single one is taken in any case"


def test_a_claim_being_looked_at_is_tried_again(tmp_path, monkeypatch):
    """`claimed_by` locks for an instant; a job that starts just then must not pass the GPU by."""
    answers = iter([BlockingIOError(), None])

    def flock(*_):
        if (answer := next(answers)) is not None:
            raise answer

    monkeypatch.setattr(devices.fcntl, "flock", flock)
    started = time.monotonic()
    assert indices(claim(GPUS, 1, FREE, folder=tmp_path / "claims")) == [1]
    assert time.monotonic() - started >= devices.SECONDS_BETWEEN_TRIES
