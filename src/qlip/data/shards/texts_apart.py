"""Captions and labels of a tar that lie apart from their images, which a stream cannot join."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qlip.data.shards.tar_index import ANNOTATIONS, SampleFiles, groups, walk
from qlip.data.sources.base import printable
from qlip.data.storage.chunked_reader import Fetch
from qlip.data.storage.retry import StorageError
from qlip.errors import QLIPError


@dataclass
class TextsApart:
    """Finds captions and labels of a shard that lie apart from their images, which a stream cannot join."""

    keys: tuple[set[str], set[str]] = field(default_factory=lambda: (set(), set()))
    """Keys of images, and keys of annotations without an image."""

    def add(self, group: SampleFiles, found: list[str] | None) -> None:
        """Note a group's key; if its other files lie elsewhere in the shard, it is added to `found`."""
        images, texts = self.keys
        own, others = (texts, images) if group.image is None else (images, texts)
        if group.files:
            own.add(group.key)
        if group.files and group.key in others and found is not None and group.key not in found:
            found.append(group.key)


def apart_message(address: str, keys: Sequence[str]) -> str:
    """Return the message that names samples whose files do not lie together."""
    more = f" and {len(keys) - 3:,} more" if len(keys) > 3 else ""
    return (
        f"{address}: the files of {printable(', '.join(keys[:3]))}{more} do not lie together, and a stream does not"
        " join them; index the shard with `qlip data index` and read it without streaming, or sort its files"
    )


def key_apart(fetch: Fetch, length: int, address: str) -> str | None:
    """Return the key of an image whose texts lie apart from it, in a shard sorted by type; None in other shards.

    Headers are read up to the first image with a text beside it, as a rule the first image. Texts before the first
    image are compared with that image alone.
    """
    images, texts = set[str](), set[str]()
    try:
        for group, _ in groups(walk(fetch, length, address)):
            if group.image is not None:
                if not images and group.key in texts:
                    return group.key
                if group.files.keys() & set(ANNOTATIONS):
                    return None
                images.add(group.key)
            elif group.files:
                if group.key in images:
                    return group.key
                texts.add(group.key)
    except StorageError:
        raise
    except QLIPError:  # reading the samples meets the damage again, and names it
        pass
    return None
