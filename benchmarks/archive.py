"""Speed and size of token datasets: ``python -m benchmarks.archive``.

- ``engine``: images/s of `qlip tokenize` in one process, and on Ray with 1 and 2 workers, compared with a plain loop
  that decodes, encodes and writes one file per image, at batch sizes of 1 to 64;
- ``size``: bytes per image on disk, compared with one .npy or .pt file per image;
- ``reader``: tokens/s of one process (aim: 1 million);
- ``memory``: peak resident memory when a tiny model tokenizes growing numbers of images;
- ``int8``: encoding at the B-16 shape with 8-bit products, and the share of the bundled model's bits that differ;
- ``cluster``: 1, 2 and 4 workers in a local Ray cluster of as many node processes.

Every command runs in its own process. Images/s count the time from the first shard to the last part: the start of
Python and Ray is excluded, the start of Ray's workers, which load the model, is included. Images are CIFAR-10's test
set (`qlip data get cifar10`). No other program should run on the machine.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from benchmarks import measure
from benchmarks.report import publish
from qlip import QLIPConfig, QLIPModel, QLIPProcessor
from qlip.archive import TokenDataset, TokenStream
from qlip.data.public import open_named
from qlip.modeling import load_image
from qlip.modeling.indices import indices_to_bits, regroup
from qlip.modeling.int8 import to_int8

README = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- archive: begin -->", "<!-- archive: end -->"
SET = "cifar10:test"
BATCHES = (1, 8, 32, 64)


def main() -> None:
    """Measure, print the tables, and optionally write them into the README."""
    options = _options()
    measure.prepare(None, options.tiny)
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(Path(folder) / "photos", options.images)
        lines = (line for name in options.tables for line in (*TABLES[name](Path(folder), photos, options), ""))
        publish(f"{options.images:,} images", lines, README, BEGIN, END, options.write)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.archive", description=__doc__.split("\n")[0])
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES), help="tables to make")
    parser.add_argument("--images", type=int, default=4096, help="number of images (default: 4096)")
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES, help="batch sizes of the engine table")
    parser.add_argument(
        "--memory", type=int, nargs="+", default=[1_000, 10_000], help="numbers of images of the memory table"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds of short measurements (default: 3)")
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/README.md")
    parser.add_argument("--tiny", action="store_true", help="use few images, to test the benchmark itself")
    return parser.parse_args()


def write_photos(folder: Path, count: int) -> Path:
    """Write the first images of the set as PNG files."""
    folder.mkdir()
    images = open_named(SET)
    for index in range(min(count, len(images))):
        (folder / f"{index:05d}.png").write_bytes(images.read(index).image)
    return folder


# ---------------------------------------------------------------- the engine


def plain_loop(photos: Path, output: Path, batch_size: int) -> float:
    """Measure images/s of a plain loop that decodes, encodes and writes one int64 .npy file per image."""
    model, processor = QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled")
    output.mkdir()
    files = sorted(photos.iterdir())
    model.encode(torch.stack([processor.pixels(file) for file in files[:batch_size]]))
    began = time.perf_counter()
    for first in range(0, len(files), batch_size):
        some = files[first : first + batch_size]
        indices = model.encode(torch.stack([processor.pixels(file) for file in some]))
        for file, tokens in zip(some, indices.numpy(), strict=True):
            np.save(output / f"{file.stem}.npy", tokens)
    return len(files) / (time.perf_counter() - began)


def tokenize(photos: Path | str, output: Path, *more: str) -> dict[str, float]:
    """Run `qlip tokenize` in its own process; return its report, and ``wall``, the seconds of the whole command."""
    command = [sys.executable, "-m", "qlip", "tokenize", str(photos), "-o", str(output), "--json", *more]
    began = time.perf_counter()
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{' '.join(command)}\n{ran.stderr}")
    report: dict[str, float] = json.loads(ran.stdout)
    return report | {"wall": time.perf_counter() - began}


def engine(folder: Path, photos: Path, options: argparse.Namespace) -> Iterator[str]:
    """Make the table of images/s of the engine and of the plain loop."""
    shards = ("--shard-size", str(max(1, options.images // 8)))
    yield "| command | batch | images/s | relative to the plain loop | whole command, s |"
    yield "|---|---|---|---|---|"
    for batch in (4,) if options.tiny else options.batches:
        plain = plain_loop(photos, folder / f"plain-{batch}", batch)
        yield f"| plain loop, one .npy file per image | {batch} | {plain:.1f} | 1 | |"
        ways = [("this process", "0")] + ([("Ray, 1 worker", "1"), ("Ray, 2 workers", "2")] if batch == 32 else [])
        for name, workers in ways:
            found = tokenize(
                photos, folder / f"{workers}-{batch}", *shards, "--batch-size", str(batch), "--workers", workers
            )
            rate = len(list(photos.iterdir())) / found["seconds"]
            yield f"| `qlip tokenize`, {name} | {batch} | {rate:.1f} | {rate / plain:.2f}x | {found['wall']:.1f} |"


# ---------------------------------------------------------------- size and reading


def _dataset(folder: Path, photos: Path) -> Path:
    output = folder / "tokens"
    if not output.exists():
        tokenize(photos, output, "--workers", "0", "--no-captions")
    return output


def size(folder: Path, photos: Path, options: argparse.Namespace) -> Iterator[str]:
    """Make the table of bytes per image."""
    output = _dataset(folder, photos)
    dataset = TokenDataset(str(output))
    indices = regroup(dataset[0], 7, from_group_size=dataset.group_size)
    packed = len(dataset.packed([0])[0])
    whole = sum(file.stat().st_size for file in (output / "data").iterdir()) / len(dataset)
    pickled = io.BytesIO()
    torch.save(indices, pickled)
    yield "| an image's tokens, 64 x 28 bits in groups of 7 | bytes | packed bits are smaller by |"
    yield "|---|---|---|"
    yield f"| packed bits | {packed} | |"
    yield f"| a row of the dataset's Parquet files, key, grid and size included | {whole:.0f} | |"
    for name, count in (
        ("integers, int64", indices.numel() * 8),
        ("integers, int16", indices.numel() * 2),
        ("a .npy file, int64", _npy(indices.numpy())),
        ("a .npy file, int16", _npy(indices.to(torch.int16).numpy())),
        ("a .pt file, int64", len(pickled.getvalue())),
    ):
        yield f"| {name} | {count:,} | {count / packed:.1f}x |"


def _npy(array: np.ndarray) -> int:
    file = io.BytesIO()
    np.save(file, array)
    return len(file.getvalue())


def reader(folder: Path, photos: Path, options: argparse.Namespace) -> Iterator[str]:
    """Make the table of tokens read per second."""
    dataset = TokenDataset(str(_dataset(folder, photos)))
    tokens, rows = dataset.batch([0]).shape[1], len(dataset)
    shuffled = torch.randperm(rows, generator=torch.Generator().manual_seed(0)).tolist()
    stream = iter(TokenStream(dataset, batch_size=256, seed=0, num_workers=0))
    ways: dict[str, Callable[[], int]] = {
        "in order, batches of 256": lambda: sum(len(dataset.batch(list(part))) for part in _cut(range(rows))),
        "in random order, batches of 256": lambda: sum(len(dataset.batch(list(part))) for part in _cut(shuffled)),
        "`TokenStream`, shuffled": lambda: sum(len(next(stream).indices) for _ in range(max(1, rows // 256))),
        "one by one": lambda: sum(1 for index in range(rows) if dataset[index] is not None),
    }
    yield "| reading, one process | million tokens/s |"
    yield "|---|---|"
    for name, way in ways.items():
        way()
        rates = []
        for _ in range(options.rounds):
            began = time.perf_counter()
            rates.append(way() * tokens / (time.perf_counter() - began))
        yield f"| {name} | {measure.median(rates) / 1e6:.2f} |"


def _cut(rows: range | list[int]) -> Iterator[range | list[int]]:
    return (rows[first : first + 256] for first in range(0, len(rows), 256))


# ---------------------------------------------------------------- memory, int8, Ray cluster


def memory(folder: Path, photos: Path, options: argparse.Namespace) -> Iterator[str]:
    """Make the table of peak resident memory, with a tiny model."""
    model = folder / "small"
    config = QLIPConfig.named("qlip-ablation-64")
    QLIPModel(config).save_pretrained(model)
    QLIPProcessor(QLIPProcessor.from_pretrained("bundled").preprocessing).save_pretrained(model)
    data = np.frombuffer(b"".join(file.read_bytes() for file in sorted(photos.iterdir())[:1]), np.uint8).tobytes()
    yield "| images | peak of `qlip tokenize --workers 0`, MiB |"
    yield "|---|---|"
    for count in [20, 40] if options.tiny else options.memory:
        many = folder / f"many-{count}"
        many.mkdir()
        for index in range(count):
            (many / f"{index:06d}.png").write_bytes(data)
        script = (
            "import sys; from benchmarks.measure import peak_bytes; from qlip.cli.main import run; code = [];"
            " peak = peak_bytes(lambda: code.append(run(sys.argv[1:])));"  # getrusage's peak includes the parent's
            " print(peak, file=sys.stderr); sys.exit(*code)"
        )
        more = ["tokenize", str(many), "-o", str(folder / f"out-{count}"), "-m", str(model), "--workers", "0"]
        ran = subprocess.run([sys.executable, "-c", script, *more], capture_output=True, text=True, check=False)
        if ran.returncode:
            raise SystemExit(ran.stderr)
        yield f"| {count:,} | {int(ran.stderr.split()[-1]) / 2**20:.0f} |"


@torch.no_grad()
def int8(folder: Path, photos: Path, options: argparse.Namespace) -> Iterator[str]:
    """Measure the time at a published shape, and the bits that differ with the bundled weights."""
    torch.manual_seed(0)
    exact = QLIPModel(QLIPConfig.named("qlip-ablation-64" if options.tiny else "QLIP-B-16-256")).eval()
    fast, side = to_int8(copy.deepcopy(exact)), exact.image_size
    pixels = torch.randn(8, 3, side, side)
    work = {"float32": lambda: exact.encode(pixels), "int8": lambda: fast.encode(pixels)}
    seconds = measure.interleaved(
        {name: lambda one=one: (one(), None)[1] for name, one in work.items()}, options.rounds
    )  # type: ignore[misc]
    one, two = (measure.median(seconds[name]) for name in ("float32", "int8"))
    yield f"`--dtype int8` at B-16 shape, batch 8: {one:.2f} s in float32, {two:.2f} s in int8, **{one / two:.2f}x**."
    model, processor = QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled")
    rounded = to_int8(QLIPModel.from_pretrained("bundled"))
    for name in (SET,) if options.tiny else (SET, "emoji:twemoji", "wallpapers:test"):
        images = open_named(name)
        count = min(len(images), 20 if options.tiny else 500)
        batch = torch.stack([processor.pixels(load_image(images.read(index).image)) for index in range(count)])
        bits = [indices_to_bits(which.encode(batch), model.group_size) for which in (model, rounded)]
        share = (bits[0] != bits[1]).float().mean().item()
        yield f"- bundled model, {count} images of `{name}`: {share:.2%} of bits differ"


def cluster(folder: Path, photos: Path, options: argparse.Namespace) -> Iterator[str]:
    """Make the table of several node processes on one machine: it shows the overhead, not the gain of more machines."""
    yield "| node processes, workers | images/s | relative to one |"
    yield "|---|---|---|"
    base = None
    for nodes in (1, 2, 4):
        with _RayCluster(nodes, folder) as address:
            more = ("--shard-size", "128", "--workers", str(nodes), "--ray-address", address)
            found = tokenize(photos, folder / f"nodes-{nodes}", *more)
        rate = len(list(photos.iterdir())) / found["seconds"]
        base = base or rate
        yield f"| {nodes} | {rate:.1f} | {rate / base:.2f}x |"


class _RayCluster:
    """Ray cluster of node processes on this machine, two CPUs each."""

    def __init__(self, nodes: int, folder: Path) -> None:
        from ray.cluster_utils import Cluster

        self.cluster = Cluster()
        for _ in range(nodes):
            self.cluster.add_node(num_cpus=2, object_store_memory=200 << 20, include_dashboard=False)

    def __enter__(self) -> str:
        address: str = self.cluster.address
        return address

    def __exit__(self, *error: object) -> None:
        self.cluster.shutdown()


Table = Callable[[Path, Path, argparse.Namespace], Iterator[str]]
TABLES: dict[str, Table] = {
    "engine": engine,
    "size": size,
    "reader": reader,
    "memory": memory,
    "int8": int8,
    "cluster": cluster,
}

if __name__ == "__main__":
    main()
