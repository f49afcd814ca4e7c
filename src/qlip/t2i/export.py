"""Copies of drawers to share: in another precision, and as a pipeline of diffusers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from qlip.files import folder_written_aside
from qlip.lm.model import DecoderModel
from qlip.modeling import checkpoint
from qlip.modeling.tokenizer import CLIPTokenizer
from qlip.t2i.drawer import Drawer
from qlip.t2i.settings import FILE, DrawSettings

TOKENIZER = "tokenizer"
"""Folder of the image tokenizer inside a drawer's folder."""

EXAMPLE = "a red circle above a blue square"

INDEX = {"_class_name": ["pipeline", "DrawerPipeline"], "drawer": ["component", "DrawerComponent"]}
"""``model_index.json``: file and class of the pipeline, and of its one component."""

PIPELINE = '''"""A drawer of the package qlip as a pipeline of diffusers; see README.md."""

from diffusers import DiffusionPipeline
from qlip.t2i.pipeline import DrawerCall


class DrawerPipeline(DrawerCall, DiffusionPipeline):
    """Draws images from prompts."""

    def __init__(self, drawer):
        super().__init__()
        self.register_modules(drawer=drawer)
'''
COMPONENT = '''"""The component of the pipeline, as diffusers looks for it."""

from qlip.t2i.pipeline import DrawerComponent

__all__ = ["DrawerComponent"]
'''


def export_folder(name: str | Path, folder: Path, dtype: torch.dtype | None = None) -> list[Path]:
    """Write a decoder's folder with what draws from it: the vocabulary of its captions, its settings, its tokenizer.

    Each is written if the source has it; a tokenizer that lies elsewhere stays there.

    Args:
        name: a decoder's folder, or a Hub id.
        folder: created if absent.
        dtype: of the decoder's written weights; float32 by default.

    Returns:
        The written files, sorted.

    Raises:
        QLIPError: a broken file, a full disk, or a folder that is not writable.
    """
    source = checkpoint.resolve(name)
    with folder_written_aside(folder) as aside:
        _write(source, aside, dtype)
        written = _files(aside)
    return [folder / path for path in written]


def export_pipeline(name: str | Path, folder: Path, dtype: torch.dtype | None = None) -> list[Path]:
    """Write a folder that ``diffusers.DiffusionPipeline.from_pretrained`` loads where the package qlip is installed.

    The folder has a drawer's folder inside, ``drawer``, and in it the image tokenizer, unchanged.

    Args:
        name: a drawer's folder, or a Hub id.
        folder: created if absent.
        dtype: of the decoder's written weights; float32 by default.

    Returns:
        The written files, sorted.

    Raises:
        QLIPError: no drawer, see :meth:`Drawer.from_pretrained`; a full disk, or a folder that is not writable.
    """
    drawer = Drawer.from_pretrained(name, device="cpu")
    with folder_written_aside(folder) as aside:
        _write(checkpoint.resolve(name), aside / "drawer", dtype, tokenizer=checkpoint.resolve(drawer.codec.name))
        texts = {
            "model_index.json": json.dumps(INDEX, indent=2) + "\n",
            "pipeline.py": PIPELINE,
            "drawer/component.py": COMPONENT,
            "README.md": _readme(drawer),
        }
        for path, text in texts.items():
            (aside / path).write_text(text, encoding="utf-8")
        written = _files(aside)
    return [folder / path for path in written]


def _readme(drawer: Drawer) -> str:
    """``README.md`` with code that runs in the folder."""
    config, settings = drawer.decoder.config, drawer.settings
    patch = drawer.codec.processor.preprocessing.patch_size
    height, width = (patch * cells for cells in config.grid)
    prompt = config.classes[0] if config.classes else "0" if config.condition == "class" else EXAMPLE
    source = "captions" if config.condition != "class" else f"the names of {config.condition_size:,} classes"
    encoder = f"\nCaptions are read by the text encoder `{config.text_encoder}`, which is loaded by that name.\n"
    return f"""# A drawer, as a pipeline of diffusers

It draws images of {width} x {height} pixels from {source}: a transformer predicts {config.num_tokens} tokens one after
the other, and a QLIP, which is in this folder, decodes them. It needs the packages `diffusers` and `qlip`.
{encoder if config.text_encoder else ""}
```python
import torch
from diffusers import DiffusionPipeline

folder = "."
pipeline = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
images = pipeline({prompt!r}, num_images_per_prompt=4, generator=torch.Generator().manual_seed(0)).images
images[0].save("drawn.png")
```

`trust_remote_code` is needed because diffusers treats `pipeline.py` and `drawer/component.py` as foreign code. They are
a few lines that import qlip.

The call takes `prompt`, `negative_prompt`, `num_images_per_prompt`, `guidance_scale`, `temperature`, `top_k`,
`generator`, `output_type` (pil, np or pt), `return_dict`, `callback_on_step_end`, and `image` with `mask_image` or
`keep` to draw a part of an image. By default guidance is {settings.guidance} and the temperature
{settings.temperature:g}. Image size and number of steps are fixed: there is no `height`, `width` or
`num_inference_steps`.

**To copy the pipeline, copy this folder.** `save_pretrained` of diffusers does not copy `pipeline.py` and the
component, so what it writes cannot be loaded.

The folder `drawer` is a drawer by itself: `qlip draw PROMPT -m drawer`, or `qlip.Drawer.from_pretrained("drawer")`.
"""


def _write(source: Path, folder: Path, dtype: torch.dtype | None, tokenizer: Path | None = None) -> None:
    """Write a decoder's folder, with a tokenizer's folder or that inside the source; see `export_folder`."""
    decoder = DecoderModel.from_pretrained(source)
    decoder.save_pretrained(folder, dtype)
    vocabulary = CLIPTokenizer.from_folder(source, decoder.config.prefix_length)
    if vocabulary is not None:
        vocabulary.save(folder)
    settings = DrawSettings.from_folder(source)
    tokenizer = tokenizer or settings.tokenizer_inside(source)
    if tokenizer is not None:
        checkpoint.copy(tokenizer, folder / TOKENIZER)
        settings = settings.model_copy(update={"tokenizer": TOKENIZER})
    if tokenizer is not None or (source / FILE).is_file():
        settings.save(folder)


def _files(folder: Path) -> list[Path]:
    """Files at any depth, relative and sorted."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
