"""What a file is by its first bytes, before it is recorded as the right one.

    wrong_form(folder / "GSE155468_RAW.tar")      # None, or in which way it is none

Where no digest is known, whatever comes first would be locked: the page of a login or of a maintenance, which servers
send as if it were the file, or an empty file.
"""

import re
from pathlib import Path

from cellformers.deposits.archives import TAR_ERRORS, open_tar

_PAGE = re.compile(rb"\s*(<!doctype\s+html|<html|<head|<\?xml)", re.IGNORECASE)
_GZIP, _HDF5, _MTX, _MARK = b"\x1f\x8b", b"\x89HDF\r\n\x1a\n", b"%%MatrixMarket", b"\xef\xbb\xbf"
_STARTS = {
    ".h5ad": (_HDF5, "HDF5"),
    ".loom": (_HDF5, "HDF5"),
    ".mtx": (_MTX, "Matrix Market"),
}


def wrong_form(path: Path) -> str | None:
    """In which way a file is none of the kind that its name says, in words; None where it may be one.

    A name that ends in .gz may hold the unpacked file: browsers and proxies unpack on the way, and readers take both.
    """
    with path.open("rb") as file:
        head = file.read(1024)
    if not head:
        return "is empty"
    if _PAGE.match(head.removeprefix(_MARK)):
        return "is a web page, not the file"
    if path.suffix == ".gz" and head.startswith(_GZIP):
        return None
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix == ".tar" and not _is_tar(path):
        return "is no tar archive"
    start, kind = _STARTS.get(suffix, (b"", ""))
    return None if head.startswith(start) else f"is no {kind} file"


def _is_tar(path: Path) -> bool:
    try:
        with open_tar(path):
            return True
    except TAR_ERRORS:
        return False
