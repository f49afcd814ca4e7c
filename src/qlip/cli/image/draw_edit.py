"""`qlip draw --image`: a part of an image is drawn; `--gif` and `--progressive`: images as they grow row by row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli.console import usage_error

if TYPE_CHECKING:
    from PIL import Image

    from qlip.lm.generate import OnStep
    from qlip.t2i import Drawer
    from qlip.t2i.inpaint import Edit

PANEL, ROWS_PANEL = "Drawing a part of an image", "Images as they grow"

OptionImage = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Image of which a part is drawn; the rest stays, as its tokens show it. Needs --mask or --keep.",
        rich_help_panel=PANEL,
    ),
]
OptionMask = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Image of equal size, white where --image is to be drawn and black elsewhere; a token with a white pixel "
        "is drawn whole.",
        rich_help_panel=PANEL,
    ),
]
OptionKeep = Annotated[
    float | None,
    typer.Option(
        metavar="SHARE",
        help="Draw a variation of --image: this share of it is kept, such as 0.5 for the upper half.",
        rich_help_panel=PANEL,
    ),
]
OptionCandidates = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="N",
        help="Number of candidates for the white part of --mask per image; one is chosen by how well the kept tokens "
        "below continue it. Default: 16.",
        rich_help_panel=PANEL,
    ),
]
OptionGif = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Also write an animated GIF of the sheet, a frame per row.", rich_help_panel=ROWS_PANEL
    ),
]
OptionProgressive = Annotated[
    bool,
    typer.Option(
        "--progressive",
        help="Write the sheet after each row of tokens, for a viewer that reloads its file.",
        rich_help_panel=ROWS_PANEL,
    ),
]


@dataclass(frozen=True)
class Request:
    """Options of `qlip draw` that are about a part of an image and about rows."""

    image: Path | None
    mask: Path | None
    keep: float | None
    candidates: int | None
    gif: Path | None
    progressive: bool

    def check(self, suite: bool, one_sheet: bool, output: Path) -> None:
        """Refuse options that do not go together, before anything is loaded.

        Args:
            suite: the prompts are those of a benchmark.
            one_sheet: the output is an image file.
            output: that file, or a folder.
        """
        if suite and (self.image or self.mask or self.keep is not None or self.gif or self.progressive):
            usage_error("--image, --mask, --keep, --gif and --progressive are for prompts; leave out --suite")
        if self.image is None and (self.mask is not None or self.keep is not None):
            usage_error(
                f"{'--keep' if self.mask is None else '--mask'} needs --image, the image of which a part is drawn"
            )
        if self.image is not None and (self.mask is None) == (self.keep is None):
            usage_error("--image needs either --mask, white where it is to be drawn, or --keep, the share that stays")
        if self.candidates is not None and self.mask is None:
            usage_error("--candidates needs --mask: only tokens that are kept after a hole can choose among them")
        if (self.gif or self.progressive) and self.mask is not None and self.candidates != 1:
            usage_error("--gif and --progressive show rows as they are drawn; with --mask they need --candidates 1")
        if self.gif is not None and self.gif.suffix.lower() != ".gif":
            usage_error(f"--gif {self.gif}: name a file that ends in .gif")
        for name, written in (("output", output), ("gif", self.gif)):
            others = {"image": self.image, "mask": self.mask} | ({"gif": self.gif} if name == "output" else {})
            for other, path in others.items():
                if written is not None and path is not None and written.resolve() == path.resolve():
                    usage_error(f"--{name} {written}: is --{other} too, which it would replace; give another name")
        if self.progressive and not one_sheet:
            usage_error("--progressive writes a sheet; give an image file to --output")

    def open(self, drawer: Drawer) -> Edit | None:
        """Read the image and its mask; None without an image."""
        from qlip.t2i.inpaint import CANDIDATES

        if self.image is None:
            return None
        return drawer.edit(self.image, self.mask, self.keep, self.candidates or CANDIDATES)

    def settings(self, edit: Edit | None) -> dict[str, Any]:
        """Settings of an edit, for reports."""
        if edit is None:
            return {}
        found = {"image": str(self.image), "drawn_tokens": int(edit.hole.sum())}
        return found if self.mask is None else found | {"mask": str(self.mask), "candidates": edit.candidates}


class Rows:
    """Frames of a sheet that grows.

    Args:
        request: says what is written.
        output: the sheet's file.
        lay_out: makes a sheet of images.
        total: number of its images.
    """

    def __init__(
        self, request: Request, output: Path, lay_out: Callable[[Sequence[Image.Image]], Image.Image], total: int
    ) -> None:
        self.request, self.output, self.lay_out, self.total = request, output, lay_out, total
        self.frames: list[Image.Image] = []

    def on_step(self, drawer: Drawer, finished: Sequence[Image.Image]) -> OnStep | None:
        """Return what makes the frames of the next images, behind the finished ones; None if none are wanted."""
        from qlip.t2i.growth import Growth

        if not (self.request.gif or self.request.progressive):
            return None
        before = list(finished)
        return Growth(drawer, lambda grown: self._add(before + grown))

    def _add(self, images: list[Image.Image]) -> None:
        from PIL import Image

        from qlip.cli.outputs import image_file
        from qlip.files import write_bytes
        from qlip.t2i.growth import GREY

        waiting = Image.new("RGB", images[0].size, GREY)
        frame = self.lay_out(images + [waiting] * (self.total - len(images)))
        if self.request.gif is not None:
            self.frames.append(frame)
        if self.request.progressive:
            write_bytes(self.output, image_file(self.output, frame))

    def finish(self, images: Sequence[Image.Image]) -> None:
        """Write the GIF, whose last frame is the finished sheet."""
        from qlip.files import write_bytes
        from qlip.t2i.growth import gif

        if self.request.gif is not None:
            write_bytes(self.request.gif, gif([*self.frames, self.lay_out(images)]))
