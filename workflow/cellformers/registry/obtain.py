"""Model directories out of what is published: fetched, verified, put together once in the cache, and found again."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cellformers.errors import UserError, did_you_mean
from cellformers.io.download import Patience
from cellformers.io.files import atomic_dir, digest_file, read_json
from cellformers.io.locks import exclusive
from cellformers.models.bert_config import Config
from cellformers.progress import progress, say
from cellformers.registry.entries import (
    CONFIG,
    PublishedModel,
    PublishedVocabulary,
    Registry,
    RemoteFile,
    differing_fields,
    read_registry,
)
from cellformers.registry.store import (
    Record,
    check_online,
    commit_of,
    damage,
    fetch_file,
    forget,
    forget_file,
    home,
    known_digest,
    lock_commit,
    read_lock,
    record_folder,
)
from cellformers.vocabulary import Vocabulary, copy_vocabulary, read_published

MODELS, VOCABULARIES, DOWNLOADS = "models", "vocabularies", "downloads"
VOCABULARY, WEIGHTS_FILE = "vocabulary", "model.safetensors"


def download(
    name: str,
    output: str | Path | None = None,
    *,
    revision: str | None = None,
    verify: bool = False,
    relock: bool = False,
    registry: Registry | None = None,
    quiet: bool = True,
    patience: Patience | None = None,
) -> Path:
    """A registered model as a model directory, or a registered vocabulary as a vocabulary folder.

    It is fetched unless the cache has it; what is interrupted goes on at the next call.

    Parameters
    ----------
    output
        Also put it there: weights as a hard link where the file system allows, else as a copy.
    revision
        Branch, tag or commit to fetch from, other than the registered one; it is locked.
    verify
        Compare digests of what the cache has, not just sizes.
    relock
        Forget what the lock file knows about it, and accept what the Hub has now. Registered digests still hold.
    registry
        None: the one of the package.

    Returns
    -------
    Path
        `output`, or the folder in the cache.

    Raises
    ------
    UserError
        If no such name is registered, the Hub refuses or fails, there is no room, a file is not the registered or
        locked one, or config.json differs from the registered architecture.
    """
    registry = registry or read_registry()
    patience = replace(patience or Patience(), notice=lambda line: say(line, quiet=quiet))
    entry = registry.find(name)
    folder = _folder(entry)
    whole = not relock and _is_whole(folder, verify=verify, quiet=quiet)
    if revision is not None and not relock:
        _check_revision(entry, revision, commit_of(entry, revision, patience), whole=whole)
    if not whole:
        check_online(name)
        with exclusive(
            home() / f".lock-{name}",
            lambda: say(f"{name}: another process downloads it, waiting", quiet=quiet),
        ):
            if relock:
                _forget_all(entry, registry)
            if relock or not _is_whole(folder, verify=verify, quiet=True):
                _make(entry, folder, registry, revision, patience, quiet=quiet)
    return folder if output is None else _give(folder, Path(output), verify=verify)


def _check_revision(entry: PublishedVocabulary, asked: str, commit: str, *, whole: bool) -> None:
    """UserError where the cache has an entry of another commit than the one that is asked for."""
    here = read_lock()["revisions"].get(entry.name, entry.revision)
    if whole and commit != here:
        raise UserError(
            f"{entry.name} is here from revision {here}, {asked} is {commit}",
            fix=f"cellformers download {entry.name} --revision {asked} --relock takes the new one",
        )


def find_model(
    model: str | Path, *, fetch: bool = False, registry: Registry | None = None, quiet: bool = False
) -> Path:
    """The folder of a model that is given as a folder or as a registered name.

    Parameters
    ----------
    fetch
        Download a registered model that the cache lacks; otherwise that is a UserError which says how to.

    Raises
    ------
    UserError
        If it is neither a folder nor a registered name, or not downloaded yet.
    """
    if Path(model).is_dir():
        return Path(model)
    name = str(model)
    registry = registry or read_registry()
    if name not in registry.models:
        raise UserError(
            "no such model directory, and no model of that name is registered", path=name,
            fix=f"{did_you_mean(name, registry.models)} (cellformers download --list)",
        )  # fmt: skip
    folder = _folder(registry.models[name])
    if folder.is_dir():
        return folder
    if fetch:
        check_online(name)
        say(f"{name} is downloaded to {folder}", quiet=quiet)
        return download(name, registry=registry, quiet=quiet)
    raise UserError(f"the model {name} is not downloaded yet", fix=f"cellformers download {name}")


# --- what the cache has ---------------------------------------------------------------------------------


def _folder(entry: PublishedVocabulary) -> Path:
    return home() / (MODELS if isinstance(entry, PublishedModel) else VOCABULARIES) / entry.name


def _record(folder: Path) -> Record:
    """What a folder of the cache is made of; {} where that is not known."""
    record: Record = read_lock()["folders"].get(folder.relative_to(home()).as_posix(), {})
    return record


def _is_whole(folder: Path, *, verify: bool, quiet: bool) -> bool:
    record = _record(folder)
    if not record or not folder.is_dir():
        return False
    wrong = damage(folder, record, thorough=verify)
    if wrong:
        say(f"{wrong}; fetching it again", quiet=quiet)
    return wrong is None


def _forget_all(entry: PublishedVocabulary, registry: Registry) -> None:
    """Drop what is locked and half-fetched of a model and its vocabulary."""
    forgotten = [entry]
    if isinstance(entry, PublishedModel):
        forgotten.append(registry.vocabularies[entry.vocabulary])
    for each in forgotten:
        forget(each, _folder(each).relative_to(home()).as_posix())
        shutil.rmtree(home() / DOWNLOADS / each.name, ignore_errors=True)


def _raw(entry: PublishedVocabulary, commit: str) -> Path:
    """Where the files of an entry wait until its folder is made; those of two commits never mix."""
    return home() / DOWNLOADS / entry.name / commit


# --- putting together -----------------------------------------------------------------------------------


def _make(
    entry: PublishedVocabulary, folder: Path, registry: Registry, revision: str | None, patience: Patience, *,
    quiet: bool,
) -> None:  # fmt: skip
    """Fetch an entry and put its folder together; what was fetched is removed when the folder stands."""
    commit = commit_of(entry, revision, patience)
    raw = _raw(entry, commit)
    words = registry.vocabularies[entry.vocabulary] if isinstance(entry, PublishedModel) else None
    with progress(
        f"download {entry.name}", _bytes_to_come(entry, words), unit="bytes", quiet=quiet
    ) as advance:

        def get(file: RemoteFile) -> Path:
            return fetch_file(entry, file, commit, raw, progress=advance, patience=patience)

        if isinstance(entry, PublishedModel) and words is not None:
            _make_model(entry, folder, get, lambda: _vocabulary(words, patience, advance))
        else:
            _make_vocabulary(entry, folder, get)
    record_folder(folder)
    lock_commit(entry, commit)
    shutil.rmtree(raw.parent)


def _bytes_to_come(entry: PublishedVocabulary, words: PublishedVocabulary | None) -> int | None:
    """Size of what an entry needs; None where it is not registered. config.json does not count."""
    needed = [file for file in entry.files if file.name != CONFIG]
    if words is not None and not _is_whole(_folder(words), verify=False, quiet=True):
        needed.extend(words.files)
    sizes = [file.size for file in needed]
    return None if None in sizes else sum(filter(None, sizes))


def _vocabulary(words: PublishedVocabulary, patience: Patience, advance: Callable[[int], None]) -> Path:
    """The folder of a vocabulary in the cache, made if need be."""
    folder = _folder(words)
    with exclusive(home() / f".lock-{words.name}"):
        if not _is_whole(folder, verify=False, quiet=True):
            commit = commit_of(words, None, patience)
            raw = _raw(words, commit)
            _make_vocabulary(
                words, folder,
                lambda file: fetch_file(words, file, commit, raw, progress=advance, patience=patience),
            )  # fmt: skip
            record_folder(folder)
            lock_commit(words, commit)
            shutil.rmtree(raw.parent)
    return folder


def _make_vocabulary(words: PublishedVocabulary, folder: Path, get: Callable[[RemoteFile], Path]) -> None:
    paths = [get(file) for file in words.files]
    read_published(paths[0].parent, name=words.name).save(folder)


def _make_model(
    model: PublishedModel, folder: Path, get: Callable[[RemoteFile], Path], vocabulary: Callable[[], Path]
) -> None:
    """The small files first: a config that does not fit is seen before gigabytes are fetched."""
    config = get(model.config)
    try:
        _check_config(model, config)
    except UserError:
        forget_file(model, model.config, config.parent)  # so that no other revision is held to it
        raise
    words = vocabulary()
    _take_from(folder, model, config.parent)
    weights = get(model.weights)
    if model.layout != "hf" or weights.name != WEIGHTS_FILE:
        from cellformers.models.directory import import_model

        import_model(config.parent, words, folder)
        return
    _check_room_for_words(words, config)
    with atomic_dir(folder) as temporary:
        _link(weights, temporary / WEIGHTS_FILE)
        shutil.copyfile(config, temporary / CONFIG)
        copy_vocabulary(words, temporary / VOCABULARY)


def _check_config(model: PublishedModel, path: Path) -> None:
    differing = differing_fields(model, Config.from_dict(read_json(path), path=path))
    if differing:
        raise UserError(
            f"differs from the registered architecture of {model.name}: {', '.join(differing)}", path=path,
            fix="another revision may fit (--revision COMMIT); import-model takes any folder as it is",
        )  # fmt: skip


def _check_room_for_words(words: Path, config: Path) -> None:
    from cellformers.models.directory import check_fit

    check_fit(Vocabulary.load(words), Config.from_dict(read_json(config), path=config), config.parent)


def _take_from(folder: Path, model: PublishedModel, raw: Path) -> None:
    """Use weights of a damaged or unrecorded folder again where they are the right ones: nothing comes twice."""
    there, fetched = folder / model.weights.name, raw / model.weights.name
    known = known_digest(model, model.weights)
    if known and there.is_file() and not fetched.exists() and digest_file(there) == f"sha256:{known}":
        _link(there, fetched)


def _link(source: Path, target: Path) -> None:
    """A hard link, so that weights are not stored twice; a copy where the file system can't."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _give(folder: Path, output: Path, *, verify: bool) -> Path:
    """Put a folder of the cache somewhere else; a second call finds it there."""
    record = _record(folder)
    if output.resolve() == folder.resolve() or damage(output, record, thorough=verify) is None:
        return output
    ours = any((output / name).is_file() for name in (CONFIG, "vocabulary.json"))
    if not ours and any(not path.is_dir() for path in output.rglob("*")):
        raise UserError("is a folder with other things in it", path=output, fix="choose a new --output")
    with atomic_dir(output) as temporary:
        for name in record:
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            if name == WEIGHTS_FILE:
                _link(folder / name, temporary / name)
            else:
                shutil.copyfile(folder / name, temporary / name)
    return output
