"""Files fetched by URL: verified, resumed where the connection broke, whole or absent under their name.

    fetch("https://example.org/cells.h5ad", "cells.h5ad", size=1_234, sha256="ab12...")

Bytes go to a hidden file beside the target, with a name that stays the same, so that the next call goes on where the
last one was interrupted, if the file on the server is still the same. It takes its name when size and digest fit. One
process at a time fetches a target; others wait for it. Proxies are taken from the environment; a redirection to
another host never sees the credentials of the first.

With CELLFORMERS_MIRROR set, https://host/path?query is fetched from $CELLFORMERS_MIRROR/host/path?query instead: a copy
of the public servers within an institute, where a plain server of files is enough. It never sees credentials.
"""

import email.utils
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from cellformers import __version__
from cellformers.errors import DISK_FULL, UserError
from cellformers.io.files import digest_file
from cellformers.io.locks import exclusive

if TYPE_CHECKING:
    from requests import PreparedRequest, Response

PIECE = 1 << 16
CONNECT_TIMEOUT = 20.0
LONGEST_WAIT = 120.0
LONGEST_DOCUMENT = 16 << 20
MIRROR = "CELLFORMERS_MIRROR"
CREDENTIALS = frozenset({"authorization", "cookie", "proxy-authorization"})
# Answers of a server that may be another one in a moment.
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})


def _ignore(_: Any) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long to put up with a bad connection, and whom to tell."""

    attempts: int = 5
    """Failures in a row, without a byte gained, before giving up; the pauses double from 1 s."""
    timeout: float = 60.0
    """Seconds without a byte that count as a failure."""
    sleep: Callable[[float], None] = time.sleep
    notice: Callable[[str], None] = _ignore
    """Told, in a line, what is waited for."""


@dataclass(frozen=True)
class Fetched:
    """What a file turned out to be: bytes, and sha256 as 64 hexadecimal digits."""

    size: int
    sha256: str


class NoSuchFileError(UserError):
    """The server is there, the file is not."""


class _PassingError(Exception):
    """A failure that may pass; `wait` is the pause in seconds the server asked for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


# --- a mirror -------------------------------------------------------------------------------------------


def mirrored(url: str) -> str:
    """Where a file is fetched from: the address under CELLFORMERS_MIRROR, or `url` where that is not set.

    UserError where the variable holds no http(s) address.
    """
    mirror = os.environ.get(MIRROR, "").strip().rstrip("/")
    if not mirror:
        return url
    if not _is_server(mirror):
        raise UserError(
            f"{MIRROR} is {mirror!r}, no address of a server", fix="set it to https://host/folder"
        )
    there = urlsplit(url)
    host = there.netloc.rpartition("@")[2]  # a name and a password before the host are credentials too
    return f"{mirror}/{host}{there.path}" + (f"?{there.query}" if there.query else "")


def _is_server(address: str) -> bool:
    try:
        base = urlsplit(address)
        host = base.hostname if base.port != 0 else None
    except ValueError:  # brackets without a partner, a port that is no number
        return False
    plain = not (base.username or base.query or re.search(r"\s", address))
    return plain and base.scheme in ("http", "https") and bool(host)


def _through_mirror(url: str, headers: Mapping[str, str], denied: str) -> tuple[str, dict[str, str], str]:
    """Address, headers and advice as they are, or those for the mirror: without credentials."""
    where = mirrored(url)
    if where == url:
        return url, dict(headers), denied
    kept = {name: value for name, value in headers.items() if name.lower() not in CREDENTIALS}
    return where, kept, f"the mirror that {MIRROR} names has to give files without credentials"


# --- one request ----------------------------------------------------------------------------------------


def _as_given(request: "PreparedRequest") -> "PreparedRequest":
    """Keep the caller's credentials: without it a ~/.netrc would replace them."""
    return request


@contextmanager
def _get(url: str, headers: Mapping[str, str], patience: Patience, denied: str) -> Iterator["Response"]:
    """The answer to a GET, body not yet read; failures as `_PassingError` or UserError."""
    import requests
    from requests.exceptions import ChunkedEncodingError, ConnectionError, Timeout
    from urllib3.exceptions import HTTPError

    # identity: ranges, sizes and digests are those of the file, not of a compressed form of it
    sent = {"User-Agent": f"cellformers/{__version__}", "Accept-Encoding": "identity", **headers}
    times = (CONNECT_TIMEOUT, patience.timeout)
    try:
        with (
            requests.Session() as session,
            session.get(url, headers=sent, stream=True, timeout=times, auth=_as_given) as response,
        ):
            _check_status(response, url, denied)
            yield response
    except (Timeout, ConnectionError, ChunkedEncodingError, HTTPError) as error:
        raise _PassingError(_reason(error)) from error
    except requests.RequestException as error:
        raise UserError(f"can't be fetched ({error})", path=url, fix="check the address") from error


def _reason(error: BaseException) -> str:
    """What is at the bottom of an error that libraries wrapped several times."""
    inner: Any = error
    for _ in range(8):
        deeper = getattr(inner, "reason", None) or next(iter(getattr(inner, "args", ())), None)
        if not isinstance(deeper, BaseException):
            break
        inner = deeper
    text = re.sub(r"^<?HTTPS?Connection(Pool)?\b.*?[)>]: ", "", " ".join(str(inner).split()))
    return f"connection failed ({text[:160] or type(inner).__name__})"


def _check_status(response: "Response", url: str, denied: str) -> None:
    code = response.status_code
    if code in (200, 206, 416):
        return
    if code in PASSING:
        raise _PassingError(f"the server answers HTTP {code}", _retry_after(response))
    if code in (401, 403):
        raise UserError(f"the server refuses (HTTP {code})", path=url, fix=denied)
    if code in (404, 410):
        raise NoSuchFileError(
            f"no such file on the server (HTTP {code})", path=url, fix="check name and version"
        )
    raise UserError(f"the server answers HTTP {code}", path=url, fix="try again later")


def _pieces(response: "Response", *, decode: bool) -> Iterator[bytes]:
    raw: Any = response.raw
    yield from raw.stream(PIECE, decode_content=decode)


def _retry_after(response: "Response") -> float | None:
    """Seconds until the server wants to be asked again: a number or a date."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        then = email.utils.parsedate_to_datetime(text)
    except (TypeError, ValueError, OverflowError):
        return None
    return max(0.0, (then - datetime.now(UTC)).total_seconds()) if then.tzinfo else None


def _persist(attempt: Callable[[], None], url: str, patience: Patience, reached: Callable[[], int]) -> None:
    """Call `attempt` until it succeeds; pauses double with every failure that gained no byte."""
    best, failures = reached(), 0
    while True:
        try:
            return attempt()
        except _PassingError as error:
            here = reached()
            failures = 1 if here > best else failures + 1
            best = max(best, here)
            if failures >= patience.attempts:
                raise UserError(
                    f"{error}, {failures} times in a row",
                    path=url,
                    fix="try again later; what has come is kept",
                ) from error
            wait = min(LONGEST_WAIT, 2.0 ** (failures - 1) if error.wait is None else error.wait)
            patience.notice(f"{url.rpartition('/')[2]}: {error}; trying again in {wait:.0f} s")
        patience.sleep(wait)


def read_url(
    url: str, *, headers: Mapping[str, str] | None = None, denied: str = "", patience: Patience | None = None
) -> bytes:
    """A small document, up to 16 MiB; retries and errors as `fetch`."""
    patience = patience or Patience()
    url, headers, denied = _through_mirror(url, headers or {}, denied)
    content = bytearray()

    def attempt() -> None:
        content.clear()
        with _get(url, headers, patience, denied) as response:
            for piece in _pieces(response, decode=True):
                content.extend(piece)
                if len(content) > LONGEST_DOCUMENT:
                    raise UserError("is larger than a document of this kind", path=url)

    _persist(attempt, url, patience, lambda: 0)
    return bytes(content)


# --- a file ---------------------------------------------------------------------------------------------


def fetch(
    url: str,
    target: str | Path,
    *,
    size: int | None = None,
    sha256: str | None = None,
    headers: Mapping[str, str] | None = None,
    denied: str = "does it need a login, or a licence to be accepted?",
    changed: str = "ask the publisher which one is right",
    progress: Callable[[int], None] = _ignore,
    patience: Patience | None = None,
) -> Fetched:
    """Fetch a file, or find that it is there already.

    Parameters
    ----------
    target
        Where the file goes. One that is there and fits `size` and `sha256` is left as it is.
    size, sha256
        Bytes and digest (64 hexadecimal digits) it must have; None: not known.
    headers
        Sent to the host of `url`; credentials neither to others nor to a mirror.
    denied, changed
        What to advise where the server refuses, and where the file is not the expected one.
    progress
        Called with bytes as they come, and with those that an earlier call left; negative if these are of no use.

    Raises
    ------
    UserError
        If the server has no such file, refuses, or fails again and again; if the file is not the expected one (it is
        removed); if there is no room (what has come is kept).
    """
    target, patience = Path(target), patience or Patience()
    url, headers, denied = _through_mirror(url, headers or {}, denied)
    try:
        with exclusive(
            target.with_name(f".lock-{target.name}"),
            lambda: patience.notice(f"{target}: another process fetches it, waiting"),
        ) as held:
            there = _examine(target, size, sha256)
            if there is not None:
                progress(there.size)
                return there
            return _download(
                url, target, size=size, sha256=sha256, headers=headers, denied=denied, changed=changed,
                progress=progress, patience=patience, held=held,
            )  # fmt: skip
    except OSError as error:
        full = error.errno in DISK_FULL
        raise UserError(
            f"can't be written ({os.strerror(error.errno) if error.errno else error})",
            path=target,
            fix="make room and call again; what has come is kept" if full else "choose a folder of your own",
        ) from error


def _examine(path: Path, size: int | None, sha256: str | None) -> Fetched | None:
    """What a file that is there is, if it is the expected one."""
    if not path.is_file() or (size is not None and path.stat().st_size != size):
        return None
    found = Fetched(path.stat().st_size, digest_file(path).removeprefix("sha256:"))
    return found if sha256 in (None, found.sha256) else None


def _download(
    url: str, target: Path, *, size: int | None, sha256: str | None, headers: Mapping[str, str], denied: str,
    changed: str, progress: Callable[[int], None], patience: Patience, held: bool,
) -> Fetched:  # fmt: skip
    own = (
        "" if held else f"{os.getpid()}-"
    )  # without locks each process fetches for itself, and resumes nothing
    partial, origin = (target.with_name(f"{start}{own}{target.name}") for start in (".download-", ".origin-"))
    handle = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:

        def length() -> int:
            return os.fstat(handle).st_size

        if length() and not _resumable(origin, url, sha256, length(), size):
            os.ftruncate(handle, 0)
        progress(length())

        def attempt() -> None:
            if size is not None and length() == size:
                return
            _receive(
                url, handle, origin, size=size, headers=headers, denied=denied, changed=changed,
                progress=progress, patience=patience,
            )  # fmt: skip

        _persist(attempt, url, patience, length)
        os.fsync(handle)
        found = Fetched(length(), digest_file(partial).removeprefix("sha256:"))
        if size not in (None, found.size) or sha256 not in (None, found.sha256):
            os.ftruncate(handle, 0)
            what = (
                f"has sha256 {found.sha256}, expected is {sha256}"
                if sha256
                else f"is {found.size:,} bytes, expected are {size:,}"
            )
            raise UserError(what, path=url, fix=changed)
        os.replace(partial, target)
        return found
    finally:
        if not held or not os.fstat(handle).st_size or not partial.exists():
            partial.unlink(missing_ok=True)
            origin.unlink(missing_ok=True)
        os.close(handle)


def _resumable(origin: Path, url: str, sha256: str | None, have: int, size: int | None) -> bool:
    """Whether bytes that an earlier call left may be the beginning of the file."""
    known = _read_origin(origin)
    if size is not None and have > size:
        return False
    return known.get("url") == url and bool(known.get("validator") or sha256)


def _read_origin(origin: Path) -> dict[str, Any]:
    try:
        known = json.loads(origin.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _validator(response: "Response") -> str | None:
    """What tells one version of the file from another: its strong entity tag, else its date."""
    tag = response.headers.get("ETag", "")
    return (tag if tag.startswith('"') else None) or response.headers.get("Last-Modified")


def _receive(
    url: str, handle: int, origin: Path, *, size: int | None, headers: Mapping[str, str], denied: str, changed: str,
    progress: Callable[[int], None], patience: Patience,
) -> None:  # fmt: skip
    """One request: append what comes to `handle`; return when the file is complete."""
    have = os.fstat(handle).st_size
    known = _read_origin(origin).get("validator")
    sent = dict(headers)
    if have:
        sent["Range"] = f"bytes={have}-"
        if known:
            sent["If-Range"] = known
    with _get(url, sent, patience, denied) as response:
        if response.status_code == 206 and not have:
            raise _PassingError("the server gives a part where the whole was asked for")
        found = _validator(response)
        start, total = _place(response)
        other = start == have > 0 and known and found and known != found
        if other or start not in (0, have):
            if response.status_code == 416 and total == have and found in (None, known):
                return
            os.ftruncate(handle, 0)
            progress(-have)
            raise _PassingError("the file is another one than before", 0.0)
        if size is not None and total not in (None, size):
            os.ftruncate(handle, 0)
            raise UserError(f"is {total:,} bytes on the server, expected are {size:,}", path=url, fix=changed)
        if start != have:
            os.ftruncate(handle, 0)
            progress(-have)
        if start == 0:
            origin.write_text(json.dumps({"url": url, "validator": found}), encoding="utf-8")
        _check_room(origin.parent, None if total is None else total - start)
        for piece in _pieces(response, decode=False):
            _write(handle, piece)
            progress(len(piece))
    if os.fstat(handle).st_size < (total or size or 0):
        raise _PassingError("connection failed (the answer ended early)")


def _place(response: "Response") -> tuple[int, int | None]:
    """Where the body of an answer begins in the file, and the size of the whole file where it is told."""
    if response.status_code == 200:
        return 0, _bytes(response.headers.get("Content-Length", ""))
    unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
    span, _, whole = rest.partition("/")
    start = _bytes(span.partition("-")[0]) if unit == "bytes" else None
    return -1 if start is None else start, _bytes(whole)


def _bytes(text: str) -> int | None:
    """A number of bytes as a header has it; None where it is none, or none of this world."""
    return int(text) if re.fullmatch("[0-9]{1,18}", text) else None


def _check_room(folder: Path, needed: int | None) -> None:
    free = shutil.disk_usage(folder).free
    if needed is not None and needed > free:
        raise UserError(
            f"no room: {needed:,} bytes are needed, {free:,} are free",
            path=folder,
            fix="make room, or choose another folder",
        )


def _write(handle: int, piece: bytes) -> None:
    rest = memoryview(piece)
    while rest:
        rest = rest[os.write(handle, rest) :]
