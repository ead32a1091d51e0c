"""How much memory a Parquet file asks for, by its own words, before any of it is unpacked.

A file of some kilobytes may hold a page of two gigabytes of zeros, a billion rows of one run, or a million rows that
name one long text. Arrow takes what the headers of pages say, so they are read first: 20 µs a page, of which there is
one a megabyte.
"""

import mmap
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

ROOM = 1 << 30  # bytes that any file may ask for
RATIO = 500  # times its own size, that a larger one may: tables of cells with many like labels come to some ten times
MAX_PAGES = 5_000_000
_CODECS = {"SNAPPY": "snappy", "GZIP": "gzip", "BROTLI": "brotli", "ZSTD": "zstd", "LZ4": "lz4_raw"}
_DICTIONARY = 2  # type of a page
WIDTH = 8  # bytes of a value, or of its place, whatever it is


class _Page(NamedTuple):
    """A page by its header: its type, where its content is and how large, packed and unpacked, and its values."""

    kind: int
    start: int
    packed: int
    unpacked: int
    n_values: int


def asked_for(path: Path, file: pq.ParquetFile) -> dict[str, int]:
    """Bytes that each column of a Parquet file takes in memory, at most or nearly so, by its name.

    Raises
    ------
    ValueError
        If the file is damaged, or one of its columns asks for more than `RATIO` times what it takes on disk and
        more than `ROOM`.
    """
    status = path.stat()
    return dict(_asked_for(path, (status.st_ino, status.st_size, status.st_mtime_ns), _Metadata(file.metadata)))


class _Metadata:
    """The footer of a file, which is no part of what makes two calls alike."""

    def __init__(self, content: pq.FileMetaData) -> None:
        self.content = content

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Metadata)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=4096)
def _asked_for(path: Path, state: tuple[int, int, int], metadata: _Metadata) -> Counter[str]:
    found: Counter[str] = Counter()
    footer, size = metadata.content, state[1]
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            if group.num_rows < 0:
                raise ValueError("a row group of fewer than no rows")
            for place in range(group.num_columns):
                column = group.column(place)
                bytes_ = _of_column(data, column, group.num_rows, footer.schema.column(place).length)
                if bytes_ > most(max(column.total_compressed_size, 0)):
                    raise ValueError(
                        f"column {column.path_in_schema!r} would take {bytes_ / 1e9:.1f} GB of memory, "
                        f"the file has {size:,} bytes"
                    )
                found[column.path_in_schema.partition(".")[0]] += bytes_
    return found


def most(size: int) -> int:
    """Bytes that may come out of `size` bytes on disk."""
    return max(ROOM, RATIO * size)


def _of_column(data: mmap.mmap, column: pq.ColumnChunkMetaData, n_rows: int, length: int) -> int:
    """Bytes that a column of a row group takes, unpacked and decoded."""
    pages = _pages(data, column)
    n_values = max(column.num_values, n_rows, sum(page.n_values for page in pages if page.kind != _DICTIONARY))
    unpacked = sum(page.unpacked for page in pages)
    if column.physical_type == "FIXED_LEN_BYTE_ARRAY":
        return unpacked + n_values * max(length, WIDTH)
    decoded = unpacked + n_values * WIDTH
    if column.physical_type != "BYTE_ARRAY":
        return decoded
    words = next((page for page in pages if page.kind == _DICTIONARY), None)
    if words is not None:
        longest = words.unpacked
        if decoded + n_values * longest > ROOM:  # worth a closer look
            longest = _longest(data[words.start : words.start + words.packed], words, column.compression)
        decoded += n_values * longest
    if "DELTA_BYTE_ARRAY" in column.encodings:  # a text may repeat all of the one before it
        decoded += n_values * max((page.unpacked for page in pages), default=0)
    return decoded


def _pages(data: mmap.mmap, column: pq.ColumnChunkMetaData) -> list[_Page]:
    """The pages of a column of a row group; ValueError where they are not within the file."""
    if not column.total_compressed_size:
        return []
    # a column without values may have a dictionary and no other page
    starts = [column.data_page_offset] if column.data_page_offset or column.num_values else []
    if column.has_dictionary_page and column.dictionary_page_offset:
        starts.append(column.dictionary_page_offset)
    if not starts:
        return []
    at = min(starts)
    end = at + column.total_compressed_size
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
    inner = next((header[key] for key in (5, 7, 8) if isinstance(header.get(key), dict)), {})
    sizes = [header.get(3), header.get(2), inner.get(1, 0)]
    if not all(isinstance(size, int) and size >= 0 for size in sizes):
        raise ValueError("a page of fewer than no bytes")
    return _Page(int(header.get(1, 0)), start, *map(int, sizes))


def _longest(content: bytes, page: _Page, compression: str) -> int:
    """Bytes of the longest text of a dictionary page."""
    if page.unpacked > ROOM:
        return page.unpacked
    if compression != "UNCOMPRESSED":
        if compression not in _CODECS:
            return page.unpacked
        try:
            content = pa.decompress(
                content, decompressed_size=page.unpacked, codec=_CODECS[compression], asbytes=True
            )
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"a damaged dictionary ({error})") from error
    longest = at = 0
    while at + 4 <= len(content):
        length = int.from_bytes(content[at : at + 4], "little")
        longest, at = max(longest, length), at + 4 + length
    return min(longest, page.unpacked)


# --- Thrift's compact protocol, as far as headers of pages need it ----------------------------------------


class _TooShortError(Exception):
    """The bytes end within a header."""


def _struct(data: bytes, offset: int) -> tuple[dict[int, Any] | None, int]:
    """Fields of the struct at the beginning of `data`, None where that is too short; where in the file it ends."""
    reader = _Reader(data)
    try:
        fields = reader.struct(0)
    except _TooShortError:
        return None, offset
    return fields, offset + reader.at


class _Reader:
    """Reads whole numbers and structs, and passes over everything else."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

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

    def _pass_over(self, n: int) -> None:
        self.at += n
        if self.at > len(self.data):
            raise _TooShortError

    def struct(self, depth: int) -> dict[int, Any]:
        """Fields by their number."""
        if depth > 8:
            raise ValueError("a header in a header in a header")
        fields: dict[int, Any] = {}
        number = 0
        while True:
            head = self._byte()
            if head == 0:
                return fields
            number = number + (head >> 4) if head >> 4 else self._number()
            fields[number] = self._value(head & 0x0F, depth)

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (1, 2):
            return kind == 1
        if kind == 3:
            return self._byte()
        if kind in (4, 5, 6):
            return self._number()
        if kind == 7:
            return self._pass_over(8)
        if kind == 8:
            return self._pass_over(self._varint())
        if kind == 12:
            return self.struct(depth + 1)
        raise ValueError("a header of an unknown form")
