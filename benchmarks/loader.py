"""Our loader compared with the pipeline of webdataset on equal tar shards: ``python -m benchmarks.loader``.

The writer of webdataset makes the shards. Number of workers and batch size are equal; both loaders shuffle, and both
tokenize captions when they decode images. Before timing, pixels are checked to be equal bit by bit. Our loader can
resume exactly at any batch, at no extra cost; webdataset's pipeline cannot. Rates are samples per second with full
queues, medians of interleaved rounds. No other program should run on the machine.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import io
import itertools
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from PIL import Image
from torch import Tensor

from benchmarks.measure import machine, median, prepare
from benchmarks.report import write_into
from qlip import assets
from qlip.data import Batch, RawBatch, Source, TarImages, TrainingStream, TrainTransform, batches, raw_batches
from qlip.data.shards.build_index import build_index
from qlip.data.storage.storage import Storage
from qlip.modeling import CLIPTokenizer

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- loader: begin -->", "<!-- loader: end -->"
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
AIMS = {"read": 2.0, "decode": 1.2}
"""Smallest ratio of our samples per second to webdataset's."""


@dataclass(frozen=True)
class Setting:
    """Data and workers of one measurement.

    Attributes:
        samples, shards: total numbers.
        side: size of the stored JPEGs, pixels.
        size: size of the images in a batch, pixels.
        batch_size: samples per batch.
        workers: processes; 0 reads in this one.
    """

    samples: int = 8192
    shards: int = 8
    side: int = 256
    size: int = 256
    batch_size: int = 64
    workers: int = 2


@dataclass(frozen=True)
class Row:
    """Samples per second of both loaders in each round."""

    what: str
    setting: Setting
    rates: dict[str, list[float]]

    @property
    def ratio(self) -> float:
        """Ratio of our median rate to webdataset's."""
        return median(self.rates["qlip"]) / median(self.rates["webdataset"])


def main() -> None:
    """Measure, print the table, and write the files that were asked for."""
    options = _options()
    prepare(None, options.tiny)
    settings = [Setting(16, 2, 32, 24, 4, workers) for workers in options.workers]
    if not options.tiny:
        sides = [(side, side) for side in options.sides]
        settings = [Setting(options.samples, 8, *one, 64, workers) for one in sides for workers in options.workers]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for setting in settings:
            shards = write_shards(Path(folder) / f"{setting.side}", setting)
            check_equal(shards, setting)
            for what in ("read", "decode"):
                print(f"{what}, {setting.side} px, {setting.workers} workers", file=sys.stderr, flush=True)
                rows.append(compare(what, shards, setting, options.rounds, options.batches))
    markdown = table(rows, options.rounds)
    print(markdown)
    if options.json:
        options.json.write_text(
            json.dumps([{"what": row.what, **vars(row.setting), **row.rates} for row in rows]) + "\n"
        )
    if options.write:
        write_into(README, markdown, BEGIN, END)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per measurement (default: 5)")
    parser.add_argument("--batches", type=int, default=60, help="batches per round (default: 60)")
    parser.add_argument("--samples", type=int, default=8192, help="number of samples in the shards (default: 8192)")
    parser.add_argument(
        "--sides",
        nargs="+",
        type=int,
        default=[64, 256],
        help="image sizes in pixels, stored and in batches (default: 64 and 256)",
    )
    parser.add_argument(
        "--workers", nargs="+", type=int, default=[1, 2], help="numbers of worker processes (default: 1 and 2)"
    )
    parser.add_argument("--tiny", action="store_true", help="use a few samples, to test the benchmark itself")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements of every round")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/README.md")
    return parser.parse_args()


# ---------------------------------------------------------------- data


def write_shards(folder: Path, setting: Setting) -> list[str]:
    """Write crops of the bundled photographs as JPEG with captions by webdataset, and index the shards."""
    photographs = [Image.open(path).convert("RGB") for path in sorted(assets.path("images").glob("*.jpg"))]
    draw, paths = np.random.default_rng(0), []
    folder.mkdir(parents=True, exist_ok=True)
    per_shard = setting.samples // setting.shards
    for number in range(setting.shards):
        path = folder / f"shard-{number:03d}.tar"
        paths.append(str(path))
        if path.exists():
            continue
        with webdataset.TarWriter(str(path)) as writer:
            for inner in range(per_shard):
                key = number * per_shard + inner
                caption = json.dumps({"caption": f"photograph {key} of many"})
                image = crop(photographs[key % len(photographs)], setting.side, draw)
                writer.write({"__key__": f"{key:08d}", "jpg": image, "json": caption.encode()})
        build_index(str(path), Storage())
    return paths


def crop(photograph: Image.Image, side: int, draw: np.random.Generator) -> bytes:
    """Cut a random square from a photograph and encode it as a JPEG of ``side`` pixels."""
    edge = int(min(photograph.size) * draw.uniform(0.3, 1.0))
    left, upper = (int(draw.integers(0, length - edge + 1)) for length in photograph.size)
    buffer = io.BytesIO()
    square = photograph.resize((side, side), Image.Resampling.BICUBIC, (left, upper, left + edge, upper + edge))
    square.save(buffer, "jpeg", quality=90)
    return buffer.getvalue()


# ---------------------------------------------------------------- the two loaders


@lru_cache(maxsize=1)
def tokenizer() -> CLIPTokenizer:
    """Load the bundled model's tokenizer, once per process."""
    found = CLIPTokenizer.from_folder(assets.path("qlip-nano-64"), 32)
    assert found is not None
    return found


def tokenize(texts: list[str]) -> tuple[Tensor, Tensor]:
    """Tokenize texts as in training."""
    return tokenizer()(texts)


def our_stream(shards: list[str], setting: Setting) -> TrainingStream:
    """Make a stream without random cropping: each crop is the whole image."""
    transform = TrainTransform((setting.size, setting.size), (1.0, 1.0), (1.0, 1.0), mean=MEAN, std=STD)
    return TrainingStream([Source(TarImages(shards, name="shards"), transform)], 0, tokenize)


def ours(what: str, shards: list[str], setting: Setting) -> Iterator[Batch] | Iterator[RawBatch]:
    """Iterate over our batches without end."""
    stream = our_stream(shards, setting)
    if what == "read":
        return raw_batches(stream, setting.batch_size, 0, setting.workers)
    return batches(stream, setting.batch_size, 0, setting.workers)


def to_tensor(image: Image.Image, size: int) -> Tensor:
    """Resize, scale to [0, 1] and normalise as torchvision does."""
    resized = image.resize((size, size), Image.Resampling.BICUBIC, reducing_gap=3.0)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    return pixels.sub_(mean).div_(std)


def collate(samples: list[tuple[str, Tensor, dict[str, str]]]) -> tuple[list[str], Tensor, Tensor]:
    """Make a batch of keys, pixels and token ids."""
    keys, pixels, records = zip(*samples, strict=True)
    return list(keys), torch.stack(pixels), tokenize([record["caption"] for record in records])[0]


def as_lists(samples: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Return the samples unchanged."""
    return samples


def theirs(what: str, shards: list[str], setting: Setting) -> Iterator[Any]:
    """Iterate without end over batches of webdataset's pipeline, built as in its documentation."""
    dataset = webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0).shuffle(1000)
    if what == "read":
        dataset = dataset.to_tuple("__key__", "jpg", "json").batched(setting.batch_size, collation_fn=as_lists)
    else:
        dataset = (
            dataset.decode("pilrgb")
            .to_tuple("__key__", "jpg", "json")
            .map_tuple(None, partial(to_tensor, size=setting.size), None)
            .batched(setting.batch_size, collation_fn=collate)
        )
    prefetch = {"prefetch_factor": 4} if setting.workers else {}
    return iter(webdataset.WebLoader(dataset.repeat(), batch_size=None, num_workers=setting.workers, **prefetch))


# ---------------------------------------------------------------- comparison


def check_equal(shards: list[str], setting: Setting) -> None:
    """Check that both loaders give equal bytes, pixels and token ids for every sample.

    Raises:
        AssertionError: they differ.
    """
    count = setting.samples // setting.batch_size
    raw = {s.key: s.image for batch in itertools.islice(ours("read", shards, setting), count) for s in batch.samples}  # type: ignore[union-attr]
    assert len(raw) == count * setting.batch_size
    seen: set[str] = set()
    for batch in theirs("read", shards, setting):
        for key, image, _ in batch:
            assert raw[key] == image, f"{key}: other bytes"
            seen.add(key)
        if len(seen) == len(raw):
            break
    found: dict[str, str] = {}
    for batch in itertools.islice(ours("decode", shards, setting), count):
        assert isinstance(batch, Batch)
        for key, pixels, ids in zip(batch.keys, batch.pixel_values, batch.input_ids, strict=True):
            found[key.rpartition("/")[2]] = digest(pixels, ids)
    seen.clear()
    for keys, pixels, ids in theirs("decode", shards, setting):
        for key, one, tokens in zip(keys, pixels, ids, strict=True):
            assert found[key] == digest(one, tokens), f"{key}: other pixels or tokens"
            seen.add(key)
        if len(seen) == len(found):
            break


def digest(*tensors: Tensor) -> str:
    """Hash the bytes of tensors."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(tensor.contiguous().numpy().tobytes())
    return sha.hexdigest()


def compare(what: str, shards: list[str], setting: Setting, rounds: int, batches_per_round: int) -> Row:
    """Time both loaders in alternating order, so that disturbances of the machine affect both equally."""
    opened: dict[str, Callable[[], Iterator[Any]]] = {
        "webdataset": lambda: theirs(what, shards, setting),
        "qlip": lambda: ours(what, shards, setting),
    }
    rates: dict[str, list[float]] = {name: [] for name in opened}
    for turn in range(rounds):
        names = list(opened) if turn % 2 == 0 else list(reversed(opened))
        for name in names:
            row = opened[name]()
            for _ in range(2 + 2 * setting.workers * 4):  # wait until workers run and queues are full
                next(row)
            began = time.perf_counter()
            for _ in range(batches_per_round):
                next(row)
            rates[name].append(setting.batch_size * batches_per_round / (time.perf_counter() - began))
            del row
    return Row(what, setting, rates)


def table(rows: list[Row], rounds: int) -> str:
    """Format the result as Markdown, with the aims that were missed."""
    lines = [
        f"{datetime.date.today().isoformat()}; {machine()}; webdataset {webdataset.__version__}.",
        f"Samples per second, medians of {rounds} interleaved rounds.",
        "",
        "| JPEG side, px | workers | what | webdataset | qlip | ratio | aim | met |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        theirs_rate, ours_rate = (median(row.rates[name]) for name in ("webdataset", "qlip"))
        aim, name = AIMS[row.what], {"read": "bytes and captions", "decode": "decoded batches"}[row.what]
        met = "yes" if row.ratio >= aim else "**no**"
        lines.append(
            f"| {row.setting.side} | {row.setting.workers} | {name} | {theirs_rate:,.0f} | {ours_rate:,.0f}"
            f" | {row.ratio:.2f}x | {aim:.1f}x | {met} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
