"""Suites: each tree is walked as its scorer does, and a stopped run continues with the images that are missing."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlip.data.public.scene_captions import CaptionedScenes
from qlip.data.public.scenes import draw
from qlip.data.sources.npz import NpzImages
from qlip.errors import QLIPError
from qlip.evaluation.prompt_suites import Suite, adm, draw_suite, open_suite, scenes, scenes_result, score_scenes
from qlip.evaluation.report.result import Result

SIDE = 4
SETTINGS = {"drawer": "abc", "seed": 0, "guidance": "3"}


def colour(prompt: str, number: int) -> tuple[int, int, int]:
    """The colour that the fake drawer gives a prompt and a number."""
    return tuple(hashlib.sha256(f"{prompt} {number}".encode()).digest()[:3])  # type: ignore[return-value]


class Squares:
    """A drawer of squares, which keeps what it was asked for and may stop after some images."""

    def __init__(self, stop: int | None = None) -> None:
        self.asked: list[tuple[str, int]] = []
        self.stop = stop

    def __call__(self, prompts: Sequence[str], numbers: Sequence[int]) -> list[Image.Image]:
        if self.stop is not None and len(self.asked) >= self.stop:
            raise KeyboardInterrupt
        pairs = list(zip(prompts, numbers, strict=True))
        self.asked += pairs
        return [Image.new("RGB", (SIDE, SIDE), colour(*pair)) for pair in pairs]


def drawn(suite: Suite, out: Path, **options: object) -> Squares:
    squares = Squares()
    draw_suite(suite, squares, out, SETTINGS, batch_size=3, **options)  # type: ignore[arg-type]
    return squares


def pixel(path: Path) -> tuple[int, ...]:
    with Image.open(path) as image:
        assert image.size == (SIDE, SIDE) and image.mode == "RGB"
        return tuple(int(one) for one in np.asarray(image)[0, 0])


def write(path: Path, content: str | dict[str, str]) -> Path:
    """A file, or a folder of files."""
    if isinstance(content, str):
        path.write_bytes(content.encode())
    else:
        path.mkdir()
        for name, text in content.items():
            (path / name).write_bytes(text.encode())
    return path


GENEVAL = """\
{"tag": "single_object", "include": [{"class": "kite", "count": 1}], "prompt": "our photo of a kite"}
{"tag": "counting", "include": [{"class": "spoon", "count": 3}], "prompt": "three of our spoons", "exclude": []}
{"tag": "colors", "include": [{"class": "boat", "count": 1, "color": "green"}], "prompt": "our boat \\u00e0 voile"}
"""
DPG = {"ours1.txt": "A long sentence about our kitchen.\n", "b-2.txt": "Another one,\nof two lines.", "10.txt": "Ten."}
COCO = 'Prompt\nOur dog runs.\n"Our ""quoted"" cat"\nOur dog runs.\n'
MJHQ = {"f00": {"category": "fashion", "prompt": "our coat"}, "a1": {"category": "art", "prompt": "our pot"}}
COMPBENCH = {
    "color_val.txt": "our red cup and our blue bowl\r\nour grey coat.\r\n",
    "3d_spatial_val.txt": "our cup in front of our bowl\r\n",
    "color_train.txt": "not read\r\n",
}
HPSV2 = {f"{style}.json": json.dumps([f"our {style} {at}" for at in range(2)]) for style in ("photo", "anime")}
PARTI = "Prompt\tCategory\tChallenge\tNote\nour elephant\tAnimals\tBasic\t\nour \ttea\tWorld\tBasic\n"
DATA: dict[str, str | dict[str, str]] = {
    "geneval": GENEVAL,
    "dpg": DPG,
    "coco30k": COCO,
    "mjhq": json.dumps(MJHQ),
    "compbench": COMPBENCH,
    "hpsv2": HPSV2,
    "parti": PARTI,
}


def suite_of(name: str, folder: Path) -> Suite:
    return adm(["cat", "dog", "ship"], 8) if name == "adm" else open_suite(name, write(folder / "data", DATA[name]))


# ------------------------------------------------------------------------------------------------- as scorers walk


def walk_geneval(out: Path) -> None:
    lines = [json.loads(line) for line in GENEVAL.splitlines()]
    found = {}
    for subfolder in os.listdir(out):
        if not (out / subfolder).is_dir() or not subfolder.isdigit():
            continue
        metadata = json.loads((out / subfolder / "metadata.jsonl").read_text())
        names = [name for name in os.listdir(out / subfolder / "samples") if re.match(r"\d+\.png", name)]
        assert sorted(names) == [f"{number:04d}.png" for number in range(4)]
        for name in names:
            assert pixel(out / subfolder / "samples" / name) == colour(metadata["prompt"], int(name[:4]))
        found[int(subfolder)] = metadata
    assert [found[at] for at in range(3)] == lines


def walk_dpg(out: Path) -> None:
    names = os.listdir(out)
    assert sorted(names) == ["10.png", "b-2.png", "ours1.png"]
    for name in names:
        key = os.path.basename(name).split(".")[0]
        text = DPG[f"{key}.txt"].strip()
        at = sorted(names).index(name)
        with Image.open(out / name) as grid:
            assert grid.size == (2 * SIDE, 2 * SIDE)
            for number, (x, y) in enumerate(((0, 0), (SIDE, 0), (0, SIDE), (SIDE, SIDE))):
                crop = np.asarray(grid.crop((x, y, x + SIDE, y + SIDE)))
                assert (crop == colour(text, 4 * at + number)).all()


def natural(name: str) -> list[object]:
    return [int(part) if part.isdigit() else part.lower() for part in re.split("([0-9]+)", name)]


def walk_captioned(captions: list[str]) -> Callable[[Path], None]:
    def walk(out: Path) -> None:
        images = sorted(map(str, out.glob("images/*.png")), key=natural)
        assert (out / "captions.txt").read_text(encoding="utf-8").splitlines() == captions
        assert len(images) == len(captions)
        records = [json.loads(line) for line in (out / "result.jsonl").read_text(encoding="utf-8").splitlines()]
        for at, (path, text, record) in enumerate(zip(images, captions, records, strict=True)):
            assert pixel(Path(path)) == colour(text, at)
            assert record == {"text": text, "image_path": path}
        settings = json.loads(out.with_name(out.name + ".settings.json").read_text())
        assert settings["prompts_sha256"] == hashlib.sha256((out / "captions.txt").read_bytes()).hexdigest()

    return walk


def walk_mjhq(out: Path) -> None:
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.*")) == ["art/a1.png", "fashion/f00.png"]
    for at, (name, one) in enumerate(MJHQ.items()):
        assert pixel(out / one["category"] / f"{name}.png") == colour(one["prompt"], at)


def walk_compbench(out: Path) -> None:
    assert sorted(os.listdir(out)) == ["3d_spatial", "color"]
    for category, prompts in (
        ("color", ["our red cup and our blue bowl", "our grey coat."]),
        ("3d_spatial", ["our cup in front of our bowl"]),
    ):
        names = os.listdir(out / category / "samples")
        names.sort(key=lambda name: int(name.split("_")[-1].split(".")[0]))
        for position, name in enumerate(names):
            prompt = name.split("_")[0]
            assert int(name.removesuffix(".png")[-6:]) == position and prompt == prompts[position // 10]
            assert pixel(out / category / "samples" / name) == colour(prompt, position)
        assert len(names) == 10 * len(prompts)


def walk_hpsv2(out: Path) -> None:
    styles = os.listdir(out)
    assert sorted(styles) == ["anime", "photo"]
    for style in styles:
        prompts = json.loads(HPSV2[f"{style}.json"])
        assert sorted(os.listdir(out / style)) == ["00000.jpg", "00001.jpg"]
        for at, prompt in enumerate(prompts):
            with Image.open(out / style / f"{at:05d}.jpg") as image:
                assert image.format == "JPEG"
                difference = np.asarray(image).astype(int)[0, 0] - colour(prompt, at)
                assert abs(difference).max() < 12


def walk_adm(out: Path) -> None:
    classes = ["cat", "dog", "ship"]
    assert sorted(os.listdir(out)) == [f"{at:06d}.png" for at in range(8)]
    path = out.with_name(out.name + ".npz")
    with np.load(path, allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        images = file["arr_0"]
    assert images.dtype == np.uint8 and images.shape == (8, SIDE, SIDE, 3) and images.flags["C_CONTIGUOUS"]
    for at, image in enumerate(images):
        assert pixel(out / f"{at:06d}.png") == colour(classes[at % 3], at) == tuple(image[0, 0])
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:  # as the evaluator streams it
        assert np.lib.format.read_magic(member) == (1, 0)
        assert np.lib.format.read_array_header_1_0(member) == (images.shape, False, np.dtype(np.uint8))
        for image in images:
            assert member.read(image.nbytes) == image.tobytes()
    assert len(NpzImages(path)) == 8


WALKS: dict[str, Callable[[Path], None]] = {
    "geneval": walk_geneval,
    "dpg": walk_dpg,
    "coco30k": walk_captioned(["Our dog runs.", 'Our "quoted" cat', "Our dog runs."]),
    "mjhq": walk_mjhq,
    "compbench": walk_compbench,
    "hpsv2": walk_hpsv2,
    "parti": walk_captioned(["our elephant", "our "]),
    "adm": walk_adm,
}


@pytest.mark.parametrize("name", WALKS)
def test_suite__is_what_its_scorer_reads(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    drawn(suite_of(name, tmp_path), out)
    WALKS[name](out)
    beside = {path.name for path in tmp_path.iterdir()} - {"data", "out", "out.npz"}
    assert beside == {"out.settings.json"}


@pytest.mark.parametrize("name", WALKS)
def test_suite__continues_with_the_missing_images(name: str, tmp_path: Path) -> None:
    suite, out = suite_of(name, tmp_path), tmp_path / "out"
    stopped = Squares(stop=1)
    with pytest.raises(KeyboardInterrupt):
        draw_suite(suite, stopped, out, SETTINGS, batch_size=1)
    assert not (out / "captions.txt").exists() and not (tmp_path / "out.npz").exists()
    finished = {path: path.read_bytes() for path in out.rglob("*.*g")}
    leftover = next(iter(finished)).with_name(".00000.png.0a1b2c3d.part")
    leftover.write_bytes(b"half")
    done: list[int] = []
    again = Squares()
    count = draw_suite(suite, again, out, SETTINGS, batch_size=5, on_progress=done.append)
    assert count == len(again.asked)
    assert len(stopped.asked) + count == sum(done) == sum(len(file.numbers) for file in suite.files)
    assert done[0] == len(stopped.asked)
    assert all(path.read_bytes() == content for path, content in finished.items())
    assert not leftover.exists()
    WALKS[name](out)
    assert not drawn(suite, out).asked


def test_adm__file_of_other_images_is_written_again(tmp_path: Path) -> None:
    (tmp_path / "out.npz").write_bytes(b"older")
    drawn(suite_of("adm", tmp_path), tmp_path / "out")
    walk_adm(tmp_path / "out")
    written = (tmp_path / "out.npz").stat().st_mtime_ns
    drawn(suite_of("adm", tmp_path), tmp_path / "out")
    assert (tmp_path / "out.npz").stat().st_mtime_ns == written


# ------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("compbench", {"color_val.txt": "a red cup\r\na snake_case cup\r\n"}, r"color_val.txt, line 2: has '_', and"),
        ("compbench", {"shape_val.txt": "a square/round cup\r\n"}, r"shape_val.txt, line 1: has '/'"),
        ("compbench", {"shape_val.txt": "a cup\r\n\r\na bowl\r\n"}, r"shape_val.txt, line 2: an empty prompt"),
        ("compbench", {"shape_val.txt": "x" * 245}, "line 1: too long for a file's name"),
        (
            "compbench",
            {"shapes.txt": "a cup"},
            "give T2I-CompBench's folder examples/dataset, or a file of it: color_val",
        ),
        ("geneval", '{"tag": "x", "prompt": "a"}\n{"tag": "x", "prompt": ""}\n', "data, line 2: an empty prompt"),
        ("geneval", '{"tag": "x", "prompt": "a"}\nprompt\n', "data, line 2: not JSON"),
        ("geneval", '{"prompt": "a"}\n', "line 1: not a line of GenEval's evaluation_metadata.jsonl"),
        ("geneval", "\n", "line 1: not JSON"),
        ("dpg", {"a.b.txt": "a cup"}, "a.b.txt: the scorer reads an id up to the first dot; rename the file"),
        ("dpg", {"a.txt": " \n"}, "a.txt: an empty prompt"),
        ("dpg", {"a.md": "a cup"}, r"no \*\.txt in it"),
        ("coco30k", "caption\na cup\n", "data: its first line has no column Prompt"),
        ("coco30k", "", "data: its first line has no column Prompt"),
        ("coco30k", "Prompt\n", "data: holds no prompt"),
        ("coco30k", "Prompt\na cup\n \n", "data, line 3: an empty prompt"),
        ("parti", 'Prompt\tNote\n"a\ncup"\t\n', "data, line 3: the prompt has a line break"),
        ("parti", "Prompt\tNote\na\u2028cup\t\n", "data, line 2: the prompt has a line break"),
        ("mjhq", '{"../x": {"category": "art", "prompt": "a"}}', r"'../x' cannot be a file's name"),
        ("mjhq", '{"a\\u0000b": {"category": "art", "prompt": "a"}}', r"'a\\x00b' cannot be a file's name"),
        ("mjhq", '{"x": {"prompt": "a"}}', "data, x: not {category, prompt}"),
        ("hpsv2", {"style.json": "[]"}, "data: not HPSv2's prompts"),
        ("hpsv2", {"photo.json": '["a", 1]'}, "photo.json: photo is not a list of prompts"),
        ("hpsv2", {"photo.json": '["a", " "]'}, "photo.json, photo 1: an empty prompt"),
        ("geneval2", "", r"geneval2: no such suite \(did you mean 'geneval'\?\)"),
    ],
)
def test_open_suite__refuses_in_one_line(name: str, content: str | dict[str, str], says: str, tmp_path: Path) -> None:
    data, squares = write(tmp_path / "data", content), Squares()
    with pytest.raises(QLIPError, match=says) as caught:
        draw_suite(open_suite(name, data), squares, tmp_path / "out", SETTINGS)
    assert "\n" not in str(caught.value) and not squares.asked and not (tmp_path / "out").exists()


def test_draw_suite__names_the_line_of_a_prompt_that_cannot_be_drawn(tmp_path: Path) -> None:
    def check(prompts: Sequence[str]) -> None:
        if long := [one for one in prompts if len(one) > 13]:
            raise QLIPError(f"prompt {long[0]!r}: too long")

    with pytest.raises(QLIPError, match=r"""data, line 3: prompt 'Our "quoted" cat': too long"""):
        drawn(suite_of("coco30k", tmp_path), tmp_path / "out", check=check)
    assert not (tmp_path / "out").exists()


class Stopped:
    """A drawer that fails at its first images."""

    def __call__(self, prompts: Sequence[str], numbers: Sequence[int]) -> list[Image.Image]:
        raise QLIPError("stopped")


def test_draw_suite__refuses_a_folder_of_other_settings_or_files(tmp_path: Path) -> None:
    suite, out = suite_of("coco30k", tmp_path), tmp_path / "out"
    drawn(suite, out)
    for settings, changed in ((SETTINGS | {"seed": 1}, "seed"), ({"drawer": "x", "seed": 0}, "drawer, guidance")):
        with pytest.raises(QLIPError, match=rf"out: was begun with other settings \({changed} differ\); give another"):
            draw_suite(suite, Squares(), out, settings)
    other = open_suite("coco30k", tmp_path / "data", limit=2)
    with pytest.raises(QLIPError, match=r"other settings \(images, prompts_sha256 differ\)"):
        drawn(other, out)
    with pytest.raises(QLIPError, match="stopped"):  # nothing drawn yet: other settings may begin here
        draw_suite(suite, Stopped(), tmp_path / "new", SETTINGS | {"negative": ""})
    assert drawn(suite, tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "photo.png").touch()
    with pytest.raises(QLIPError, match=r"full: holds photo.png, and no full.settings.json is beside it; give a new"):
        drawn(suite, tmp_path / "full")


def test_draw_suite__full_disk_keeps_finished_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite, out = suite_of("coco30k", tmp_path), tmp_path / "out"
    write_bytes, written = Path.write_bytes, list[Path]()

    def full(path: Path, data: bytes) -> int:
        if path.suffix == ".part" and "png" in path.name:
            written.append(path)
            if len(written) == 2:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_bytes(path, data)

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(QLIPError, match=r"000001\.png: cannot write \(No space left on device\); free the disk"):
        drawn(suite, out)
    assert [path.name for path in out.rglob("*.*")] == ["000000.png"]
    assert len(drawn(suite, out).asked) == 2
    WALKS["coco30k"](out)


def test_draw_suite__in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = suite_of("adm", tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    drawn(suite, Path())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "here.npz", "here.settings.json"]


# ------------------------------------------------------------------------------------------------- scenes


def scene_drawer(suite: Suite, mirrored: bool = False) -> Callable[[Sequence[str], Sequence[int]], list[Image.Image]]:
    """Draws the true scenes, or with all things on the other side."""
    source = CaptionedScenes(suite.name.partition(":")[2])

    def draws(prompts: Sequence[str], numbers: Sequence[int]) -> list[Image.Image]:
        found = []
        for prompt, number in zip(prompts, numbers, strict=True):
            description, scene = source.scene(number)
            assert description.caption == prompt
            if mirrored:
                things = tuple(replace(one, x=64 - one.x, y=64 - one.y) for one in scene.things)
                scene = replace(scene, things=things)
            found.append(draw(scene))
        return found

    return draws


def test_scenes__a_perfect_drawer_has_all_right(tmp_path: Path) -> None:
    suite, out = scenes("unseen_pair", 20), tmp_path / "out"
    draw_suite(suite, scene_drawer(suite), out, SETTINGS)
    spoilt = lambda images: [*images[:-2], *(Image.new("RGB", (64, 64)) for _ in range(2))]  # noqa: E731
    found = score_scenes(suite, out, spoilt)
    assert found.values["scenes_right"].value == 100 and found.values["scenes_right"].low > 80  # type: ignore[operator]
    assert found.values["scenes_contradicted"].value == 0
    assert found.values["scenes_other_caption"].value <= 5
    assert found.values["scenes_rebuilt"].value == 90
    families = [value for name, value in found.values.items() if name.startswith("scenes_right_")]
    assert sum(one.count for one in families) == 20
    result = scenes_result("ours", found, suite, SETTINGS, torch.device("cpu"))
    result.save(tmp_path / "result.json")
    (row,) = Result.load(tmp_path / "result.json").measured
    assert row.count == 20 and row.data == "scenes:unseen_pair" and row.tables["images"][0]["right"] is True


def test_scenes__a_contradicting_drawer_has_none_right(tmp_path: Path) -> None:
    suite, out = scenes("unseen_relation", 6), tmp_path / "out"
    draw_suite(suite, scene_drawer(suite, True), out, SETTINGS)
    found = score_scenes(suite, out, None)
    assert found.values["scenes_right"].value == 0 and found.values["scenes_contradicted"].value == 100
    assert "scenes_rebuilt" not in found.values


def test_scenes__refuses_another_size_and_an_unknown_split(tmp_path: Path) -> None:
    with pytest.raises(QLIPError, match=r"unseen: no such split of scenes \(did you mean"):
        scenes("unseen")
    with pytest.raises(QLIPError, match="needs images of 64 x 64 pixels, this drawer's have 4 x 4"):
        drawn(scenes("seen", 2), tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.png"))
