"""A dataset that lacks parts: readers warn, merge and push refuse it."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlip import QLIPError
from qlip.archive.dataset.completeness import PartialDatasetError, missing_parts
from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.layout import Layout
from qlip.archive.dataset.provenance import SourceRecord, SourceShard
from qlip.archive.manage import hub
from qlip.archive.manage.merge import merge, split
from qlip.archive.manage.verify import verify
from qlip.archive.search.embeddings import Vectors
from qlip.errors import QLIPWarning
from tests.archive.made import made
from tests.cli.conftest import Command
from tests.cli.conftest import qlip as qlip  # the command, as a fixture


@pytest.fixture
def partial(tmp_path: Path) -> Layout:
    """A dataset with 2 parts of a folder's 5 shards of 5 images."""
    layout = made(tmp_path / "partial", parts=2, prefix="p")
    shards = tuple(SourceShard(name=f"pictures {n}", images=5, digest="") for n in range(5))
    record = SourceRecord(kind="folder", input="photos", options={}, shards=shards)
    layout.storage.write(layout.path("source.json"), record.to_json().encode())
    return layout


TEXT = "3 of its 5 parts are missing with 15 images, the first is part 2"


def test_missing_parts__come_from_the_source_record(partial: Layout) -> None:
    missing = missing_parts(partial, partial.manifest())
    assert missing and (missing.parts, missing.expected, missing.images) == ((2, 3, 4), 5, 15)
    assert TEXT in str(missing)


def test_missing_parts__a_deleted_file_is_missing_with_or_without_its_entry(tmp_path: Path, partial: Layout) -> None:
    Path(partial.part_path(0)).unlink()
    assert missing_parts(partial, partial.manifest()).parts == (0, 2, 3, 4)
    Path(partial.entry_path(0)).unlink()
    Path(partial.path("manifest.jsonl")).unlink()
    assert missing_parts(partial, partial.manifest()).parts == (0, 2, 3, 4)
    whole = made(tmp_path / "whole")
    assert not missing_parts(whole, whole.manifest())
    Path(whole.part_path(1)).write_bytes(b"PAR1")
    assert missing_parts(whole, whole.manifest()).parts == (1,)


def test_missing_parts__a_merge_that_has_not_ended(tmp_path: Path) -> None:
    merged = Layout(str(tmp_path / "merged"))
    merge([made(tmp_path / "a")], merged)
    assert not missing_parts(merged, merged.manifest())
    Path(merged.path("manifest.jsonl")).unlink()
    assert "its run has not ended" in str(missing_parts(merged, merged.manifest()))


def test_partial_dataset__readers_warn(partial: Layout, tmp_path: Path) -> None:
    with pytest.warns(QLIPWarning, match=TEXT):
        assert TokenDataset(partial.address).missing.parts == (2, 3, 4)
    with pytest.warns(QLIPWarning, match=TEXT):
        Vectors(partial)
    with pytest.warns(QLIPWarning, match=TEXT):
        split(partial, {str(tmp_path / "x"): 1, str(tmp_path / "y"): 1})


def test_partial_dataset__merge_and_push_refuse_it(partial: Layout, tmp_path: Path) -> None:
    merged = Layout(str(tmp_path / "merged"))
    with pytest.raises(PartialDatasetError, match=TEXT):
        merge([made(tmp_path / "a"), partial], merged)
    assert not merged.exists()
    merge([made(tmp_path / "a"), partial], merged, allow_partial=True)
    assert len(TokenDataset(merged.address)) == 25 and not verify(merged).findings
    with pytest.raises(PartialDatasetError, match=TEXT):
        hub.push(partial, "me/tokens")


def test_partial_dataset__verify_calls_it_incomplete(partial: Layout) -> None:
    (finding,) = verify(partial).findings
    assert finding.file == "data" and finding.what.startswith(f"incomplete: {TEXT}")
    report = verify(partial, allow_partial=True)
    assert report.intact and TEXT in report.notes[0]


def test_partial_dataset__commands_say_so_in_one_line(partial: Layout, qlip: Command) -> None:
    assert f"incomplete   {TEXT}" in qlip("tokens", "info", partial.address).out
    assert TEXT in qlip("tokens", "info", partial.address, "--json").json["missing"]
    ran = qlip("tokens", "verify", partial.address)
    assert ran.code == 1 and TEXT in ran.out and qlip("tokens", "verify", partial.address, "--allow-partial").code == 0
    ran = qlip("tokens", "merge", partial.address, "-o", "merged")
    assert ran.code == 1 and "or allow a partial dataset with --allow-partial" in ran.error_lines[-1]
    assert qlip("tokens", "merge", partial.address, "-o", "merged", "--allow-partial").code == 0
    ran = qlip("tokens", "export", partial.address, "-o", "tars")
    assert ran.code == 0 and any(line.startswith("warning: ") and TEXT in line for line in ran.error_lines)


def test_token_dataset__refuses_a_part_of_another_model(tmp_path: Path) -> None:
    layout, other = made(tmp_path / "a"), made(tmp_path / "b", code_fingerprint="f" * 64)
    Path(layout.part_path(1)).write_bytes(Path(other.part_path(1)).read_bytes())
    dataset = TokenDataset(layout.address)
    assert dataset[4].shape == (4, 2)
    with pytest.raises(QLIPError, match=r"part-00001.parquet: another dataset's part, its code_fingerprint differs"):
        dataset[5]


def test_token_dataset__refuses_a_part_of_another_size_than_the_manifests(tmp_path: Path) -> None:
    layout, other = made(tmp_path / "a"), made(tmp_path / "b", rows=6)
    Path(layout.part_path(1)).write_bytes(Path(other.part_path(1)).read_bytes())
    with pytest.warns(QLIPWarning, match="1 part is missing"):
        dataset = TokenDataset(layout.address)
    with pytest.raises(QLIPError, match=r"part-00001.parquet: .* bytes, and the manifest says"):
        dataset[5]
