"""`qlip tokenize`: exit codes and lines that a user sees."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
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


def test_tokenize__several_columns_of_images_name_the_option(qlip: Command, model: Path) -> None:
    pq.write_table(pa.table({"before": [encoded(1)], "after": [encoded(2)]}), "pairs.parquet")
    command = ["tokenize", "pairs.parquet", "-o", "tokens", "-m", model, "--workers", "0"]
    ran = qlip(*command)
    assert ran.code == 1 and "2 columns may hold the images, before, after" in ran.err and "--image-column" in ran.err
    assert qlip(*command, "--image-column", "after").code == 0


def test_tokenize__tables_of_equal_names_have_keys_of_their_own(qlip: Command, model: Path) -> None:
    for split in ("train", "test"):
        Path(split).mkdir()
        pq.write_table(pa.table({"image": [encoded(1)]}), f"{split}/0000.parquet")
    command = ["tokenize", "train/0000.parquet", "test/0000.parquet", "-o", "tokens", "-m", model, "--workers", "0"]
    assert qlip(*command).code == 0
    keys = pq.read_table("tokens/data").column("key").to_pylist()
    assert sorted(keys) == ["test/0000-000000", "train/0000-000000"]
