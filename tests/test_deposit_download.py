"""Deposits from a server that behaves or not, from a mirror, and from what the user put there by hand."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from command_line import files_in
from hub_server import Hub
from test_deposits import small
from typer.testing import CliRunner

from cellformers.commands import downloads
from cellformers.deposits import deposit_names, download_deposit, read_deposit
from cellformers.deposits import obtain as module
from cellformers.errors import UserError
from cellformers.io.download import Patience, fetch, mirrored, read_url
from cellformers.registry import home

FAST = Patience(sleep=lambda _: None, attempts=3, timeout=10.0)
SILENT = (
    "http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", "HF_TOKEN", "HF_ENDPOINT", "HF_HUB_OFFLINE",
    "CELLFORMERS_OFFLINE", "CELLFORMERS_MIRROR",
)  # fmt: skip


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Lab:
    """A server with the two files of the deposit `small`, and the registry that knows it."""

    def __init__(self, hub: Hub, folder: Path) -> None:
        self.hub, self.resources = hub, folder / "resources"
        self.a, self.b = os.urandom(200_000), b"gene\tcell\nG1\t3\n"
        self.changes: dict[str, dict[str, Any]] = {"a.tsv": {}, "b.tsv": {}}
        self.publish()

    def publish(self) -> None:
        """Put the files on the server, and write the entry: `a.tsv` is registered, `b.tsv` is not."""
        self.hub.files["/data/a.tsv"], self.hub.files["/data/b.tsv"] = self.a, self.b
        self.register()

    def register(self, **changes: Any) -> None:
        """Write the entry."""
        files = {
            "a.tsv": {"url": f"{self.hub.url}/data/a.tsv", "size": len(self.a), "sha256": sha(self.a), "needed": True},
            "b.tsv": {"url": f"{self.hub.url}/data/b.tsv", "size": None, "sha256": None, "needed": True},
        }  # fmt: skip
        for name, change in self.changes.items():
            files[name].update(change)
        entry = small(**{"files": files, **changes})
        (self.resources / "datasets").mkdir(parents=True, exist_ok=True)
        (self.resources / "datasets" / "small.yaml").write_text(yaml.safe_dump(entry, sort_keys=False))

    def by_hand(self) -> Path:
        """Make it a deposit that has to be fetched by hand: two small files, or a large one; where they belong."""
        files = {
            name: {"url": None, "size": None, "sha256": None, "needed": False} for name in ("a.tsv", "b.tsv", "c.tsv")
        }  # fmt: skip
        self.changes = {}
        self.register(
            files=files, access="manual", manual="sign in at https://lab.org and fetch c.tsv, or a.tsv and b.tsv",
            any_of=[["c.tsv"], ["a.tsv", "b.tsv"]],
        )  # fmt: skip
        folder = home() / "manual" / "small"
        folder.mkdir(parents=True)
        return folder


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    for name in SILENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CELLFORMERS_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("CELLFORMERS_RESOURCES", str(tmp_path / "resources"))
    with Hub() as hub:
        yield Lab(hub, tmp_path)


def get(output: Path | None = None, **options: Any) -> Path:
    return download_deposit("small", output, patience=FAST, **options)


def lock() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((home() / "deposits.lock.json").read_text())
    return content


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


def flip(path: Path) -> None:
    """Change one byte, and the time of change with it."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture
def digests(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of files that were read for their digest here, in order; `fetch` reads what it gets by itself."""
    read: list[str] = []
    real = module.digest_file

    def counting(path: Path) -> str:
        read.append(Path(path).name)
        return real(path)

    monkeypatch.setattr(module, "digest_file", counting)
    return read


# --- fetching -------------------------------------------------------------------------------------------


def test_a_deposit_is_fetched(lab: Lab) -> None:
    folder = get()
    assert folder == home() / "deposits" / "small"
    assert content_of(folder) == {"a.tsv": lab.a, "b.tsv": lab.b}
    assert lock()["files"] == {
        "small/b.tsv": {"size": len(lab.b), "sha256": sha(lab.b)}
    }  # a.tsv is registered
    assert sorted(lock()["folders"]["deposits/small"]) == ["a.tsv", "b.tsv"]
    assert [path for path in files_in(home()) if path.name.startswith(".")] == []
    assert lab.hub.sent() == len(lab.a) + len(lab.b)


def test_a_second_call_fetches_and_reads_nothing(lab: Lab, digests: list[str]) -> None:
    folder = get()
    assert digests == []
    lab.hub.asked.clear()
    assert get() == get() == folder
    assert digests == []
    assert get(verify=True) == folder
    assert sorted(digests) == ["a.tsv", "b.tsv"]
    assert lab.hub.asked == []


def test_a_touched_file_is_read_once(lab: Lab, digests: list[str]) -> None:
    os.utime(get() / "a.tsv", (0, 0))
    lab.hub.asked.clear()
    get()
    get()
    assert digests == ["a.tsv"]
    assert lab.hub.asked == []


def test_files_elsewhere(lab: Lab, tmp_path: Path) -> None:
    output = tmp_path / "results" / "deposits" / "small"
    assert get(output) == output
    assert content_of(output) == content_of(home() / "deposits" / "small")
    there = {path.name: path.stat().st_ino for path in output.iterdir()}
    assert there == {path.name: path.stat().st_ino for path in (home() / "deposits" / "small").iterdir()}
    (output / ".snakemake_timestamp").write_text("")
    before = output.stat().st_ino
    get(output)
    assert output.stat().st_ino == before  # nothing is made again
    (output / "a.tsv").unlink()
    get(output)
    assert content_of(output) == {"a.tsv": lab.a, "b.tsv": lab.b}
    (output / "thesis.txt").write_text("all of it")
    with pytest.raises(UserError, match="small: is a folder with other things in it; choose a new --output"):
        get(output)
    assert (output / "thesis.txt").read_text() == "all of it"
    assert [path.name for path in output.parent.iterdir()] == ["small"]


def test_a_file_system_without_links(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refused)
    output = get(tmp_path / "small")
    before = output.stat().st_ino
    assert get(tmp_path / "small").stat().st_ino == before
    flip(output / "a.tsv")
    assert content_of(get(output)) == {"a.tsv": lab.a, "b.tsv": lab.b}


def test_an_interrupted_download_goes_on(lab: Lab) -> None:
    lab.hub.cut_after, lab.hub.piece = 100_000, 10_000
    with pytest.raises(UserError, match="connection failed"):
        download_deposit("small", patience=Patience(attempts=1))
    assert not (home() / "deposits" / "small" / "a.tsv").exists()
    lab.hub.cut_after = None
    lab.hub.asked.clear()
    assert content_of(get()) == {"a.tsv": lab.a, "b.tsv": lab.b}
    assert 0 < lab.hub.sent("a.tsv") < len(lab.a)


def test_what_came_before_the_failure_stays(lab: Lab) -> None:
    del lab.hub.files["/data/b.tsv"]
    with pytest.raises(UserError):
        get()
    lab.hub.files["/data/b.tsv"] = lab.b
    lab.hub.asked.clear()
    get()
    assert [asked.path for asked in lab.hub.asked] == ["/data/b.tsv"]


# --- what is wrong --------------------------------------------------------------------------------------


def test_one_changed_byte(lab: Lab) -> None:
    right = lab.a
    wrong = right[:100] + bytes([right[100] ^ 1]) + right[101:]
    lab.hub.files["/data/a.tsv"] = wrong
    with pytest.raises(UserError) as caught:
        get()
    message = str(caught.value)
    assert message.startswith(
        f"{lab.hub.url}/data/a.tsv: has sha256 {sha(wrong)}, expected is {sha(right)}; "
    )
    assert "\n" not in message
    assert not (home() / "deposits" / "small" / "a.tsv").exists()
    lab.hub.files["/data/a.tsv"] = right
    assert content_of(get())["a.tsv"] == right


@pytest.mark.parametrize("with_length", [True, False])
def test_another_size(lab: Lab, with_length: bool) -> None:
    lab.hub.with_length = with_length
    lab.changes["a.tsv"] = {"size": len(lab.a) + 1, "sha256": None}
    lab.register()
    with pytest.raises(
        UserError, match=r"data/a\.tsv: is 200,000 bytes.* expected are 200,001; something on the way"
    ):
        get()
    assert not (home() / "deposits" / "small" / "a.tsv").exists()


def test_a_file_that_is_not_there(lab: Lab) -> None:
    del lab.hub.files["/data/a.tsv"]
    with pytest.raises(UserError) as caught:
        get()
    by_hand = home() / "manual" / "small" / "a.tsv"
    assert str(caught.value) == (
        f"{lab.hub.url}/data/a.tsv: no such file on the server (HTTP 404); "
        f"look where small keeps it now, and put it at {by_hand}"
    )
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(lab.a[:-1])
    with pytest.raises(
        UserError, match=r"manual/small/a\.tsv: is 199,999 bytes, expected are 200,000; fetch it again"
    ):
        get()
    by_hand.write_bytes(lab.a)
    folder = get()
    assert content_of(folder) == {"a.tsv": lab.a, "b.tsv": lab.b}
    assert (folder / "a.tsv").samefile(by_hand)


def test_a_server_that_refuses(lab: Lab) -> None:
    lab.hub.failures = [403]
    with pytest.raises(
        UserError, match=r"refuses \(HTTP 403\); it may need a login: .* put it at .*manual/small/a"
    ):
        get()


def test_a_file_that_nobody_needs(lab: Lab, capsys: pytest.CaptureFixture[str]) -> None:
    lab.changes["b.tsv"] = {"needed": False}
    lab.register()
    del lab.hub.files["/data/b.tsv"]
    assert set(content_of(get(quiet=False))) == {"a.tsv"}
    assert (
        "/data/b.tsv: no such file on the server (HTTP 404); going on without it" in capsys.readouterr().err
    )
    lab.hub.asked.clear()
    get()
    assert lab.hub.asked == []
    lab.hub.files["/data/b.tsv"] = lab.b
    assert set(content_of(get(relock=True))) == {"a.tsv", "b.tsv"}


def test_names_that_are_not_registered(lab: Lab) -> None:
    with pytest.raises(UserError, match=r"no deposit 'smal' is registered; did you mean 'small'\?"):
        download_deposit("smal")


# --- the lock -------------------------------------------------------------------------------------------


def test_a_locked_digest_holds(lab: Lab) -> None:
    """Another file in a fresh cache with the same lock file: refused with both digests, until it is accepted."""
    get()
    shutil.rmtree(home() / "deposits")
    old, lab.b = lab.b, lab.b.replace(b"3", b"4")
    lab.publish()
    with pytest.raises(UserError) as caught:
        get()
    assert f"/data/b.tsv: has sha256 {sha(lab.b)}, expected is {sha(old)}" in str(caught.value)
    assert "it was another one at the first download; cellformers download small --relock" in str(
        caught.value
    )
    lab.hub.asked.clear()
    assert content_of(get(relock=True)) == {"a.tsv": lab.a, "b.tsv": lab.b}
    assert lock()["files"]["small/b.tsv"]["sha256"] == sha(lab.b)
    assert lab.hub.times("a.tsv") == 0  # its registered digest holds, it need not come again


def test_relock_holds_to_what_is_registered(lab: Lab) -> None:
    get()
    lab.hub.files["/data/a.tsv"] = bytes(len(lab.a))
    (home() / "deposits" / "small" / "a.tsv").unlink()
    with pytest.raises(UserError, match="expected is " + sha(lab.a)):
        get(relock=True)


def test_the_lock_file_is_lost(lab: Lab) -> None:
    get()
    (home() / "deposits.lock.json").unlink()
    lab.hub.asked.clear()
    assert content_of(get()) == {"a.tsv": lab.a, "b.tsv": lab.b}
    assert lab.hub.asked == []
    assert lock()["files"]["small/b.tsv"]["sha256"] == sha(lab.b)


@pytest.mark.parametrize("text", ["[]", "{", '{"files": []}'])
def test_a_lock_file_that_is_none(lab: Lab, text: str) -> None:
    home().mkdir()
    (home() / "deposits.lock.json").write_text(text)
    with pytest.raises(UserError, match=r"deposits\.lock\.json: "):
        get()


@pytest.mark.parametrize("name", ["a.tsv", "b.tsv"])
def test_damage_in_the_cache(lab: Lab, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = get() / name
    flip(path)
    get(quiet=False)
    assert content_of(path.parent) == {"a.tsv": lab.a, "b.tsv": lab.b}
    assert f"{path} is damaged; fetching it again" in capsys.readouterr().err


def test_damage_that_does_not_show(lab: Lab) -> None:
    """The same size and time of change: found when digests are asked for."""
    path = get() / "a.tsv"
    status = path.stat()
    flip(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert content_of(get())["a.tsv"] != lab.a
    assert content_of(get(verify=True))["a.tsv"] == lab.a


def test_a_registry_that_changed(lab: Lab) -> None:
    """Files that came by another entry are neither given out as those of this one, nor lost without being asked."""
    folder = get()
    lab.changes["a.tsv"] = {"size": None, "sha256": None}
    lab.register()
    with pytest.raises(
        UserError, match=r"a\.tsv: came by another entry: .* download small --relock fetches it anew"
    ):
        get()
    lab.a = lab.a[::-1]
    lab.changes["a.tsv"] = {}
    lab.publish()
    with pytest.raises(UserError, match=r"a\.tsv: has sha256 .*: the registry knows another file than when"):
        get()
    assert content_of(folder)["a.tsv"] == lab.a[::-1]
    assert content_of(get(relock=True))["a.tsv"] == lab.a


# --- offline, others' caches, several at once -----------------------------------------------------------


@pytest.mark.parametrize("variable", ["CELLFORMERS_OFFLINE", "HF_HUB_OFFLINE"])
def test_offline(lab: Lab, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(
        UserError, match=f"small is not complete in .*, and {variable} forbids to fetch it; unset"
    ):
        get()
    assert lab.hub.asked == []
    by_hand = home() / "manual" / "small"
    by_hand.mkdir(parents=True)
    (by_hand / "a.tsv").write_bytes(lab.a)
    lab.changes["b.tsv"] = {"needed": False}
    lab.register()
    assert set(content_of(get())) == {"a.tsv"}
    monkeypatch.delenv(variable)
    assert set(content_of(get(relock=True))) == {"a.tsv", "b.tsv"}
    monkeypatch.setenv(variable, "true")
    assert set(content_of(get(verify=True))) == {"a.tsv", "b.tsv"}


def test_a_cache_that_belongs_to_others(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = get()
    os.utime(folder / "a.tsv", (0, 0))

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("cellformers.io.locks.os.open", refused)
    assert get() == folder
    assert content_of(get(tmp_path / "small"))["a.tsv"] == lab.a


SCRIPT = "from cellformers.deposits import download_deposit; print(download_deposit('small'))"


def test_two_at_once(lab: Lab) -> None:
    lab.hub.delay = 0.02
    first = subprocess.Popen(
        [sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(get())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    out, err = first.communicate(timeout=60)
    assert (out, err) == (f"{folders[0]}\n", "")
    assert len(folders) == 2
    assert content_of(folders[0]) == {"a.tsv": lab.a, "b.tsv": lab.b}
    assert lab.hub.times("a.tsv") == lab.hub.times("b.tsv") == 1


def test_a_lock_file_that_somebody_changed(lab: Lab) -> None:
    get()
    path = home() / "deposits.lock.json"
    for files, folder in (
        ({"small/b.tsv": 3}, {}),
        ({"small/b.tsv": {"size": 3}}, {}),
        ({}, {"b.tsv": {"size": 3, "sha256": "ab"}}),
        ({}, ["b.tsv"]),
    ):
        path.write_text(json.dumps({"files": files, "folders": {"deposits/small": folder}}))
        with pytest.raises(
            UserError, match=r"deposits\.lock\.json: holds records that are none of.*; remove it"
        ):
            get()
    path.unlink()
    assert content_of(get()) == {"a.tsv": lab.a, "b.tsv": lab.b}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"<!DOCTYPE html>\n<html>maintenance</html>", "is a web page, not the file"),
        (b"\xef\xbb\xbf \n<HTML><body>sign in", "is a web page, not the file"),
        (b'<?xml version="1.0"?><Error>', "is a web page, not the file"),
    ],
)
def test_a_page_in_place_of_a_file_is_not_locked(lab: Lab, content: bytes, words: str) -> None:
    """A server that answers with a page and status 200, where no digest says that this is not the file."""
    whole, lab.b = lab.b, content
    lab.publish()
    with pytest.raises(UserError) as caught:
        get()
    by_hand = home() / "manual" / "small" / "b.tsv"
    assert f"{lab.hub.url}/data/b.tsv: {words}; " in str(caught.value)
    assert str(caught.value).endswith(f"put it at {by_hand}")
    assert list(content_of(home() / "deposits" / "small")) == ["a.tsv"]
    assert lock()["files"] == {}
    by_hand.parent.mkdir(parents=True)
    by_hand.write_bytes(content)
    with pytest.raises(UserError, match=f"{by_hand}: {words}; fetch it again$"):
        get()
    by_hand.unlink()
    lab.b = whole
    lab.publish()
    assert content_of(get()) == {"a.tsv": lab.a, "b.tsv": lab.b}


# --- by hand --------------------------------------------------------------------------------------------


def test_what_is_missing_is_said(lab: Lab) -> None:
    folder = lab.by_hand()
    with pytest.raises(UserError) as caught:
        get()
    assert str(caught.value) == (
        f"{folder}: small has to be fetched by hand, and the folder lacks c.tsv or a.tsv and b.tsv; sign in at "
        f"https://lab.org and fetch c.tsv, or a.tsv and b.tsv; put the files into {folder} and call again"
    )
    (folder / "a.tsv").write_bytes(lab.a)
    with pytest.raises(UserError, match=r"and the folder lacks b\.tsv; sign in"):
        get()
    assert lab.hub.asked == []


def test_what_is_there_is_taken(lab: Lab, tmp_path: Path, digests: list[str]) -> None:
    folder = lab.by_hand()
    (folder / "a.tsv").write_bytes(lab.a)
    (folder / "b.tsv").write_bytes(lab.b)
    (folder / "notes.txt").write_text("mine")
    output = get(tmp_path / "out")
    assert content_of(output) == {"a.tsv": lab.a, "b.tsv": lab.b}
    assert (output / "a.tsv").samefile(folder / "a.tsv")
    assert lock()["files"] == {
        "small/a.tsv": {"size": len(lab.a), "sha256": sha(lab.a)},
        "small/b.tsv": {"size": len(lab.b), "sha256": sha(lab.b)},
    }
    assert get() == folder
    get(tmp_path / "out")
    assert digests == ["a.tsv", "b.tsv"]  # once
    (folder / "c.tsv").write_bytes(b"all in one")
    assert content_of(get(tmp_path / "out")) == {"c.tsv": b"all in one"}  # the set that is named first


def test_what_was_tampered_with(lab: Lab) -> None:
    folder = lab.by_hand()
    (folder / "c.tsv").write_bytes(lab.a)
    get()
    flip(folder / "c.tsv")
    with pytest.raises(UserError) as caught:
        get()
    assert f"{folder / 'c.tsv'}: has sha256 " in str(caught.value)
    assert f"expected is {sha(lab.a)}; fetch it again; it was another one at the first use" in str(
        caught.value
    )
    assert (folder / "c.tsv").exists()
    get(relock=True)
    assert get() == folder
    (folder / "c.tsv").write_bytes(lab.a)
    with pytest.raises(UserError, match="cellformers download small --relock accepts it"):
        get()


def test_a_registered_file_by_hand(lab: Lab) -> None:
    """As the entries of simulated deposits are: what is fetched by hand has a known digest too."""
    folder = lab.by_hand()
    path = lab.resources / "datasets" / "small.yaml"
    entry = yaml.safe_load(path.read_text())
    entry["files"]["c.tsv"] |= {"size": len(lab.a), "sha256": sha(lab.a)}
    path.write_text(yaml.safe_dump(entry))
    (folder / "c.tsv").write_bytes(lab.a + b"x")
    with pytest.raises(UserError, match=r"c\.tsv: is 200,001 bytes, expected are 200,000; fetch it again$"):
        get()
    (folder / "c.tsv").write_bytes(bytes(len(lab.a)))
    for relock in (False, True):
        with pytest.raises(UserError, match=f"expected is {sha(lab.a)}; fetch it again$"):
            get(relock=relock)
    (folder / "c.tsv").write_bytes(lab.a)
    assert get() == folder
    assert lock()["files"] == {}


def test_the_words_for_scp1303(lab: Lab) -> None:
    """The entry of the package says in one line what to get, where, and where to put it."""
    with pytest.raises(UserError) as caught:
        download_deposit("scp1303")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{home() / 'manual' / 'scp1303'}: scp1303 has to be fetched by hand")
    for words in (
        "human_dcm_hcm_scportal_03.17.2022.h5ad",
        "singlecell.broadinstitute.org",
        "free registration",
    ):
        assert words in message


# --- a mirror -------------------------------------------------------------------------------------------


def test_addresses_of_a_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "https://me:secret@lab.org:8080/a%2Fb/c.tsv?download=1"
    monkeypatch.delenv("CELLFORMERS_MIRROR", raising=False)
    assert mirrored(url) == url
    monkeypatch.setenv("CELLFORMERS_MIRROR", "https://mirror.example/public/")
    assert mirrored(url) == "https://mirror.example/public/lab.org:8080/a%2Fb/c.tsv?download=1"
    for wrong in (
        "mirror.example", "file:///data", "https://", "https://me:pw@mirror.example", "https://[::1",
        "https://mirror.example:eighty", "https://my mirror/public",
    ):  # fmt: skip
        monkeypatch.setenv("CELLFORMERS_MIRROR", wrong)
        with pytest.raises(
            UserError, match=r"CELLFORMERS_MIRROR is .*, no address of a server; set it to https://"
        ):
            mirrored(url)


def test_every_open_deposit_comes_from_a_mirror(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """The addresses of the package's own entries; a file with another digest than the registered one is refused."""
    monkeypatch.setenv("CELLFORMERS_MIRROR", lab.hub.url)
    lab.hub.files["/zenodo.org/records/6347673/files/Collins_rCNV_2022.dosage_sensitivity_scores.tsv.gz"] = (
        b"scores"
    )
    assert list(content_of(download_deposit("collins2022", patience=FAST)).values()) == [b"scores"]
    path = "/static-content.springer.com/esm/art:10.1038/s41467-020-16106-x/MediaObjects/"
    lab.hub.files[path + "41467_2020_16106_MOESM4_ESM.csv"] = b"ranges"
    with pytest.raises(
        UserError, match="expected is d0f095bbdbe2e07b0e8c654831a531a8f40b4f4d63b74ad53b81efb583cda6ae"
    ):
        download_deposit("tf-range", patience=FAST)
    assert {asked.host for asked in lab.hub.asked} == {"127.0.0.1"}
    for name in set(deposit_names()) - {"scp1303", "small"}:
        lab.hub.asked.clear()
        for file in read_deposit(name).files.values():
            assert mirrored(str(file.url)).startswith(
                f"{lab.hub.url}/{str(file.url).removeprefix('https://')}"
            )


def test_a_mirror_sees_no_credentials(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = {"authorization": "Bearer hf_secret", "Cookie": "hf_secret", "X-Lab": "ours"}
    fetch(f"{lab.hub.url}/data/b.tsv", tmp_path / "b.tsv", headers=headers)
    assert "hf_secret" in str(lab.hub.asked[-1].headers)  # the host itself does
    monkeypatch.setenv("CELLFORMERS_MIRROR", lab.hub.url)
    lab.hub.files["/lab.org/b.tsv"] = lab.b
    lab.hub.asked.clear()
    fetch("https://lab.org/b.tsv", tmp_path / "c.tsv", headers=headers)
    assert read_url("https://lab.org/b.tsv", headers=headers) == lab.b
    for asked in lab.hub.asked:
        assert "hf_secret" not in str(asked.headers)
        assert asked.headers["X-Lab"] == "ours"
    lab.hub.failures = [401]
    with pytest.raises(
        UserError, match=r"/lab\.org/b\.tsv: .*401.*; the mirror that CELLFORMERS_MIRROR names has to"
    ):
        read_url("https://lab.org/b.tsv", headers=headers, denied="set HF_TOKEN")


def test_models_come_from_the_mirror_too(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    from cellformers.registry import download

    monkeypatch.setenv("CELLFORMERS_MIRROR", lab.hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(UserError, match="no such file on the server"):
        download("geneformer-v1-10m", patience=FAST)
    (asked,) = lab.hub.asked
    commit = "f45a6c7de57ff07f946f146c254da02a90e2cdf5"
    assert (
        asked.path == f"/huggingface.co/ctheodoris/Geneformer/resolve/{commit}/Geneformer-V1-10M/config.json"
    )
    assert "hf_secret" not in str(asked.headers)


# --- the command ----------------------------------------------------------------------------------------


@pytest.fixture
def command(lab: Lab) -> Callable[..., Any]:
    app = typer.Typer()
    app.command("download")(downloads.download)
    return lambda *arguments: CliRunner().invoke(app, list(map(str, arguments)))


def test_the_command(lab: Lab, command: Callable[..., Any], tmp_path: Path) -> None:
    rows = {line.split(" ")[0]: line for line in command("--list").stdout.splitlines()}
    assert {"geneformer-v2-104m", *deposit_names()} <= set(rows)
    assert rows["small"].split("  ")[0] == "small"
    assert rows["small"].rstrip().endswith("open     not verified  no")
    assert "A few cells" in rows["small"]
    assert "0.2 MB and more" in rows["small"]
    assert " by hand " in rows["scp1303"]
    assert rows["collins2022"].rstrip().endswith("CC-BY-4.0     no")
    ran = command("small")
    assert (ran.exit_code, ran.stdout) == (0, f"{home() / 'deposits' / 'small'}\n")
    assert ran.stderr.startswith(f"download small: {len(lab.a) + len(lab.b):,} bytes in 0:0")
    ran = command("small", "-o", tmp_path / "out", "--verify", "--quiet")
    assert (ran.exit_code, ran.stdout, ran.stderr) == (0, f"{tmp_path / 'out'}\n", "")
    assert [line for line in command("--list").stdout.splitlines() if re.match("small .* yes$", line)]
    assert command("small", "--relock", "--quiet").exit_code == 0


def test_the_command_refuses(command: Callable[..., Any]) -> None:
    for arguments, words in (
        (("small", "--revision", "main"), "the deposit small has no revisions; leave out --revision"),
        (("gse129906",), "no model or deposit 'gse129906' is registered; did you mean 'gse129096'?"),
        (("geneformer-v2-104",), "did you mean 'geneformer-v2-104m'?"),
        ((), "no model or deposit is named; cellformers download --list"),
    ):
        error = command(*arguments).exception
        assert isinstance(error, UserError)
        assert words in str(error)
