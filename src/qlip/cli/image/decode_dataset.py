"""`qlip decode DATASET`: images of a token dataset, as files or on a contact sheet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlip.cli import io_pipeline, options
from qlip.cli.console import Failures, note, plural, print_json, progress, show, stoppable, usage_error
from qlip.cli.inputs import Input
from qlip.errors import QLIPError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from qlip.archive import TokenDataset
    from qlip.tokens import ImageCodec

ON_A_SHEET, MOST_ON_A_SHEET = 60, 600
"""Images on a sheet by default, and at most."""


@dataclass(frozen=True)
class Request:
    """Options of `qlip decode` for a dataset.

    Attributes:
        output: folder for one image file per row, or None; tiles are joined to one file per image, unless `rows` are
            named.
        sheet: file for one image of all rows, or None.
        rows: rows to decode, as `qlip.archive.manage.decode.chosen_rows` reads them; None is all.
        limit: number of randomly chosen rows, or of joined images; None is all.
        seed: random seed of the choice.
        original_size: resize to the original's size.
        overwrite, skip_existing: treatment of existing files.
    """

    output: Path | None
    sheet: Path | None
    rows: str | None = None
    limit: int | None = None
    seed: int = 0
    original_size: bool = False
    overwrite: bool = False
    skip_existing: bool = False


def is_dataset(argument: str) -> bool:
    """Return whether an argument names a token dataset instead of `.qlip` files."""
    from qlip.archive.dataset.layout import INFO
    from qlip.data.storage.storage import is_remote, local_path

    return is_remote(argument) or (local_path(argument) / INFO).is_file()


def decode_dataset(
    address: str, request: Request, model: str | None, device: str, dtype: options.Dtype, batch_size: int, as_json: bool
) -> None:
    """Reconstruct the rows that were asked for."""
    from qlip.archive import TokenDataset
    from qlip.cli import models, outputs

    if request.output is None and request.sheet is None:
        usage_error(f"{address}: is a dataset; give -o DIR for one image file per row, or --sheet FILE for one of all")
    if request.sheet is not None:
        outputs.check_image_name(request.sheet)
    dataset = TokenDataset(address)
    chosen = _chosen(dataset, request)
    codec = models.load_for_dataset(dataset.info, address, model, ["decode"], device, dtype)
    failures, report = Failures(), dict[str, Any]()
    total = len(chosen)
    if request.output is not None and request.rows is None and dataset.info.views.fit == "tiles":
        total, written = _write_joined(dataset, codec, request, batch_size, failures)
        report |= written
    elif request.output is not None:
        report |= _write_rows(dataset, chosen, codec, request, batch_size, failures)
    if request.sheet is not None:
        drawn = chosen
        if request.output is not None and request.limit is None and len(chosen) > ON_A_SHEET:
            drawn = _random_rows(chosen, ON_A_SHEET, request.seed)
        draw_sheet(dataset, drawn, codec, request.sheet, batch_size)
        report["sheet"] = {"file": str(request.sheet), "images": len(drawn)}
    if as_json:
        print_json({"model": codec.described(), "dataset": address} | report | {"failures": failures.found})
    else:
        _print(report)
    failures.finish(total, "image")


def draw_sheet(dataset: TokenDataset, rows: NDArray[np.int64], codec: ImageCodec, file: Path, batch_size: int) -> None:
    """Write a contact sheet of reconstructed rows, each with its caption and key."""
    from qlip.archive.manage.decode import decode_rows
    from qlip.cli.image.contact_sheet import SheetImage, write_rows

    if len(rows) > MOST_ON_A_SHEET:
        usage_error(f"--sheet: {len(rows):,} images; a sheet holds {MOST_ON_A_SHEET}, so give --limit or --rows")
    if not len(rows):
        raise QLIPError(f"{dataset.layout.address}: no row to draw")
    with stoppable("nothing was written"), progress("decoding", len(rows)) as bar:
        images = {}
        for row, image in decode_rows(dataset, rows, codec.model, codec.processor, batch_size):
            images[row] = image
            bar.advance()
    shown = [SheetImage(row, images[number]) for number, row in zip(rows.tolist(), dataset.rows(rows), strict=True)]
    title = dataset.layout.address.rstrip("/").rpartition("/")[2]
    write_rows(file, shown, title, f"{len(rows):,} of {len(dataset):,} rows, decoded by {codec.name}")


def _chosen(dataset: TokenDataset, request: Request) -> NDArray[np.int64]:
    from qlip.archive.manage.decode import chosen_rows

    rows = chosen_rows(request.rows, len(dataset), dataset.layout.address)
    limit = request.limit
    if limit is None and request.output is None and request.rows is None:
        limit = ON_A_SHEET
    return rows if limit is None else _random_rows(rows, limit, request.seed)


def _random_rows(rows: NDArray[np.int64], limit: int, seed: int) -> NDArray[np.int64]:
    from qlip.archive.manage.merge import sample_rows

    chosen: NDArray[np.int64] = rows[sample_rows(len(rows), limit, seed)]
    return chosen


def _write_rows(
    dataset: TokenDataset,
    rows: NDArray[np.int64],
    codec: ImageCodec,
    request: Request,
    batch_size: int,
    failures: Failures,
) -> dict[str, Any]:
    """Write a PNG per row; return the report."""
    from qlip.archive.manage.decode import decode_rows, file_names

    def images(todo: NDArray[np.int64]) -> Iterator[tuple[int, Image.Image]]:
        return decode_rows(dataset, todo, codec.model, codec.processor, batch_size)

    return _write_images(dataset, rows, file_names(dataset, rows), images, request, failures)


def _write_joined(
    dataset: TokenDataset, codec: ImageCodec, request: Request, batch_size: int, failures: Failures
) -> tuple[int, dict[str, Any]]:
    """Write a PNG per image of a dataset of tiles; return the number of images and the report."""
    import numpy as np

    from qlip.archive.manage.decode import decode_tiled, file_names, tiled_images

    found = tiled_images(dataset)
    if request.limit is not None:
        found = [found[number] for number in _random_rows(np.arange(len(found)), request.limit, request.seed).tolist()]
    for one in found:
        if not one.complete:
            rows, columns = one.tiles
            has = f"has {len(one.rows):,} of its {rows} x {columns} tiles; --rows shows them one by one"
            failures.add(one.key, QLIPError(has))
    by_row = {one.rows.start: one for one in found if one.complete}
    firsts = np.array(list(by_row), dtype=np.int64)

    def images(todo: NDArray[np.int64]) -> Iterator[tuple[int, Image.Image]]:
        some = [by_row[row] for row in todo.tolist()]
        for one, image in decode_tiled(dataset, some, codec.model, codec.processor, batch_size):
            yield one.rows.start, image

    names = file_names(dataset, firsts, joined=True)
    return len(found), _write_images(dataset, firsts, names, images, request, failures)


def _write_images(
    dataset: TokenDataset,
    rows: NDArray[np.int64],
    names: Iterator[str],
    images: Callable[[NDArray[np.int64]], Iterator[tuple[int, Image.Image]]],
    request: Request,
    failures: Failures,
) -> dict[str, Any]:
    """Write a PNG per image; return the report.

    Args:
        dataset: dataset of the rows.
        rows: number of each image's first row.
        names: file names without suffix.
        images: reconstructs images, given the numbers of their first rows, and yields each with its number.
        request: options of the command.
        failures: collects single files that cannot be written.
    """
    from qlip.cli.outputs import enlarged, png, write_new

    folder = request.output
    assert folder is not None
    files = {row: folder / f"{name}.png" for row, name in zip(rows.tolist(), names, strict=True)}
    todo, failed_before = rows, len(failures.found)
    if request.skip_existing:
        todo = rows[[not files[row].exists() for row in rows.tolist()]]

    def write(row: int, image: Image.Image) -> None:
        sized = enlarged(image, dataset.row(row).original_size) if request.original_size else image
        write_new(files[row], png(sized), request.overwrite, folder=folder)

    with (
        stoppable("finished images are kept; run the same command with --skip-existing to continue"),
        progress("decoding", len(todo)) as bar,
        io_pipeline.WriteBehind(failures, lambda item: bar.advance()) as writer,
    ):
        for row, image in images(todo):
            item = Input(files[row], files[row].stem)
            writer.submit(item, lambda row=row, image=image: write(row, image))  # type: ignore[misc]
    written = len(todo) - len(failures.found) + failed_before
    return {"output": str(folder), "written": written, "skipped": len(rows) - len(todo)}


def _print(report: dict[str, Any]) -> None:
    if report.get("skipped"):
        note(f"{plural(report['skipped'], 'existing image')} skipped")
    if "written" in report:
        show(f"{plural(report['written'], 'image')} written in {report['output']}")
    if "sheet" in report:
        show(f"{plural(report['sheet']['images'], 'image')} on {report['sheet']['file']}")
