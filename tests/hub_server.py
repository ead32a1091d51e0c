"""A small web server on 127.0.0.1 that serves files like a Hub does, and misbehaves when it is told to.

with Hub() as hub:
    hub.files["/a.bin"] = b"..."
    hub.cut_after = 1000            # the next answers break off after so many bytes
"""

import hashlib
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote


@dataclass
class Asked:
    """A request as it came: path, host it was sent to, headers; bytes of the body that went out so far."""

    path: str
    host: str
    headers: dict[str, str]
    sent: int = 0


class Hub:
    """Files by path of their URL, and switches for what goes wrong."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.asked: list[Asked] = []
        self.failures: list[int] = []  # status of the next answers
        self.failure_headers: dict[str, str] = {}
        self.cut_after: int | None = None  # bytes of a body after which the connection breaks
        self.cuts = 10**9  # how many times
        self.ignore_range = False
        self.ignore_condition = False  # If-Range
        self.with_etag = True
        self.with_length = True
        self.token: str | None = None
        self.redirect = False  # files are at http://localhost/elsewhere/...
        self.delay = 0.0  # seconds between pieces of `piece` bytes
        self.piece = 1 << 16
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.server.daemon_threads = True

    def __enter__(self) -> Self:
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.shutdown()
        self.server.server_close()

    @property
    def url(self) -> str:
        """Where the server is."""
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def sent(self, path: str = "") -> int:
        """Bytes of bodies that went out for a file (its path ends so)."""
        return sum(asked.sent for asked in self.asked if asked.path.endswith(path))

    def times(self, path: str = "") -> int:
        """How often a file was asked for."""
        return sum(asked.path.endswith(path) for asked in self.asked)

    def publish(self, repository: str, commit: str, folder: str, files: dict[str, bytes]) -> None:
        """Put files where a Hub has them, of one commit; the branch `main` then stands at it."""
        for name, content in files.items():
            path = f"{folder}/{name}" if folder else name
            self.files[f"/{repository}/resolve/{commit}/{path}"] = content
        self.files[f"/api/models/{repository}/revision/main"] = f'{{"sha": "{commit}"}}'.encode()


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Keep stderr clean."""

        def do_GET(self) -> None:
            path = unquote(self.path)
            host = self.headers.get("Host", "").rpartition(":")[0]
            self.asked = Asked(path, host, dict(self.headers))
            hub.asked.append(self.asked)
            try:
                self.answer(path)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def refuse(self, status: int, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": "0", **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()

        def answer(self, path: str) -> None:
            if hub.failures:
                return self.refuse(hub.failures.pop(0), **hub.failure_headers)
            elsewhere = path.startswith("/elsewhere/")
            if hub.token and not elsewhere and self.headers.get("Authorization") != f"Bearer {hub.token}":
                return self.refuse(401)
            if hub.redirect and not elsewhere and not path.startswith("/api/"):
                port = hub.server.server_address[1]
                return self.refuse(302, Location=f"http://localhost:{port}/elsewhere{self.path}")
            content = hub.files.get(path.removeprefix("/elsewhere"))
            return self.refuse(404) if content is None else self.give(content)

        def give(self, content: bytes) -> None:
            tag = f'"{hashlib.md5(content).hexdigest()}"'
            start = 0
            wanted = self.headers.get("Range", "")
            same = hub.ignore_condition or self.headers.get("If-Range") in (None, tag)
            if wanted and same and not hub.ignore_range:
                start = int(wanted.removeprefix("bytes=").removesuffix("-"))
                if start >= len(content):
                    return self.refuse(416, Content_Range=f"bytes */{len(content)}")
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            else:
                self.send_response(200)
            if hub.with_etag:
                self.send_header("ETag", tag)
            if hub.with_length:
                self.send_header("Content-Length", str(len(content) - start))
            self.end_headers()
            return self.body(content[start:])

        def body(self, rest: bytes) -> None:
            end = len(rest)
            if hub.cut_after is not None and hub.cuts > 0:
                hub.cuts -= 1
                end = min(end, hub.cut_after)
            for start in range(0, end, hub.piece):
                piece = rest[start : min(start + hub.piece, end)]
                self.asked.sent += len(piece)
                self.wfile.write(piece)
                self.wfile.flush()
                if hub.delay:
                    time.sleep(hub.delay)

    return Handler
