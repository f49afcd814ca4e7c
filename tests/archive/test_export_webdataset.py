"""Export to tars for webdataset; upload to and download from the Hub."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlip import QLIPError
from qlip.archive.dataset.card import MARK, card
from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.layout import CARD, Layout
from qlip.archive.dataset.schema import Views
from qlip.archive.manage import export_webdataset as webdataset
from qlip.archive.manage import hub
from qlip.archive.manage.merge import merge
from qlip.archive.manage.verify import verify
from qlip.tokens import TokenFile
from tests.archive.made import info, made, table_of


def test_export__tars_are_read_by_webdataset(tmp_path: Path) -> None:
    import webdataset as wds

    dataset = TokenDataset(made(tmp_path / "t", parts=2, rows=6, prefix="a/b.c/", views=Views(crops="flip")).address)
    assert webdataset.export(dataset, str(tmp_path / "tars")) == 2
    shards = [str(tmp_path / "tars" / f"part-0000{part}.tar") for part in range(2)]
    read: list[dict[str, Any]] = list(wds.WebDataset(shards, shardshuffle=False, empty_check=False))
    assert len(read) == len(dataset)
    for number, sample in enumerate(read):
        row, file = dataset.row(number), TokenFile.from_bytes(sample["qlip"])
        assert sample["__key__"] == f"{row.key.replace('.', '_')}-{row.view}"
        assert torch.equal(file.indices(14), dataset[number]) and file.original_size == row.original_size
        said = json.loads(sample["json"])
        assert (said["key"], said["view"], said["captions"]) == (row.key, row.view, list(row.captions))
        assert sample["txt"].decode() == row.captions[0]


def test_export__keys_that_differ_in_dots_are_different_samples(tmp_path: Path) -> None:
    import webdataset as wds

    layout, what, keys = (
        Layout(str(tmp_path / "t")),
        info(),
        ["img.1", "img_1", "img_1~2", "img.1~2", "a/b.c/d", "a/b_c/d"],
    )
    layout.write_info(what)
    table = table_of(what, keys, [(2, 2)], np.random.default_rng(0))
    layout.write_manifest([layout.write_part(what, 0, "shard", len(keys), table)])
    dataset = TokenDataset(layout.address)
    webdataset.export(dataset, str(tmp_path / "tars"))
    read = list(wds.WebDataset(str(tmp_path / "tars/part-00000.tar"), shardshuffle=False))
    assert [json.loads(sample["json"])["key"] for sample in read] == keys
    assert len({sample["__key__"] for sample in read}) == len(keys)
    for number, sample in enumerate(read):
        assert torch.equal(TokenFile.from_bytes(sample["qlip"]).indices(14), dataset[number])


def test_export__resumes_and_refuses_another_dataset(tmp_path: Path) -> None:
    dataset = TokenDataset(made(tmp_path / "t", parts=3).address)
    seen: list[int] = []

    def stop(rows: int) -> None:
        seen.append(rows)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        webdataset.export(dataset, str(tmp_path / "tars"), on_progress=stop)
    first = (tmp_path / "tars/part-00000.tar").stat().st_mtime_ns
    assert webdataset.export(dataset, str(tmp_path / "tars")) == 3
    assert (tmp_path / "tars/part-00000.tar").stat().st_mtime_ns == first
    webdataset.export(dataset, str(tmp_path / "again"))
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / "tars" / path.name).read_bytes()
    other = TokenDataset(made(tmp_path / "other", seed=1).address)
    with pytest.raises(QLIPError, match=r"holds another export \(webdataset differ\)"):
        webdataset.export(other, str(tmp_path / "tars"))


def test_export__writes_tars_to_a_store(tmp_path: Path) -> None:
    import fsspec

    dataset = TokenDataset(made(tmp_path / "t", parts=1).address)
    webdataset.export(dataset, str(tmp_path / "tars"))
    webdataset.export(dataset, "memory://exported")
    there = fsspec.filesystem("memory").cat_file("/exported/part-00000.tar")
    here = tmp_path / "tars/part-00000.tar"
    assert {*_members(there)} == {*_members(here.read_bytes())}


def _members(tar: bytes) -> list[tuple[str, bytes]]:
    import io
    import tarfile

    with tarfile.open(fileobj=io.BytesIO(tar)) as file:
        return [(one.name, file.extractfile(one).read()) for one in file]  # type: ignore[union-attr]


def test_card__has_the_hubs_fields_and_the_content(tmp_path: Path) -> None:
    from huggingface_hub import DatasetCard

    layout = Layout(str(tmp_path / "m"))
    merge([made(tmp_path / "t", broken=2)], layout)
    text = Path(layout.path(CARD)).read_text()
    front = DatasetCard(text).data.to_dict()
    assert front["configs"] == [{"config_name": "default", "data_files": "data/*.parquet"}]
    assert front["size_categories"] == ["n<1K"] and "qlip" in front["tags"]
    for words in ("15 in 3 parts", "21, of which 6 could not be read", "c" * 64, "fixed-size binary, 14", "float16[8]"):
        assert words in text
    many = [entry.model_copy(update={"rows": 10**10 // 3}) for entry in layout.manifest()]
    assert DatasetCard(card(layout.read_info(), many)).data.to_dict()["size_categories"] == ["1B<n<10B"]
    assert text == card(layout.read_info(), layout.manifest())
    mine = text.replace(MARK, "my own words")
    Path(layout.path(CARD)).write_text(mine)
    merge([Layout(str(tmp_path / "t"))], layout)
    assert Path(layout.path(CARD)).read_text() == mine


def test_push_and_pull__transfer_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub is a folder here: what would be sent is copied, as its client selects it."""
    from huggingface_hub.utils import filter_repo_objects

    layout, sent, asked = Layout(str(tmp_path / "mine")), tmp_path / "hub", dict[str, Any]()
    merge([made(tmp_path / "t")], layout)
    (tmp_path / "mine/data/.part-00001.parquet.1234.part").write_bytes(b"half")
    (tmp_path / "mine/index").mkdir()
    (tmp_path / "mine/index/vectors.faiss").write_bytes(b"this machine's")

    def create(self: object, repo_id: str, **how: Any) -> str:
        asked.update(how, repo_id=repo_id)
        return f"https://huggingface.co/datasets/{repo_id}"

    def upload(self: object, *, repo_id: str, folder_path: str, repo_type: str, ignore_patterns: list[str]) -> None:
        names = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            (sent / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(Path(folder_path) / name, sent / name)

    def download(repo_id: str, *, repo_type: str, local_dir: Path, **how: Any) -> str:
        shutil.copytree(sent, local_dir, dirs_exist_ok=True)
        names = [str(path.relative_to(local_dir)) for path in local_dir.rglob("*") if path.is_file()]
        for name in {*names} - {*filter_repo_objects(names, ignore_patterns=how["ignore_patterns"])}:
            (local_dir / name).unlink()
        return str(local_dir)

    monkeypatch.setattr(hub.HfApi, "create_repo", create)
    monkeypatch.setattr(hub.HfApi, "upload_folder", upload)
    monkeypatch.delattr(hub.HfApi, "upload_large_folder", raising=False)
    monkeypatch.setattr(hub, "snapshot_download", download)
    assert hub.push(layout, "me/tokens", private=True) == "https://huggingface.co/datasets/me/tokens"
    assert asked == {"repo_id": "me/tokens", "repo_type": "dataset", "private": True, "exist_ok": True}
    pulled = hub.pull("me/tokens", tmp_path / "theirs")
    assert not verify(Layout(pulled)).findings and torch.equal(TokenDataset(pulled)[:], TokenDataset(layout.address)[:])
    assert not list(Path(pulled).rglob("*.part")) and not (sent / "index").exists()
    (sent / "index").mkdir()
    (sent / "index/vectors.faiss").write_bytes(b"another machine's")  # sent by other means
    assert not list((Path(hub.pull("me/tokens", tmp_path / "again"))).rglob("*.faiss"))


def test_pull__reads_the_cache_offline(tmp_path: Path) -> None:
    """The layout of the Hub's own cache, without a network."""
    repo = tmp_path / "datasets--me--tokens"
    snapshot = repo / "snapshots" / ("0" * 40)
    made(snapshot)
    (repo / "refs").mkdir()
    (repo / "refs/main").write_text("0" * 40)
    where = hub.pull("me/tokens", cache_dir=tmp_path, local_files_only=True)
    assert len(TokenDataset(where)) == 15
    with pytest.raises(QLIPError, match="me/other: not in the local cache, and cannot download without a network"):
        hub.pull("me/other", cache_dir=tmp_path, local_files_only=True)


def test_push__errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = made(tmp_path / "t")
    with pytest.raises(QLIPError, match=r"not a name: not a Hub id \(.*\); one looks like owner/name"):
        hub.push(layout, "not a name")
    Path(layout.path("manifest.jsonl")).unlink()
    with pytest.raises(QLIPError, match="its run has not ended"):
        hub.push(layout, "me/tokens")
    with pytest.raises(QLIPError, match="no token dataset"):
        hub.push(Layout(str(tmp_path)), "me/tokens")
