"""Draw a suite's images into a folder, so that a killed run continues with those that are missing.

Settings lie beside the folder, in ``OUT.settings.json``: scorers list the folder itself. An image is whole or not
there, and depends on its prompt, the seed and its number alone, so a continued run gives the same images.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from PIL import Image

from qlip.errors import QLIPError
from qlip.evaluation.prompt_suites.layouts import ImageFile, Suite, beside
from qlip.evaluation.prompt_suites.prompts import Prompt
from qlip.files import write_bytes
from qlip.runtime.progress import OnProgress, no_progress
from qlip.runtime.workspace import Workspace, lock_folder

Draw = Callable[[Sequence[str], Sequence[int]], Sequence[Image.Image]]
"""From prompts and the number of each image to RGB images of one size; prompts and numbers are as many."""
Check = Callable[[Sequence[str]], object]
"""Raises QLIPError if a drawer cannot draw one of some prompts."""
SETTINGS = ".settings.json"
"""Suffix of the file beside a suite's folder that says how it was drawn."""


def draw_suite(
    suite: Suite,
    draw: Draw,
    out: Path,
    settings: Mapping[str, object],
    *,
    check: Check = lambda prompts: None,
    batch_size: int = 32,
    on_progress: OnProgress = no_progress,
) -> int:
    """Draw all images of a suite that are not in the folder yet.

    Args:
        suite: benchmark.
        draw: drawer with its seed, guidance and sampling.
        out: folder that the scorer will read.
        settings: JSON of all that images depend on, such as drawer, seed and guidance.
        check: of prompts, before anything is drawn.
        batch_size: images per call of ``draw``, or a few more.
        on_progress: called with the number of images that are done since the last call.

    Returns:
        Number of images drawn now.

    Raises:
        QLIPError: a prompt that cannot be drawn, a folder that was begun with other settings or holds other files,
            or one that cannot be written; finished images stay.
    """
    check_prompts(suite.prompts, check)
    with lock_folder(out, "another process draws here; wait for it, or stop it"):
        _claim(suite, out, settings)
        for leftover in out.rglob(".*.part"):  # of a killed process
            leftover.unlink(missing_ok=True)
        missing = [file for file in suite.files if not (out / file.path).exists()]
        count = sum(len(file.numbers) for file in missing)
        on_progress(sum(len(file.numbers) for file in suite.files) - count)
        for files in _batches(missing, batch_size):
            texts = [file.prompt.text for file in files for _ in file.numbers]
            images = iter(draw(texts, [number for file in files for number in file.numbers]))
            for file in files:
                image = _joined([next(images) for _ in file.numbers])
                if suite.side is not None and image.size != (suite.side, suite.side):
                    raise QLIPError(
                        f"suite {suite.name}: needs images of {suite.side} x {suite.side} pixels, this drawer's have"
                        f" {image.width} x {image.height}; choose another drawer"
                    )
                write_bytes(out / file.path, _encoded(image, Path(file.path).suffix))
                on_progress(len(file.numbers))
        suite.finish(out)
    return count


def check_prompts(prompts: Sequence[Prompt], check: Check) -> None:
    """Refuse a prompt that is empty or cannot be drawn.

    Raises:
        QLIPError: names its file and line.
    """
    for prompt in prompts:
        if not prompt.text.strip():
            raise QLIPError(f"{prompt.where}: an empty prompt")
        try:
            check([prompt.text])
        except QLIPError as error:
            raise QLIPError(f"{prompt.where}: {error}") from None


def _claim(suite: Suite, out: Path, settings: Mapping[str, object]) -> None:
    """Write the settings beside a new folder, or compare them with those that it was begun with."""
    images = sum(len(file.numbers) for file in suite.files)
    plan = {"suite": suite.name, **settings, "images": images, "prompts_sha256": suite.digest}
    path = beside(out, SETTINGS)
    record = Workspace(path.parent, plan, record=path.name)
    if not path.exists():
        if other := next((one for one in out.rglob("*") if one.is_file()), None):
            raise QLIPError(
                f"{out}: holds {other.relative_to(out)}, and no {path.name} is beside it; give a new folder"
            )
    elif (changed := record.changed_keys()) and not any(one.is_file() for one in out.rglob("*")):
        path.unlink()  # stopped before the first image
    elif changed:
        raise QLIPError(
            f"{out}: was begun with other settings ({', '.join(changed)} differ); give another folder, or delete it and"
            f" {path.name}"
        )
    record.claim()


def _batches(files: Sequence[ImageFile], batch_size: int) -> Iterator[list[ImageFile]]:
    """Files of at least `batch_size` images together, but for the last ones."""
    batch, count = list[ImageFile](), 0
    for file in files:
        batch.append(file)
        count += len(file.numbers)
        if count >= batch_size:
            yield batch
            batch, count = [], 0
    if batch:
        yield batch


def _joined(images: Sequence[Image.Image]) -> Image.Image:
    """The image, or a grid of 2 x 2 images in raster order, without borders."""
    if len(images) == 1:
        return images[0]
    width, height = images[0].size
    grid = Image.new("RGB", (2 * width, 2 * height))
    for at, image in enumerate(images):
        grid.paste(image, (at % 2 * width, at // 2 * height))
    return grid


def _encoded(image: Image.Image, suffix: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, {".png": "PNG", ".jpg": "JPEG"}[suffix])  # JPEG in Pillow's quality, as HPSv2's example does
    return buffer.getvalue()
