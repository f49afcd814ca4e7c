"""Offsets of the files in a tar, read from its headers: all common dialects, from any header on.

The writer of webdataset puts an extended (pax) header before each file, for fractions of a second in its time stamp, so
extended headers are the common case. Python's `tarfile` makes several objects per file and is 10 times slower.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from qlip.data.storage.chunked_reader import Fetch
from qlip.errors import QLIPError
from qlip.files import IMAGE_SUFFIXES

BLOCK = 512
ZEROS = bytes(BLOCK)
ANNOTATIONS = ("txt", "json", "cls")
"""Suffixes of the files that may lie beside an image: a caption, a record, a class number."""
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
        key: the path up to a dot of its last part, see `groups`.
        start: offset of the first header.
        files: suffix -> span, of the suffixes that are read.
        duplicate: a suffix that occurs more than once, or None.
        unused: names of files that are not read, though they end as images do.
    """

    key: str
    start: int
    files: dict[str, FileSpan]
    duplicate: str | None = None
    unused: list[str] = field(default_factory=list)

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

    A key ends at the first dot of the name: ``c.jpg`` and its mask ``c.seg.png`` are one sample. Where that finds no
    image, dots before other characters than letters are part of the key: ``IMG_1.5.jpg`` and ``IMG_1.6.jpg`` are two.
    The offset after the last sample is -1.
    """
    for near, after in _of_one_key(members, split_key):
        found = [_sample(near, split_key)]
        if found[0].image is None:
            found = [_sample(files, split_dotted) for files, _ in _of_one_key(iter(near), split_dotted)]
        yield from zip(found, [*(one.start for one in found[1:]), after], strict=True)


def _of_one_key(
    members: Iterator[Member], split: Callable[[str], tuple[str, str]]
) -> Iterator[tuple[list[Member], int]]:
    """Consecutive files of one key, each time with the offset of the next header, -1 at the end."""
    near: list[Member] = []
    for member in members:
        if near and split(member.name)[0] != split(near[0].name)[0]:
            yield near, member.start
            near = []
        near.append(member)
    if near:
        yield near, -1


def _sample(members: list[Member], split: Callable[[str], tuple[str, str]]) -> SampleFiles:
    sample = SampleFiles(split(members[0].name)[0], members[0].start, {})
    for member in members:
        suffix = split(member.name)[1]
        if suffix in IMAGE_SUFFIXES or suffix in ANNOTATIONS:
            if suffix in sample.files:
                sample.duplicate = suffix
            sample.files[suffix] = FileSpan(member.offset, member.size, member.check)
        elif suffix.rpartition(".")[2] in IMAGE_SUFFIXES:
            sample.unused.append(member.name)
    return sample


def split_key(name: str) -> tuple[str, str]:
    """Key and suffix, split at the first dot of the name: ``a.b/c.seg.png`` -> ``a.b/c``, ``seg.png``."""
    folder, slash, file = name.rpartition("/")
    stem, _, suffix = file.partition(".")
    return (folder + slash + stem).removeprefix("./"), suffix.lower()


def split_dotted(name: str) -> tuple[str, str]:
    """Key and suffix of a name with dots: ``a.b/c.5.png`` -> ``a.b/c.5``, ``png``; else as `split_key`."""
    key, suffix = split_key(name)
    if not suffix or suffix[0].isalpha() or "." not in suffix:
        return key, suffix
    return name.rpartition(".")[0].removeprefix("./"), suffix.rpartition(".")[2]


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
