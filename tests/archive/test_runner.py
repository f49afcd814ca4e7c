"""Runs in this process: missing parts are made once, and a stopped run is resumed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from qlip import QLIPError, QLIPProcessor
from qlip.archive import TokenDataset
from qlip.archive.dataset.completeness import missing_parts
from qlip.archive.dataset.layout import Layout
from qlip.archive.dataset.schema import Views, info_of
from qlip.archive.manage.verify import verify
from qlip.archive.tokenize import crops
from qlip.archive.tokenize.encoder import Encoder, describe
from qlip.archive.tokenize.inputs import find
from qlip.archive.tokenize.runner import Outcome, Piece, Run, encode_here, lock_dataset
from qlip.data.storage.storage import Storage
from qlip.tokens.entropy.tables import FILE, Tables
from qlip.tokens.entropy.train_tables import ContextNetwork
from tests.cli.conftest import BITS, Command, Ran, save_checkpoint
from tests.cli.conftest import qlip as qlip  # the command, as a fixture
from tests.data.objects import denying_store
from tests.data.samples import encoded, shard

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "one", seed=0)


def tars(folder: Path, count: int, images: int = 5, broken: int | None = None) -> str:
    """Shards; the second image of number `broken` does not decode. Returns their pattern."""
    for number in range(count):
        numbers = range(images * number, images * (number + 1))
        shard(folder / f"{number:03d}.tar", numbers, [images * number + 1] if number == broken else [])
    return str(folder / "*.tar")


def prepared(source: str | list[str], model: Path, output: Path, **options: Any) -> Run:
    key_column = options.get("key_column")
    found = find(source, options.pop("shard_size", 4096), key_column=key_column)
    how = {name: options.pop(name, False) for name in ("append", "retry_errors")}
    work = describe(str(model), options.pop("views", Views()), batch_size=2, embeddings=True, **options)
    return Run(Layout(str(output)), found, work, **how)


def carried_out(run: Run) -> Outcome:
    run.begin()
    return run.write_parts(encode_here(run.todo, Encoder(run.work), run.work, 1))


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_run__makes_a_part_of_each_shard(tmp_path: Path, model: Path) -> None:
    source = tars(tmp_path / "in", 3, broken=1)
    outcome = carried_out(prepared(source, model, tmp_path / "out"))
    assert (outcome.made, outcome.inputs, outcome.rows, outcome.skipped, outcome.failed) == (3, 15, 14, 1, [])
    assert [entry.shard for entry in outcome.entries] == ["000.tar", "001.tar", "002.tar"]
    assert outcome.bytes == sum(path.stat().st_size for path in (tmp_path / "out/data").iterdir())
    errors = pq.read_table(tmp_path / "out/errors.parquet").to_pylist()
    assert [(row["shard"], row["key"]) for row in errors] == [("001.tar", "0006")] and "broken" in errors[0]["reason"]
    dataset = TokenDataset(tmp_path / "out")
    assert len(dataset) == 14 and dataset[0].shape == (16, 4)  # 20 bits in groups of 5
    assert (tmp_path / "out/README.md").read_text().count("15") >= 1
    before = files(tmp_path / "out")
    again = prepared(source, model, tmp_path / "out")
    assert not again.todo
    carried_out(again)
    assert files(tmp_path / "out") == before


def test_run__odd_text_and_names_drop_no_image(tmp_path: Path, model: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    records = ['{"caption": "half \\ud83d", "label": 3}', '{"caption": NaN, "label": {}}', '{"caption": "c"}']
    for number, record in enumerate(records):
        (folder / f"{number}.png").write_bytes(encoded(number))
        (folder / f"{number}.json").write_text(record)
    (folder / os.fsdecode(b"\xff.png")).write_bytes(encoded(3))
    outcome = carried_out(prepared(str(folder), model, tmp_path / "out"))
    assert (outcome.rows, outcome.skipped, len(outcome.text_faults)) == (4, 0, 2)
    assert "half a surrogate pair" in outcome.text_faults[0] and "0.json" in outcome.text_faults[0]
    rows = pq.read_table(tmp_path / "out/data").select(["key", "captions", "label"]).to_pylist()
    assert [tuple(row.values()) for row in rows] == [
        ("0.png", ["half \ufffd"], "3"),
        ("1.png", [], None),
        ("2.png", ["c"], None),
        ("\\udcff.png", [], None),
    ]
    assert not prepared(str(folder), model, tmp_path / "out").todo


def test_run__makes_missing_and_truncated_parts_again(tmp_path: Path, model: Path) -> None:
    source, out = tars(tmp_path / "in", 4), tmp_path / "out"
    carried_out(prepared(source, model, out))
    before = files(out)
    (out / "manifest/part-00000.json").unlink()
    (out / "data/part-00002.parquet").write_bytes(before["data/part-00002.parquet"][:-1])
    (out / "data/part-00003.parquet").unlink()
    (out / "data/.part-00003.parquet.0123.part").write_bytes(b"what a killed writer left")
    again = prepared(source, model, out)
    assert [part for part, _ in again.todo] == [0, 2, 3]
    assert carried_out(again).made == 3 and files(out) == before


def test_run__of_tiles_goes_on_with_the_same_bytes(tmp_path: Path, model: Path) -> None:
    source, out, views = tars(tmp_path / "in", 3, broken=1), tmp_path / "out", Views(fit="tiles", size=(64, 96))
    outcome = carried_out(prepared(source, model, out, views=views))
    assert (outcome.inputs, outcome.skipped, outcome.rows) == (15, 1, 14 * 6)
    before = files(out)
    (out / "manifest/part-00000.json").unlink()
    (out / "data/part-00002.parquet").unlink()
    again = prepared(source, model, out, views=views)
    assert [part for part, _ in again.todo] == [0, 2]
    again.begin()
    images: list[int] = []
    again.write_parts(
        encode_here(again.todo, Encoder(again.work), again.work, 3), lambda count, part: images.append(count)
    )
    assert files(out) == before and sum(images) == 10


def test_run__records_how_images_were_prepared(tmp_path: Path, model: Path) -> None:
    source, preprocessing = tars(tmp_path / "in", 1), QLIPProcessor.from_pretrained(model).preprocessing
    for place, views in enumerate([Views(), Views(fit="keep-aspect", size=(48, 64)), Views(crops="ten")]):
        out = tmp_path / str(place)
        carried_out(prepared(source, model, out, views=views))
        found = TokenDataset(out).info.preparation
        assert found == preprocessing.fingerprint(views.fit, views.size)
        assert info_of(pq.read_schema(out / "data/part-00000.parquet").metadata, "part").preparation == found
        assert found in (out / "README.md").read_text()


def test_run__of_an_old_dataset_without_a_preparation_is_not_resumed(tmp_path: Path, model: Path) -> None:
    """Its images were prepared by other rules, so its missing parts would not be like the others."""
    source, out = tars(tmp_path / "in", 2), tmp_path / "out"
    run = prepared(source, model, out)
    run.work = replace(run.work, info=run.work.info.model_copy(update={"preparation": None}))
    carried_out(run)
    assert len(TokenDataset(out)) and b"preparation" not in files(out)["dataset.json"]
    with pytest.raises(QLIPError, match="preparation none"):
        prepared(source, model, out)


def test_run__pieces_in_any_order_and_twice(tmp_path: Path, model: Path) -> None:
    source = tars(tmp_path / "in", 3)
    carried_out(prepared(source, model, tmp_path / "one"))
    run = prepared(source, model, tmp_path / "two")
    run.begin()
    pieces = list(encode_here(run.todo, Encoder(run.work), run.work, 1))
    run.write_parts(iter([*reversed(pieces), *pieces[:5]]))
    assert files(tmp_path / "two") == files(tmp_path / "one")


def test_run__retry_errors_adds_the_rows_of_images_that_can_be_read_now(tmp_path: Path, model: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(8):
        (photos / f"{number}.png").write_bytes(encoded(number) if number not in (1, 2, 5) else b"broken")

    def run(**options: Any) -> Run:
        return prepared(str(photos), model, tmp_path / "tokens", shard_size=4, **options)

    def rows(folder: Path) -> dict[str, bytes]:
        dataset = TokenDataset(folder)
        return {row.key: row.tokens for row in dataset.rows(range(len(dataset)))}

    assert carried_out(run()).skipped == 3
    for number in (1, 5):
        (photos / f"{number}.png").write_bytes(encoded(number))
    assert not run().todo
    outcome = carried_out(run(retry_errors=True))
    assert (outcome.made, outcome.images, outcome.rows, outcome.skipped) == (2, 3, 7, 1)
    carried_out(prepared(str(photos), model, tmp_path / "once", shard_size=4))
    assert rows(tmp_path / "tokens") == rows(tmp_path / "once")
    layout = Layout(str(tmp_path / "tokens"))
    assert [error["key"] for error in pq.read_table(tmp_path / "tokens" / "errors.parquet").to_pylist()] == ["2.png"]
    assert verify(layout).intact and not run().todo

    (photos / "2.png").write_bytes(encoded(2))
    before = layout.entry_path(0), Path(layout.entry_path(0)).read_bytes()
    carried_out(run(retry_errors=True))
    Path(before[0]).write_bytes(before[1])  # killed between the part and its entry: the next run makes the part again
    assert [part for part, _ in run().todo] == [0]
    carried_out(run())
    assert rows(tmp_path / "tokens").keys() == {f"{number}.png" for number in range(8)} and verify(layout).intact


def test_run__retry_errors_killed_at_any_write_keeps_all_finished_rows(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(4):
        (photos / f"{number}.png").write_bytes(encoded(number) if number else b"broken")
    carried_out(prepared(str(photos), model, tmp_path / "begun"))
    written, write = list[str](), Storage.write

    def killed_at(count: int, out: Path) -> None:
        def write_or_die(storage: Storage, address: str, data: bytes) -> None:
            if len(written) == count:
                raise KeyboardInterrupt
            write(storage, address, data)
            written.append(Path(address).name)

        written.clear()
        shutil.copytree(tmp_path / "begun", out)
        (photos / "0.png").write_bytes(encoded(0))
        with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
            patched.setattr(Storage, "write", write_or_die)
            carried_out(prepared(str(photos), model, out, retry_errors=True))
        (photos / "0.png").write_bytes(b"broken")  # as an address that was there for a moment

    killed_at(99, tmp_path / "whole")
    assert written[:3] == ["part-00000.json", "part-00000.parquet", "part-00000.json"]
    for count in range(len(written)):
        out = tmp_path / f"killed-{count}"
        killed_at(count, out)
        run = prepared(str(photos), model, out)
        assert not run.todo
        carried_out(run)
        dataset = TokenDataset(out)
        found = {row.key for row in dataset.rows(range(len(dataset)))}
        assert found == {f"{number}.png" for number in range(4) if number or count >= 2}
        assert verify(Layout(str(out))).intact


def test_run__retry_errors_refuses_a_key_that_the_part_has(tmp_path: Path, model: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        (photos / f"{number}.png").write_bytes(encoded(number) if number else b"broken")
        (photos / f"{number}.json").write_text(json.dumps({"id": "7" if number < 2 else "8"}))

    def run(**options: Any) -> Run:
        return prepared(str(photos), model, tmp_path / "tokens", key_column="id", **options)

    carried_out(run())
    before = files(tmp_path / "tokens")
    (photos / "0.png").write_bytes(encoded(0))
    again = run(retry_errors=True)
    again.begin()
    outcome = again.write_parts(encode_here(again.todo, Encoder(again.work), again.work, 1))
    assert len(outcome.failed) == 1 and outcome.failed[0][1].endswith("has the key of another one: 7")
    assert files(tmp_path / "tokens") == before


def test_run__append_adds_the_parts_of_new_shards(tmp_path: Path, model: Path) -> None:
    (tmp_path / "tars").mkdir()
    source = tars(tmp_path / "tars", 2)
    carried_out(prepared(source, model, tmp_path / "tokens"))
    layout = Layout(str(tmp_path / "tokens"))
    before = {part: Path(layout.part_path(part)).stat().st_mtime_ns for part in (0, 1)}
    shard(tmp_path / "tars" / "000b.tar", range(30, 34))  # its name comes between the two others
    shard(tmp_path / "tars" / "002.tar", range(40, 43))
    with pytest.raises(
        QLIPError, match="made of 2 input shards, not of 4; take another folder, or append to this dataset"
    ):
        prepared(source, model, tmp_path / "tokens")
    run = prepared(source, model, tmp_path / "tokens", append=True)
    assert [(part, one.name) for part, one in run.todo] == [(2, "000b.tar"), (3, "002.tar")]
    run.begin()  # killed before the first part
    assert missing_parts(layout, layout.manifest()).parts == (2, 3)
    outcome = carried_out(prepared(source, model, tmp_path / "tokens", append=True))
    assert (outcome.made, outcome.rows) == (2, 17) and verify(Layout(layout.address)).intact
    assert before == {part: Path(layout.part_path(part)).stat().st_mtime_ns for part in (0, 1)}
    assert not prepared(source, model, tmp_path / "tokens", append=True).todo
    shard(tmp_path / "tars" / "001.tar", range(60))
    with pytest.raises(QLIPError, match=r"input shard '001.tar' changed; .* and merge both"):
        prepared(source, model, tmp_path / "tokens", append=True)
    (tmp_path / "tars" / "001.tar").unlink()
    with pytest.raises(QLIPError, match=r"input shard '001.tar' is not in this input; .* and merge both"):
        prepared(source, model, tmp_path / "tokens", append=True)


def test_run__append_takes_files_of_a_further_folder(tmp_path: Path, model: Path) -> None:
    train, val = tars(tmp_path / "train", 2), str(tmp_path / "val" / "*.tar")
    shard(tmp_path / "val" / "000.tar", range(30, 34))
    carried_out(prepared(train, model, tmp_path / "tokens"))
    with pytest.raises(QLIPError, match="or append to this dataset"):
        prepared([val, train], model, tmp_path / "tokens")
    run = prepared([val, train], model, tmp_path / "tokens", append=True)
    assert [(part, one.name) for part, one in run.todo] == [(2, "val/000.tar")]
    assert carried_out(run).rows == 14
    assert not prepared([train, val], model, tmp_path / "tokens").todo  # the record has the longer names now
    assert verify(Layout(str(tmp_path / "tokens"))).intact
    shutil.copytree(tmp_path / "train", tmp_path / "twin")
    carried_out(prepared(train, model, tmp_path / "again"))
    with pytest.raises(QLIPError, match="'000.tar' fits several files"):
        prepared([train, str(tmp_path / "twin" / "*.tar")], model, tmp_path / "again", append=True)


def test_run__a_repaired_shard_is_read(tmp_path: Path, model: Path) -> None:
    source = tars(tmp_path / "in", 3)
    whole = (tmp_path / "in" / "001.tar").read_bytes()
    (tmp_path / "in" / "001.tar").write_bytes(whole[:700])
    run = prepared(source, model, tmp_path / "tokens")
    run.begin()
    outcome = run.write_parts(encode_here(run.todo, Encoder(run.work), run.work, 1))
    assert [name for name, _ in outcome.failed] == ["001.tar"]
    (tmp_path / "in" / "001.tar").write_bytes(whole)
    assert carried_out(prepared(source, model, tmp_path / "tokens")).rows == 15
    carried_out(prepared(source, model, tmp_path / "once"))
    assert files(tmp_path / "tokens") == files(tmp_path / "once")
    shard(tmp_path / "in" / "001.tar", range(60))
    with pytest.raises(QLIPError, match="input shard 1 was another '001.tar'"):
        prepared(source, model, tmp_path / "tokens")


def test_run__killed_between_the_record_and_its_checksums_is_mended(tmp_path: Path, model: Path) -> None:
    source = tars(tmp_path / "in", 1)
    carried_out(prepared(source, model, tmp_path / "tokens"))
    sums = (tmp_path / "tokens" / "source.sums.json").read_bytes()
    tars(tmp_path / "in", 2)
    carried_out(prepared(source, model, tmp_path / "tokens", append=True))
    (tmp_path / "tokens" / "source.sums.json").write_bytes(sums)
    assert not verify(Layout(str(tmp_path / "tokens"))).intact
    carried_out(prepared(source, model, tmp_path / "tokens"))
    assert verify(Layout(str(tmp_path / "tokens"))).intact


def test_run__retry_errors_leaves_parts_of_which_nothing_can_be_read(tmp_path: Path, model: Path) -> None:
    source, out = tars(tmp_path / "in", 1, broken=0), tmp_path / "tokens"
    carried_out(prepared(source, model, out))
    written = Path(out / "data/part-00000.parquet").stat()
    outcome = carried_out(prepared(source, model, out, retry_errors=True))
    assert (outcome.made, outcome.skipped, outcome.rows) == (0, 1, 4)
    assert Path(out / "data/part-00000.parquet").stat().st_mtime_ns == written.st_mtime_ns


def test_run__retry_errors_knows_rows_of_tables_whose_keys_grew(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, numbers in (("a", range(3)), ("b", range(3, 6))):
        rows = [{"image": encoded(number)} for number in numbers]
        (tmp_path / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name / "x.parquet")
    one, other = (str(tmp_path / name / "x.parquet") for name in "ab")
    out = tmp_path / "tokens"
    with monkeypatch.context() as patched:
        patched.setattr(crops.ViewMaker, "__call__", _broken_once(crops.ViewMaker.__call__))
        assert carried_out(prepared(one, model, out)).skipped == 1
    assert carried_out(prepared([one, other], model, out, append=True)).rows == 5
    outcome = carried_out(prepared([one, other], model, out, retry_errors=True))
    assert (outcome.rows, outcome.skipped) == (6, 0) and verify(Layout(str(out))).intact


def _broken_once(make: Any) -> Any:
    left = [True]

    def views(self: Any, image: Any) -> Any:
        if left:
            left.clear()
            raise QLIPError("a disk that failed for a moment")
        return make(self, image)

    return views


def test_run__workers_that_end_early_are_an_error(tmp_path: Path, model: Path) -> None:
    run = prepared(tars(tmp_path / "in", 2), model, tmp_path / "out")
    run.begin()
    *pieces, _ = encode_here(run.todo, Encoder(run.work), run.work, 1)
    with pytest.raises(QLIPError, match="the workers ended early; the same command resumes the run"):
        run.write_parts(iter(pieces))
    assert [entry.part for entry in Layout(str(tmp_path / "out")).manifest()] == [0]


def test_run__an_error_keeps_finished_parts(tmp_path: Path, model: Path) -> None:
    source, out = tars(tmp_path / "in", 3), tmp_path / "out"
    run = prepared(source, model, out)
    run.begin()

    def stopping() -> Iterator[Piece]:
        for piece in encode_here(run.todo, Encoder(run.work), run.work, 1):
            yield piece
            if piece.end is not None:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run.write_parts(stopping())
    assert [entry.part for entry in Layout(str(out)).manifest()] == [0]  # a reader finds what is there
    assert carried_out(prepared(source, model, out)).made == 2


def test_tokenize__a_shard_that_cannot_be_read_fails_alone(tmp_path: Path, qlip: Command, model: Path) -> None:
    source, out = tars(tmp_path / "in", 3), tmp_path / "out"
    whole = (tmp_path / "in/001.tar").read_bytes()
    (tmp_path / "in/001.tar").write_bytes(whole[:3000])
    os.utime(tmp_path / "in/001.tar")
    command = ["tokenize", source, "-o", out, "--model", model, "--workers", 0, "--batch-size", 2]
    ran = qlip(*command)
    assert ran.code == 1 and "3 shards in this process, on cpu" in ran.err
    (line,) = [line for line in ran.error_lines if line.startswith("001.tar")]
    assert "truncated" in line and "fetch or write it again" in line
    assert sorted(path.name for path in (out / "data").iterdir()) == ["part-00000.parquet", "part-00002.parquet"]
    (tmp_path / "in/001.tar").write_bytes(whole)
    ran = qlip(*command)  # another size, but no part was made of it
    assert ran.code == 0 and "1 shard in this process, on cpu, 2 parts done already" in ran.err


def test_tokenize__refuses_a_second_run_in_one_folder(tmp_path: Path, qlip: Command, model: Path) -> None:
    source, out = tars(tmp_path / "in", 3), tmp_path / "out"
    command = ["tokenize", source, "-o", out, "--model", model, "--workers", 0, "--batch-size", 2, "--embeddings"]
    seen: list[tuple[Ran, bool]] = []

    def beside(rows: int, done: bool) -> None:
        if done and not seen:
            before = files(out)
            seen.append((qlip(*command), files(out) == before))

    with lock_dataset(Layout(str(out))):
        run = prepared(source, model, out)
        run.begin()
        run.write_parts(encode_here(run.todo, Encoder(run.work), run.work, 1), beside)
    ((ran, untouched),) = seen
    assert ran.code == 1 and untouched
    assert ran.error_lines == [
        f"qlip: {out}: another `qlip tokenize` is running here; wait for it, or give another folder"
    ]
    assert qlip(*command, "--json").json["parts_made"] == 0  # it is free again
    (tmp_path / "file").write_text("mine")
    ran = qlip(*command[:3], tmp_path / "file", *command[4:])
    assert ran.error_lines == [f"qlip: {tmp_path}/file: is a file; give a folder"]


def test_tokenize__missing_credentials_stop_the_run(tmp_path: Path, qlip: Command, model: Path) -> None:
    out, photos = tmp_path / "out", tmp_path / "in"
    photos.mkdir()
    for number in range(6):
        (photos / f"{number}.png").write_bytes(encoded(number))
    with denying_store(photos, "3.png") as address:
        command = ["tokenize", address, "-o", out, "--model", model, "--workers", 0, "--shard-size", 2]
        ran = qlip(*command)
        line = f"qlip: {address}/3.png: no permission (Forbidden); check the credentials for this store"
        assert ran.code == 1 and ran.error_lines[1:] == [line]
        assert [entry.part for entry in Layout(str(out)).manifest()] == [0]
    again = qlip(*command, "--json")  # the store gives it now
    assert again.code == 0 and (again.json["parts_made"], again.json["skipped"]) == (2, 0)


def test_tokenize__refuses_other_options_and_inputs_naming_the_difference(
    tmp_path: Path, qlip: Command, model: Path, other: Path
) -> None:
    source, out = tars(tmp_path / "in", 2), tmp_path / "out"
    command = ["tokenize", source, "-o", out, "--model", model, "--workers", 0]
    assert qlip(*command).code == 0
    before = files(out)
    for more, difference in (
        (["--batch-size", 7], "--batch-size 32, not 7; give the same options to resume it, or another folder"),
        (["--embeddings"], "text_fingerprint none, not"),
        (["--crops", "ten"], "--views fit square crops one crop_range 1.1, not fit square crops ten crop_range 1.1"),
        (["--no-captions"], "--captions True, not False"),
        (["--model", other], "code_fingerprint"),
    ):
        ran = qlip(*command, *more)
        assert ran.code == 1 and difference in ran.err and len(ran.error_lines) == 1
    tars(tmp_path / "in", 3)
    ran = qlip(*command)
    assert ran.code == 1 and "holds another input's tokens: it was made of 2 input shards, not of 3" in ran.err
    assert files(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/README.md").write_text("mine")
    ran = qlip("tokenize", source, "-o", tmp_path / "mine", "--model", model)
    assert ran.code == 1 and "holds 'README.md' and no token dataset; give a new or an empty folder" in ran.err


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model") / "two", seed=1)


def test_tokenize__report_and_dry_run(tmp_path: Path, qlip: Command, model: Path) -> None:
    source, out = tars(tmp_path / "in", 2, images=9, broken=1), tmp_path / "out"
    command = ["tokenize", source, "-o", out, "--model", model, "--workers", 0, "--batch-size", 2, "--json"]
    assert qlip(*command[:3], tmp_path / "first", *command[4:]).code == 0
    dry = qlip(*command, "--dry-run").json
    assert (dry["shards"], dry["finished"], dry["images"], dry["bytes"]) == (2, 0, None, None)
    assert dry["sampled"] == 6 and dry["images_per_second"] > 0 and not out.exists()
    assert qlip("data", "index", source).code == 0  # which counts them
    dry = qlip(*command, "--dry-run").json
    assert dry["images"] == 18 and dry["seconds"] > 0 and 40 * 18 < dry["bytes"] < 100 * 18
    again = qlip(*command[:3], tmp_path / "first", *command[4:])
    assert again.code == 0 and again.json["parts_made"] == 0  # that they are counted makes it no other input
    ran = qlip(*command)
    assert ran.code == 0
    report = ran.json
    assert (report["images"], report["rows"], report["skipped"], report["parts_made"]) == (18, 17, 1, 2)
    assert report["bytes_per_image"] == round(report["bytes"] / 17, 1) and report["images_per_second"] > 0
    assert any("1 image could not be read" in line for line in qlip(*command[:-1]).error_lines)
    assert qlip(*command, "--dry-run").json["images"] == 0
    assert qlip("tokenize", source, "-o", out, "--workers", 0, "--ray-address", "auto").code == 2


def test_tokenize__entropy_code(tmp_path: Path, qlip: Command, model: Path) -> None:
    torch.manual_seed(0)
    network = ContextNetwork(BITS, 4)
    with torch.no_grad():
        network.bias.fill_(0.5)
    Tables.from_network(network).save(tmp_path / FILE)
    source = tars(tmp_path / "in", 2)
    command = ["tokenize", source, "--model", model, "--workers", 0, "--batch-size", 2, "-o"]
    refused = qlip(*command, tmp_path / "coded", "--entropy-code")
    assert (
        refused.code == 1 and "has no entropy_tables.safetensors; make it with `qlip tokens codec train`" in refused.err
    )
    assert qlip(*command, tmp_path / "coded", "--entropy-tables", tmp_path / FILE).code == 0
    assert qlip(*command, tmp_path / "raw").code == 0
    coded, raw = TokenDataset(tmp_path / "coded"), TokenDataset(tmp_path / "raw")
    assert coded.info.coding == "entropy" and coded.info.token_bytes is None
    assert len(coded) == len(raw) == 10 and all(torch.equal(coded[i], raw[i]) for i in range(10))
    again = qlip(*command, tmp_path / "coded")
    assert again.code == 1 and "--entropy-code entropy, not raw" in again.err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_tokenize__a_stop_keeps_finished_parts(
    tmp_path: Path, qlip: Command, model: Path, number: signal.Signals
) -> None:
    source, out = tars(tmp_path / "in", 12, images=40), tmp_path / "out"
    command = ["tokenize", source, "-o", out, "--model", model, "--workers", 0, "--batch-size", 2]

    def ask() -> None:
        while not (out / "manifest/part-00001.json").exists():
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    ran = qlip(*command)
    asking.join()
    assert (
        ran.code == 130 and ran.error_lines[-1] == "stopped; finished parts are kept; run the same command to continue"
    )
    done = len(Layout(str(out)).finished())
    assert 2 <= done < 12 and len(Layout(str(out)).manifest()) >= done - 1  # stopped in the middle of a write, at worst
    again = qlip(*command, "--json")
    assert again.code == 0 and again.json["parts_made"] == 12 - done


LIMITED = """
import resource, sys
from qlip.cli.main import run
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
sys.exit(run(sys.argv[2:]))
"""


def test_tokenize__a_full_disk_keeps_finished_parts(tmp_path: Path, model: Path, qlip: Command) -> None:
    """The system refuses the larger part; the one before is whole, and a later run makes the rest."""
    shard(tmp_path / "in/000.tar", range(4))
    shard(tmp_path / "in/001.tar", range(200))
    command = ["tokenize", str(tmp_path / "in/*.tar"), "-o", str(tmp_path / "out"), "--model", str(model)]
    command += ["--workers", "0"]
    limited = [sys.executable, "-c", LIMITED, "8000", *command]
    ran = subprocess.run(limited, capture_output=True, text=True, check=False, cwd=ROOT)
    assert ran.returncode == 1
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("qlip:")]
    assert "part-00001.parquet: cannot write (File too large); free the disk or choose another folder" in line
    assert [entry.part for entry in Layout(str(tmp_path / "out")).manifest()] == [0]
    assert not list((tmp_path / "out").rglob("*.part"))
    again = qlip(*command, "--json")
    assert again.code == 0 and again.json["parts_made"] == 1 and len(TokenDataset(tmp_path / "out")) == 204


def test_ten_kills_at_random_moments_lose_and_double_nothing(tmp_path: Path, model: Path) -> None:
    """-9 at moments drawn from a seed: most fall inside a shard, and the end is that of a run never killed."""
    source = tars(tmp_path / "in", 24, images=8, broken=5)
    command = [sys.executable, "-m", "tests.archive.killed", source, str(model), str(tmp_path), "10", "7"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=environment)
    assert ran.returncode == 0, ran.stderr
    report = json.loads(ran.stdout.splitlines()[-1])
    assert report["last"] == 0 and len(report["fell"]) == 10 and "" not in report["fell"]
    assert report["fell"].count("i") >= 5
    whole, killed = files(tmp_path / "whole"), files(tmp_path / "killed")
    assert len([name for name in whole if name.startswith("data/")]) == 24
    assert killed == whole
    entries = Layout(str(tmp_path / "killed")).manifest()
    assert sum(entry.inputs for entry in entries) == 24 * 8 and sum(len(entry.errors) for entry in entries) == 1
