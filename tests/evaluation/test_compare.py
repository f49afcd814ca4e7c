"""Results side by side: only what may be compared, the best in bold, what differs said aloud."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlip import QLIPError
from qlip.data.sources.training_text import TrainingText
from qlip.evaluation.evaluators.base import MetricResult, MetricValue
from qlip.evaluation.evaluators.zero_shot import ZeroShot
from qlip.evaluation.models.codecs import CodecEvalModel
from qlip.evaluation.report.bundle import Bundle
from qlip.evaluation.report.compare import compare
from qlip.evaluation.report.plots import meaning_against_fidelity, rate_distortion
from qlip.evaluation.report.result import EvalResult, Result
from qlip.evaluation.report.table import number, titled, write
from qlip.modeling.model import unit

from .known import Known, rows_of
from .test_result import measured


def rebuilt(psnr: float, rate: float = 0.4, lpips: float | None = None, **changes: object) -> EvalResult:
    """A row of reconstruction."""
    values = {
        "psnr": MetricValue(psnr, psnr - 0.2, psnr + 0.2, 100, "dB", "higher"),
        "bits_per_pixel": MetricValue(rate, None, None, 100, "bit"),
    }
    if lpips is not None:
        values["lpips_vgg"] = MetricValue(lpips, None, None, 100, "", "lower")
    return measured(values=values, **({"broken": []} | changes))


def named(top1: float, **changes: object) -> EvalResult:
    """A row of zero-shot."""
    values = {"zero_shot_top1": MetricValue(top1, top1 - 2, top1 + 2, 100, "%", "higher")}
    return measured(values=values, **({"evaluator": "zero_shot", "broken": []} | changes))


def of(name: str, *rows: EvalResult, fingerprint: str | None = None, kind: str = "QLIPEvalModel") -> Result:
    """A result of a model."""
    return Result(
        subject={"name": name, "fingerprint": fingerprint or name * 4, "kind": kind},
        measured=list(rows),
        command="qlip eval",
        time="2026-11-24T00:00:00+00:00",
        packages={},
        machine="Linux",
    )


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (("/runs/twins/both/seed-0/model", "/runs/twins/alone/seed-0/model"), ("both/seed-0", "alone/seed-0")),
        (("a/x/seed-0/model", "b/x/seed-0/model"), ("a/x/seed-0", "b/x/seed-0")),
        (("/runs/mine/model", "/runs/mine", "owner/mine"), ("/runs/mine/model", "/runs/mine", "owner/mine")),
        (("owner/model", "here"), ("owner/model", "here")),
        (("transformers.CLIPModel:/a/b/c/d", "/a/b/c/d"), ("transformers.CLIPModel:/a/b/c/d", "c/d")),
    ],
)
def test_compare__of_paths_stands_the_end_that_tells_them_apart(names: tuple[str, ...], shown: tuple[str, ...]) -> None:
    (table,) = compare([of(name, rebuilt(28.0 + at)) for at, name in enumerate(names)])
    assert tuple(row.model for row in table.rows) == shown


def test_compare__equal_evaluations_share_a_table_and_the_best_is_bold() -> None:
    (table,) = compare([of("a", rebuilt(28.0, lpips=0.3)), of("b", rebuilt(29.0, lpips=0.4)), of("c", rebuilt(29.001))])
    assert [row.model for row in table.rows] == ["a", "b", "c"]
    assert table.best("psnr") == {"b", "c"}  # equal as written
    assert table.best("lpips_vgg") == {"a"} and table.best("bits_per_pixel") == set()
    text = write([table.table()], "markdown")
    assert "reconstruction on cifar10:test (n=100; 64x64, bicubic, centre crop)" in text
    assert "| b | **29.00** | 0.4 | 0.4 |" in text and "| c | **29.00** | 0.4 | \u2013 |" in text
    assert "PSNR, dB \u2191" in text and "LPIPS (VGG) \u2193" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"count": 99}, "count differ"),
        ({"digest": "cd" * 32}, "images differ"),
        ({"settings": {"templates": ["a {}"]}}, "settings differ"),
    ],
)
def test_compare__what_was_measured_otherwise_stands_apart_and_says_why(changes: dict[str, object], said: str) -> None:
    tables = compare([of("a", rebuilt(28.0)), of("b", rebuilt(35.0, **changes))])
    assert [[row.model for row in table.rows] for table in tables] == [["a"], ["b"]]
    assert said in tables[1].notes[-1] and "not comparable with an earlier table" in tables[1].notes[-1]
    assert all(table.best("psnr") == set() for table in tables)


def test_compare__another_set_is_another_table_without_a_warning() -> None:
    tables = compare([of("a", rebuilt(28.0)), of("b", rebuilt(35.0, data="emoji:twemoji"))])
    assert len(tables) == 2 and not tables[1].notes


def test_compare__different_preparations_are_refused_in_one_line_and_flagged_when_mixed() -> None:
    results = [of("a", rebuilt(28.0)), of("b", rebuilt(35.0, preparation="256x256, bicubic, centre crop"))]
    with pytest.raises(QLIPError) as refused:
        compare(results)
    assert str(refused.value) == (
        "reconstruction on cifar10:test: a was measured at 64x64, bicubic, centre crop, b at 256x256, bicubic, centre"
        " crop; measure both at one size, or compare them as mixed, each under its own preparation"
    )
    with pytest.raises(QLIPError, match="not the checkpoint's own"):
        compare([of("a", rebuilt(28.0)), of("b", rebuilt(35.0, as_shipped=False))])
    (table,) = compare(results, mixed=True)
    assert table.best("psnr") == set() and "no comparison" in table.notes[0] and "preparations differ" in table.caption
    text = write([table.table()], "markdown")
    assert "| b | 256x256, bicubic, centre crop | 35.00 |" in text and "**35" not in text


def test_compare__one_model_in_two_files_fills_one_row_and_may_not_contradict_itself() -> None:
    (table, other) = compare([of("a", rebuilt(28.0)), of("a", named(20.0)), of("a", rebuilt(28.0))])
    assert len(table.rows) == len(other.rows) == 1
    with pytest.raises(QLIPError, match="psnr@cifar10:test.*of a is 28 in one result and 29 in another"):
        compare([of("a", rebuilt(28.0)), of("a", rebuilt(29.0))])
    (table,) = compare([of("a", rebuilt(28.0), fingerprint="1" * 64), of("a", rebuilt(29.0), fingerprint="2" * 64)])
    assert [row.model for row in table.rows] == ["a (11111111)", "a (22222222)"]


def test_compare__notes_and_broken_images_are_numbered() -> None:
    row = rebuilt(28.0, notes={"psnr": "infinite: 2"}, broken=[("x", "truncated")])
    (table,) = compare([of("a", row), of("b", rebuilt(29.0, notes={"psnr": "infinite: 2"}))])
    assert table.notes == ["psnr: infinite: 2", "1 image could not be read and is not counted"]
    assert [one.notes for one in table.rows] == [[1, 2], [1]]
    assert "| a (1) (2) |" in write([table.table()], "markdown") and "| b (1) |" in write([table.table()], "markdown")


def test_compare__latex_is_escaped_and_has_booktabs_rules() -> None:
    (table,) = compare([of("a_b & 50%", rebuilt(28.0)), of("c", rebuilt(27.0))])
    text = write([table.table(intervals=True)], "latex")
    assert r"a\_b \& 50\% & \textbf{28.00 [27.80, 28.20]} & 0.4 \\" in text
    assert text.count(r"\toprule") == text.count(r"\midrule") == text.count(r"\bottomrule") == 1
    assert r"PSNR, dB $\uparrow$" in text and text.count("{") == text.count("}")
    columns = re.search(r"\\begin{tabular}{(l?r*)}", text)
    assert columns is not None and all(
        line.count(" & ") == len(columns[1]) - 1 for line in text.splitlines() if line.endswith(r"\\")
    )


class Balanced(HTMLParser):
    """Refuses tags that are not closed in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("td", "th", "strong"):
            self.cells.append(data.strip())


def test_compare__html_is_escaped_and_well_formed() -> None:
    (table,) = compare([of("<b>", rebuilt(28.0, notes={"psnr": "a < b"})), of("c", rebuilt(29.0))])
    text = write([table.table()], "html")
    parser = Balanced()
    parser.feed(text)
    assert not parser.open and "<b>" in parser.cells and "29.00" in parser.cells
    assert '<th scope="row">&lt;b&gt; <sup>1</sup></th>' in text and "<li>psnr: a &lt; b</li>" in text
    assert "<strong>29.00</strong>" in text


def test_compare__columns_can_be_chosen_and_formats_are_named() -> None:
    results = [of("a", rebuilt(28.0), named(20.0))]
    assert [list(table.columns) for table in compare(results, only=["bits_per_pixel", "psnr"])] == [
        ["bits_per_pixel", "psnr"]
    ]
    with pytest.raises(QLIPError, match=r"no result has a metric psrn \(did you mean 'psnr'\?\); there are psnr, bits"):
        compare(results, only=["psrn"])
    with pytest.raises(QLIPError, match="tables are written as markdown, latex, html; got docx"):
        write([], "docx")  # type: ignore[arg-type]
    with pytest.raises(QLIPError, match="nothing to compare"):
        compare([])


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (28.126, "dB", "28.13"),
        (12.34, "%", "12.3"),
        (10000.0, "", "10,000"),
        (0.123456, "", "0.1235"),
        (float("inf"), "dB", "inf"),
        (123456.7, "", "123,457"),
        (float("inf"), "", "inf"),
    ],
)
def test_compare__metrics_are_written_as_the_field_writes_them(value: float, unit: str, text: str) -> None:
    assert number(value, unit) == text


def test_compare__rate_distortion_joins_a_codecs_budgets(tmp_path: Path) -> None:
    codecs = [
        of(f"{name}, {size} bytes", rebuilt(20 + size / 100, size / 1000), kind=CodecEvalModel.kind)
        for name in ("JPEG", "WebP")
        for size in (900, 300, 600)
    ]
    (panel,) = rate_distortion(compare([of("qlip", rebuilt(28.0)), *codecs]), tmp_path / "rate.png")
    assert {point.curve for point in panel[1]} == {None, "JPEG", "WebP"} and len(panel[1]) == 7
    with Image.open(tmp_path / "rate.png") as image:
        assert image.format == "PNG"
    with pytest.raises(
        QLIPError, match=r"none\.png: not drawn, since no result has both ssim of reconstructions and bits per pixel"
    ):
        rate_distortion(compare(codecs), tmp_path / "none.png", "ssim")
    assert not (tmp_path / "none.png").exists()


def test_compare__mixed_preparations_are_points_of_their_own(tmp_path: Path) -> None:
    """One model at two sizes is two points, each under its size; a codec's curves at both are two."""
    small, large = "64x64, bicubic, centre crop", "128x128, bicubic, centre crop"
    results = []
    for at, psnr, top1 in ((small, 28.0, 20.0), (large, 30.0, 22.0)):
        results.append(of("a", rebuilt(psnr, preparation=at), named(top1, preparation=at)))
        budgets = (rebuilt(psnr - less, preparation=at) for less in (2, 4))
        results += [
            of(f"WebP, {int(one.values['psnr'].value)} bytes", one, kind=CodecEvalModel.kind) for one in budgets
        ]
    tables = compare(results, mixed=True)
    ((_, rates),) = rate_distortion(tables, tmp_path / "rate.png")
    alone = {one.model: one.x.value for one in rates if one.curve is None}
    assert list(alone) == [f"a, {small}", f"a, {large}"]
    curves = {one.curve for one in rates if one.curve is not None}
    assert curves == {f"WebP, {small}", f"WebP, {large}"}
    ((_, points),) = meaning_against_fidelity(tables, tmp_path / "both.png")
    assert [(one.model, one.x.value, one.y.value) for one in points] == [
        (f"a, {small}", 28.0, 20.0),
        (f"a, {large}", 30.0, 22.0),
    ]


CLASSES = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]


def naming(trained: list[str] | None) -> EvalResult:
    """A row of zero-shot classification by a model that was trained with these captions; None: they are unknown."""
    model = Known()
    if trained is not None:
        model.training_text = TrainingText.of(trained)
    embeddings = unit(torch.stack([model.vector(f"a {name}") for name in CLASSES]))
    made = ZeroShot(templates=["a {}"])
    found = made.summarize(model, rows_of({"embedding": embeddings}, CLASSES))
    return measured(
        evaluator="zero_shot",
        settings=dict(made.settings()),
        values=found.values,
        notes=found.notes,
        broken=[],
    )


def test_compare__models_of_different_training_share_a_table_that_says_which_named_the_classes(tmp_path: Path) -> None:
    rows = {
        "all": naming(CLASSES),
        "two": naming(["cat", "fox"]),
        "unknown": naming(None),
    }
    results = [of(name, row, rebuilt(28.0)) for name, row in rows.items()]
    tables = compare(results)
    table = tables[0]
    assert [row.model for row in table.rows] == list(rows)
    protocols = [note for note in table.notes if note.startswith("protocol: ")]
    assert [[table.notes[mark - 1] for mark in row.notes] for row in table.rows] == [[one] for one in protocols]
    assert "trained classes: all 7 names occur in" in protocols[0]
    assert "2 of 7 class names occur in" in protocols[1] and "unknown" in protocols[2]
    assert table.best("prompt_top1") == set(rows)
    assert table.best("trained_top1") == set() and len(table.parts("trained_top1")) == 2
    said = r"trained top-1: over different classes \(all classes; 2 of 7 classes \(\w{8}\)\)"
    assert re.search(said, table.notes[-1])
    ((caption, points),) = meaning_against_fidelity(tables, tmp_path / "all.png")
    assert [one.model for one in points] == list(rows) and "classes" not in caption
    ((caption, points),) = meaning_against_fidelity(tables, tmp_path / "held-out.png", meaning="zero_shot_top1")
    assert [one.model for one in points] == ["two"] and ", 5 of 7 classes (" in caption


def test_compare__what_training_named_is_no_setting_in_results_of_before() -> None:
    row = named(20.0, settings={"templates": ["a {}"]}).model_dump()
    before = row | {"settings": {"templates": ["a {}"], "trained": ["cifar10:train"]}}
    assert EvalResult.model_validate(before).settings == {"templates": ["a {}"]}
    assert EvalResult.model_validate(before | {"options": {"trained": ["cifar10:train"]}}).options == {}
    assert "trained" in EvalResult.model_validate(before | {"evaluator": "probe"}).settings


def test_compare__meaning_is_drawn_against_fidelity(tmp_path: Path) -> None:
    results = [of("a", rebuilt(28.0), named(20.0)), of("b", rebuilt(29.0), named(10.0)), of("codec", rebuilt(30.0))]
    ((caption, points),) = meaning_against_fidelity(compare(results), tmp_path / "first.png")
    assert [(one.model, one.x.value, one.y.value) for one in points] == [("a", 28.0, 20.0), ("b", 29.0, 10.0)]
    assert "zero shot on cifar10:test (n=100" in caption
    said = (
        r"none\.png: not drawn, since no result has a metric that measures how well images are classified \(zero_shot"
    )
    with pytest.raises(QLIPError, match=said):
        meaning_against_fidelity(compare([of("a", rebuilt(28.0))]), tmp_path / "none.png")


def test_compare__a_long_caption_stays_inside_its_image(tmp_path: Path) -> None:
    long = "256x256, bicubic, whole image inside, then centre crop, of photographs/of/a/far/folder, several hundred"
    results = [of(name, rebuilt(28.0, preparation=long), named(20.0, preparation=long)) for name in "ab"]
    for draw in (rate_distortion, meaning_against_fidelity):
        ((caption, _),) = draw(compare(results), tmp_path / "long.png")
        assert long in caption
        image = Image.open(tmp_path / "long.png").convert("L")
        margin = image.crop((image.width - 4, 0, image.width, image.height))
        assert margin.getextrema() == (255, 255)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("lpips_vgg", "LPIPS (VGG)"),
        ("linear_cls_top1", "linear cls top-1"),
        ("image_to_text_r10", "image to text R@10"),
        ("text_to_image_r1_chance", "text to image R@1 chance"),
        ("jpeg_psnr_input", "JPEG PSNR input"),
        ("image_to_text_median_rank", "image to text median rank"),
    ],
)
def test_compare__metrics_are_called_as_papers_call_them(name: str, words: str) -> None:
    assert titled(name) == words


def bundle(name: str, decibels: np.ndarray) -> Bundle:
    """A result's folder with the PSNR of each image."""
    metric_result = MetricResult({})
    metric_result.add_mean("psnr", torch.from_numpy(decibels), unit="dB", better="higher")
    row = measured(values=metric_result.values, broken=[], count=len(decibels))
    return Bundle(of(name, row), [metric_result])


def test_compare__a_paired_comparison_decides_on_what_is_bold() -> None:
    rng = np.random.default_rng(0)
    images = rng.normal(28, 4, 200)  # both intervals are 1.1 dB wide: on their own they tell nothing apart
    better, same = images + 0.1 + rng.normal(0, 0.1, 200), images + 0.1 + rng.normal(0, 0.1, 200)
    (table,) = compare([bundle("a", images), bundle("b", better), bundle("c", same)])
    assert table.best("psnr") == {"b", "c"}
    (table,) = compare([bundle("a", images), bundle("b", better)])
    assert table.best("psnr") == {"b"}
    assert re.search(r"a minus b: PSNR -0\.\d\d \[-0\.1\d, -0\.0\d\] dB", table.notes[-1])
    (table,) = compare([bundle("a", images), bundle("b", images + rng.normal(0, 2, 200))])
    assert table.best("psnr") == {"a", "b"}


def test_compare__infinite_values_are_never_best_and_their_images_leave_no_trace() -> None:
    images = np.random.default_rng(0).normal(28, 4, 50)
    exact = images - 1
    exact[0] = np.inf
    (table,) = compare([bundle("a", images), bundle("b", exact)])
    assert table.best("psnr") == {"a"} and table.rows[1].metrics["psnr"].count == 49
    (table,) = compare([bundle("a", images), bundle("b", np.full(50, np.inf))])
    assert table.best("psnr") == set()
    assert not any("bold" in note for note in table.notes)
