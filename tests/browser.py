"""A headless Chromium for tests of pages, driven over its debugging pipe.

The browser does what it is told, one command after the other, and every command has to be answered within a time: no
virtual clock that a busy machine can bring to a standstill, no port, no session bus. A browser that answers nothing is
stopped with all its processes and started again with an empty profile, a few times; what a page does wrong is
reported at once and never tried again.
"""

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest

PATIENCE = 30.0  # seconds for one answer of a browser; a busy machine takes ten to start one
ATTEMPTS = 4
ARGUMENTS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--no-default-browser-check", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-default-apps", "--disable-extensions", "--disable-breakpad",
    "--disable-features=DialMediaRouteProvider,MediaRouter,OptimizationHints,Translate",
    "--password-store=basic", "--use-mock-keychain", "--remote-debugging-pipe", "about:blank",
)  # fmt: skip
# A browser reads commands from descriptor 3 and answers on 4, whatever these are in the process that starts it.
LAUNCH = """
import os, sys
for number, end in zip((3, 4), sys.argv[1:3]):
    os.dup2(int(end), number)
os.execvp(sys.argv[3], sys.argv[3:])
"""
Result = TypeVar("Result")


def patience(attempt: int) -> float:
    """Seconds to wait for an answer in an attempt (0 is the first): each has longer than the one before."""
    return PATIENCE * (1 + attempt)


class SilentError(Exception):
    """The browser gave no answer: not a finding about the page."""


def find() -> str:
    """The program; skips the test where there is none."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        if path:
            return path
    pytest.skip("no chromium here")


class Page:
    """A tab: commands go out and are answered in order, events in between are kept."""

    def __init__(self, commands: int, answers: int, patience: float) -> None:
        self._out, self._in = commands, answers
        self._patience = patience
        self._rest, self._number = b"", 0
        self._session: str | None = None
        self.events: list[dict[str, Any]] = []

    def _message(self, until: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(until - time.monotonic(), 0))
            part = os.read(self._in, 1 << 20) if ready else b""
            if not part:
                raise SilentError("has ended" if ready else f"no answer within {self._patience:.0f} s")
            self._rest += part
        whole, self._rest = self._rest.split(b"\0", 1)
        return dict(json.loads(whole))

    def send(self, command: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": command, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        try:
            os.write(self._out, json.dumps(message).encode() + b"\0")
        except BrokenPipeError:
            raise SilentError("has ended") from None
        until = time.monotonic() + self._patience
        while True:
            answer = self._message(until)
            if answer.get("id") == self._number:
                assert "error" not in answer, (command, answer["error"])
                return dict(answer["result"])
            self.events.append(answer)

    def wait_for(self, event: str) -> None:
        """Wait until an event has come."""
        until = time.monotonic() + self._patience
        while not any(e.get("method") == event for e in self.events):
            self.events.append(self._message(until))

    def start(self) -> None:
        """Open the tab and listen to it."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.send(f"{domain}.enable")

    def run(self, expression: str) -> Any:
        """The value of an expression (or of the promise it is) in the page; an exception of it fails the test."""
        answer = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def open(self, url: str, *, width: int = 1300, scripts: bool = True, dark: bool = False) -> None:
        """Show a page on a screen of that many pixels and wait until it is there."""
        self.events.clear()
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )  # fmt: skip
        self.send("Emulation.setScriptExecutionDisabled", value=not scripts)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        # another place of the page that is shown already loads nothing, which the missing loader tells
        if "loaderId" in self.send("Page.navigate", url=url):
            self.wait_for("Page.loadEventFired")

    def settle(self) -> None:
        """Wait for two frames: what the page does after it has been laid out is done."""
        self.run(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done))).then(() => 0)"
        )

    def complaints(self) -> list[str]:
        """What the console holds: exceptions, messages of the page, refusals of the browser."""
        self.run("0")  # events come in order: all that happened before have arrived
        found = []
        for event in self.events:
            about = event.get("params", {})
            if event.get("method") == "Runtime.exceptionThrown":
                found.append(str(about["exceptionDetails"].get("exception", about["exceptionDetails"])))
            elif event.get("method") == "Runtime.consoleAPICalled":
                found.append(str([argument.get("value") for argument in about["args"]]))
            elif event.get("method") == "Log.entryAdded":
                found.append(about["entry"]["text"])
        return found

    def picture(self, path: Path) -> None:
        """Write what the whole page looks like as PNG."""
        answer = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def _started(program: str, seconds: float) -> Iterator[Page]:
    """A browser with an empty profile; all its processes end with the block."""
    profile = tempfile.mkdtemp(prefix="profile-")
    # above the two numbers that the browser expects, so that neither takes the other's place
    ours, theirs = zip(*(os.pipe()[:: 1 - 2 * k] for k in (1, 0)), strict=True)
    theirs = tuple(_high(end) for end in theirs)
    ours = tuple(_high(end) for end in ours)
    environment = {k: v for k, v in os.environ.items() if k != "DBUS_SESSION_BUS_ADDRESS"}
    launcher = [sys.executable, "-I", "-S", "-c", LAUNCH, *map(str, theirs)]
    process = subprocess.Popen(
        [*launcher, program, f"--user-data-dir={profile}", *ARGUMENTS],
        pass_fds=theirs, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        for end in theirs:
            os.close(end)
        page = Page(*ours, seconds)
        page.start()
        yield page
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for end in ours:
            os.close(end)
        shutil.rmtree(profile, ignore_errors=True)


def _high(end: int) -> int:
    """The same end of a pipe under a number of 10 or more."""
    moved = fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(end)
    return moved


def with_browser(
    do: Callable[[Page], Result], *, program: str | None = None, attempts: int = ATTEMPTS
) -> Result:
    """What `do` returns of a page; again with a new browser where the browser, not the page, gave no answer."""
    program = program or find()
    said = ""
    for attempt in range(attempts):
        try:
            with _started(program, patience(attempt)) as page:
                return do(page)
        except SilentError as error:
            said = str(error)
    pytest.fail(f"{attempts} browsers in turn gave no answer: {said}")


def complaints(url: str, expressions: Sequence[str] = (), **options: Any) -> tuple[list[str], list[Any]]:
    """Open a page, evaluate expressions in it, and return what the console holds and their values."""

    def do(page: Page) -> tuple[list[str], list[Any]]:
        page.open(url, **options)
        page.settle()
        values = [page.run(expression) for expression in expressions]
        return page.complaints(), values

    return with_browser(do)
