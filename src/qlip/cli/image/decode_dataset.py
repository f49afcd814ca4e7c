"""`qlip decode DATASET`: a token dataset back to images, as files or on a sheet."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlip.cli import io_pipeline as flow
from qlip.cli import options
from qlip.cli.console import Failures, note, plural, print_json, progress, stoppable, usage_error
from qlip.cli.inputs import Input
from qlip.errors import QLIPError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    from qlip.archive import TokenDataset
    from qlip.tokens import ImageCodec

ON_A_SHEET, MOST_ON_A_SHEET = 60, 600


@dataclass(frozen=True)
class Wanted:
    """What to rebuild of a dataset, and how.

    Attributes:
        output: folder for an image a row, or None.
        sheet: file for one image of all, or None.
        rows: as `qlip.archive.manage.decode.chosen_rows` reads; None is all.
        sample: so many of them by chance; None is all.
        seed: of the chance.
        original_size: enlarge to the original's size.
        overwrite, skip_existing: files that are there.
    """

    output: Path | None
    sheet: Path | None
    rows: str | None = None
    sample: int | None = None
    seed: int = 0
    original_size: bool = False
    overwrite: bool = False
    skip_existing: bool = False


def is_dataset(argument: str) -> bool:
    """Whether an argument names a token dataset instead of `.qlip` files."""
    from qlip.archive.dataset.layout import INFO
    from qlip.data.storage.storage import is_remote, local_path

    return is_remote(argument) or (local_path(argument) / INFO).is_file()


def decode_dataset(
    address: str, wanted: Wanted, model: str | None, device: str, dtype: options.Dtype, batch_size: int, as_json: bool
) -> None:
    """Rebuild the rows that were asked for."""
    from qlip.archive import TokenDataset
    from qlip.cli import models, outputs

    if wanted.output is None and wanted.sheet is None:
        usage_error(f"{address}: a dataset; give -o DIR for a picture a row, or --sheet FILE for all in one")
    if wanted.sheet is not None:
        outputs.check_picture_name(wanted.sheet)
    dataset = TokenDataset(address)
    chosen = _chosen(dataset, wanted)
    codec = models.load_maker(dataset.info, address, model, ["rebuilding"], device, dtype)
    failures, report = Failures(), dict[str, Any]()
    if wanted.output is not None:
        report |= _write_pictures(dataset, chosen, codec, wanted, batch_size, failures)
    if wanted.sheet is not None:
        drawn = chosen
        if wanted.output is not None and wanted.sample is None and len(chosen) > ON_A_SHEET:
            drawn = _by_chance(chosen, ON_A_SHEET, wanted.seed)
        draw_sheet(dataset, drawn, codec, wanted.sheet, batch_size)
        report["sheet"] = {"file": str(wanted.sheet), "pictures": len(drawn)}
    if as_json:
        print_json({"model": codec.described(), "dataset": address} | report | {"failures": failures.found})
    else:
        _print(report)
    failures.finish(len(chosen), "picture")


def draw_sheet(dataset: TokenDataset, rows: NDArray[np.int64], codec: ImageCodec, file: Path, batch_size: int) -> None:
    """Reconstructed images side by side, each with its words and its key."""
    from qlip.archive.manage.decode import rebuild
    from qlip.cli.image import dataset_sheets as sheets

    if len(rows) > MOST_ON_A_SHEET:
        usage_error(f"--sheet: {len(rows):,} pictures; a sheet holds {MOST_ON_A_SHEET}, so take --sample or --rows")
    if not len(rows):
        raise QLIPError(f"{dataset.layout.address}: no row to draw")
    with stoppable("nothing was written"), progress("rebuilding", len(rows)) as bar:
        images = {}
        for row, image in rebuild(dataset, rows, codec.model, codec.processor, batch_size):
            images[row] = image
            bar.advance()
    shown = [sheets.Shown(row, images[number]) for number, row in zip(rows.tolist(), dataset.rows(rows), strict=True)]
    title = dataset.layout.address.rstrip("/").rpartition("/")[2]
    sheets.write(file, shown, title, f"{len(rows):,} of {len(dataset):,} rows", codec.name)


def _chosen(dataset: TokenDataset, wanted: Wanted) -> NDArray[np.int64]:
    from qlip.archive.manage.decode import chosen_rows

    rows = chosen_rows(wanted.rows, len(dataset), dataset.layout.address)
    count = wanted.sample
    if count is None and wanted.output is None and wanted.rows is None:
        count = ON_A_SHEET
    return rows if count is None else _by_chance(rows, count, wanted.seed)


def _by_chance(rows: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    from qlip.archive.manage.merge import sample_rows

    chosen: NDArray[np.int64] = rows[sample_rows(len(rows), count, seed)]
    return chosen


def _write_pictures(
    dataset: TokenDataset,
    rows: NDArray[np.int64],
    codec: ImageCodec,
    wanted: Wanted,
    batch_size: int,
    failures: Failures,
) -> dict[str, Any]:
    """A PNG a row; the report of it."""
    from qlip.archive.manage.decode import file_names, rebuild
    from qlip.cli.outputs import png, write_new

    folder = wanted.output
    assert folder is not None
    files = {row: folder / f"{name}.png" for row, name in zip(rows.tolist(), file_names(dataset, rows), strict=True)}
    todo = rows
    if wanted.skip_existing:
        todo = rows[[not files[row].exists() for row in rows.tolist()]]

    def write(row: int, image: Image.Image) -> None:
        from qlip.cli.image.encode import enlarged

        shown = enlarged(image, dataset.row(row).original_size) if wanted.original_size else image
        write_new(files[row], png(shown), wanted.overwrite)

    with (
        stoppable("finished pictures are kept; the same command with --skip-existing goes on"),
        progress("decoding", len(todo)) as bar,
        flow.WriteBehind(failures, lambda item: bar.advance()) as writer,
    ):
        for row, image in rebuild(dataset, todo, codec.model, codec.processor, batch_size):
            item = Input(files[row], files[row].stem)
            writer.submit(item, lambda row=row, image=image: write(row, image))  # type: ignore[misc]
    written = len(todo) - len(failures.found)
    return {"output": str(folder), "written": written, "skipped": len(rows) - len(todo)}


def _print(report: dict[str, Any]) -> None:
    if report.get("skipped"):
        note(f"{plural(report['skipped'], 'picture')} there already, skipped")
    if "written" in report:
        print(f"{plural(report['written'], 'picture')} written in {report['output']}")
    if "sheet" in report:
        print(f"{plural(report['sheet']['pictures'], 'picture')} on {report['sheet']['file']}")
