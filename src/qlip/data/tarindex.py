"""What lies where in a tar file, from its headers: quickly for plain ones, else by tarfile."""

from __future__ import annotations

import mmap
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

from qlip.errors import QLIPError

BLOCK = 512
Member = tuple[str, int, int]  # name, offset of the data, size


def members(path: Path) -> list[Member]:
    """The regular files in an uncompressed tar, in order.

    Raises:
        QLIPError: no such file, not a tar, or a truncated one.
    """
    try:
        found = _plain_members(path)
        return list(_any_members(path)) if found is None else found
    except tarfile.ReadError as error:
        what = "truncated" if "unexpected end" in str(error) else f"not an uncompressed tar file ({error})"
        raise QLIPError(f"{path}: {what}; fetch or write it again") from None
    except OSError as error:
        raise QLIPError(f"{path}: {error.strerror or error}; check the path") from None


def _plain_members(path: Path) -> list[Member] | None:
    """Members of a tar of nothing but plain ustar headers, as most shards are; None if it is anything else.

    tarfile makes an object a header and takes ten times as long, which for shards by the hundred is minutes.
    """
    found: list[Member] = []
    with open(path, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        if length < BLOCK:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            offset = 0
            while offset + BLOCK <= length:
                header = data[offset : offset + BLOCK]
                if header[0] == 0:
                    return found if header == bytes(BLOCK) else None
                member = _plain_member(header, offset)
                if member is None:
                    return None
                found.append(member)
                offset = member[1] + -(-member[2] // BLOCK) * BLOCK
    return None  # no end mark: tarfile finds the words for it


def _plain_member(header: bytes, offset: int) -> Member | None:
    kind, magic = header[156:157], header[257:263]
    if kind not in (b"0", b"\0") or magic not in (b"ustar\0", b"ustar ", b"\0\0\0\0\0\0"):
        return None
    try:
        size, checksum = int(header[124:135], 8), int(header[148:156].rstrip(b"\0 "), 8)
        name = header[:100].rstrip(b"\0").decode()
        prefix = header[345:500].rstrip(b"\0").decode() if magic == b"ustar\0" else ""
    except (ValueError, UnicodeDecodeError):
        return None
    if sum(header) - sum(header[148:156]) + 8 * 32 != checksum or "\0" in name or name.endswith("/"):
        return None
    return (f"{prefix}/{name}" if prefix else name, offset + BLOCK, size)


def _any_members(path: Path) -> Iterator[Member]:
    with tarfile.open(path, "r:") as tar:
        for member in tar:
            if member.isfile() and not member.issparse():
                yield member.name, member.offset_data, member.size
        end = tar.offset
    # tarfile takes a broken header in the middle for the end: only the mark of zeros is the end
    with open(path, "rb") as file:
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK):
            raise QLIPError(f"{path}: truncated, it has no end-of-archive mark; fetch or write it again")
