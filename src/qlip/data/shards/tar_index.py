"""Offsets of the files in a tar, read from its headers: all common dialects, from any header on.

The writer of webdataset puts an extended (pax) header before each file, for fractions of a second in its time stamp, so
extended headers are the common case. Python's `tarfile` makes several objects per file and is 10 times slower.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from qlip.data.sources.base import IMAGE_SUFFIXES
from qlip.data.storage.chunked_reader import Fetch
from qlip.errors import QLIPError

BLOCK = 512
ZEROS = bytes(BLOCK)
COMPRESSED = (b"\x1f\x8b", b"BZ", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
PLAIN, LONG_NAME, LONG_LINK, EXTENDED, GLOBAL = b"0\0" + b"7", b"L", b"K", b"x", b"g"
WITHOUT_DATA = b"123456"  # links, devices, folders, pipes: their size field is ignored


class Member(NamedTuple):
    """A regular file in a tar.

    Attributes:
        name: name as stored.
        start: offset of its first header, an extended one included.
        offset: of its data; the header proper is the block before.
        size: bytes of its data.
        check: CRC-32 of the header proper.
    """

    name: str
    start: int
    offset: int
    size: int
    check: int


class FileSpan(NamedTuple):
    """Offset and size of one file of a sample, and the CRC-32 of its header, which is the block before."""

    offset: int
    size: int
    check: int


@dataclass
class SampleFiles:
    """Files of one key: an image and its annotation.

    Attributes:
        key: the path up to the first dot of its last part.
        start: offset of the first header.
        files: suffix -> span, of the suffixes that are read.
        duplicate: a suffix that occurs more than once, or None.
    """

    key: str
    start: int
    files: dict[str, FileSpan]
    duplicate: str | None = None

    @property
    def image(self) -> FileSpan | None:
        """Span of the image file, or None."""
        return next((self.files[suffix] for suffix in IMAGE_SUFFIXES if suffix in self.files), None)


def walk(fetch: Fetch, length: int, where: str, start: int = 0) -> Iterator[Member]:
    """Iterate over the regular files of an uncompressed tar, from the header at `start` on.

    Args:
        fetch: reads the tar.
        length: size of the tar in bytes.
        where: name of the tar in errors.
        start: offset of the first header to read.

    Raises:
        QLIPError: not a tar, or a truncated or broken one.
    """
    offset, first, name, size, sparse = start, start, None, None, False
    while True:
        header = fetch(offset, BLOCK)
        if len(header) < BLOCK:
            if offset == 0:
                raise _not_a_tar(where, header)
            raise QLIPError(f"{where}: truncated, it has no end-of-archive mark; fetch or write it again")
        if header == ZEROS:
            return
        if not _sound(header):
            raise _not_a_tar(where, header) if offset == 0 else _broken(where, offset)
        kind, stated = header[156:157], _number(header[124:136])
        if stated is None:
            raise _broken(where, offset)
        data = offset + BLOCK
        if kind in (EXTENDED, LONG_NAME):
            after = _end(data, stated, length, where)
            body = fetch(data, stated)
            if kind == LONG_NAME:
                name = body.rstrip(b"\0").decode("utf-8", "surrogateescape")
            else:
                records = _records(body, where, offset)
                name, size = records.get("path", name), int(records["size"]) if "size" in records else size
                sparse = sparse or any(record.startswith("GNU.sparse") for record in records)
            offset = after
            continue
        if kind in (GLOBAL, LONG_LINK):
            offset = _end(data, stated, length, where)
            continue
        count = 0 if kind in WITHOUT_DATA else stated if size is None else size
        after = _end(data, count, length, where)
        if kind in PLAIN:
            name = _name(header) if name is None else name
            if not sparse and not name.endswith("/"):
                yield Member(name, first, data, count, zlib.crc32(header))
        elif kind == b"S":
            raise QLIPError(f"{where}: holds a sparse file; write it again without")
        offset = first = after
        name, size, sparse = None, None, False


def groups(members: Iterator[Member]) -> Iterator[tuple[SampleFiles, int]]:
    """Group consecutive files of one key, as webdataset does; yield each group with the offset of the next header.

    The offset after the last sample is -1.
    """
    group: SampleFiles | None = None
    for member in members:
        key, suffix = split_key(member.name)
        if group is None or key != group.key:
            if group is not None:
                yield group, member.start
            group = SampleFiles(key, member.start, {})
        if suffix in IMAGE_SUFFIXES or suffix in ("txt", "json"):
            if suffix in group.files:
                group.duplicate = suffix
            group.files[suffix] = FileSpan(member.offset, member.size, member.check)
    if group is not None:
        yield group, -1


def split_key(name: str) -> tuple[str, str]:
    """Key and suffix, split at the first dot of the name: ``a.b/c.seg.png`` -> ``a.b/c``, ``seg.png``."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return (folder + slash + stem).removeprefix("./"), suffix.lower()


def _sound(header: bytes) -> bool:
    """Check the header's checksum: the sum of its bytes, with blanks for the eight bytes of the checksum itself."""
    try:
        stated = int(header[148:156].rstrip(b"\0 "), 8)
    except ValueError:
        return False
    return sum(header) - sum(header[148:156]) + 8 * 32 == stated


def _number(field: bytes) -> int | None:
    """Value of a size field: octal or, if its first bit is set, binary."""
    if field[0] & 0x80:
        return int.from_bytes(bytes([field[0] & 0x7F]) + field[1:], "big")
    try:
        return int(field.rstrip(b"\0 ") or b"0", 8)
    except ValueError:
        return None


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape")


def _records(body: bytes, where: str, offset: int) -> dict[str, str]:
    r"""Records of an extended header: "LENGTH KEY=VALUE\n", LENGTH being the bytes of the whole record."""
    records, at = {}, 0
    while at < len(body) and body[at]:
        blank = body.find(b" ", at)
        if blank < 0 or not body[at:blank].isdigit() or (end := at + int(body[at:blank])) <= blank:
            raise _broken(where, offset)
        key, _, value = body[blank + 1 : end - 1].partition(b"=")
        records[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        at = end
    if not records.get("size", "0").isdigit():
        raise _broken(where, offset)
    return records


def _end(data: int, size: int, length: int, where: str) -> int:
    """Offset after a member's data."""
    if data + size > length:
        raise QLIPError(f"{where}: truncated, {data + size - length} bytes of it are missing; fetch or write it again")
    return data + -(-size // BLOCK) * BLOCK


def _not_a_tar(where: str, header: bytes) -> QLIPError:
    if header.startswith(COMPRESSED):
        return QLIPError(f"{where}: not an uncompressed tar file (it is compressed); unpack it to a plain .tar")
    if len(header) and header[257:262] == b"ustar":
        return QLIPError(f"{where}: truncated; fetch or write it again")
    return QLIPError(f"{where}: not an uncompressed tar file; fetch or write it again")


def _broken(where: str, offset: int) -> QLIPError:
    return QLIPError(f"{where}: truncated or broken, no header at byte {offset}; fetch or write it again")
