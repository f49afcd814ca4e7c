"""`qlip tokens codec`: the tables of the entropy coder, trained and measured."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli import options
from qlip.cli.console import new_table, note, plural, print_json, print_table, progress, say, stoppable, usage_error

if TYPE_CHECKING:
    from torch import Tensor

    from qlip.data.loader.eval_set import EvalSet
    from qlip.data.sources.base import CaptionedImages
    from qlip.tokens import ImageCodec
    from qlip.tokens.entropy.train_tables import Fit

app = typer.Typer(help="Train and measure the tables that code tokens in fewer bytes.", no_args_is_help=True)

HELD_OUT = ["cifar10:test", "emoji:twemoji", "clipart:test", "wallpapers:test"]
SAVE_EVERY = 200
"""Steps of training between two states on the disk."""

Data = Annotated[
    list[str],
    typer.Argument(metavar="DATA...", help="Sets such as cifar10:train (see `qlip data list`), folders or tar shards."),
]
Limit = Annotated[
    int | None, typer.Option(min=1, help="So many pictures of each at most, evenly spread over it; all by default.")
]


@app.command()
def train(
    data: Data,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FILE", help="The tables; the model's folder takes them.")
    ] = Path("entropy_tables.safetensors"),
    limit: Limit = 10_000,
    steps: Annotated[int, typer.Option(min=1, help="Of training, 4,096 tokens each.")] = 4000,
    hidden: Annotated[int, typer.Option(min=1, max=4096, help="Hidden units: more code better, and slower.")] = 32,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
    batch_size: options.BatchSize = 32,
    as_json: options.Json = False,
) -> None:
    """Train the tables of a model's tokens on images: minutes on a processor core.

    Put the file into the model's folder as entropy_tables.safetensors; keep tables that coded files which you still
    want to read beside it as entropy_tables-OLD.safetensors. Stopped and started again, the command goes on.
    """
    import torch

    from qlip.cli import models
    from qlip.tokens import Tables
    from qlip.tokens.entropy.train_tables import Fit, Neighbourhoods

    if output.suffix != ".safetensors":
        usage_error(f"{output}: tables are a .safetensors file; give such a name")
    codec = models.load(model, device)
    sets = {name: _pictures(codec, name, limit) for name in data}
    stamps = {name: pictures.stamp(wanted) for name, (pictures, wanted) in sets.items()}
    made_by = {"model": codec.model.code_fingerprint, "data": data, "limit": limit, "stamps": stamps}
    work = output.with_name(f"{output.stem}-work") / _name_of(made_by)
    with stoppable("the same command goes on"):
        bits = torch.cat([_kept_bits(codec, name, *sets[name], batch_size, work) for name in data])
        fit = Fit(Neighbourhoods(bits, codec.model.grid), steps, hidden, seed)
        spent = _fit(fit, work / f"fit-{steps}-{hidden}-{seed}.safetensors")
    tables = Tables.from_network(fit.network)
    told = {"code_fingerprint": codec.model.code_fingerprint, "data": " ".join(data), "pictures": f"{len(bits)}"}
    tables.save(output, told | {"limit": f"{limit}", "steps": f"{steps}", "seed": f"{seed}"})
    shutil.rmtree(work)
    with suppress(OSError):  # another training of this name may be at work beside
        work.parent.rmdir()
    report = {
        "output": str(output),
        "digest": tables.digest,
        "file_bytes": output.stat().st_size,
        "pictures": len(bits),
        "bits_a_token": spent and round(spent, 3),
        "raw_bits_a_token": tables.num_bits,
    }
    if as_json:
        print_json(report)
        return
    on_them = "" if spent is None else f"; {spent:.2f} of {tables.num_bits} bits a token on them"
    print(
        f"{output}: tables {tables.digest[:16]}, {report['file_bytes']:,} bytes, trained on"
        f" {plural(len(bits), 'picture')}{on_them}"
    )


def _fit(fit: Fit, path: Path) -> float | None:
    """Train with states on the disk; returns the bits a token over the last steps, if there was one left."""
    from safetensors.torch import load_file, save_file

    from qlip.files import written_aside

    if path.exists():
        fit.load_state(load_file(path))
        note(f"goes on from step {fit.step:,}")
    recent: list[float] = []

    def each(step: int, spent: float) -> None:
        recent.append(spent)
        bar.advance()
        if step % SAVE_EVERY == 0 and step < fit.steps:  # of the last step the tables themselves are the state
            with written_aside(path) as aside:
                save_file(fit.state(), aside)

    with progress("training", fit.steps) as bar:
        bar.advance(fit.step)
        fit.run(each=each)
    last = recent[-SAVE_EVERY:]
    return sum(last) / len(last) if last else None


def _kept_bits(codec: ImageCodec, name: str, pictures: EvalSet, wanted: range, batch_size: int, work: Path) -> Tensor:
    """A set's bits, bool (M, N, L), kept in a file between two goes."""
    import torch
    from safetensors.torch import load_file, save_file

    from qlip.files import written_aside
    from qlip.modeling.indices import indices_to_bits

    path = work / f"{_name_of(name)}.safetensors"
    if path.exists():
        indices = load_file(path)["indices"]
    else:
        indices = _indices(codec, name, pictures, wanted, batch_size)
        with written_aside(path) as aside:
            save_file({"indices": indices.contiguous()}, aside)
    return indices_to_bits(indices.to(torch.int64), codec.model.group_size)


def _pictures(codec: ImageCodec, name: str, limit: int | None) -> tuple[EvalSet, range]:
    """A set, and the places of the images that are taken of it."""
    from qlip.data.loader.eval_set import EvalSet
    from qlip.data.loader.transforms import EvalTransform
    from qlip.evaluation.run.datasets import open_set

    source: CaptionedImages = open_set(name)
    wanted = range(0, len(source), max(1, -(-len(source) // limit) if limit else 1))
    return EvalSet(source, EvalTransform(codec.processor.preprocessing)), wanted


def _indices(codec: ImageCodec, name: str, pictures: EvalSet, wanted: range, batch_size: int) -> Tensor:
    """The tokens of a set's images, int64 (M, N, K); broken ones are said and left out."""
    import torch

    from qlip.errors import QLIPError

    found: list[Tensor] = []
    with torch.inference_mode(), progress(f"encoding {name}", len(wanted)) as bar:
        for batch in pictures.batches(batch_size, parts=[wanted]):
            for broken in batch.skipped:
                say(f"{name}: {broken.key}: {broken.reason}")
            if len(batch):
                model = codec.model
                found.append(model.encode(batch.pixel_values.to(model.device, model.dtype)).cpu())
            bar.advance(len(batch.digests))
    if not found:
        raise QLIPError(f"{name}: no picture could be read; give another set")
    return torch.cat(found)


def _name_of(what: Any) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]


@app.command()
def report(
    data: Annotated[
        list[str] | None,
        typer.Argument(metavar="[DATA...]", help=f"Sets, folders or tar shards; by default {' '.join(HELD_OUT)}."),
    ] = None,
    tables: options.Tables = None,
    limit: Limit = None,
    model: options.Model = options.DEFAULT_MODEL,
    device: options.Device = "auto",
    batch_size: options.BatchSize = 32,
    as_json: options.Json = False,
) -> None:
    """Measure how many bytes the tables save, on images that they were not trained on.

    Every image is coded and decoded again. Bytes are of the coded bits alone, as figures of tokens are; a .qlip file
    adds 8 that name the tables.
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
        images = pack_batch(_indices(codec, name, *_pictures(codec, name, limit), batch_size), codec.model.group_size)
        coded = coder.encode(images, codec.model.grid)
        if coder.decode(coded, codec.model.grid) != images:
            raise QLIPError(f"{name}: a picture's tokens did not come back; please report this")
        sizes, raw = sorted(len(one) for one in coded), len(images[0])
        mean = sum(sizes) / len(sizes)
        rows.append(
            {
                "data": name,
                "pictures": len(sizes),
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
        "pictures": "pictures",
        "raw": "raw_bytes",
        "coded": "mean_bytes",
        "saved": "saved_percent",
        "bits a token": "bits_a_token",
        "5%": "percentile_5_bytes",
        "95%": "percentile_95_bytes",
    }
    table = new_table(*columns, numbers=tuple(columns)[1:])
    for row in rows:
        table.add_row(*(f"{row[key]}%" if key == "saved_percent" else f"{row[key]}" for key in columns.values()))
    print_table(table)
    print(f"bytes a picture of the coded bits; tables {coder.digest[:16]}")
