"""Preprocessing: images and text to tensors, and the model's pixels back to images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from qlip.errors import QLIPError
from qlip.files import write_text
from qlip.modeling.checkpoint import Files, push
from qlip.modeling.images import ColorProfiles, ImageInput, check_pixels, load_image, to_images
from qlip.modeling.tokenizer import CLIPTokenizer, Padding

Size = tuple[int, int]
"""Height and width in pixels."""

PREPARATION_RULES = 2
"""Version of what `Preprocessing.resized` and `load_image` do; raised when another rule makes other pixels.

1 rounded the longer side, and ignored colour profiles; 2 truncates it, as CLIP's processor does, and converts to sRGB.
"""
MAX_TOKENS = 16_384
"""Largest number of tokens of an image that keeps its aspect ratio; the cost of attention grows with its square."""
LARGEST_RESIZE = 4096 * 4096
"""Pixels of a resized image above which only its centre crop is computed."""
RESAMPLING = {filter.value: filter for filter in Image.Resampling}


@dataclass(frozen=True)
class Preprocessing:
    """Resizing and normalisation of images; stored in a checkpoint.

    Attributes:
        size: (height, width) of the model's input.
        shortest_edge: the shorter side is resized to this before the centre crop; None resizes both sides to ``size``
            without a crop.
        resample: Pillow's filter number; 3 is bicubic.
        mean, std: RGB constants of the normalisation, for pixels in [0, 1].
        patch_size: sides become multiples of it if the aspect ratio is kept.
        color_profiles: "convert" turns colours of images with an ICC profile into sRGB, as viewers do; "ignore" takes
            them as they are stored, as transformers' processors do. Training always converts.
    """

    size: Size
    shortest_edge: int | None
    resample: int = int(Image.Resampling.BICUBIC)
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    patch_size: int = 1
    color_profiles: ColorProfiles = "convert"

    def load(self, source: ImageInput, name: str | None = None) -> Image.Image:
        """Load an image as RGB, see `qlip.modeling.images.load_image`."""
        return load_image(source, name, self.color_profiles)

    def in_patches(self, size: tuple[float, float]) -> tuple[int, int]:
        """Round (height, width) to whole patches, at least one per side."""
        height, width = (max(1, round(side / self.patch_size)) * self.patch_size for side in size)
        return height, width

    def resized(
        self, image: Image.Image, keep_aspect: bool = False, size: tuple[int, int] | None = None
    ) -> Image.Image:
        """Resize and centre-crop an RGB image for the model.

        Args:
            image: RGB.
            keep_aspect: keep the aspect ratio: the shorter side becomes the model's, the longer one is cropped to a
                multiple of the patch size; with a ``size``, the whole image as large as it fits.
            size: (height, width) other than the model's; it is not rounded to patches, see :meth:`in_patches`.

        Raises:
            QLIPError: the image is so long that it keeps its aspect ratio only in more than `MAX_TOKENS` tokens.
        """
        if size is not None:
            if keep_aspect:
                scale = min(size[0] / image.height, size[1] / image.width)
                size = self.in_patches((image.height * scale, image.width * scale))
            return ImageOps.fit(image, (size[1], size[0]), Image.Resampling(self.resample))
        height, width = self.size
        if keep_aspect or self.shortest_edge is not None:
            edge = min(self.size) if keep_aspect or self.shortest_edge is None else self.shortest_edge
            # the longer side is truncated, as by CLIPImageProcessor and torchvision
            scaled = (edge * image.width // min(image.size), edge * image.height // min(image.size))
            if keep_aspect:
                columns, rows = (side // self.patch_size for side in scaled)
                if rows * columns > MAX_TOKENS:
                    raise QLIPError(
                        f"{image.width} x {image.height} pixels keep their aspect ratio in {rows * columns:,} tokens,"
                        f" more than {MAX_TOKENS:,}; crop the image, cut it into tiles, or give a size"
                    )
                width, height = columns * self.patch_size, rows * self.patch_size
            return _centre_crop(image, scaled, (width, height), self.resample)
        return image.resize((width, height), self.resample)

    def fingerprint(self, fit: str = "square", size: Size | None = None) -> str:
        """Identify how images are prepared, so that tokens of images prepared in another way can be told apart.

        Args:
            fit: ``square``, ``keep-aspect`` or ``tiles``, see `qlip.tokens.image_codec.Fit`.
            size: (height, width) other than the model's.

        Returns:
            16 lower-case hex digits, the first of SHA-256 over all that decides about the pixels.
        """
        facts = {"rules": PREPARATION_RULES, "fit": fit, "given_size": size, **asdict(self)}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    def pixels(self, image: Image.Image) -> Tensor:
        """Normalise an RGB image without resizing it: (3, H, W) float32."""
        array = torch.from_numpy(np.array(image, dtype=np.uint8)).permute(2, 0, 1)
        return self.normalize(array.float() / 255)

    def normalize(self, pixels: Tensor) -> Tensor:
        """(..., 3, H, W) in [0, 1] to the model's space."""
        return (pixels - self._column(self.mean, pixels)) / self._column(self.std, pixels)

    def denormalize(self, pixels: Tensor) -> Tensor:
        """(..., 3, H, W) in the model's space to float32 in [0, 1], clamped."""
        pixels = pixels.float()
        return (pixels * self._column(self.std, pixels) + self._column(self.mean, pixels)).clamp(0, 1)

    @staticmethod
    def _column(values: tuple[float, float, float], like: Tensor) -> Tensor:
        return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None, None]


class ProcessorOutput(dict[str, Tensor]):
    """Inputs of the model by name, also as attributes: ``model(**inputs)``, ``inputs.pixel_values``."""

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no {name!r} here, only {', '.join(self)}") from None

    def to(self, device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> ProcessorOutput:
        """Return the tensors on a device; ``dtype`` applies to those of floats."""
        return ProcessorOutput(
            {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in self.items()}
        )


class QLIPProcessor:
    """Preprocessing of images and text for the model, and postprocessing of its pixels.

    Args:
        preprocessing: resizing and normalisation of images.
        tokenizer: text tokenizer, or None if the checkpoint has no vocabulary.
    """

    def __init__(self, preprocessing: Preprocessing, tokenizer: CLIPTokenizer | None = None) -> None:
        self.preprocessing = preprocessing
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, name_or_path: str | Path, **hub: Any) -> QLIPProcessor:
        """Read a checkpoint's preprocessing and vocabulary.

        Without ``preprocessor_config.json``: mean and std 0.5, bicubic, shorter side to the model's size, centre crop.

        Args:
            name_or_path: as for :meth:`QLIPModel.from_pretrained`.
            **hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only``.

        Raises:
            QLIPError: no such checkpoint, or a file in it that cannot be read.
        """
        files = Files(name_or_path, **hub)
        config = files.config()
        image, patch = config.vision_config.image_size, config.vision_config.patch_size
        path = files.path("preprocessor_config.json")
        preprocessing = (
            Preprocessing((image, image), image, patch_size=patch)
            if path is None
            else read_preprocessing(path, image, patch)
        )
        length = config.text_config.max_position_embeddings
        return cls(preprocessing, CLIPTokenizer.from_folder(files.folder, length))

    def __call__(
        self,
        images: ImageInput | Sequence[ImageInput] | None = None,
        text: str | Sequence[str] | None = None,
        *,
        return_tensors: Literal["pt"] | None = None,
        padding: Padding = "max_length",
        truncation: bool = True,
        max_length: int | None = None,
        keep_aspect: bool = False,
    ) -> ProcessorOutput:
        """Turn images and texts into tensors for the model.

        Args:
            images: an image or a list of them: PIL, NumPy, tensors, paths, bytes (see ``ImageInput``); or a batch
                (B, H, W, C) or (B, C, H, W).
            text: a string or a list of strings.
            return_tensors: "pt" or None; the result has tensors in any case.
            padding, truncation, max_length: of texts, see `CLIPTokenizer`.
            keep_aspect: keep the aspect ratio: the shorter side becomes the model's, the longer one is cropped to a
                multiple of the patch size. All images of a call must then have one size.

        Returns:
            A dict whose keys are also attributes: ``pixel_values`` (B, 3, H, W) float32 if images are given;
            ``input_ids`` and ``attention_mask`` (B, N) int64 if text is given.

        Raises:
            QLIPError: an image that cannot be read, no vocabulary, or images of unequal size with ``keep_aspect``.
        """
        if return_tensors not in (None, "pt"):
            raise QLIPError(f"return_tensors {return_tensors!r}: only PyTorch's tensors are made, 'pt'")
        result = ProcessorOutput()
        if images is not None:
            is_batch = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
            several = list(cast(Iterable[ImageInput], images)) if is_batch else [images]
            pixels = [self.pixels(cast(ImageInput, image), keep_aspect=keep_aspect) for image in several]
            if len({tensor.shape for tensor in pixels}) > 1:
                sizes = ", ".join(sorted({f"{t.shape[2]}x{t.shape[1]}" for t in pixels}))
                raise QLIPError(f"images of one batch differ in size ({sizes}); with keep_aspect, pass them one by one")
            result["pixel_values"] = torch.stack(pixels) if pixels else torch.empty(0, 3, *self.size)
        if text is not None:
            if self.tokenizer is None:
                raise QLIPError("this checkpoint has no vocabulary (vocab.json and merges.txt, or tokenizer.json)")
            if not isinstance(text, str | Iterable):
                raise QLIPError(f"text is {text!r:.40}, not a string or a list of strings")
            texts = [text] if isinstance(text, str) else list(text)
            result["input_ids"], result["attention_mask"] = self.tokenizer(
                texts, padding=padding, truncation=truncation, max_length=max_length
            )
        if not result:
            raise QLIPError("nothing to process: give images, text, or both")
        return result

    def pixels(self, image: ImageInput, *, keep_aspect: bool = False) -> Tensor:
        """Load, resize and normalise an image: (3, H, W) float32."""
        return self.preprocessing.pixels(self.preprocessing.resized(self.preprocessing.load(image), keep_aspect))

    def to_images(self, reconstructions: Tensor) -> list[Image.Image]:
        """Convert the model's pixels to images.

        Args:
            reconstructions: (B, 3, H, W) in the normalised space, any floating type, unclamped.

        Returns:
            B RGB images.
        """
        check_pixels(reconstructions)
        return to_images(self.preprocessing.denormalize(reconstructions))

    @property
    def size(self) -> Size:
        """Default (height, width) of the model's input."""
        return self.preprocessing.size

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``preprocessor_config.json`` and the vocabulary's files."""
        given = self.preprocessing
        height, width = given.size
        values = {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": height, "width": width}
            if given.shortest_edge is None
            else {"shortest_edge": given.shortest_edge},
            "resample": given.resample,
            "do_center_crop": given.shortest_edge is not None,
            "crop_size": {"height": height, "width": width},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": list(given.mean),
            "image_std": list(given.std),
            "color_profiles": given.color_profiles,
        }
        write_text(Path(folder) / "preprocessor_config.json", json.dumps(values, indent=2) + "\n")
        if self.tokenizer is not None:
            self.tokenizer.save(Path(folder))

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None, **options: Any) -> str:
        """Upload preprocessing and vocabulary to a Hub repository; see :meth:`QLIPModel.push_to_hub`."""
        return push((self.save_pretrained,), repo_id, private=private, token=token, **options)

    def __repr__(self) -> str:
        return f"QLIPProcessor({asdict(self.preprocessing)}, vocabulary={self.tokenizer and self.tokenizer.vocab_size})"


def _centre_crop(image: Image.Image, scaled: tuple[int, int], crop: tuple[int, int], resample: int) -> Image.Image:
    """Resize an image to ``scaled`` and crop its centre; all sizes are (width, height)."""
    left, top = (scaled[0] - crop[0]) // 2, (scaled[1] - crop[1]) // 2
    edges = (left, top, left + crop[0], top + crop[1])
    if scaled[0] * scaled[1] <= LARGEST_RESIZE:
        return image.resize(scaled, resample).crop(edges)
    # a very long image: its crop, with the pixels around it that the filter reads, is resized alone
    across, down = image.width / scaled[0], image.height / scaled[1]
    box = [edges[0] * across, edges[1] * down, edges[2] * across, edges[3] * down]
    x, y = (max(0, int(box[side] - 4 * max(1, step))) for side, step in ((0, across), (1, down)))
    right, bottom = (
        min(most, int(box[side] + 4 * max(1, step)) + 1)
        for side, step, most in ((2, across, image.width), (3, down, image.height))
    )
    part = image.crop((x, y, right, bottom))
    return part.resize(crop, resample, box=(box[0] - x, box[1] - y, box[2] - x, box[3] - y))


def read_preprocessing(path: Path, image_size: int, patch_size: int) -> Preprocessing:
    """Read a ``preprocessor_config.json`` in the format of CLIP's image processors."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        resample = int(values.get("resample", Image.Resampling.BICUBIC))
        mean, std = (tuple(float(x) for x in values.get(key, [0.5] * 3)) for key in ("image_mean", "image_std"))
        rescale = float(values.get("rescale_factor", 1 / 255))
        edge = _sides(values.get("size", image_size))
        crop = _sides(values.get("crop_size", image_size)) if values.get("do_center_crop", True) else None
        profiles = values.get("color_profiles", "convert")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise QLIPError(f"{path}: not an image processor's settings ({error}); fetch it again") from None
    if resample not in RESAMPLING or len(mean) != 3 or len(std) != 3 or not all(std):
        raise QLIPError(
            f"{path}: resample {resample}, mean {mean}, std {std} cannot be used; three channels, std not 0"
        )
    if abs(rescale - 1 / 255) > 1e-6 or not all(
        values.get(key, True) for key in ("do_resize", "do_rescale", "do_normalize")
    ):
        raise QLIPError(f"{path}: only resize, rescale by 1/255 and normalise together are supported")
    if profiles not in get_args(ColorProfiles):
        raise QLIPError(f"{path}: color_profiles {profiles!r} is unknown; take {' or '.join(get_args(ColorProfiles))}")
    if crop is not None and isinstance(crop, int):
        crop = (crop, crop)
    if isinstance(edge, tuple):
        size, shortest = edge, None
        if crop is not None and crop != edge:
            raise QLIPError(f"{path}: size {edge} and crop_size {crop} disagree; give shortest_edge or equal sizes")
    else:
        size, shortest = (crop or (image_size, image_size)), edge
        if min(size) > edge or max(size) > edge:
            raise QLIPError(f"{path}: crop_size {size} is larger than shortest_edge {edge}")
    if any(side % patch_size for side in size):
        raise QLIPError(f"{path}: size {size} is not a multiple of the patch size {patch_size}")
    return Preprocessing(size, shortest, resample, mean, std, patch_size, profiles)


def _sides(value: Any) -> int | Size:
    """Parse a size in one of CLIP's three formats."""
    if isinstance(value, dict):
        if "shortest_edge" in value:
            return int(value["shortest_edge"])
        return int(value["height"]), int(value["width"])
    return int(value)
