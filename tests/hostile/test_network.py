"""Nothing listens on a network, and only `download` asks one.

Processes that train together on several GPUs talk to each other by gloo and NCCL (docs/security.md); they are started
by torchrun, not by this package.
"""

import ast
import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import forked
import typer

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "workflow" / "cellformers"
NETWORKING = {
    "aiohttp", "asyncio", "fsspec", "ftplib", "grpc", "http.client", "http.server", "httpx", "huggingface_hub",
    "imaplib",
    "poplib", "requests", "smtplib", "socket", "socketserver", "ssl", "telnetlib", "tornado", "urllib.request",
    "urllib3",
    "websockets", "wsgiref", "xmlrpc",
}  # fmt: skip
ASKING = {"io/download.py"}
USING_IT = {"deposits/obtain.py", "registry/obtain.py", "registry/store.py", "simulate/deposits/run.py"}
STARTING = re.compile(r"^(subprocess|os\.(system|popen|exec\w+|spawn\w+|posix_spawn\w*)|pty)$")


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_one_module_talks_to_servers() -> None:
    found, users = set(), set()
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).as_posix()
        modules = set(imported(path))
        if any(module == net or module.startswith(f"{net}.") for module in modules for net in NETWORKING):
            found.add(name)
        if "cellformers.io.download" in modules:
            users.add(name)
    assert found == ASKING
    assert users <= USING_IT


def test_nothing_binds_or_listens() -> None:
    """Neither in the package nor in the rules; gloo and NCCL belong to training in several processes."""
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "workflow" / "rules").glob("*.smk"), ROOT / "Snakefile"]:
        content = path.read_text(encoding="utf-8")
        calls = re.findall(r"\.(?:bind|listen|accept|serve_forever|create_server|start_server)\(", content)
        assert not calls, path
        if "init_process_group" in content:
            assert path.relative_to(PACKAGE).as_posix() == "training/distributed.py"


def test_no_module_starts_programs_or_runs_text() -> None:
    """A first one is to be looked at: what it starts, with whose words."""
    for path in PACKAGE.rglob("*.py"):
        content = path.read_text(encoding="utf-8")
        assert not any(STARTING.match(module) for module in imported(path)), path
        assert not re.search(r"\bos\.(system|popen|exec|spawn|posix_spawn)", content), path
        assert "shell=True" not in content, path
        assert not re.search(r"(?<![\w.])(eval|exec)\(", content), path
        assert "allow_pickle=True" not in content, path
        assert "weights_only=False" not in content, path
        assert "trust_remote_code=True" not in content, path
        assert not re.search(r"yaml\.(load|full_load|unsafe_load)\(", content), path


def run_verbs(folder: Path) -> int:
    """The help of every verb, and the verbs that look around."""
    from cellformers.cli import app

    command = typer.main.get_command(app)
    names = list(command.commands)  # type: ignore[attr-defined]
    calls = [[name, "--help"] for name in names] + [["--help"], ["doctor"], ["download", "--list"]]
    for words in calls:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            command(words, standalone_mode=False)
    assert "cellformers.io.files" in sys.modules
    return len(calls)


def test_verbs_that_look_around_ask_no_server(tmp_path: Path) -> None:
    outcome = forked.run(run_verbs, tmp_path, writable=tmp_path, seconds=60)
    assert outcome.kind == "value", outcome.text
    assert outcome.value > 25
    assert not [deed for deed in outcome.deeds if deed.startswith("socket.")], outcome.deeds
