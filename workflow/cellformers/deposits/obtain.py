"""Deposits fetched into the cache, verified, and given out as folders of plain files.

    folder = download_deposit("gse129096")                    # in the cache, fetched if need be
    download_deposit("gse129096", "results/deposits/gse129096")

Files lie in deposits/NAME of the cache; what has to be fetched by hand is looked for in manual/NAME, and so is any file
of an open deposit before its server is asked. Sizes and digests that are registered hold; those that are not are
recorded in deposits.lock.json at the first download and hold from then on. A file is read for its digest once: as long
as its size and time of change are the recorded ones, it is taken to be the same.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cellformers.deposits.entries import Deposit, DepositFile, read_deposit
from cellformers.deposits.forms import wrong_form
from cellformers.errors import UserError
from cellformers.io.download import NoSuchFileError, Patience, fetch, mirrored
from cellformers.io.files import atomic_dir, digest_file
from cellformers.io.locks import exclusive
from cellformers.progress import progress, say
from cellformers.registry.store import changing_lock, check_online, home, offline, read_lock

DEPOSITS, MANUAL = "deposits", "manual"
LOCK_FILE, SECTIONS = "deposits.lock.json", ("files", "folders")
IGNORED = (".snakemake_timestamp",)  # Snakemake's own, in every folder that is an output

Record = dict[str, dict[str, Any]]
"""Files of a deposit by name: size, sha256, and mtime_ns, the time of change at which the digest was taken."""


@dataclass(frozen=True)
class _Place:
    """Where the files of a deposit lie, and what is known of them."""

    deposit: Deposit
    folder: Path
    quiet: bool

    @property
    def key(self) -> str:
        """Name of its record in the lock file."""
        return self.folder.relative_to(home()).as_posix()

    def record(self) -> Record:
        """What was recorded of its files; {} at first."""
        record = read_lock(LOCK_FILE, SECTIONS)["folders"].get(self.key, {})
        return _recorded(record, ("size", "sha256", "mtime_ns"))

    def locked(self) -> Record:
        """Size and digest of files that have no registered digest, by name."""
        locked = read_lock(LOCK_FILE, SECTIONS)["files"]
        found = {name: locked.get(f"{self.deposit.name}/{name}") for name in self.deposit.files}
        return _recorded({name: known for name, known in found.items() if known}, ("size", "sha256"))

    def write(self, record: Record) -> None:
        """Record the files of the folder, and lock those without a registered digest."""
        with changing_lock(LOCK_FILE, SECTIONS) as lock:
            lock["folders"][self.key] = record
            for name, known in record.items():
                if self.deposit.files[name].sha256 is None:
                    kept = {"size": known["size"], "sha256": known["sha256"]}
                    lock["files"][f"{self.deposit.name}/{name}"] = kept

    def forget(self) -> None:
        """Drop what is recorded and locked."""
        with changing_lock(LOCK_FILE, SECTIONS) as lock:
            lock["folders"].pop(self.key, None)
            for name in self.deposit.files:
                lock["files"].pop(f"{self.deposit.name}/{name}", None)


def _recorded(record: Any, keys: tuple[str, ...]) -> Record:
    """A record as it was written; UserError where somebody changed it."""
    if isinstance(record, dict) and all(
        isinstance(known, dict) and all(isinstance(known.get(key), int | str) for key in keys)
        for known in record.values()
    ):
        return record
    raise UserError("holds records that are none of cellformers", path=home() / LOCK_FILE, fix="remove it")


def download_deposit(
    name: str,
    output: str | Path | None = None,
    *,
    verify: bool = False,
    relock: bool = False,
    quiet: bool = True,
    patience: Patience | None = None,
) -> Path:
    """The files of a registered deposit in a folder; fetched unless the cache has them.

    What is interrupted goes on at the next call. Of a deposit that has to be fetched by hand, the files are looked for
    in manual/NAME of the cache, the first complete set that the entry names.

    Parameters
    ----------
    output
        Also put the files there: as hard links where the file system allows, else as copies.
    verify
        Read every file for its digest, also where size and time of change are the recorded ones.
    relock
        Forget what the lock file knows about it, and accept what there is now. Registered digests still hold.

    Returns
    -------
    Path
        `output`, or the folder in the cache.

    Raises
    ------
    UserError
        If no such deposit is registered, the server refuses or fails, there is no room, a file is not the registered
        or locked one, or a file that has to be fetched by hand is not there.
    """
    deposit = read_deposit(name)
    by_hand = deposit.access == "manual"
    place = _Place(deposit, home() / (MANUAL if by_hand else DEPOSITS) / name, quiet)
    if by_hand:
        record = _take_by_hand(place, verify=verify, relock=relock)
    else:
        patience = replace(patience or Patience(), notice=lambda line: say(line, quiet=quiet))
        record = _fetch_missing(place, patience, verify=verify, relock=relock)
    return place.folder if output is None else _give(place, record, Path(output))


def is_here(deposit: Deposit) -> bool:
    """Whether the cache has the deposit: its files as recorded, or a set of those that are fetched by hand."""
    if deposit.access == "manual":
        folder = home() / MANUAL / deposit.name
        return any(not _missing(folder, files) for files in _sets(deposit))
    place = _Place(deposit, home() / DEPOSITS / deposit.name, quiet=True)
    record = place.record()
    return bool(record) and not _missing(place.folder, tuple(record))


# --- digests --------------------------------------------------------------------------------------------


def _examine(path: Path, known: Mapping[str, Any] | None, *, thorough: bool) -> dict[str, Any]:
    """Size, digest and time of change of a file; not read if it looks as recorded, unless `thorough`."""
    status = path.stat()
    found = {"size": status.st_size, "mtime_ns": status.st_mtime_ns}
    same = known is not None and all(known.get(key) == value for key, value in found.items())
    if known is not None and same and not thorough:
        return dict(known)
    return {**found, "sha256": digest_file(path).removeprefix("sha256:")}


def _difference(found: Mapping[str, Any], file: DepositFile, locked: Mapping[str, Any] | None) -> str | None:
    """In which way a file is not the expected one, in words."""
    sha256 = file.sha256 or (locked["sha256"] if locked else None)
    if file.size is not None and found["size"] != file.size:
        return f"is {found['size']:,} bytes, expected are {file.size:,}"
    if sha256 is not None and found["sha256"] != sha256:
        return f"has sha256 {found['sha256']}, expected is {sha256}"
    return None


def _unfit(
    path: Path, found: Mapping[str, Any], file: DepositFile, locked: Mapping[str, Any] | None
) -> str | None:
    """As `_difference`; of a file without a known digest, in which way it can't be the one."""
    return _difference(found, file, locked) or (None if file.sha256 or locked else wrong_form(path))


# --- open deposits --------------------------------------------------------------------------------------


def _fetch_missing(place: _Place, patience: Patience, *, verify: bool, relock: bool) -> Record:
    """The record of a complete folder, after fetching what it lacks."""
    name = place.deposit.name
    record = None if relock else _whole(place, verify=verify)
    if record is not None:
        return record
    with exclusive(
        home() / f".lock-deposit-{name}",
        lambda: say(f"{name}: another process downloads it, waiting", quiet=place.quiet),
    ):
        if relock:
            place.forget()
            for file in place.deposit.files.values():
                if file.sha256 is None:
                    (place.folder / file.name).unlink(missing_ok=True)
        record = _whole(place, verify=False)  # another process may have made it in the meantime
        return record or _make(place, patience)


def _whole(place: _Place, *, verify: bool) -> Record | None:
    """The record of the folder if all that it names is there and right, else None; what is damaged is removed."""
    deposit, record, locked = place.deposit, place.record(), place.locked()
    if any(name not in deposit.files for name in record):
        return None  # the entry has changed
    found: Record = {}
    for name, known in record.items():
        path, file = place.folder / name, deposit.files[name]
        if not path.is_file():
            return None
        found[name] = _examine(path, known, thorough=verify)
        if found[name]["sha256"] != known["sha256"]:
            say(f"{path} is damaged; fetching it again", quiet=place.quiet)
            path.unlink()
            return None
        unknown = "came by another entry" if file.sha256 is None and name not in locked else None
        wrong = unknown or _difference(found[name], file, locked.get(name))
        if wrong:
            raise UserError(
                f"{wrong}: the registry knows another file than when this one came", path=path,
                fix=f"cellformers download {deposit.name} --relock fetches it anew; or name another CELLFORMERS_HOME",
            )  # fmt: skip
    if any(file.needed and name not in found for name, file in deposit.files.items()):
        return None
    if found != record:
        with contextlib.suppress(UserError):  # the cache of others is used without writing to it
            place.write(found)
    return found


def _make(place: _Place, patience: Patience) -> Record:
    """Fetch the files of a deposit that the folder lacks; every one is locked as soon as it is there."""
    deposit, known = place.deposit, place.record()
    sizes = [file.size for file in deposit.files.values()]
    total = None if None in sizes else sum(filter(None, sizes))
    made: Record = {}
    with progress(f"download {deposit.name}", total, unit="bytes", quiet=place.quiet) as advance:
        # those that are needed come last, so that nobody takes the folder for complete before the others were tried
        for file in sorted(deposit.files.values(), key=lambda file: file.needed):
            found = _get(place, file, known.get(file.name), advance, patience)
            if found is not None:
                made[file.name] = found
                place.write(made)
    return made


def _get(
    place: _Place, file: DepositFile, known: Mapping[str, Any] | None, advance: Callable[[int], None],
    patience: Patience,
) -> dict[str, Any] | None:  # fmt: skip
    """One file, in the folder: as it is there, put there by hand, or fetched; None for one that is not needed."""
    locked = place.locked().get(file.name)
    found = _already_there(place, file, known, locked) or _link_by_hand(place, file, locked)
    if found is not None:
        advance(found["size"])
        return found
    if offline() and not file.needed:
        say(f"{file.name}: not here and not needed; going on without it", quiet=place.quiet)
        return None
    check_online(place.deposit.name)
    try:
        return _fetch(place, file, locked, advance, patience)
    except NoSuchFileError as error:
        if file.needed:
            raise UserError(
                error.what, path=error.path,
                fix=f"look where {place.deposit.name} keeps it now, and put it at {_by_hand(place, file)}",
            ) from error  # fmt: skip
        say(f"{error.path}: {error.what}; going on without it", quiet=place.quiet)
    return None


def _already_there(
    place: _Place, file: DepositFile, known: Mapping[str, Any] | None, locked: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """A file that an interrupted call left, or that lost its record; one that is not the expected file is removed."""
    path = place.folder / file.name
    if not path.is_file():
        return None
    found = _examine(path, known, thorough=False)
    if _unfit(path, found, file, locked) is None:
        return found
    path.unlink()
    return None


def _fetch(
    place: _Place, file: DepositFile, locked: Mapping[str, Any] | None, advance: Callable[[int], None],
    patience: Patience,
) -> dict[str, Any]:  # fmt: skip
    path = place.folder / file.name
    fetched = fetch(
        str(file.url), path, size=file.size, sha256=file.sha256 or (locked["sha256"] if locked else None),
        denied=f"it may need a login: fetch it in a browser and put it at {_by_hand(place, file)}",
        changed=_changed(place.deposit, file), progress=advance, patience=patience,
    )  # fmt: skip
    found = {"size": fetched.size, "sha256": fetched.sha256, "mtime_ns": path.stat().st_mtime_ns}
    wrong = _unfit(path, found, file, locked)
    if wrong:
        path.unlink()
        raise UserError(
            wrong, path=mirrored(str(file.url)),
            fix=f"try again later, or fetch it in a browser and put it at {_by_hand(place, file)}",
        )  # fmt: skip
    return found


def _changed(deposit: Deposit, file: DepositFile) -> str:
    if file.sha256 or file.size:
        return "something on the way changes it, or the publisher put another file there: try again, then look there"
    return (
        f"it was another one at the first download; cellformers download {deposit.name} --relock accepts it"
    )


def _by_hand(place: _Place, file: DepositFile) -> Path:
    return home() / MANUAL / place.deposit.name / file.name


def _link_by_hand(
    place: _Place, file: DepositFile, locked: Mapping[str, Any] | None
) -> dict[str, Any] | None:
    """Take a file that the user fetched; UserError where it is not the expected one."""
    source, path = _by_hand(place, file), place.folder / file.name
    if not source.is_file():
        return None
    found = _examine(source, None, thorough=True)
    _check_by_hand(source, found, place.deposit, file, locked)
    path.parent.mkdir(parents=True, exist_ok=True)
    _link(source, path)
    return {**found, "mtime_ns": path.stat().st_mtime_ns}


# --- by hand --------------------------------------------------------------------------------------------


def _sets(deposit: Deposit) -> tuple[tuple[str, ...], ...]:
    """Sets of files, one of which is enough."""
    return deposit.any_of or (tuple(name for name, file in deposit.files.items() if file.needed),)


def _missing(folder: Path, files: tuple[str, ...]) -> list[str]:
    return [name for name in files if not (folder / name).is_file()]


def _take_by_hand(place: _Place, *, verify: bool, relock: bool) -> Record:
    """The record of the first complete set of files that the user put into the folder."""
    deposit = place.deposit
    chosen = next((files for files in _sets(deposit) if not _missing(place.folder, files)), None)
    if chosen is None:
        raise _not_there(place)
    if relock:
        place.forget()
    record, locked = place.record(), place.locked()
    found: Record = {}
    for name in chosen:
        path, file = place.folder / name, deposit.files[name]
        if name not in record and path.stat().st_size >= 1 << 30:
            say(f"{path}: reading it once for its digest", quiet=place.quiet)
        found[name] = _examine(path, record.get(name), thorough=verify)
        _check_by_hand(path, found[name], deposit, file, locked.get(name))
    if any(record.get(name) != known for name, known in found.items()):
        place.write({**record, **found})
    return found


def _check_by_hand(
    path: Path,
    found: Mapping[str, Any],
    deposit: Deposit,
    file: DepositFile,
    locked: Mapping[str, Any] | None,
) -> None:
    wrong = _unfit(path, found, file, locked)
    if wrong:
        relock = (
            f"; it was another one at the first use: cellformers download {deposit.name} --relock accepts it"
        )
        registered = file.sha256 or file.size not in (None, found["size"])
        raise UserError(
            wrong, path=path, fix="fetch it again" + (relock if locked and not registered else "")
        )


def _not_there(place: _Place) -> UserError:
    """What is missing, where to get it and where to put it; of several sets the one that lacks least."""
    deposit = place.deposit
    sets = _sets(deposit)
    nearest = min(sets, key=lambda files: len(_missing(place.folder, files)) / len(files))
    missing = _missing(place.folder, nearest)
    begun = len(missing) < len(nearest)
    what = " and ".join(missing) if begun else " or ".join(" and ".join(files) for files in sets)
    return UserError(
        f"{deposit.name} has to be fetched by hand, and the folder lacks {what}",
        path=place.folder,
        fix=f"{deposit.manual}; put the files into {place.folder} and call again",
    )


# --- giving out -----------------------------------------------------------------------------------------


def _link(source: Path, target: Path) -> None:
    """A hard link, so that nothing is stored twice; a copy of the same time where the file system can't."""
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _give(place: _Place, record: Record, output: Path) -> Path:
    """The files in a folder of their own; a second call finds them there."""
    if output.resolve() == place.folder.resolve():
        return output
    there = {path.name for path in output.iterdir()} - set(IGNORED) if output.is_dir() else set()
    if there == set(record) and all(_is_given(output / name, record[name]) for name in record):
        return output
    if there - set(place.deposit.files):
        raise UserError("is a folder with other things in it", path=output, fix="choose a new --output")
    with atomic_dir(output) as temporary:
        for name in record:
            _link(place.folder / name, temporary / name)
    return output


def _is_given(path: Path, known: Mapping[str, Any]) -> bool:
    """Whether a file is a link to the one in the cache or a copy of it: both have its size and time."""
    status = path.stat()
    return path.is_file() and (status.st_size, status.st_mtime_ns) == (known["size"], known["mtime_ns"])
