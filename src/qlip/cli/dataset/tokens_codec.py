"""`qlip tokens codec`: train and measure the tables of the entropy coder."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli import options
from qlip.cli.console import (
    new_table,
    note,
    plural,
    print_json,
    print_table,
    progress,
    say,
    show,
    stoppable,
    usage_error,
)

if TYPE_CHECKING:
    from torch import Tensor

    from qlip.data.loader.eval_set import EvalSet
    from qlip.data.sources.base import CaptionedImages
    from qlip.tokens import ImageCodec
    from qlip.tokens.entropy.train_tables import TableTraining

app = typer.Typer(help="Train and measure the entropy tables, which code tokens in fewer bytes.", no_args_is_help=True)

HELD_OUT = ["cifar10:test", "emoji:twemoji", "clipart:test", "wallpapers:test"]
SAVE_EVERY = 200
"""Training steps per saved state."""

Data = Annotated[
    list[str],
    typer.Argument(
        metavar="DATA...", help="Images: sets such as cifar10:train (see `qlip data list`), folders or tar shards."
    ),
]


@app.command()
def train(
    data: Data,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="FILE", help="File for the tables; copy it into the model's folder to use them."
        ),
    ] = Path("entropy_tables.safetensors"),
    limit: Annotated[
        int, typer.Option(min=1, help="Maximum number of images per set, spread evenly over it.")
    ] = 10_000,
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps, of 4,096 tokens each.")] = 4000,
    hidden: Annotated[
        int, typer.Option(min=1, max=4096, help="Number of hidden units: more save more bytes, and are slower.")
    ] = 32,
    seed: Annotated[int, typer.Option(min=0, help="Random seed of the training.")] = 0,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = options.AUTO,
    batch_size: options.BatchSize = 32,
    as_json: options.Json = False,
) -> None:
    """Train entropy tables for a model's tokens; takes minutes on one CPU core.

    Put the file into the model's folder as entropy_tables.safetensors. Keep older tables beside it, such as
    entropy_tables-OLD.safetensors, to read files that were coded with them. A stopped command can be run again to
    continue.
    """
    import torch

    from qlip.cli import models
    from qlip.tokens import Tables
    from qlip.tokens.entropy.train_tables import NeighbourhoodSampler, TableTraining

    if output.suffix != ".safetensors":
        usage_error(f"{output}: tables are a .safetensors file; give such a name")
    codec = models.load(model, device)
    sets = {name: _open_images(codec, name, limit) for name in data}
    stamps = {name: images.stamp(wanted) for name, (images, wanted) in sets.items()}
    made_by = {"model": codec.model.code_fingerprint, "data": data, "limit": limit, "stamps": stamps}
    work = output.with_name(f"{output.stem}-work") / _name_of(made_by)
    with stoppable("run the same command to continue"):
        bits = torch.cat([_kept_bits(codec, name, *sets[name], batch_size, work) for name in data])
        training = TableTraining(NeighbourhoodSampler(bits, codec.model.grid), steps, hidden, seed)
        bits_per_token = _train(training, work / f"fit-{steps}-{hidden}-{seed}.safetensors")
    tables = Tables.from_network(training.network)
    origin = {"code_fingerprint": codec.model.code_fingerprint, "data": " ".join(data), "pictures": f"{len(bits)}"}
    tables.save(output, origin | {"limit": f"{limit}", "steps": f"{steps}", "seed": f"{seed}"})
    shutil.rmtree(work)
    with suppress(OSError):  # another training may be using it
        work.parent.rmdir()
    report = {
        "output": str(output),
        "digest": tables.digest,
        "file_bytes": output.stat().st_size,
        "images": len(bits),
        "bits_a_token": bits_per_token and round(bits_per_token, 3),
        "raw_bits_a_token": tables.num_bits,
    }
    if as_json:
        print_json(report)
        return
    rate = "" if bits_per_token is None else f"; {bits_per_token:.2f} instead of {tables.num_bits} bits per token"
    show(
        f"{output}: tables {tables.digest[:16]}, {report['file_bytes']:,} bytes, trained on"
        f" {plural(len(bits), 'image')}{rate}"
    )


def _train(training: TableTraining, path: Path) -> float | None:
    """Train and save the state regularly; return bits per token over the last steps, or None if no step was left."""
    from safetensors.torch import load_file, save_file

    from qlip.files import written_aside

    if path.exists():
        training.load_state(load_file(path))
        note(f"continues from step {training.step:,}")
    recent: list[float] = []

    def on_step(step: int, bits_per_token: float) -> None:
        recent.append(bits_per_token)
        bar.advance()
        if step % SAVE_EVERY == 0 and step < training.steps:  # after the last step the tables are saved
            with written_aside(path) as aside:
                save_file(training.state(), aside)

    with progress("training", training.steps) as bar:
        bar.advance(training.step)
        training.run(on_step=on_step)
    last = recent[-SAVE_EVERY:]
    return sum(last) / len(last) if last else None


def _kept_bits(codec: ImageCodec, name: str, images: EvalSet, wanted: range, batch_size: int, work: Path) -> Tensor:
    """Return the bits of a set, bool (M, N, L), from a file of an earlier run if there is one."""
    import torch
    from safetensors.torch import load_file, save_file

    from qlip.files import written_aside
    from qlip.modeling.indices import indices_to_bits

    path = work / f"{_name_of(name)}.safetensors"
    if path.exists():
        indices = load_file(path)["indices"]
    else:
        indices = _indices(codec, name, images, wanted, batch_size)
        with written_aside(path) as aside:
            save_file({"indices": indices.contiguous()}, aside)
    return indices_to_bits(indices.to(torch.int64), codec.model.group_size)


def _open_images(codec: ImageCodec, name: str, limit: int | None) -> tuple[EvalSet, range]:
    """Open a set; return it and the positions of the images to use."""
    from qlip.data.loader.eval_set import EvalSet
    from qlip.data.loader.transforms import EvalTransform
    from qlip.evaluation.run.datasets import open_set

    source: CaptionedImages = open_set(name)
    wanted = range(0, len(source), max(1, -(-len(source) // limit) if limit else 1))
    return EvalSet(source, EvalTransform(codec.processor.preprocessing)), wanted


def _indices(codec: ImageCodec, name: str, images: EvalSet, wanted: range, batch_size: int) -> Tensor:
    """Encode the images of a set, int64 (M, N, K); broken images are reported and skipped."""
    import torch

    from qlip.errors import QLIPError

    found: list[Tensor] = []
    with torch.inference_mode(), progress(f"encoding {name}", len(wanted)) as bar:
        for batch in images.batches(batch_size, parts=[wanted]):
            for broken in batch.skipped:
                say(f"{name}: {broken.key}: {broken.reason}")
            if len(batch):
                model = codec.model
                found.append(model.encode(batch.pixel_values.to(model.device, model.dtype)).cpu())
            bar.advance(len(batch.digests))
    if not found:
        raise QLIPError(f"{name}: no image could be read; give another set")
    return torch.cat(found)


def _name_of(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


@app.command()
def report(
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA...]", help=f"Images: sets, folders or tar shards; default: {' '.join(HELD_OUT)}."
        ),
    ] = None,
    tables: options.EntropyTables = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Maximum number of images per set, spread evenly over it; default: all."),
    ] = None,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = options.AUTO,
    batch_size: options.BatchSize = 32,
    as_json: options.Json = False,
) -> None:
    """Measure how many bytes the entropy tables save on held-out images.

    Every image is coded, decoded and compared. Bytes are those of the coded bits alone; a .qlip file adds 8 bytes that
    name the tables.
    """
    from qlip.cli import models
    from qlip.errors import QLIPError
    from qlip.tokens import pack_batch
    from qlip.tokens.entropy.registry import TAG_BYTES

    codec = models.load(model, device)
    coder = codec.coder(tables)
    if coder is None:
        raise QLIPError(f"{codec.name}: has no entropy tables; make them with `qlip tokens codec train`")
    rows = []
    for name in data or HELD_OUT:
        indices = _indices(codec, name, *_open_images(codec, name, limit), batch_size)
        packed = pack_batch(indices, codec.model.group_size)
        coded = coder.encode(packed, codec.model.grid)
        if coder.decode(coded, codec.model.grid) != packed:
            raise QLIPError(f"{name}: decoded tokens differ from the coded ones; please report this")
        sizes, raw = sorted(len(one) for one in coded), len(packed[0])
        mean = sum(sizes) / len(sizes)
        rows.append(
            {
                "data": name,
                "images": len(sizes),
                "raw_bytes": raw,
                "mean_bytes": round(mean, 2),
                "saved_percent": round(100 * (1 - mean / raw), 2),
                "bits_a_token": round(8 * mean / (codec.model.grid[0] * codec.model.grid[1]), 3),
                "percentile_5_bytes": sizes[len(sizes) // 20],
                "percentile_95_bytes": sizes[-1 - len(sizes) // 20],
                "left_raw_in_files": sum(size + TAG_BYTES >= raw for size in sizes),
            }
        )
    if as_json:
        print_json({"model": codec.described(), "tables": coder.digest, "results": rows})
        return
    columns = {
        "set": "data",
        "images": "images",
        "raw": "raw_bytes",
        "coded": "mean_bytes",
        "saved": "saved_percent",
        "bits per token": "bits_a_token",
        "5%": "percentile_5_bytes",
        "95%": "percentile_95_bytes",
    }
    table = new_table(*columns, numbers=tuple(columns)[1:])
    for row in rows:
        table.add_row(*(f"{row[key]}%" if key == "saved_percent" else f"{row[key]}" for key in columns.values()))
    print_table(table)
    show(f"bytes per image of the coded bits; tables {coder.digest[:16]}")
