"""Fetching files: resumed, verified, patient, and never half there."""

import fcntl
import hashlib
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hub_server import Hub

from cellformers.errors import UserError
from cellformers.io.download import LONGEST_WAIT, Fetched, Patience, fetch, read_url
from cellformers.io.locks import exclusive

SIZE = 1_000_003
CONTENT = np.random.default_rng(0).bytes(SIZE)
SHA = hashlib.sha256(CONTENT).hexdigest()


class Clock(NamedTuple):
    """Patience that does not sleep, and what it was asked to."""

    patience: Patience
    slept: list[float]
    told: list[str]


@pytest.fixture
def clock() -> Clock:
    slept: list[float] = []
    told: list[str] = []
    return Clock(Patience(sleep=slept.append, notice=told.append, attempts=4, timeout=10.0), slept, told)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Hub() as running:
        running.files["/a.bin"] = CONTENT
        yield running


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def leave(folder: Path, hub: Hub, n_bytes: int) -> Path:
    """A folder in which fetching /a.bin broke off after about so many bytes."""
    hub.cut_after, hub.cuts = n_bytes, 1
    with pytest.raises(UserError, match="connection failed"):
        fetch(f"{hub.url}/a.bin", folder / "a.bin", patience=Patience(attempts=1))
    hub.cut_after = None
    hub.asked.clear()
    assert not (folder / "a.bin").exists()
    assert hidden(folder) == [".download-a.bin", ".origin-a.bin"]
    return folder / ".download-a.bin"


def test_a_file_comes_whole(tmp_path: Path, hub: Hub, clock: Clock) -> None:
    done: list[int] = []
    target = tmp_path / "deep" / "folder" / "a.bin"
    found = fetch(f"{hub.url}/a.bin", target, size=SIZE, sha256=SHA, progress=done.append)
    assert found == Fetched(SIZE, SHA)
    assert target.read_bytes() == CONTENT
    assert sum(done) == SIZE
    assert os.listdir(target.parent) == ["a.bin"]


def test_a_file_that_is_there_is_left_alone(tmp_path: Path, hub: Hub) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(CONTENT)
    assert fetch(f"{hub.url}/a.bin", target, size=SIZE, sha256=SHA) == Fetched(SIZE, SHA)
    assert fetch(f"{hub.url}/a.bin", target).sha256 == SHA
    assert hub.asked == []


@pytest.mark.parametrize("damage", ["shorter", "changed"])
def test_a_wrong_file_that_is_there_is_replaced(tmp_path: Path, hub: Hub, damage: str) -> None:
    target = tmp_path / "a.bin"
    target.write_bytes(CONTENT[:-1] if damage == "shorter" else b"x" + CONTENT[1:])
    fetch(f"{hub.url}/a.bin", target, size=SIZE, sha256=SHA)
    assert target.read_bytes() == CONTENT


# --- interrupted ----------------------------------------------------------------------------------------


def test_an_interrupted_download_goes_on(tmp_path: Path, hub: Hub) -> None:
    partial = leave(tmp_path, hub, 600_000)
    have = partial.stat().st_size
    assert 500_000 < have <= 600_000
    done: list[int] = []
    assert fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", progress=done.append) == Fetched(SIZE, SHA)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert hub.sent() == SIZE - have
    assert done[0] == have
    assert sum(done) == SIZE
    assert hidden(tmp_path) == []


def test_a_connection_that_breaks_again_and_again(tmp_path: Path, hub: Hub, clock: Clock) -> None:
    """Attempts count from the last byte gained, and nothing is sent twice but what was on its way."""
    hub.cut_after = 200_000
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", sha256=SHA, patience=clock.patience)
    assert hub.times() > clock.patience.attempts
    assert clock.slept == [1.0] * (hub.times() - 1)
    assert hub.sent() < SIZE + hub.times() * 70_000
    assert "connection failed" in clock.told[0]


def test_a_server_that_knows_no_ranges(tmp_path: Path, hub: Hub, clock: Clock) -> None:
    leave(tmp_path, hub, 600_000)
    hub.ignore_range = True
    done: list[int] = []
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", sha256=SHA, progress=done.append, patience=clock.patience)
    assert (hub.times(), hub.sent(), sum(done)) == (1, SIZE, SIZE)
    (tmp_path / "a.bin").unlink()
    hub.cut_after, hub.cuts = 200_000, 99  # such a server that also breaks off gains nothing: it is given up
    with pytest.raises(UserError, match="4 times in a row; try again later"):
        fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", sha256=SHA, patience=clock.patience)


def test_a_file_that_changed_meanwhile_starts_over(tmp_path: Path, hub: Hub) -> None:
    leave(tmp_path, hub, 600_000)
    hub.files["/a.bin"] = other = CONTENT[::-1]
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == other
    assert hub.sent() == SIZE


def test_a_server_that_ignores_the_condition(tmp_path: Path, hub: Hub, clock: Clock) -> None:
    """The tag of the answer is compared too, so two versions are never joined."""
    leave(tmp_path, hub, 600_000)
    hub.files["/a.bin"] = other = CONTENT[::-1]
    hub.ignore_condition = True
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", patience=clock.patience)
    assert (tmp_path / "a.bin").read_bytes() == other


def test_without_tag_or_digest_nothing_is_resumed(tmp_path: Path, hub: Hub) -> None:
    hub.with_etag = False
    leave(tmp_path, hub, 600_000)
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin")
    assert hub.sent() == SIZE


def test_without_tag_but_with_digest_it_is(tmp_path: Path, hub: Hub) -> None:
    hub.with_etag = False
    have = leave(tmp_path, hub, 600_000).stat().st_size
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", sha256=SHA)
    assert hub.sent() == SIZE - have


def test_another_address_starts_over(tmp_path: Path, hub: Hub) -> None:
    leave(tmp_path, hub, 600_000)
    hub.files["/b.bin"] = CONTENT
    fetch(f"{hub.url}/b.bin", tmp_path / "a.bin", sha256=SHA)
    assert hub.sent() == SIZE


@pytest.mark.parametrize("size", [SIZE, None])
def test_everything_had_come_already(tmp_path: Path, hub: Hub, size: int | None) -> None:
    """Killed between the last byte and the new name: nothing is sent again."""
    partial = leave(tmp_path, hub, 600_000)
    partial.write_bytes(CONTENT)
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", size=size, sha256=SHA)
    assert hub.sent() == 0
    assert hub.times() == (0 if size else 1)
    assert hidden(tmp_path) == []


def test_more_than_there_is_starts_over(tmp_path: Path, hub: Hub, clock: Clock) -> None:
    partial = leave(tmp_path, hub, 600_000)
    partial.write_bytes(CONTENT + b"more")
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", patience=clock.patience)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


SCRIPT = """
import sys
from cellformers.io.download import fetch
fetch(sys.argv[1], sys.argv[2], sha256=sys.argv[3] or None)
print("done")
"""


def start(hub: Hub, target: Path, *, sha256: str = SHA, limit: int | None = None) -> subprocess.Popen[str]:
    def before() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, f"{hub.url}/a.bin", str(target), sha256],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=before,
    )  # fmt: skip


def wait_for(path: Path, n_bytes: int, process: subprocess.Popen[str]) -> None:
    for _ in range(3000):
        if path.exists() and path.stat().st_size >= n_bytes:
            return
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    raise AssertionError("nothing came")


def test_killed_in_the_middle(tmp_path: Path, hub: Hub) -> None:
    hub.delay = 0.1
    process = start(hub, tmp_path / "a.bin")
    partial = tmp_path / ".download-a.bin"
    wait_for(partial, 200_000, process)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=20)
    hub.delay = 0.0
    have = partial.stat().st_size
    assert 200_000 <= have < SIZE
    assert not (tmp_path / "a.bin").exists()
    hub.asked.clear()
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [asked.sent for asked in hub.asked if asked.headers.get("Range") == f"bytes={have}-"] == [
        SIZE - have
    ]
    assert hidden(tmp_path) == []


# --- not the expected file ------------------------------------------------------------------------------


def test_a_wrong_digest(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(UserError) as caught:
        fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", size=SIZE, sha256="0" * 64, changed="ask Ann")
    message = str(caught.value)
    assert message == f"{hub.url}/a.bin: has sha256 {SHA}, expected is {'0' * 64}; ask Ann"
    assert os.listdir(tmp_path) == []


def test_a_wrong_size_is_seen_before_anything_is_fetched(tmp_path: Path, hub: Hub) -> None:
    with pytest.raises(UserError, match=r"is 1,000,003 bytes on the server, expected are 5"):
        fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", size=5)
    assert os.listdir(tmp_path) == []


def test_a_wrong_size_of_an_answer_without_length(tmp_path: Path, hub: Hub) -> None:
    hub.with_length = False
    assert fetch(f"{hub.url}/a.bin", tmp_path / "b.bin") == Fetched(SIZE, SHA)
    with pytest.raises(UserError, match=r"is 1,000,003 bytes, expected are 5"):
        fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", size=5)
    assert os.listdir(tmp_path) == ["b.bin"]


# --- servers that fail ----------------------------------------------------------------------------------


def test_server_errors_pass(tmp_path: Path, hub: Hub, clock: Clock) -> None:
    hub.failures = [500, 503, 502]
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", sha256=SHA, patience=clock.patience)
    assert clock.slept == [1.0, 2.0, 4.0]
    assert "HTTP 500; trying again in 1 s" in clock.told[0]


def test_server_errors_that_stay(tmp_path: Path, hub: Hub, clock: Clock) -> None:
    hub.failures = [503] * 10
    with pytest.raises(UserError, match=r"a\.bin: the server answers HTTP 503, 4 times in a row; try again"):
        fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", patience=clock.patience)
    assert clock.slept == [1.0, 2.0, 4.0]
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [("7", 7, 7), ("100000", LONGEST_WAIT, LONGEST_WAIT), ("in 40 s, as a date", 20, 40),
     ("soon", 1, 1)],
)  # fmt: skip
def test_a_server_that_asks_for_time(
    tmp_path: Path, hub: Hub, clock: Clock, asked: str, least: float, most: float
) -> None:
    header = formatdate(time.time() + 40, usegmt=True) if "date" in asked else asked
    hub.failures, hub.failure_headers = [429], {"Retry_After": header}
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", patience=clock.patience)
    assert len(clock.slept) == 1
    assert least <= clock.slept[0] <= most


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "refuses (HTTP 401); log in"), (403, "refuses (HTTP 403); log in"),
     (404, "no such file on the server (HTTP 404)"), (410, "no such file"), (418, "answers HTTP 418")],
)  # fmt: skip
def test_answers_that_are_final(tmp_path: Path, hub: Hub, clock: Clock, status: int, words: str) -> None:
    hub.failures = [status]
    with pytest.raises(UserError) as caught:
        fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", denied="log in", patience=clock.patience)
    assert f"{hub.url}/a.bin: " in str(caught.value)
    assert words in str(caught.value)
    assert (hub.times(), clock.slept, os.listdir(tmp_path)) == (1, [], [])


def test_nobody_there(tmp_path: Path, hub: Hub, clock: Clock) -> None:
    hub.server.server_close()
    with pytest.raises(
        UserError, match=r"a\.bin: connection failed \([^()]*refused\), 4 times in a row"
    ) as caught:
        fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", patience=clock.patience)
    assert "HTTP" not in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_a_server_that_falls_silent(tmp_path: Path, hub: Hub) -> None:
    hub.delay, hub.piece = 0.6, 500_000
    patience = Patience(attempts=9, timeout=0.2, sleep=lambda _: setattr(hub, "delay", 0.0))
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", sha256=SHA, patience=patience)
    assert "Range" not in hub.asked[0].headers
    assert hub.asked[-1].headers["Range"].startswith("bytes=")


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/a.bin", "a.bin", "http://"])
def test_addresses_that_are_none(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match=r"can't be fetched .*; check the address"):
        fetch(url, tmp_path / "a.bin")
    assert os.listdir(tmp_path) == []


def test_small_documents(hub: Hub, clock: Clock) -> None:
    hub.failures = [500]
    assert read_url(f"{hub.url}/a.bin", patience=clock.patience) == CONTENT
    with pytest.raises(UserError, match="no such file"):
        read_url(f"{hub.url}/none")


# --- credentials ----------------------------------------------------------------------------------------


def test_credentials_stay_with_their_host(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login ann password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    hub.token, hub.redirect = "hf_right", True
    with pytest.raises(UserError, match="HTTP 401"):
        fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", headers={"Authorization": "Bearer hf_wrong"})
    hub.asked.clear()
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", sha256=SHA, headers={"Authorization": "Bearer hf_right"})
    assert [(asked.host, asked.headers.get("Authorization")) for asked in hub.asked] == [
        ("127.0.0.1", "Bearer hf_right"),
        ("localhost", None),
    ]
    assert all("hf_right" not in str(asked.headers) for asked in hub.asked if asked.host == "localhost")


def test_resuming_behind_a_redirection(tmp_path: Path, hub: Hub) -> None:
    hub.redirect = True
    have = leave(tmp_path, hub, 600_000).stat().st_size
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin")
    assert hub.sent() == SIZE - have


def test_a_proxy_of_the_environment(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", hub.url)
    hub.files["http://cells.invalid/a.bin"] = CONTENT
    assert fetch("http://cells.invalid/a.bin", tmp_path / "a.bin").sha256 == SHA


# --- room -----------------------------------------------------------------------------------------------


def test_no_room_is_seen_early(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    little = shutil.disk_usage(tmp_path)._replace(free=SIZE - 1)
    monkeypatch.setattr("shutil.disk_usage", lambda _: little)
    with pytest.raises(UserError, match="no room: 1,000,003 bytes are needed, 1,000,002 are free; make room"):
        fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", sha256=SHA)
    assert os.listdir(tmp_path) == []


def test_the_disk_fills_up(tmp_path: Path, hub: Hub) -> None:
    """What has come is kept, and the next call needs only the rest."""
    process = start(hub, tmp_path / "a.bin", limit=300_000)
    out, err = process.communicate(timeout=30)
    last = err.strip().splitlines()[-1]
    assert (process.returncode, out) == (1, "")
    assert last.endswith(f"UserError: {tmp_path / 'a.bin'}: can't be written (File too large); "
                         "make room and call again; what has come is kept")  # fmt: skip
    assert (tmp_path / ".download-a.bin").stat().st_size == 300_000
    assert not (tmp_path / "a.bin").exists()
    hub.asked.clear()
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", sha256=SHA)
    assert hub.sent() == SIZE - 300_000


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_of_somebody_else(tmp_path: Path, hub: Hub) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="can't write here"):
        fetch(f"{hub.url}/a.bin", tmp_path / "a.bin")


def test_a_file_where_a_folder_should_be(tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose a folder of your own"):
        fetch(f"{hub.url}/a.bin", tmp_path / "file" / "a.bin")


# --- several processes ----------------------------------------------------------------------------------


def test_two_processes_at_once(tmp_path: Path, hub: Hub) -> None:
    hub.delay = 0.02
    processes = [start(hub, tmp_path / "a.bin") for _ in range(3)]
    for process in processes:
        assert process.communicate(timeout=60)[0] == "done\n"
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert hub.sent() == SIZE
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_one_that_waits_takes_over(tmp_path: Path, hub: Hub) -> None:
    hub.delay = 0.2
    first = start(hub, tmp_path / "a.bin")
    wait_for(tmp_path / ".download-a.bin", 100_000, first)
    told: list[str] = []
    waiting = threading.Thread(
        target=fetch, args=(f"{hub.url}/a.bin", tmp_path / "a.bin"),
        kwargs={"sha256": SHA, "patience": Patience(notice=told.append)},
    )  # fmt: skip
    waiting.start()
    for _ in range(1000):
        if told:
            break
        time.sleep(0.01)
    first.kill()
    hub.delay = 0.0
    first.communicate(timeout=20)
    waiting.join(timeout=30)
    assert told == [f"{tmp_path / 'a.bin'}: another process fetches it, waiting"]
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert hub.asked[-1].headers["Range"].startswith("bytes=")
    assert os.listdir(tmp_path) == ["a.bin"]


def test_locks_are_one_at_a_time(tmp_path: Path) -> None:
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(20):
            with exclusive(tmp_path / "lock") as held:
                assert held
                inside += 1
                most = max(most, inside)
                time.sleep(0.0005)
                inside -= 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks(
    tmp_path: Path, hub: Hub, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: Any) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    hub.cut_after, hub.cuts = 600_000, 1
    with pytest.raises(UserError, match="connection failed"):
        fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", sha256=SHA, patience=Patience(attempts=1))
    assert os.listdir(tmp_path) == []
    hub.cuts = 1
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", sha256=SHA, patience=clock.patience)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert os.listdir(tmp_path) == ["a.bin"]
