"""Published ways to prepare images for a Frechet distance, by name; distances of different ones do not compare.

own        real images: shorter side resized (bicubic), centre crop; generated ones as they are; FID's own input
adm        real images: ADM's centre crop, which halves large images first; else as own (arXiv 2105.05233)
clean-fid  an .npz reference of clean-fid's mode clean; generated images as they are; clean-fid's input (2104.11222)
llamagen   real and generated ones: square centre crop, Lanczos to 256 pixels; clean-fid's input (GigaGAN's script)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from PIL import Image

from qlip.errors import QLIPError
from qlip.evaluation.networks.inception import Convention
from qlip.evaluation.run.datasets import preparation as described
from qlip.modeling import Preprocessing

Preparation = Literal["own", "adm", "clean-fid", "llamagen"]
CONVENTIONS: dict[Preparation, Convention] = {
    "own": "tensorflow",
    "adm": "tensorflow",
    "clean-fid": "clean-fid",
    "llamagen": "clean-fid",
}
"""Input of Inception."""
LLAMAGEN_SIDE = 256


@dataclass(frozen=True)
class SquareCrop(Preprocessing):
    """A square crop of the centre, by ADM's or LlamaGen's rule; ``size`` is the side twice."""

    rule: Literal["adm", "llamagen"] = "adm"

    def resized(
        self, image: Image.Image, keep_aspect: bool = False, size: tuple[int, int] | None = None
    ) -> Image.Image:
        """Resize and crop an RGB image; the other arguments are not used."""
        del keep_aspect, size
        side = self.size[0]
        return adm_crop(image, side) if self.rule == "adm" else llamagen_crop(image, side)


def adm_crop(image: Image.Image, side: int) -> Image.Image:
    """Crop as ADM does: halve (box) while the shorter side is twice the target, resize (bicubic), take the centre."""
    while min(image.size) >= 2 * side:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = side / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def llamagen_crop(image: Image.Image, side: int) -> Image.Image:
    """Crop as LlamaGen's and GigaGAN's scripts do: the largest square in the centre, then Lanczos."""
    short = min(image.size)
    left, top = round((image.width - short) / 2), round((image.height - short) / 2)
    return image.crop((left, top, left + short, top + short)).resize((side, side), Image.Resampling.LANCZOS)


def real_images(name: Preparation, size: tuple[int, int]) -> tuple[Preprocessing, str]:
    """Return the preparation of real images, and its description.

    Args:
        name: of the way.
        size: (height, width) in pixels.

    Raises:
        QLIPError: a way for square images and another size, or one that has no rule for real images.
    """
    if name == "own":
        prepared = Preprocessing(size, max(size) if size[0] == size[1] else None)
        return prepared, described(prepared)
    if name == "clean-fid":
        raise QLIPError("preparation clean-fid takes its reference from an .npz file of mode clean; else use llamagen")
    height, width = size
    if height != width:
        raise QLIPError(f"preparation {name} is for square images, these have {width} x {height} pixels")
    return SquareCrop(size, None, rule=name), f"{width}x{height}, {described_rule(name)}"


def generated_images(name: Preparation) -> SquareCrop | None:
    """Return the preparation of generated images; None leaves them as they are."""
    return SquareCrop((LLAMAGEN_SIDE, LLAMAGEN_SIDE), None, rule=name) if name == "llamagen" else None


def described_rule(name: Literal["adm", "llamagen"]) -> str:
    """Rule of a square crop in words."""
    return "ADM's centre crop" if name == "adm" else "centre crop, then Lanczos, as LlamaGen"
