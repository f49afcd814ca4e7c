"""A feed read by processes that are killed over and over: run as a program, it prints what all of them consumed.

Each round forks as many ranks as it says. A rank writes a line a batch, its keys and its state, which stands for the
step and the save. After a random while all are killed with SIGKILL; what every rank has finished counts, and its merged
state is where the next round, of another number of ranks and workers, goes on.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

import torch

from qlip.data.config import DataConfig
from qlip.data.image_feed import open_feed
from qlip.data.loader.stream import ImageFeed
from qlip.data.shards.streaming import StreamedFeed
from qlip.errors import validate
from qlip.modeling import Preprocessing

BATCH = 12


def feed_of(sources: list[dict[str, object]], num_workers: int) -> ImageFeed | StreamedFeed:
    """Tiny images of the sources."""
    from tests.data.samples import tokenize

    config = validate(DataConfig, {"sources": sources, "num_workers": num_workers, "prefetch": 2}, "recipe")
    return open_feed(config, 5, Preprocessing((4, 4), None), tokenize, BATCH)


def consume(
    feed: ImageFeed | StreamedFeed, state: dict[str, object] | None, rank: int, world: int, journal: Path
) -> None:
    """One rank, until it is killed."""
    with open(journal, "w") as file:
        for batch, after in feed.open(state, rank=rank, world=world):
            broken = [f"{one.source}/{one.key}" for one in batch.skipped]
            file.write(json.dumps([batch.keys + broken, after]) + "\n")
            file.flush()
            time.sleep(0.002)


def finished(journal: Path) -> list[tuple[list[str], dict[str, object]]]:
    """Whole lines of a journal."""
    text = journal.read_text() if journal.exists() else ""
    return [tuple(json.loads(line)) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def main(folder: Path, rounds: list[tuple[int, int]], sources: list[dict[str, object]], seed: int) -> None:
    """All rounds."""
    draw, state, consumed = random.Random(seed), None, []
    for number, (world, num_workers) in enumerate(rounds):
        journals = [folder / f"{number}-{rank}.jsonl" for rank in range(world)]
        children = []
        for rank in range(world):
            child = os.fork()
            if child == 0:
                torch.set_num_threads(1)
                consume(feed_of(sources, num_workers), state, rank, world, journals[rank])
            children.append(child)
        wanted, end = draw.randrange(2, 12), time.monotonic() + 120
        while min(len(finished(journal)) for journal in journals) < wanted:
            assert time.monotonic() < end, "the ranks do not get on"
            time.sleep(0.005 * draw.random())
        for child in draw.sample(children, len(children)):
            os.kill(child, signal.SIGKILL)
        for child in children:
            os.waitpid(child, 0)
        lines = [finished(journal) for journal in journals]
        steps = min(map(len, lines))
        consumed += [[line[step][0] for line in lines] for step in range(steps)]
        state = json.loads(json.dumps(feed_of(sources, 0).merge([line[steps - 1][1] for line in lines])))
    print(json.dumps({"batches": consumed, "state": state}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *json.loads(sys.argv[2]))
