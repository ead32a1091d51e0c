"""Archives that ask for paths elsewhere, links, devices, or more than a disk has."""

import gzip
import io
import stat
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import count_targets
import forked
import pytest
from hostile_cases import COMPILED

from cellformers.deposits.archives import gunzip, unpack_tar
from cellformers.deposits.forms import wrong_form

NAME = "GSM1_a.txt.gz"


def expected(name: str) -> bool:
    return name.startswith("GSM")


def member(name: str, content: bytes = b"x", **changes: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for key, value in changes.items():
        setattr(info, key, value)
    return info, content


def packed(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.GNU_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def header(kind: bytes, size: int, name: bytes = b"x") -> bytes:
    """A tar header of a type that claims a size, in the binary form that sizes above 8 GB have."""
    info = tarfile.TarInfo(name.decode())
    info.type, info.size = kind, size
    return info.tobuf(tarfile.GNU_FORMAT)


def pax(**records: str) -> bytes:
    info, content = member(NAME)
    info.pax_headers = records
    return packed((info, content), form=tarfile.PAX_FORMAT)


TARS: dict[str, Callable[[], bytes]] = {
    "an absolute path": lambda: packed(member("/GSM1_a.txt.gz")),
    "a path upwards": lambda: packed(member("../GSM1_a.txt.gz")),
    "a path upwards within": lambda: packed(member("GSM/../../GSM1_a.txt.gz")),
    "a folder": lambda: packed(member("GSM1", type=tarfile.DIRTYPE)),
    "a path into a folder": lambda: packed(member("GSM1/a")),
    "a symbolic link": lambda: packed(member(NAME, b"", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "a link and a member through it": lambda: packed(
        member("GSM1", b"", type=tarfile.SYMTYPE, linkname="/tmp"), member("GSM1/a")
    ),
    "a hard link": lambda: packed(member(NAME, b"", type=tarfile.LNKTYPE, linkname="../x")),
    "a hard link to a member": lambda: packed(
        member(NAME), member("GSM2", b"", type=tarfile.LNKTYPE, linkname=NAME)
    ),
    "a device": lambda: packed(member(NAME, b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3)),
    "a pipe": lambda: packed(member(NAME, b"", type=tarfile.FIFOTYPE)),
    "a sparse file": lambda: packed(member(NAME, b"", type=tarfile.GNUTYPE_SPARSE)),
    "a sparse file of a terabyte": lambda: pax(
        **{"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40)}
    ),
    "a name with a newline": lambda: packed(member("GSM1\na")),
    "a name with a tab": lambda: packed(member("GSM1\ta")),
    "a name with a NUL in its header": lambda: pax(path="GSM1\0a"),
    "a name with escapes": lambda: packed(member("GSM1\x1b[2Ja")),
    "a name of blanks": lambda: packed(member("GSM1 a")),
    "a name like an option": lambda: packed(member("-GSM1")),
    "a hidden name": lambda: packed(member(".GSM1")),
    "a long name": lambda: packed(member("GSM" + "x" * 5000)),
    "no name": lambda: packed(member("")),
    "a path by its extended header": lambda: pax(path="../../GSM1"),
    "a size by its extended header": lambda: pax(size=str(1 << 50)),
    "a negative size": lambda: pax(size="-1"),
    "a size that is none": lambda: pax(size="x"),
    "a member of 2**60 bytes": lambda: header(tarfile.REGTYPE, 1 << 60, NAME.encode()) + b"x" * 512,
    "a long name of 2**60 bytes": lambda: header(tarfile.GNUTYPE_LONGNAME, 1 << 60) + b"x" * 512,
    "a long name of 3 GB": lambda: header(tarfile.GNUTYPE_LONGNAME, 3 << 30) + b"x" * 512,
    "an extended header of 3 GB": lambda: header(tarfile.XHDTYPE, 3 << 30) + b"x" * 512,
    "a global header of 3 GB": lambda: header(tarfile.XGLTYPE, 3 << 30) + b"x" * 512,
    "long names of long names": lambda: header(tarfile.GNUTYPE_LONGNAME, 512) * 3000,
    "the same member twice": lambda: packed(member(NAME), member(NAME)),
    "twenty thousand members": lambda: packed(*(member(f"x{i}", b"") for i in range(20_000))),
    "a compressed archive": lambda: gzip.compress(packed(member(NAME))),
    "an archive of zip": lambda: _zip(),
    "nothing": lambda: b"",
    "zeros": lambda: bytes(10_240),
}  # fmt: skip


HARMLESS = {"zeros": [], "a size that is none": [NAME]}  # an archive of nothing; an empty member


def _zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../GSM1", "x")
    return out.getvalue()


def unpack(folder: Path) -> list[str]:
    """Names of what came out."""
    work = folder / "work"
    work.mkdir()
    wrong_form(folder / "x.tar")
    return sorted(unpack_tar(folder / "x.tar", work, expected=expected))


@pytest.mark.parametrize("name", sorted(TARS))
def test_hostile_tars_are_refused_and_leave_nothing_elsewhere(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "deposit"
    folder.mkdir()
    (folder / "x.tar").write_bytes(TARS[name]())
    outcome = forked.run(unpack, folder, writable=folder)
    assert not outcome.deeds
    if name in HARMLESS:
        assert (outcome.kind, outcome.value) == ("value", HARMLESS[name])
    else:
        assert outcome.kind == "user_error", outcome
        assert outcome.text.isprintable()
    assert [path.name for path in tmp_path.iterdir()] == ["deposit"]
    assert all(path.is_file() and not path.is_symlink() for path in (folder / "work").iterdir())
    assert sum(path.stat().st_size for path in (folder / "work").iterdir()) < 1 << 20


def test_an_archive_in_an_archive_stays_packed(tmp_path: Path) -> None:
    inner = packed(member("../GSM9"))
    (tmp_path / "x.tar").write_bytes(packed(member("GSM1.tar", inner)))
    outcome = forked.run(unpack, tmp_path, writable=tmp_path)
    assert outcome.value == ["GSM1.tar"]
    assert (tmp_path / "work" / "GSM1.tar").read_bytes() == inner


def unpack_gz(folder: Path) -> int:
    return gunzip(folder / "x.gz", folder / "x", limit=1 << 20).stat().st_size


GZIPS: dict[str, Callable[[], bytes]] = {
    "a bomb": lambda: gzip.compress(bytes(64 << 20), 9),
    "a bomb of members": lambda: gzip.compress(bytes(1 << 20), 9) * 300,
    "a length that is not so": lambda: gzip.compress(b"x" * 100)[:-4] + struct.pack("<I", 7),
    "a name that never ends": lambda: b"\x1f\x8b\x08\x08" + bytes(6) + b"x" * 10_000_000,
    "a field of 64 kB that is not there": lambda: b"\x1f\x8b\x08\x04" + bytes(6) + b"\xff\xff",
    "members without content": lambda: gzip.compress(b"") * 200_000,
}


@pytest.mark.parametrize("name", sorted(GZIPS))
def test_hostile_gzip_files_leave_nothing(name: str, tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(GZIPS[name]())
    outcome = forked.run(unpack_gz, tmp_path, writable=tmp_path, memory_mb=512)
    if name == "members without content":
        assert outcome.kind in ("value", "user_error"), outcome
        return
    assert outcome.kind == "user_error", outcome
    assert not outcome.deeds
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.gz"]


# --- zarr stores in a zip ---------------------------------------------------------------------------------

LINK = (stat.S_IFLNK | 0o777) << 16


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], count_targets.Counts]:
    """The members of a zarr store in a zip, and its counts."""
    folder = tmp_path_factory.mktemp("store")
    count_targets.make_zarr_zip(folder)
    with zipfile.ZipFile(folder / "a.zarr.zip") as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist() if not info.is_dir()}
    return members, count_targets.read_zarr_zip(folder)


def zipped(path: Path, members: Mapping[str, bytes], *more: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    """A zip of some members, and after them of others."""
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore")  # of names that repeat
        for name, content in [*members.items(), *more]:
            archive.writestr(name, content)
    return path


def named(name: str, **changes: object) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.compress_type = zipfile.ZIP_DEFLATED
    for key, value in changes.items():
        setattr(info, key, value)
    return info


def read_zip(folder: Path) -> forked.Outcome:
    """How reading ends; nothing is written, and memory stays small."""
    before = sorted(folder.rglob("*"))
    outcome = forked.run(count_targets.read_zarr_zip, folder, writable=COMPILED)
    assert outcome.kind in ("value", "user_error"), outcome
    assert not outcome.deeds
    assert sorted(folder.rglob("*")) == before
    assert outcome.peak_mb < 300
    assert outcome.kind == "value" or "\n" not in outcome.text
    return outcome


ODD_MEMBERS = {
    "an absolute path": [("/etc/cellformers", b"x")],
    "an absolute path of the store": [("/X/zarr.json", b"{}"), ("/X/.zarray", b"{}")],
    "a path upwards": [("../outside", b"x"), ("X/../../outside", b"x")],
    "a path upwards to itself": [("X/../X/zarr.json", b"{}")],
    "a symbolic link": [(named("link", external_attr=LINK), b"/etc/passwd")],
    "a link to a folder, and a member through it": [
        (named("out", external_attr=LINK), b"/tmp"), ("out/cellformers", b"x"),
    ],
    "a name with a newline": [("X\n", b"x")],
    "a folder like a member": [("obs/", b"")],
    "a hundred thousand folders deep": [("d/" * 30_000 + "x", b"x")],
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_MEMBERS)
def test_odd_members_beside_those_of_a_store_do_no_harm(tmp_path, store, name):
    members, truth = store
    zipped(tmp_path / "a.zarr.zip", members, *ODD_MEMBERS[name])
    outcome = read_zip(tmp_path)
    assert outcome.kind == "user_error" or outcome.value == truth


def test_links_in_the_place_of_members_are_not_followed(tmp_path, store):
    """One at a time: where the metadata are stored once more, in one piece, some members are not asked for."""
    members, truth = store
    refused = 0
    for name in (".zgroup", ".zmetadata", "X/.zattrs", "X/data/.zarray", "X/indices/0"):
        assert name in members or name == ".zmetadata"
        others = {other: content for other, content in members.items() if other != name}
        zipped(tmp_path / "a.zarr.zip", others, (named(name, external_attr=LINK), b"/etc/passwd"))
        outcome = read_zip(tmp_path)
        assert outcome.kind == "user_error" or outcome.value == truth, name
        assert "root:" not in outcome.text
        refused += outcome.kind == "user_error"
    assert refused


def test_of_members_of_one_name_the_last_counts(tmp_path, store):
    """As in every zip that was added to; zarr itself adds its metadata twice."""
    members, truth = store
    zipped(tmp_path / "a.zarr.zip", dict.fromkeys(members, b"damaged"), *members.items())
    assert read_zip(tmp_path).value == truth
    zipped(tmp_path / "a.zarr.zip", members, *((name, b"damaged") for name in members))
    assert read_zip(tmp_path).kind == "user_error"


@pytest.mark.parametrize("name", ["chunk", "metadata"])
def test_a_member_that_unpacks_to_gigabytes_is_refused(tmp_path, store, name):
    """Of a store, and one that nobody asks for; also where the archive says that it is small."""
    members, truth = store
    place = max(
        members, key=lambda member: "X/data" in member and "json" not in member and ".z" not in member
    )
    if name == "metadata":
        place = next(member for member in members if member.endswith(("zarr.json", ".zgroup")))
    path = zipped(tmp_path / "a.zarr.zip", members, (place, b"x"))
    bomb(path, place, says=3 << 30)
    assert read_zip(tmp_path).kind == "user_error"
    bomb(path, place, says=len(members[place]))
    assert read_zip(tmp_path).kind == "user_error"
    zipped(path, members, ("unasked", b"x"))
    bomb(path, "unasked", says=100)
    outcome = read_zip(tmp_path)
    assert outcome.kind == "user_error" or outcome.value == truth


def bomb(path: Path, name: str, *, says: int) -> None:
    """Put 3 GB of zeros, deflated, in the place of the last member, which the directory says to have `says` bytes."""
    with zipfile.ZipFile(path) as archive:
        info = archive.infolist()[-1]
        directory = archive.start_dir
    assert info.filename == name
    data = path.read_bytes()
    first = data[: info.header_offset]
    record = bytearray(data[directory : data.rindex(b"PK\5\6")])
    at = record.rindex(b"PK\1\2")
    packed = DEFLATED_ZEROS
    header = struct.pack("<4s5H3I2H", b"PK\3\4", 20, 0, 8, 0, 33, 0, len(packed), says, len(name), 0)
    struct.pack_into("<2H", record, at + 8, 0, 8)
    struct.pack_into("<3I", record, at + 16, 0, len(packed), says)
    struct.pack_into("<I", record, at + 42, len(first))
    body = first + header + name.encode() + packed
    end = bytearray(data[data.rindex(b"PK\5\6") :])
    struct.pack_into("<2I", end, 12, len(record), len(body))
    path.write_bytes(body + record + end)


def _deflated_zeros() -> bytes:
    """3 GB of zeros: a piece that ends at a whole byte, again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = packer.compress(bytes(16 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return piece * (3 << 6) + packer.flush()


DEFLATED_ZEROS = _deflated_zeros()


def test_members_that_lie_over_each_other_cost_no_more_than_one(tmp_path, store):
    """Every entry of the directory leads to the same bytes, as in the bombs that overlap."""
    members, _ = store
    path = zipped(tmp_path / "a.zarr.zip", members)
    data = bytearray(path.read_bytes())
    at = data.find(b"PK\1\2")
    while at >= 0:
        struct.pack_into("<I", data, at + 42, 0)
        at = data.find(b"PK\1\2", at + 4)
    path.write_bytes(data)
    assert read_zip(tmp_path).kind == "user_error"


@pytest.mark.parametrize(("at", "value"), [(8, 1), (10, 99), (10, 9)])
def test_members_that_are_locked_or_packed_in_unknown_ways_are_refused(tmp_path, store, at, value):
    """The bit of encryption, and methods that there are not."""
    members, _ = store
    path = zipped(tmp_path / "a.zarr.zip", members)
    data = bytearray(path.read_bytes())
    place = data.find(b"PK\1\2")
    while place >= 0:
        struct.pack_into("<H", data, place + at, value)
        place = data.find(b"PK\1\2", place + 4)
    path.write_bytes(data)
    assert read_zip(tmp_path).kind == "user_error"
