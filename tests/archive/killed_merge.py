"""A merge that is killed again and again, and goes on each time; run by test_merge.py, as `killed` is by another.

Each run is a fork of this process, which has imported all and read nothing.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

from qlip.archive.dataset.layout import Layout
from qlip.archive.manage.merge import merge
from tests.archive.killed import killed_after


def forked(home: Path, output: str, log: Path) -> int:
    """Start a merge of a and b; each part that is done is a byte in `log`."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        events = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        sources = [Layout(str(home / name)) for name in ("a", "b")]
        merge(sources, Layout(str(home / output)), on_progress=lambda parts: os.write(events, b"t") and None)
        code = 0
    finally:
        os._exit(code)


def main(folder: str, kills: int, seed: int) -> None:
    """Undisturbed to `folder`/whole, killed to `folder`/killed; says how many parts were done at each kill."""
    rng, home = random.Random(seed), Path(folder)
    assert os.waitpid(forked(home, "whole", home / "log"), 0)[1] == 0
    parts, done = (home / "log").stat().st_size, list[int]()
    for number in range(kills):
        pid = forked(home, "killed", log := home / f"log-{number}")
        reached = done[-1] if done else 0
        at = rng.randint(reached, min(parts, reached + 2 * parts // kills)) if number else 0  # the first: as it begins
        if not killed_after(pid, log, at, rng.uniform(0, 0.004)) and log.stat().st_size == parts:
            break
        done.append(len(list((home / "killed/manifest").glob("part-*.json"))))
    last = os.waitpid(forked(home, "killed", home / "log-last"), 0)[1]
    print(json.dumps({"done": done, "parts": parts, "last": last}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
