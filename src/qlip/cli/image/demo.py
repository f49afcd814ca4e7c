"""`qlip demo`: encode, decode and classify the images in the package."""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli import options
from qlip.cli.console import Failures, new_table, print_json, print_table, show, stoppable
from qlip.cli.inputs import Input

if TYPE_CHECKING:
    from PIL import Image

    from qlip.cli.image.contact_sheet import Exhibit
    from qlip.tokens import ImageCodec, Prepared, TokenFile

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""Most frequent labels in the bundled model's training captions: the classes of CIFAR-10."""

PROMPTS = ("a red circle above a blue square", "three orange triangles", "a photo of a ship")
"""Prompts that the bundled drawer draws; each is of a kind that it was trained on."""

TILES = 4
"""Tiles per side of the larger version, which keeps more detail."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Shown:
    """An image in all its forms: prepared, as tokens read from their file, and reconstructed from these."""

    item: Input
    prepared: Prepared
    tokens: TokenFile
    rebuilt: Image.Image

    @property
    def label(self) -> str:
        """Correct label: the name of the bundled image."""
        return self.item.path.stem


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the results, created if absent.")
    ] = Path("demo"),
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = options.AUTO,
    as_json: options.Json = False,
) -> None:
    """See it work: turn the package's images into a few hundred bytes each, and back; classify them; draw from text.

    Writes DIR/demo.png, and for each image its .qlip file and the reconstruction from that file alone.
    """
    from qlip import assets
    from qlip.cli import models, outputs
    from qlip.cli.image import contact_sheet
    from qlip.cli.image.reconstruct import measure
    from qlip.files import write_bytes

    folder = assets.path("images")
    photographs = [Input(path, path.stem) for path in sorted(folder.glob("*.jpg"))]
    drawings = [Input(path, f"{path.stem}-drawn") for path in sorted((folder / "drawings").glob("*.png"))]
    start = time.perf_counter()
    codec = models.load(model, device)
    loaded = time.perf_counter() - start
    with stoppable("finished files are kept"):
        start = time.perf_counter()
        shown = _through_files(codec, photographs + drawings, output)
        rows = {one.item: measure(one.item, one.prepared, one.rebuilt, one.tokens) for one in shown}
        for one in shown:
            write_bytes(output / f"{one.item.name}.png", outputs.png(one.rebuilt))
        for item, labels in _classified(codec, [one.item for one in shown if one.label in LABELS]).items():
            rows[item]["labels"] = labels
        sheets = [
            contact_sheet.draw([_photograph(codec, one, rows[one.item]) for one in shown[: len(photographs)]]),
            contact_sheet.draw(
                [_drawing(one, rows[one.item]) for one in shown[len(photographs) :]], columns=5, small=128
            ),
        ]
        drawn = _drawn(codec)
        if drawn:
            sheets.append(contact_sheet.draw(drawn, columns=len(drawn), small=128))
        write_bytes(output / "demo.png", outputs.png(contact_sheet.stack(sheets)))
        took = time.perf_counter() - start
    if as_json:
        report = {"model": codec.described(), "output": str(output / "demo.png"), "seconds": round(took, 3)}
        print_json(report | {"results": list(rows.values())})
        return
    _print(codec, shown, rows)
    show(f"\n{codec.name}: loaded in {loaded:.1f} s, ran in {took:.1f} s.")
    show(f"Open {output / 'demo.png'}, then try your own image: {_command()} reconstruct YOUR.jpg --tiles -o mine.png")


def _through_files(codec: ImageCodec, items: list[Input], output: Path) -> list[Shown]:
    """Encode images to `.qlip` files and decode these files."""
    from qlip.files import write_bytes
    from qlip.tokens import TokenFile

    prepared = [codec.prepare(item.path) for item in items]
    for item, tokens in zip(items, codec.encode_prepared(prepared), strict=True):
        write_bytes(item.output(output, ".qlip"), tokens.to_bytes())
    files = [TokenFile.load(item.output(output, ".qlip")) for item in items]
    rebuilt = codec.decode_files(files)
    return [Shown(*one) for one in zip(items, prepared, files, rebuilt, strict=True)]


def _classified(codec: ImageCodec, items: list[Input]) -> dict[Input, list[dict[str, str | float]]]:
    """Labels of each image, most probable first."""
    from qlip.cli.image import classify, embed

    classes = classify.label_vectors(codec, LABELS, "cifar")
    vectors = embed.embed_images(codec, items, len(items), Failures())
    return {item: classify.ranked(codec, vector, classes, LABELS) for item, vector in vectors.items()}


def _photograph(codec: ImageCodec, one: Shown, row: Row) -> Exhibit:
    """A photograph, its reconstruction, and one of a larger size in tiles, whose metrics are added to its row."""
    from qlip.cli.image.contact_sheet import Exhibit
    from qlip.cli.image.reconstruct import measure
    from qlip.tokens import Fit

    side = TILES * codec.model.image_size
    large = codec.prepare(one.item.path, Fit("tiles", (side, side)))
    [(tokens, image)] = codec.round_trip([large], batch_size=32)
    row["in_tiles"] = tiled = measure(one.item, large, image, tokens)
    panels = (
        ("", large.image),
        (f"from {row['token_bytes']:,} bytes", one.rebuilt),
        (f"from {tiled['token_bytes']:,}, in {tiled['tiles']} tiles", image),
    )
    caption = f"{row['psnr']:.1f} dB at {row['size'][0]} px · {tiled['psnr']:.1f} dB at {side} px"
    return Exhibit(one.item.name, panels, f"{caption} · class: {_guess(row)}" if "labels" in row else caption)


def _drawing(one: Shown, row: Row) -> Exhibit:
    from qlip.cli.image.contact_sheet import Exhibit

    panels = (("", one.prepared.image), (f"from {row['token_bytes']:,} bytes", one.rebuilt))
    return Exhibit(one.label, panels, f"class: {_guess(row)}")


def _drawn(codec: ImageCodec) -> list[Exhibit]:
    """Images that the bundled drawer draws from text, if it draws tokens of this model."""
    from qlip.cli.image.contact_sheet import Exhibit
    from qlip.t2i import Drawer

    drawer = Drawer.from_pretrained("bundled", device=codec.model.device)
    if codec.model.code_fingerprint != drawer.codec.model.code_fingerprint:
        return []
    images = drawer.images(drawer.draw(drawer.condition(PROMPTS)))
    return [Exhibit("drawn from text", (("", one),), text) for text, one in zip(PROMPTS, images, strict=True)]


def _guess(row: Row, place: int = 0) -> str:
    label = row["labels"][place]
    return f"{label['label']} {label['probability']:.0%}"


def _print(codec: ImageCodec, shown: list[Shown], rows: dict[Input, Row]) -> None:
    side = codec.model.image_size
    columns = ("photograph", f"{side} x {side} pixels", "its .qlip file", "reconstruction", f"in {TILES * TILES} tiles")
    sizes_table = new_table(*columns, numbers=columns[1:])
    labels_table = new_table("image", "classified as", "next", "")
    right = count = 0
    for one in shown:
        row = rows[one.item]
        if "in_tiles" in row:
            sizes = (f"{size:,} bytes" for size in (3 * side * side, one.tokens.num_bytes))
            sizes_table.add_row(one.label, *sizes, *(f"{kept['psnr']:.1f} dB" for kept in (row, row["in_tiles"])))
        if "labels" in row:
            hit = row["labels"][0]["label"] == one.label
            right, count = right + hit, count + 1
            kind = "photograph" if "in_tiles" in row else "drawing"
            labels_table.add_row(f"{one.label}, {kind}", _guess(row), _guess(row, 1), "right" if hit else "")
    print_table(sizes_table)
    show()
    print_table(labels_table)
    show(f"{right} of {count} classified correctly, among {len(LABELS)} classes that its training captions name.")


def _command() -> str:
    """Path by which this command was called, so that the advice can be pasted."""
    called = Path(sys.argv[0])
    if os.sep not in sys.argv[0]:
        return "qlip"
    try:
        return str(called.absolute().relative_to(Path.cwd()))
    except ValueError:
        return "qlip"
