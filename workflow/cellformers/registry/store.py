"""The cache on disk, its lock file, and the Hub it is filled from.

`checkpoints.lock.json` in the cache holds what the registry does not know beforehand: the commit a branch stood at,
size and digest of files without registered ones, and what every folder in the cache is made of. It is written at the
first download and enforced after.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from cellformers.errors import UserError
from cellformers.io.download import Fetched, Patience, fetch, read_url
from cellformers.io.files import digest_file, read_json, write_json
from cellformers.io.locks import exclusive
from cellformers.registry.entries import PublishedVocabulary, RemoteFile, is_commit
from cellformers.registry.fields import SHA256

LOCK_FILE = "checkpoints.lock.json"
DEFAULT_ENDPOINT = "https://huggingface.co"
DENIED = "set HF_TOKEN to a token of your account, and accept the licence on the model's page if it has one"
SECTIONS = ("revisions", "files", "folders")
REMOVE = (
    "remove it: what it locked is taken as it comes at the next download, and what is here is read once more"
)
_PATH = re.compile(r"(?!.*\.\.)[A-Za-z0-9][\w.+-]*(/[A-Za-z0-9][\w.+-]*)*")

Record = dict[str, dict[str, Any]]
"""Files of a folder by relative path: size and sha256 of each."""


def home() -> Path:
    """The cache: CELLFORMERS_HOME, else `cellformers` in XDG_CACHE_HOME or ~/.cache."""
    named = os.environ.get("CELLFORMERS_HOME")
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cellformers"


def offline() -> str | None:
    """The variable that forbids the network, or None."""
    for variable in ("CELLFORMERS_OFFLINE", "HF_HUB_OFFLINE"):
        if os.environ.get(variable, "").strip().lower() not in ("", "0", "false", "no", "off"):
            return variable
    return None


def check_online(what: str) -> None:
    """UserError where a variable forbids the network."""
    variable = offline()
    if variable is not None:
        raise UserError(
            f"{what} is not complete in {home()}, and {variable} forbids to fetch it",
            fix=f"unset {variable}, or download it on a machine with network and the same CELLFORMERS_HOME",
        )


# --- the lock file --------------------------------------------------------------------------------------


Lock = dict[str, dict[str, Any]]
"""Sections of a lock file."""


def read_lock(name: str = LOCK_FILE, sections: tuple[str, ...] = SECTIONS) -> Lock:
    """A lock file of the cache, with all its sections.

    That of the checkpoints has revisions (name: commit), files (repository/path: size, sha256) and folders (folder:
    files). UserError where there is something else under its name.
    """
    path = home() / name
    try:
        found = read_json(path) if path.exists() else {}
    except UserError as error:
        raise UserError(error.what, path=path, fix=REMOVE) from error
    if not isinstance(found, dict) or not all(isinstance(found.get(key, {}), dict) for key in sections):
        raise UserError("is no lock file of cellformers", path=path, fix=REMOVE)
    lock = {key: found.get(key, {}) for key in sections}
    for section, entries in lock.items():
        if not all(_is_recorded(section, entry) for entry in entries.values()):
            raise UserError("holds records that are none of cellformers", path=path, fix=REMOVE)
    return lock


def _is_recorded(section: str, entry: Any) -> bool:
    """Whether an entry of a lock file is of the kind that its section has; names of files lead nowhere else."""
    if section == "revisions":
        return isinstance(entry, str) and is_commit(entry)
    if not isinstance(entry, dict):
        return False
    if section == "folders":
        return all(_PATH.fullmatch(name) and _is_recorded("files", known) for name, known in entry.items())
    size, sha256 = entry.get("size"), entry.get("sha256")
    return type(size) is int and isinstance(sha256, str) and SHA256.fullmatch(sha256) is not None


@contextmanager
def changing_lock(name: str = LOCK_FILE, sections: tuple[str, ...] = SECTIONS) -> Iterator[Lock]:
    """The content of a lock file, written back when the block ends; one process at a time."""
    path = home() / name
    with exclusive(path.with_name(f".lock-{name}")):
        lock = read_lock(name, sections)
        yield lock
        write_json({key: dict(sorted(lock[key].items())) for key in sections}, path)


def forget(entry: PublishedVocabulary, folder: str) -> None:
    """Drop what the lock knows about an entry, so that the next download records it anew."""
    with changing_lock() as lock:
        lock["revisions"].pop(entry.name, None)
        lock["folders"].pop(folder, None)
        for file in entry.files:
            lock["files"].pop(_key(entry, file), None)


def record_folder(folder: Path) -> None:
    """Write down what a finished folder of the cache is made of."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    record: Record = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": digest_file(path).removeprefix("sha256:"),
        }
        for path in files
    }
    with changing_lock() as lock:
        lock["folders"][folder.relative_to(home()).as_posix()] = record


def damage(folder: Path, record: Record, *, thorough: bool) -> str | None:
    """The first file of a folder that is missing or differs in size (`thorough`: or content), with what is wrong."""
    for name, known in record.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != known["size"]:
            return f"{path} is {path.stat().st_size:,} bytes, expected are {known['size']:,}"
        if thorough and digest_file(path) != f"sha256:{known['sha256']}":
            return f"{path} is damaged (its sha256 is not {known['sha256']})"
    return None


# --- the Hub --------------------------------------------------------------------------------------------


def _endpoint() -> str:
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def _headers() -> dict[str, str]:
    token = os.environ.get("HF_TOKEN", "").strip()
    return {"Authorization": f"Bearer {token}"} if token else {}


def _key(entry: PublishedVocabulary, file: RemoteFile) -> str:
    return f"{entry.repository}/{file.path}"


def commit_of(entry: PublishedVocabulary, asked: str | None, patience: Patience) -> str:
    """The commit to fetch an entry from: the locked one, else the one that `asked` or the registry means.

    Raises
    ------
    UserError
        If neither names a revision, or `asked` is another one than the locked.
    """
    locked = read_lock()["revisions"].get(entry.name)
    if locked and (asked is None or (re.fullmatch(r"[0-9a-f]{7,}", asked) and locked.startswith(asked))):
        return str(locked)
    wanted = asked or entry.revision
    if wanted is None:
        raise UserError(
            f"the registry knows no revision that holds {entry.name} ({entry.note})",
            fix=f"name one of {entry.repository}: --revision COMMIT",
        )
    commit = wanted if is_commit(wanted) else _resolve(entry.repository, wanted, patience)
    if locked and commit != locked:
        raise UserError(
            f"{entry.name} is locked to revision {locked}, {asked} is {commit}",
            fix=f"cellformers download {entry.name} --revision {asked} --relock takes the new one",
        )
    return commit


def lock_commit(entry: PublishedVocabulary, commit: str) -> None:
    """Hold an entry to the commit that its folder was made of, where that is not the registered one."""
    if commit != entry.revision:
        with changing_lock() as lock:
            lock["revisions"][entry.name] = commit


def forget_file(entry: PublishedVocabulary, file: RemoteFile, folder: Path) -> None:
    """Drop a fetched file that turned out to be the wrong one, and what the lock knows about it."""
    (folder / file.name).unlink(missing_ok=True)
    with changing_lock() as lock:
        lock["files"].pop(_key(entry, file), None)


def _resolve(repository: str, revision: str, patience: Patience) -> str:
    url = f"{_endpoint()}/api/models/{repository}/revision/{quote(revision, safe='')}"
    content = read_url(url, headers=_headers(), denied=DENIED, patience=patience)
    try:
        commit = json.loads(content)["sha"]
    except (ValueError, KeyError, TypeError):
        commit = None
    if not isinstance(commit, str) or not is_commit(commit):
        raise UserError(
            "the Hub does not say which commit this is",
            path=url,
            fix="give --revision with a commit (40 digits)",
        )
    return commit


def known_digest(entry: PublishedVocabulary, file: RemoteFile) -> str | None:
    """The sha256 a file must have: the registered one, else the locked one, else None."""
    locked = read_lock()["files"].get(_key(entry, file))
    return file.sha256 or (locked["sha256"] if locked else None)


def fetch_file(
    entry: PublishedVocabulary, file: RemoteFile, commit: str, folder: Path, *,
    progress: Callable[[int], None], patience: Patience,
) -> Path:  # fmt: skip
    """Fetch a file of an entry into a folder, verified; without a known digest, the one it has is locked."""
    if file.sha256:
        changed = (
            "something between you and the Hub changes it, or this revision has another file: try again, "
            f"or name the revision that has it: cellformers download {entry.name} --revision COMMIT"
        )
    else:
        changed = (
            f"it was another one at the first download; cellformers download {entry.name} --relock accepts it"
        )
    target = folder / file.name
    known = known_digest(entry, file)
    found = fetch(
        f"{_endpoint()}/{entry.repository}/resolve/{quote(commit, safe='')}/{quote(file.path)}", target,
        size=file.size, sha256=known, headers=_headers(), denied=DENIED, changed=changed,
        progress=progress, patience=patience,
    )  # fmt: skip
    if known is None:
        _lock_file(_key(entry, file), found)
    return target


def _lock_file(key: str, found: Fetched) -> None:
    known: Mapping[str, Any] = {"size": found.size, "sha256": found.sha256}
    with changing_lock() as lock:
        lock["files"][key] = known
