"""`qlip tokenize`: exit codes and lines that a user sees."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from tests.cli.conftest import Command
from tests.data.samples import encoded


def test_tokenize__no_image_that_can_be_read_is_an_error(qlip: Command, model: Path) -> None:
    Path("in").mkdir()
    for name in "ab":
        Path(f"in/{name}.png").write_bytes(b"no image")
    command = ["tokenize", "in", "-o", "tokens", "-m", model, "--workers", "0"]
    for _ in range(2):  # and when it resumes
        ran = qlip(*command)
        assert ran.code == 1
        assert "in: none of its 2 images can be read; the first, a.png: " in ran.err
    assert pq.read_table("tokens/errors.parquet").column("key").to_pylist() == ["a.png", "b.png"]


def test_tokenize__a_list_of_paths_needs_allow_local(qlip: Command, model: Path) -> None:
    Path("a.png").write_bytes(encoded(1))
    Path("list.txt").write_text("a.png\n")
    command = ["tokenize", "list.txt", "-o", "tokens", "-m", model, "--workers", "0"]
    refused = qlip(*command)
    assert refused.code == 1 and "a.png: a path on this machine" in refused.err
    assert qlip(*command, "--allow-local").code == 0
