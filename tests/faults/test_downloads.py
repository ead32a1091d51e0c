"""What a network may do to a download besides what `tests/io/test_download.py` has: answers that lie or never end."""

import gzip
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub

from cellformers.errors import UserError
from cellformers.io.download import LONGEST_WAIT, Fetched, Patience, fetch

CONTENT = os.urandom(1_000_003)
SHA = hashlib.sha256(CONTENT).hexdigest()


class Slept(list[float]):
    """Pauses that were asked for; none is made."""

    @property
    def patience(self) -> Patience:
        """Three attempts."""
        return Patience(attempts=3, timeout=5.0, sleep=self.append)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Hub() as made:
        made.files["/a.bin"] = CONTENT
        yield made


def script(*answers: bytes) -> tuple[str, list[bytes], threading.Thread]:
    """A server that gives these answers, byte by byte as they are, one a connection; its address, what it was asked."""
    server = socket.create_server(("127.0.0.1", 0))
    asked: list[bytes] = []

    def serve() -> None:
        with server:
            for answer in answers:
                connection, _ = server.accept()
                with connection:
                    asked.append(connection.recv(1 << 16))
                    connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    return f"http://127.0.0.1:{server.getsockname()[1]}", asked, thread


@pytest.mark.parametrize(
    ("asked", "wait"),
    [
        ("9" * 400, LONGEST_WAIT),
        ("Fri, 31 Dec 9999 23:59:59 GMT", LONGEST_WAIT),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("-5", 1.0),
        ("1e3", 1.0),
        ("\u00b2", 1.0),  # a digit to Python, no number
        ("Mon, 01 Jan 2024 00:00:00 +99999999999999999999", 1.0),
        ("Mon, 99 Jan 99999 00:00:00 GMT", 1.0),
        ("Mon, 01 Jan 2024 00:00:00", 1.0),  # of no time zone
        ("", 1.0),
    ],
)
def test_absurd_waiting_times(tmp_path: Path, hub: Hub, asked: str, wait: float) -> None:
    slept = Slept()
    hub.failures, hub.failure_headers = [429], {"Retry_After": asked}
    assert fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", patience=slept.patience) == Fetched(
        len(CONTENT), SHA
    )
    assert slept == [wait]


def test_the_clock_jumps_while_it_waits(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    slept = Slept()
    hub.failures, hub.failure_headers = [503, 429], {"Retry_After": "3"}
    jumps = iter(range(1, 10_000))
    for name in ("time", "monotonic"):
        real = getattr(time, name)
        monkeypatch.setattr(time, name, lambda real=real: real() + 86_400.0 * (-1) ** next(jumps) * 365)
    assert fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", patience=slept.patience).sha256 == SHA
    assert slept == [3.0, 3.0]


# --- redirections ------------------------------------------------------------------------------------------


def redirect(to: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nLocation: {to}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".encode()


@pytest.mark.parametrize("scheme", ["file:///etc/hostname", "ftp://127.0.0.1/a.bin", "gopher://127.0.0.1/"])
def test_a_redirection_leads_to_servers_only(tmp_path: Path, hub: Hub, scheme: str) -> None:
    url, _, _ = script(redirect(scheme))
    with pytest.raises(UserError, match=r"a\.bin: can't be fetched"):
        fetch(f"{url}/a.bin", tmp_path / "a.bin", patience=Slept().patience)
    assert os.listdir(tmp_path) == []


def test_redirections_in_a_circle(tmp_path: Path, hub: Hub) -> None:
    url, asked, _ = script(*[redirect("/a.bin")] * 60)
    with pytest.raises(UserError, match=r"can't be fetched \(Exceeded 30 redirects"):
        fetch(f"{url}/a.bin", tmp_path / "a.bin", patience=Slept().patience)
    assert len(asked) == 31
    assert os.listdir(tmp_path) == []


# --- answers that lie ------------------------------------------------------------------------------------------


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "Connection: close", "", ""]).encode("latin-1") + body


def chunked(*pieces: bytes, end: bool) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(p), p) for p in pieces) + (b"0\r\n\r\n" if end else b"")


def test_a_body_in_chunks_is_cut(tmp_path: Path, hub: Hub) -> None:
    slept = Slept()
    cut = answer(chunked(b"abc", end=False), "Transfer-Encoding: chunked")
    whole = answer(chunked(b"abc", b"def", end=True), "Transfer-Encoding: chunked")
    url, asked, _ = script(cut, whole)
    fetch(f"{url}/a.bin", tmp_path / "a.bin", patience=slept.patience)
    assert (tmp_path / "a.bin").read_bytes() == b"abcdef"
    assert (len(asked), slept) == (2, [1.0])


def test_a_chunk_of_no_length(tmp_path: Path, hub: Hub) -> None:
    broken = answer(b"what\r\nabc\r\n", "Transfer-Encoding: chunked")
    url, _, _ = script(broken, broken, broken)
    with pytest.raises(UserError, match=r"a\.bin: connection failed \(.*3 times in a row"):
        fetch(f"{url}/a.bin", tmp_path / "a.bin", patience=Slept().patience)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("body", [gzip.compress(b"abc", mtime=0), b"no gzip"])
def test_a_content_encoding_is_not_undone(tmp_path: Path, hub: Hub, body: bytes) -> None:
    """Some servers say gzip of any file that ends in .gz; the file is what was asked for, and its digest counts."""
    url, asked, _ = script(answer(body, "Content-Encoding: gzip", f"Content-Length: {len(body)}"))
    fetch(
        f"{url}/a.gz", tmp_path / "a.gz", sha256=hashlib.sha256(body).hexdigest(), patience=Slept().patience
    )
    assert (tmp_path / "a.gz").read_bytes() == body
    assert b"Accept-Encoding: identity" in asked[0]


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Range: bytes 0-2/" + "9" * 5000,), ("Content-Range: bytes \u00b2-2/3",),
        ("Content-Range: items 0-2/3",), ("Content-Range: bytes 7-9/10",), (),
    ],
)  # fmt: skip
def test_a_part_that_nobody_asked_for(tmp_path: Path, hub: Hub, headers: tuple[str, ...]) -> None:
    part = answer(b"abc", *headers, "Content-Length: 3", status="206 Partial Content")
    url, _, _ = script(part, part, part)
    with pytest.raises(UserError, match=r"a\.bin: "):
        fetch(f"{url}/a.bin", tmp_path / "a.bin", patience=Slept().patience)
    assert os.listdir(tmp_path) == []


def test_a_range_that_can_never_be_given(tmp_path: Path, hub: Hub) -> None:
    refuse = answer(b"", "Content-Range: bytes */3", "Content-Length: 0", status="416 Range Not Satisfiable")
    url, _, _ = script(refuse, refuse, refuse)
    with pytest.raises(UserError, match="3 times in a row"):
        fetch(f"{url}/a.bin", tmp_path / "a.bin", patience=Slept().patience)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "garbage", [b"", b"\x00" * 100, b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n"]
)
def test_no_answer_of_a_web_server(tmp_path: Path, hub: Hub, garbage: bytes) -> None:
    url, _, _ = script(garbage, garbage, garbage)
    with pytest.raises(UserError, match=r"a\.bin: "):
        fetch(f"{url}/a.bin", tmp_path / "a.bin", sha256=SHA, patience=Slept().patience)
    assert not (tmp_path / "a.bin").exists()


# --- proxies -----------------------------------------------------------------------------------------------------


def test_a_proxy_that_is_gone(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
    with pytest.raises(UserError, match=r"a\.bin: connection failed \(.*3 times in a row"):
        fetch("http://cells.invalid/a.bin", tmp_path / "a.bin", patience=Slept().patience)
    assert os.listdir(tmp_path) == []


def test_a_proxy_that_dies_in_the_middle(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """What came stays, and the next call needs only the rest."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", hub.url)
    hub.files["http://cells.invalid/a.bin"] = CONTENT
    hub.cut_after, hub.cuts = 600_000, 1
    slept = Slept()
    fetch("http://cells.invalid/a.bin", tmp_path / "a.bin", sha256=SHA, patience=slept.patience)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert hub.asked[-1].headers["Range"].startswith("bytes=")
    assert slept == [1.0]


# --- the disk ------------------------------------------------------------------------------------------------------


def test_the_last_rename_fails(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """All came, and there is no room for the name: the next call fetches nothing."""
    real, failed = os.replace, []

    def once(*paths: Any) -> None:
        if not failed:
            failed.append(paths)
            raise OSError(28, "No space left on device")
        real(*paths)

    monkeypatch.setattr(os, "replace", once)
    with pytest.raises(UserError, match="make room and call again; what has come is kept"):
        fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", sha256=SHA)
    assert not (tmp_path / "a.bin").exists()
    fetch(f"{hub.url}/a.bin", tmp_path / "a.bin", sha256=SHA)
    assert hub.sent() == len(CONTENT)
    assert os.listdir(tmp_path) == ["a.bin"]
