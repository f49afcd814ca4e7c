"""Layouts of benchmarks: which files a scorer reads, and which prompt and image numbers each is drawn from.

A `Suite` lists its image files; `open_suite` makes one from a benchmark's own prompt files. Formats, one function each:

    geneval    00000/metadata.jsonl, 00000/samples/0000.png ... 0003.png
    dpg        ID.png: a grid of 2 x 2 images without borders
    coco30k    images/000000.png, captions.txt, result.jsonl (as LlamaGen and the QLIP paper); parti too
    mjhq       CATEGORY/ID.png
    compbench  CATEGORY/samples/PROMPT_000000.png, ten images per prompt
    hpsv2      STYLE/00000.jpg
    adm        000000.png, and beside the folder its .npz (class-conditional, as ADM and LlamaGen)
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import Image

from qlip.errors import QLIPError
from qlip.evaluation.prompt_suites import prompts as read
from qlip.evaluation.prompt_suites.prompts import Prompt
from qlip.files import write_text, written_aside
from qlip.registry import unknown_name

ADM_IMAGES = 50_000
Finish = Callable[[Path], None]
"""Writes what a scorer needs beside the images into the suite's folder, once all are there."""


@dataclass(frozen=True)
class ImageFile:
    """A file with one image, or with a grid of four.

    Attributes:
        path: relative to the suite's folder; its suffix is the format.
        prompt: to draw.
        numbers: number of each image, which with the seed decides its noise.
    """

    path: str
    prompt: Prompt
    numbers: tuple[int, ...]


def _nothing(out: Path) -> None:
    """No-op `Finish`."""


@dataclass(frozen=True)
class Suite:
    """A benchmark's prompts and image files.

    Attributes:
        name: of the benchmark.
        files: in the order in which they are drawn.
        finish: called once all images are there.
        side: width and height that images must have; None takes any.
    """

    name: str
    files: list[ImageFile]
    finish: Finish = _nothing
    side: int | None = None

    @property
    def prompts(self) -> list[Prompt]:
        """Each prompt once, in order."""
        return list({id(file.prompt): file.prompt for file in self.files}.values())

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the prompts, a line each, as `captions.txt` has them."""
        return hashlib.sha256(lines([one.text for one in self.prompts]).encode()).hexdigest()


def open_suite(name: str, data: Path, limit: int | None = None) -> Suite:
    """Open a benchmark by the prompt files that it ships.

    Args:
        name: out of `SUITES`.
        data: file or folder of its prompts.
        limit: number of prompts, the first ones; None takes all.

    Raises:
        QLIPError: no such benchmark, or files that are not its own.
    """
    if name not in SUITES:
        raise unknown_name(name, "suite", SUITES)
    reader, layout = SUITES[name]
    prompts = reader(data)[:limit]
    if not prompts:
        raise QLIPError(f"{data}: holds no prompt; give the benchmark's own file")
    return layout(name, prompts)


def geneval(name: str, prompts: Sequence[Prompt]) -> Suite:
    """Four images per prompt, of numbers 0 to 3: GenEval's script sets the same seed before every prompt."""
    files = [
        ImageFile(f"{at:05d}/samples/{number:04d}.png", prompt, (number,))
        for at, prompt in enumerate(prompts)
        for number in range(4)
    ]

    def finish(out: Path) -> None:
        for at, prompt in enumerate(prompts):
            write_text(out / f"{at:05d}" / "metadata.jsonl", prompt.name)

    return Suite(name, files, finish)


def grids(name: str, prompts: Sequence[Prompt]) -> Suite:
    """One file of four images per prompt."""
    files = [ImageFile(f"{one.name}.png", one, tuple(range(4 * at, 4 * at + 4))) for at, one in enumerate(prompts)]
    return Suite(name, files)


def captioned(name: str, prompts: Sequence[Prompt], side: int | None = None) -> Suite:
    """One image per prompt, with the captions in ``captions.txt`` and ``result.jsonl``."""
    files = [ImageFile(f"images/{at:06d}.png", one, (at,)) for at, one in enumerate(prompts)]

    def finish(out: Path) -> None:
        records = [{"text": one.prompt.text, "image_path": str(out / one.path)} for one in files]
        write_text(out / "captions.txt", lines([one.text for one in prompts]))
        write_text(out / "result.jsonl", lines([json.dumps(one, ensure_ascii=False) for one in records]))

    return Suite(name, files, finish, side)


def mjhq(name: str, prompts: Sequence[Prompt]) -> Suite:
    """One image per prompt, in a folder per category."""
    return Suite(name, [ImageFile(f"{one.group}/{one.name}.png", one, (number,)) for number, one in enumerate(prompts)])


def compbench(name: str, prompts: Sequence[Prompt]) -> Suite:
    """Ten images per prompt, numbered without a gap in each category: the scorers tell them by position."""
    files = [
        ImageFile(f"{group}/samples/{prompt.text}_{number:06d}.png", prompt, (number,))
        for group, members in groupby(prompts, lambda one: one.group)
        for at, prompt in enumerate(members)
        for number in range(10 * at, 10 * at + 10)
    ]
    return Suite(name, files)


def hpsv2(name: str, prompts: Sequence[Prompt]) -> Suite:
    """One JPEG per prompt, in a folder per style."""
    files = [
        ImageFile(f"{group}/{at:05d}.jpg", prompt, (at,))
        for group, members in groupby(prompts, lambda one: one.group)
        for at, prompt in enumerate(members)
    ]
    return Suite(name, files)


SUITES: dict[str, tuple[Callable[[Path], list[Prompt]], Callable[[str, Sequence[Prompt]], Suite]]] = {
    "geneval": (read.geneval, geneval),
    "dpg": (read.texts, grids),
    "coco30k": (read.table, captioned),
    "mjhq": (read.mjhq, mjhq),
    "compbench": (read.compbench, compbench),
    "hpsv2": (read.hpsv2, hpsv2),
    "parti": (read.table, captioned),
}
"""Reader of the prompt files and layout, by name of the benchmark."""


def adm(classes: Sequence[str], count: int = ADM_IMAGES) -> Suite:
    """Class-conditional images for ADM's evaluator: image i is of class i mod C, so that all classes are as frequent.

    Args:
        classes: C names, as the drawer has them.
        count: images.
    """
    prompts = [Prompt(one, f"class {at}") for at, one in enumerate(classes)]
    files = [ImageFile(f"{at:06d}.png", prompts[at % len(prompts)], (at,)) for at in range(count)]
    return Suite("adm", files, partial(write_npz, files=files))


def write_npz(out: Path, files: Sequence[ImageFile]) -> None:
    """Write ``OUT.npz`` beside the folder: ``arr_0`` (N, H, W, 3) uint8 in C order, image by image.

    The file is what ``np.savez`` writes, but never whole in memory: 50,000 images of 256 px are 10 GB.
    """
    path, images = beside(out, ".npz"), [out / file.path for file in files]
    if path.exists() and path.stat().st_mtime_ns >= max(image.stat().st_mtime_ns for image in images):
        return
    with Image.open(images[0]) as first:
        width, height = first.size
    header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), height, width, 3)}
    with (
        written_aside(path) as aside,
        zipfile.ZipFile(aside, "w") as archive,
        archive.open("arr_0.npy", "w", force_zip64=True) as array,
    ):
        np.lib.format.write_array_header_1_0(array, header)
        for one in images:
            with Image.open(one) as image:
                array.write(image.convert("RGB").tobytes())


def beside(out: Path, suffix: str) -> Path:
    """Path of a file that lies beside a folder and has its name and a suffix."""
    return Path(f"{os.path.abspath(out)}{suffix}")


def lines(texts: Sequence[str]) -> str:
    """Texts, a line each."""
    return "".join(f"{one}\n" for one in texts)
