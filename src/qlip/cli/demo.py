"""`qlip demo`: the whole way once, on the pictures in the package."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli import inputs, options
from qlip.cli.console import Failures, new_table, print_json, print_table, stoppable

if TYPE_CHECKING:
    from PIL import Image

    from qlip.cli.codec import Prepared
    from qlip.cli.models import Tokenizer
    from qlip.cli.pictures import Exhibit
    from qlip.tokens import TokenFile

TILES = 4
"""Along a side of the larger version: a model this small sees more in several tiles."""

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""What the bundled model's captions named most: the classes of CIFAR-10."""


def demo(
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Folder for the results, made if absent.")
    ] = Path("demo"),
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """See it work: photographs that come with the package, as a few hundred bytes each, rebuilt from them, and named.

    Writes DIR/demo.png to look at, and for each picture its .qlip file and what is rebuilt from that file alone.
    """
    from qlip import assets
    from qlip.cli import codec, models, outputs, pictures
    from qlip.cli.reconstruct import figures
    from qlip.files import write_bytes
    from qlip.tokens import TokenFile

    found = inputs.find([str(assets.path("pictures"))], inputs.IMAGE_SUFFIXES, "picture")
    start = time.perf_counter()
    tokenizer = models.load(model, device)
    loaded = time.perf_counter() - start
    with stoppable("finished files are kept"):
        start = time.perf_counter()
        prepared = [codec.prepare(tokenizer, item.path, codec.Fit()) for item in found]
        for item, tokens in zip(found, codec.tokenize(tokenizer, prepared), strict=True):
            write_bytes(output / f"{item.name}.qlip", tokens.to_bytes())
        files = [TokenFile.load(output / f"{item.name}.qlip") for item in found]  # from here on nothing but the files
        rebuilt = codec.rebuild(tokenizer, files)
        names = _named(tokenizer, found)
        tiled = [_in_tiles(tokenizer, item) for item in found]
        rows = [
            figures(item, picture, image, [tokens])
            | {"file_bytes": tokens.num_bytes, "labels": names[item], "in_tiles": figures(item, *large)}
            for item, picture, image, tokens, large in zip(found, prepared, rebuilt, files, tiled, strict=True)
        ]
        for item, image in zip(found, rebuilt, strict=True):
            write_bytes(output / f"{item.name}.png", outputs.png(image))
        exhibits = [_exhibit(*shown) for shown in zip(found, rebuilt, tiled, rows, strict=True)]
        write_bytes(output / "demo.png", outputs.png(pictures.draw(exhibits)))
        took = time.perf_counter() - start
    if as_json:
        print_json(
            {
                "model": tokenizer.described(),
                "output": str(output / "demo.png"),
                "seconds": round(took, 3),
                "results": rows,
            }
        )
        return
    side = tokenizer.model.image_size
    large = f"in {TILES * TILES} tiles"
    columns = ("picture", f"{side} x {side} pixels", "its .qlip file", "rebuilt", large, "looks most like")
    table = new_table(*columns, numbers=columns[1:5])
    for item, row in zip(found, rows, strict=True):
        sizes = (f"{count:,} bytes" for count in (3 * side * side, row["file_bytes"]))
        rebuilds = (f"{one['psnr']:.1f} dB" for one in (row, row["in_tiles"]))
        table.add_row(item.name, *sizes, *rebuilds, _guesses(row, 2))
    print_table(table)
    print(f"\n{tokenizer.name}, loaded in {loaded:.1f} s, did this in {took:.1f} s.")
    print(f"The words to choose from were {', '.join(LABELS)}.")
    print(f"Look at {output / 'demo.png'}, then try your own: {_command()} reconstruct YOUR.jpg --tiles -o mine.png")


def _in_tiles(tokenizer: Tokenizer, item: inputs.Input) -> tuple[Prepared, Image.Image, list[TokenFile]]:
    """A picture at several times the model's size, and what is rebuilt from its tiles."""
    from qlip.cli import codec

    side = TILES * tokenizer.model.image_size
    picture = codec.prepare_for_tiles(tokenizer, item.path, (side, side))
    files, image = codec.there_and_back_in_tiles(tokenizer, picture, batch_size=32)
    return picture, image, files


def _exhibit(
    item: inputs.Input, rebuilt: Image.Image, tiled: tuple[Prepared, Image.Image, list[TokenFile]], row: dict[str, Any]
) -> Exhibit:
    from qlip.cli.pictures import Exhibit

    (original, large, _), figures = tiled, row["in_tiles"]
    panels = (
        ("", original.image),
        (f"from {row['token_bytes']:,} bytes", rebuilt),
        (f"from {figures['token_bytes']:,}, in {figures['tiles']} tiles", large),
    )
    sides = [one["size"][0] for one in (row, figures)]
    psnr = f"{row['psnr']:.1f} dB at {sides[0]} px · {figures['psnr']:.1f} dB at {sides[1]} px"
    return Exhibit(item.name, panels, f"{psnr} · {_guesses(row, 1)}")


def _named(tokenizer: Tokenizer, found: list[inputs.Input]) -> dict[inputs.Input, list[dict[str, str | float]]]:
    """Each picture's labels, likeliest first."""
    from qlip.cli import classify, embed

    classes = classify.label_vectors(tokenizer, LABELS, "cifar")
    vectors = embed.embed_images(tokenizer, found, len(found), Failures())
    return {item: classify.ranked(tokenizer, vector, classes, LABELS) for item, vector in vectors.items()}


def _guesses(row: dict[str, Any], count: int) -> str:
    return ", ".join(f"{guess['label']} {guess['probability']:.0%}" for guess in row["labels"][:count])


def _command() -> str:
    """How this command was called, so that the advice can be pasted."""
    called = Path(sys.argv[0])
    if os.sep not in sys.argv[0]:
        return "qlip"
    try:
        return str(called.absolute().relative_to(Path.cwd()))
    except ValueError:
        return "qlip"
