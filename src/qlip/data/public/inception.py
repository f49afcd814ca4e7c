"""Weights of FID's Inception network (2015-12-05), from the page of its PyTorch port; no package carries them.

The checksum is the one that users of the file publish; its first eight digits are in the file's name.
"""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor

from qlip.data.public.builder import Builder, PublicDataset
from qlip.data.public.cache import verified_file
from qlip.data.public.fetch import ARCHIVES, fetch_page
from qlip.errors import QLIPError
from qlip.files import sha256_of

PAGE = "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
LICENCE = "Apache-2.0"
FILE = "inception.safetensors"


def build(builder: Builder) -> None:
    """Write the weights as safetensors, tensors as :func:`read_published` gives them."""
    fetched = fetch_page(PAGE, SHA256, builder.raw, quiet=builder.quiet)
    if fetched is None:
        name = PAGE.rpartition("/")[2]
        raise QLIPError(
            f"{PAGE}: cannot be reached, or is another file; check the network, or put {name} into a folder and set"
            f" {ARCHIVES} to it"
        )
    builder.save_weights(FILE, read_published(fetched.path))
    builder.sources.append(fetched)


def read_published(path: Path) -> dict[str, Tensor]:
    """The tensors of the published file, float32, without its classifier (``fc``).

    Args:
        path: the file; it is read only if its checksum is right.

    Returns:
        ``<torchvision's name>.conv.weight``, and ``.bn.weight``, ``.bias``, ``.running_mean``, ``.running_var``.

    Raises:
        QLIPError: no such file, or another one.
    """
    try:
        digest = sha256_of(path)
    except OSError as error:
        raise QLIPError(f"{path}: {error.strerror}; give {PAGE.rpartition('/')[2]}") from None
    if digest != SHA256:
        raise QLIPError(
            f"{path}: SHA-256 is {digest[:16]}..., that of FID's network is {SHA256[:16]}...; with other weights"
            " a distance is not FID"
        )
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise QLIPError(f"{path}: cannot be read ({type(error).__name__}); fetch it again") from None
    tensors = {name: tensor for name, tensor in found.items() if isinstance(tensor, Tensor)}
    return {
        name: tensor.float().contiguous()
        for name, tensor in tensors.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }


def read_weights(cache_dir: str | Path | None = None) -> dict[str, Tensor]:
    """The tensors from the cache, checked against the manifest's checksum.

    Raises:
        QLIPError: not fetched yet, or damaged.
    """
    return load_file(verified_file("inception", FILE, cache_dir))


DATASET = PublicDataset(
    "inception",
    "weights of the Inception network of FID, from the page of its PyTorch port: no package has them; no images",
    LICENCE,
    build,
    download=96_000_000,
    disk=88_000_000,
    weights={"inception": "the network without its classifier"},
    page=PAGE,
)
