"""Archives that ask for paths elsewhere, links, devices, or more than a disk has."""

import gzip
import io
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import forked
import pytest

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
