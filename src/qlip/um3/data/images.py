"""Images of documents by name: rows of a token dataset, or image files that are encoded when they are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.layout import Layout
from qlip.errors import QLIPError
from qlip.modeling.indices import regroup
from qlip.tokens.image_codec import ImageCodec, codec_of_process
from qlip.um3.config import UM3Config


def open_tokens(folder: str, config: UM3Config) -> TokenDataset:
    """Open a token dataset with a model's groups.

    Raises:
        QLIPError: no such dataset, or its tokens are not those of the model's QLIP.
    """
    info, bits = Layout(folder).read_info(), config.group_size * config.num_groups
    check_fingerprint(config, info.code_fingerprint, folder)
    if info.bits_per_token != bits:
        raise QLIPError(f"{folder}: its tokens have {info.bits_per_token} bits, the model's {bits}")
    if info.grid is not None and info.grid != config.grid:
        ours, theirs = (f"{one[0]} x {one[1]}" for one in (config.grid, info.grid))
        raise QLIPError(f"{folder}: its images have {theirs} tokens, the model's {ours}; tokenise them in its size")
    return TokenDataset(folder, config.group_size)


def check_fingerprint(config: UM3Config, fingerprint: str | None, name: str) -> None:
    """Refuse tokens of another QLIP than the model's.

    Args:
        config: of the model.
        fingerprint: code fingerprint of the QLIP that made the tokens; None is unknown, and passes.
        name: of the tokens, for the error.

    Raises:
        QLIPError: they are of another.
    """
    wanted = config.vision_fingerprint
    if None not in (wanted, fingerprint) and wanted != fingerprint:
        raise QLIPError(
            f"{name}: tokens of the QLIP {str(fingerprint)[:12]}, but the model's are of {config.vision_tower},"
            f" {str(wanted)[:12]}; tokenise the images with that one"
        )


def size_fault(indices: Tensor, config: UM3Config) -> str | None:
    """Say that an image of indices (N, K) is cut short or too long; None if it is whole."""
    if indices.shape == (config.num_tokens, config.num_groups):
        return None
    return f"has {len(indices):,} tokens, not the {config.num_tokens:,} of a whole image"


@dataclass(frozen=True)
class TokenImages:
    """Images of a token dataset by their keys; of several views of an image the first; pickles into workers.

    Attributes:
        dataset: with the model's groups.
        config: of the model.
    """

    dataset: TokenDataset
    config: UM3Config

    @cached_property
    def places(self) -> dict[str, int]:
        """Row of each image by its key."""
        keys = self.dataset.keys()
        return {key: row for row, key in zip(range(len(keys) - 1, -1, -1), reversed(keys), strict=True)}

    def __contains__(self, name: object) -> bool:
        return name in self.places

    def __call__(self, names: Sequence[str]) -> list[Tensor | str]:
        """See `qlip.um3.data.stored.ReadImages`."""
        found = self.dataset.indices([self.places[name] for name in names])
        faults = [size_fault(one, self.config) for one in found]
        return [
            one if fault is None else f"{name}: {fault}" for name, one, fault in zip(names, found, faults, strict=True)
        ]


@dataclass(frozen=True)
class FileImages:
    """Image files of a folder by their paths in it, encoded on the CPU when they are read; pickles into workers.

    Attributes:
        folder: of the files.
        config: of the model.
    """

    folder: Path
    config: UM3Config

    @property
    def codec(self) -> ImageCodec:
        """The model's QLIP."""
        return codec_of_process(self.config.vision_tower)

    def check(self) -> None:
        """Check the folder, and load the QLIP.

        Raises:
            QLIPError: no such folder or QLIP, or another QLIP than the model's.
        """
        if not self.folder.is_dir():
            raise QLIPError(f"{self.folder}: no such folder; give the folder of the image files")
        check_fingerprint(self.config, self.codec.model.code_fingerprint, self.config.vision_tower)

    def __contains__(self, name: object) -> bool:
        return (self.folder / str(name)).is_file()

    @torch.no_grad()
    def __call__(self, names: Sequence[str]) -> list[Tensor | str]:
        """See `qlip.um3.data.stored.ReadImages`."""
        model, preprocessing = self.codec.model, self.codec.processor.preprocessing
        found = list[Tensor | str]()
        for name in names:
            try:
                image = preprocessing.resized(preprocessing.load(self.folder / name))
            except QLIPError as error:
                found.append(str(error))
                continue
            indices = model.encode(preprocessing.pixels(image)[None])[0]
            found.append(regroup(indices, self.config.group_size, from_group_size=model.group_size))
        return found
