"""How much memory a Parquet file asks for, by its own words, before any of it is unpacked.

A file of some kilobytes may hold a page of two gigabytes of zeros, a billion rows of one run, or a million rows that
name one long text. Arrow takes what the headers of pages say, and some damages of a footer end the process, so both
are read here first: some 20 µs a page, of which there is one a megabyte, and a column of a row group.
"""

import mmap
from collections import Counter
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

ROOM = 1 << 30  # bytes that any file may ask for
RATIO = 500  # times its own size, that a larger one may: tables of cells with many like labels come to some ten times
MAX_PAGES = 5_000_000
WIDTH = 8  # bytes of a value, or of its place, whatever it is
_MARK = b"PAR1"
# Numbers of the format: types of columns and pages, encodings, codecs.
_TEXT, _FIXED = 6, 7
_DICTIONARY = 2
_DELTA_TEXT = 7
_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}


class _Page(NamedTuple):
    """A page by its header: its type, where its content is and how large, packed and unpacked, and its values."""

    kind: int
    start: int
    packed: int
    unpacked: int
    n_values: int


class _Column(NamedTuple):
    """A column of a row group by the footer."""

    name: str
    kind: int
    length: int  # of values of a fixed length
    codec: int
    encodings: list[int]
    n_values: int
    start: int
    packed: int


def asked_for(path: Path) -> dict[str, int]:
    """Bytes that each column of a Parquet file takes in memory, at most or nearly so, by its name.

    Raises
    ------
    ValueError
        If the file is no Parquet or damaged, or one of its columns asks for more than `RATIO` times what it takes on
        disk and more than `ROOM`.
    """
    status = path.stat()
    return dict(_asked_for(path, (status.st_ino, status.st_size, status.st_mtime_ns)))


def most(size: int) -> int:
    """Bytes that may come out of `size` bytes on disk."""
    return max(ROOM, RATIO * size)


@lru_cache(maxsize=4096)
def _asked_for(path: Path, state: tuple[int, int, int]) -> Counter[str]:
    found: Counter[str] = Counter()
    if state[1] < 12:
        raise ValueError("it is too short")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        if data[:4] != _MARK or data[-4:] != _MARK:
            raise ValueError("it does not begin and end like one")
        length = int.from_bytes(data[-8:-4], "little")
        if length + 12 > len(data):
            raise ValueError("its footer is longer than the file")
        for n_rows, columns in _row_groups(data[len(data) - 8 - length : len(data) - 8]):
            for column in columns:
                bytes_ = _of_column(data, column, n_rows)
                if bytes_ > most(column.packed):
                    raise ValueError(
                        f"column {column.name!r} would take {bytes_ / 1e9:.1f} GB of memory, "
                        f"the file has {len(data):,} bytes"
                    )
                found[column.name] += bytes_
    return found


def _row_groups(footer: bytes) -> list[tuple[int, list[_Column]]]:
    """Number of rows and columns of every row group."""
    content, _ = _struct(footer, 0)
    if content is None:
        raise ValueError("its footer ends within a field")
    schema = [_fields(element) for element in content.get(2, ())]
    leaves = [element for element in schema[1:] if not element.get(5)]
    groups = []
    for group in content.get(4, ()):
        group = _fields(group)
        chunks, n_rows = group.get(1, ()), _size(group.get(3))
        if len(chunks) != len(leaves):
            raise ValueError("a row group of other columns than its schema")
        groups.append((n_rows, [_column(*pair) for pair in zip(map(_fields, chunks), leaves, strict=True)]))
    return groups


def _column(chunk: dict[int, Any], leaf: dict[int, Any]) -> _Column:
    about = _fields(chunk.get(3))
    if 1 in chunk:
        raise ValueError("a column in another file")
    starts = [_size(about[key]) for key in (9, 11) if about.get(key)]  # of data and dictionary
    path = about.get(3) or [b""]
    kind = leaf.get(1)
    if kind != about.get(1):
        raise ValueError("a column of another type than its schema")
    return _Column(
        path[0].decode("utf-8"), _size(kind), _size(leaf.get(2) or 0), _size(about.get(4)), list(about.get(2) or ()),
        _size(about.get(5)), min(starts, default=0), _size(about.get(7)),
    )  # fmt: skip


def _fields(value: Any) -> dict[int, Any]:
    if not isinstance(value, dict):
        raise ValueError("a field of another form in its footer")
    return value


def _size(value: Any) -> int:
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"a size of {value!r}")
    return value


def _of_column(data: mmap.mmap, column: _Column, n_rows: int) -> int:
    """Bytes that a column of a row group takes, unpacked and decoded."""
    pages = _pages(data, column)
    n_values = max(column.n_values, n_rows, sum(page.n_values for page in pages if page.kind != _DICTIONARY))
    unpacked = sum(page.unpacked for page in pages)
    if column.kind == _FIXED:
        return unpacked + n_values * max(column.length, WIDTH)
    decoded = unpacked + n_values * WIDTH
    if column.kind != _TEXT:
        return decoded
    words = next((page for page in pages if page.kind == _DICTIONARY), None)
    if words is not None:
        longest = words.unpacked
        if decoded + n_values * longest > ROOM:  # worth a closer look
            longest = _longest(data[words.start : words.start + words.packed], words, column.codec)
        decoded += n_values * longest
    if _DELTA_TEXT in column.encodings:  # a text may repeat all of the one before it
        decoded += n_values * max((page.unpacked for page in pages), default=0)
    return decoded


def _pages(data: mmap.mmap, column: _Column) -> list[_Page]:
    """The pages of a column of a row group; ValueError where they are not within the file."""
    if not column.packed:
        return []
    at, end = column.start, column.start + column.packed
    if not 0 < at <= end <= len(data):
        raise ValueError("a column outside the file")
    pages: list[_Page] = []
    while at < end:
        page = _page(data, at, end)
        pages.append(page)
        at = page.start + page.packed
        if at > end or len(pages) > MAX_PAGES:
            raise ValueError("a page outside its column")
    return pages


def _page(data: mmap.mmap, at: int, end: int) -> _Page:
    header, start = _struct(data[at : min(end, at + 256)], at)
    if header is None:  # with long texts as statistics
        header, start = _struct(data[at : min(end, at + (16 << 20))], at)
    if header is None:
        raise ValueError("a page without a header")
    inner: dict[int, Any] = next((header[key] for key in (5, 7, 8) if isinstance(header.get(key), dict)), {})
    packed, unpacked, n_values = (_size(size) for size in (header.get(3), header.get(2), inner.get(1, 0)))
    return _Page(_size(header.get(1, 0)), start, packed, unpacked, n_values)


def _longest(content: bytes, page: _Page, codec: int) -> int:
    """Bytes of the longest text of a dictionary page."""
    if page.unpacked > ROOM:
        return page.unpacked
    if codec:
        if codec not in _CODECS:
            return page.unpacked
        try:
            content = pa.decompress(
                content, decompressed_size=page.unpacked, codec=_CODECS[codec], asbytes=True
            )
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"a damaged dictionary ({error})") from error
    longest = at = 0
    while at + 4 <= len(content):
        length = int.from_bytes(content[at : at + 4], "little")
        longest, at = max(longest, length), at + 4 + length
    return min(longest, page.unpacked)


# --- Thrift's compact protocol ----------------------------------------------------------------------------


class _TooShortError(Exception):
    """The bytes end within a struct."""


def _struct(data: bytes, offset: int) -> tuple[dict[int, Any] | None, int]:
    """Fields of the struct at the beginning of `data`, None where that is too short; where in the file it ends."""
    reader = _Reader(data)
    try:
        fields = reader.struct(0)
    except _TooShortError:
        return None, offset
    return fields, offset + reader.at


class _Reader:
    """Reads structs as dicts of their fields by number, texts as bytes."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0
        number = self._number
        self._simple: dict[int, Callable[[], Any]] = {
            1: lambda: True, 2: lambda: False, 3: self._byte, 4: number, 5: number, 6: number,
            7: lambda: self._bytes(8), 8: lambda: self._bytes(self._varint()),
        }  # fmt: skip

    def _byte(self) -> int:
        if self.at >= len(self.data):
            raise _TooShortError
        self.at += 1
        return self.data[self.at - 1]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    def _number(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _bytes(self, n: int) -> bytes:
        self.at += n
        if self.at > len(self.data):
            raise _TooShortError
        return self.data[self.at - n : self.at]

    def struct(self, depth: int) -> dict[int, Any]:
        """Fields by their number."""
        if depth > 16:
            raise ValueError("a struct in a struct in a struct")
        fields: dict[int, Any] = {}
        number = 0
        while True:
            head = self._byte()
            if head == 0:
                return fields
            number = number + (head >> 4) if head >> 4 else self._number()
            fields[number] = self._value(head & 0x0F, depth)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in self._simple:
            return self._simple[kind]()
        if kind in (9, 10):
            return self._list(depth)
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError("a field of an unknown form")

    def _list(self, depth: int) -> list[Any]:
        head = self._byte()
        n, kind = head >> 4, head & 0x0F
        n = self._varint() if n == 15 else n
        if n > len(self.data):  # each takes a byte at least
            raise _TooShortError
        if kind in (1, 2):
            return [self._byte() == 1 for _ in range(n)]
        return [self._value(kind, depth + 1) for _ in range(n)]
