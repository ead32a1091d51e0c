"""Archives: what is plain is unpacked to the byte, anything else is refused."""

import gzip
import io
import tarfile
from pathlib import Path

import pytest
from deposit_files import write_gz, write_tar

from cellformers.deposits.archives import gunzip, unpack_tar
from cellformers.errors import UserError

MEMBERS = {"GSM1_a.txt.gz": b"one", "GSM2_b.txt.gz": b"", "c-1+x.tsv": bytes(range(256)) * 40}


def anything(_: str) -> bool:
    return True


def scratch(folder: Path) -> Path:
    work = folder / "work"
    work.mkdir()
    return work


def test_plain_members_come_out_as_they_went_in(tmp_path):
    archive = write_tar(tmp_path / "RAW.tar", MEMBERS)
    found = unpack_tar(archive, scratch(tmp_path), expected=anything)
    assert {name: path.read_bytes() for name, path in found.items()} == MEMBERS
    assert sorted(p.name for p in (tmp_path / "work").iterdir()) == sorted(MEMBERS)


@pytest.mark.parametrize(
    "name",
    ["/etc/x", "../x", "a/../../x", "a/b", "./x", "..", ".hidden", "a\nb", "-rf", "a\\b", "x" * 50 + "/"],
)
def test_other_names_than_plain_ones_are_refused(tmp_path, name):
    archive = write_tar(tmp_path / "RAW.tar", {name: b"x"})
    with pytest.raises(UserError, match=r"no plain file name|a folder or a device"):
        unpack_tar(archive, scratch(tmp_path), expected=anything)
    assert list((tmp_path / "work").iterdir()) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["RAW.tar", "work"]


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE]
)
def test_links_folders_and_devices_are_refused(tmp_path, kind):
    with tarfile.open(tmp_path / "RAW.tar", "w") as tar:
        member = tarfile.TarInfo("innocent")
        member.type, member.linkname = kind, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(UserError, match="a link, a folder or a device"):
        unpack_tar(tmp_path / "RAW.tar", scratch(tmp_path), expected=anything)
    assert list((tmp_path / "work").iterdir()) == []


def test_unexpected_and_repeated_members_are_refused(tmp_path):
    archive = write_tar(tmp_path / "RAW.tar", MEMBERS)
    work = scratch(tmp_path)
    with pytest.raises(UserError, match=r"RAW\.tar: holds 'GSM2_b\.txt\.gz', which"):
        unpack_tar(archive, work, expected=lambda name: "GSM2" not in name)
    with tarfile.open(archive, "w") as tar:
        for content in (b"one", b"two"):
            member = tarfile.TarInfo("twice")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(UserError, match="holds 'twice' twice"):
        unpack_tar(archive, work, expected=anything)


def test_a_member_larger_than_its_archive_is_refused(tmp_path):
    member = tarfile.TarInfo("large")
    member.size = 1 << 40
    (tmp_path / "RAW.tar").write_bytes(member.tobuf() + bytes(1024))
    with pytest.raises(UserError, match="larger than the archive"):
        unpack_tar(tmp_path / "RAW.tar", scratch(tmp_path), expected=anything)


def test_cut_off_foreign_and_missing_archives_are_refused(tmp_path):
    archive = write_tar(tmp_path / "RAW.tar", {"a": bytes(5000)})
    archive.write_bytes(archive.read_bytes()[:3000])
    work = scratch(tmp_path)
    with pytest.raises(UserError, match=r"larger than the archive|cut off|not a readable tar"):
        unpack_tar(archive, work, expected=anything)
    two = write_tar(tmp_path / "two.tar", {"a": bytes(5000), "b": bytes(5000)})
    two.write_bytes(two.read_bytes()[:9000])
    (work / "a").unlink(missing_ok=True)
    with pytest.raises(UserError, match=r"cut off|not a readable tar"):
        unpack_tar(two, work, expected=anything)
    packed = write_gz(tmp_path / "RAW.tar.gz", write_tar(archive, MEMBERS).read_bytes())
    with pytest.raises(UserError, match="not a readable tar archive"):
        unpack_tar(packed, work, expected=anything)
    with pytest.raises(UserError, match="no such file"):
        unpack_tar(tmp_path / "absent.tar", work, expected=anything)


def test_gunzip_gives_the_bytes(tmp_path):
    content = bytes(range(256)) * 1000
    path = write_gz(tmp_path / "x.gz", content)
    path.write_bytes(
        path.read_bytes() + gzip.compress(b"tail")
    )  # several members in one file, as bgzip has them
    target = gunzip(path, tmp_path / "x", limit=len(content) + 4)
    assert target.read_bytes() == content + b"tail"


def test_gunzip_refuses_what_is_damaged_cut_off_or_too_large(tmp_path):
    content = bytes(200_000)
    path = write_gz(tmp_path / "x.gz", content)
    whole = path.read_bytes()
    target = tmp_path / "x"
    with pytest.raises(UserError, match="more than 199,999 bytes"):
        gunzip(path, target, limit=199_999)
    assert not target.exists()
    for broken in (
        whole[:-30],
        whole[:-8] + b"\0\0\0\0" + whole[-4:],
        b"plain text",
        whole[:60] + b"\xff" * 9,
    ):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="damaged or cut-off"):
            gunzip(path, target, limit=1 << 20)
        assert not target.exists()
