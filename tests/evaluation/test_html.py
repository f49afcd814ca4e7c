"""The page of a measurement: whole, safe, readable without anything else, and saying what it is of."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image

from qlip import QLIPError
from qlip.evaluation.evaluators.base import MetricResult
from qlip.evaluation.report.bundle import Bundle, read_bundle, write_bundle
from qlip.evaluation.report.compare import compare
from qlip.evaluation.report.galleries import galleries
from qlip.evaluation.report.html import MOST_RECORDS, records_of, report, write_comparison, write_report
from qlip.evaluation.report.table import spelled

from .test_bundle import codebook, reconstruction
from .test_compare import of, rebuilt
from .test_result import measured, result

VOID = {"meta", "img", "br", "link", "hr", "input"}


class Page(HTMLParser):
    """Every tag with its attributes, in turn closed, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(text)
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] != ["style"]:
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """Attributes of all tags of a name."""
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    metric_results = [reconstruction(), codebook(), MetricResult({})]
    rows = [
        measured(tables=metric_results[0].tables, values=metric_results[0].values, notes={"psnr": "<b>look</b>"}),
        measured(evaluator="codebook", values=metric_results[1].values, tables=metric_results[1].tables, broken=[]),
        measured(values={}, as_shipped=False, broken=[]),
    ]
    one = result(*rows).model_copy(update={"complete": False, "command": "qlip eval <&>"})
    path = tmp_path_factory.mktemp("bundle")
    write_bundle(path, one, metric_results)
    return path


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    return Page(write_report(folder).read_text(encoding="utf-8"))


def test_html__nothing_is_loaded_from_elsewhere(page: Page) -> None:
    assert not page.of("script") and not page.of("link") and not page.of("iframe")
    for _, attributes in page.tags:
        for name in ("src", "href"):
            assert (attributes.get(name) or "#").startswith(("data:image/png;base64,", "#"))
    (policy,) = [one["content"] for one in page.of("meta") if one.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None and policy.startswith("default-src 'none'")
    assert "url(" not in "".join(str(attributes.get("style")) for _, attributes in page.tags)


def test_html__images_lie_in_it_with_words_for_those_who_do_not_see_them(page: Page) -> None:
    images = page.of("img")
    assert len(images) == 5  # two pairs and a plot
    for one in images:
        data = base64.b64decode(str(one["src"]).partition(",")[2])
        with Image.open(io.BytesIO(data)) as opened:
            assert opened.size == (int(str(one["width"])), int(str(one["height"])))
    alts = [str(one["alt"]) for one in images]
    assert alts[:2] == ["a/b.png, original; PSNR 20", "a/b.png, rebuilt by mine; PSNR 20"]
    assert all(alts) and "Worst by PSNR" in page.text


def test_html__of_a_few_images_none_is_among_the_worst_and_the_best(tmp_path: Path) -> None:
    """Nor are there more than a page bears, and a gallery ends where an image is missing: it is in order."""
    keys = [f"{number:02d}" for number in range(12)]
    up: list[dict[str, object]] = [{"key": key, "psnr": 20.0 + number} for number, key in enumerate(keys)]
    tables: dict[str, list[dict[str, object]]] = {
        "worst_psnr": up,
        "best_psnr": up[::-1],
        "worst_lpips_vgg": up[::-1],
        "best_lpips_vgg": up,
    }
    pair = (torch.zeros(3, 4, 4, dtype=torch.uint8), torch.ones(3, 4, 4, dtype=torch.uint8))
    shown = {0: {key: pair for key in keys if key != "10"}}
    write_bundle(tmp_path, result(measured(tables=tables)), [MetricResult({}, {}, tables)], pairs=shown)
    bundle = read_bundle(tmp_path)
    found = {
        one.title: [two.key for two in one.images]
        for one in galleries(bundle.metric_results[0], {"m": bundle}, {"m": 0})
    }
    assert found["Worst by PSNR"] == keys[:8] and found["Best by PSNR"] == ["11"]
    assert found["Worst by LPIPS (VGG)"] == ["11"] and found["Best by LPIPS (VGG)"] == keys[:8]


def test_html__metrics_stand_with_intervals_and_tables_have_heads(page: Page) -> None:
    assert "28.00" in page.text and "[27.90, 28.10]" in page.text and "PSNR, dB \u2191" in page.text
    assert len(page.of("caption")) == len(page.of("table"))
    assert all(one.get("scope") in ("col", "row") for one in page.of("th"))
    assert "worst psnr" not in page.text and re.search(r"bits \(\d+ rows\)", page.text)
    assert page.of("html") == [{"lang": "en"}] and any(one.get("name") == "viewport" for one in page.of("meta"))


def test_html__what_to_keep_in_mind_is_at_the_top_and_escaped(page: Page) -> None:
    for words in (
        "stopped before its last measurement",
        "another way than the checkpoint's own",
        "1 images could not be read",
        "Not the whole of cifar10:test was measured",
        "<b>look</b>",
        "qlip eval <&>",
        "truncated",
        "cd" * 32,
        "ab" * 32,
    ):
        assert words in page.text
    assert not page.of("b")


def test_html__a_link_inside_the_page_leads_somewhere(page: Page) -> None:
    wanted = {str(one["href"])[1:] for one in page.of("a")}
    assert wanted == {"row-0", "row-1", "row-2", "provenance"}
    assert wanted <= {str(attributes["id"]) for _, attributes in page.tags if "id" in attributes}


def test_html__reads_in_the_dark_on_a_phone_and_on_paper(folder: Path) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    for rule in ("prefers-color-scheme: dark", "@media print", "@media (max-width", "overflow-x: auto"):
        assert rule in text


def test_html__long_tables_say_that_they_go_on() -> None:
    records = records_of("classes", [{"class": str(at), "top1": at / 3} for at in range(300)])
    assert len(records.rows) == MOST_RECORDS and "first 200 of 300 rows" in records.caption
    assert [cell.text for cell in records.rows[1]] == ["1", "0.3333"]
    assert [spelled(one) for one in (None, True, 1234, "x", 0.5)] == ["\u2013", "yes", "1,234", "x", "0.5"]


def other(folder: Path, key: str) -> Bundle:
    """Another model that rebuilt an image of the same set."""
    pair = torch.zeros(3, 5, 4, dtype=torch.uint8), torch.ones(3, 5, 4, dtype=torch.uint8)
    write_bundle(folder, of("theirs", rebuilt(30.0)), [MetricResult({})], pairs={0: {key: pair}})
    return read_bundle(folder)


def test_html__several_evaluations_share_a_page(folder: Path, tmp_path: Path) -> None:
    mine = read_bundle(folder)
    first = mine.result.measured[0]
    only = mine.result.model_copy(update={"measured": [first]})
    bundle = Bundle(only, mine.metric_results[:1], mine.images)
    plot = {"A plot": mine.images["01-codebook"]}
    both = [bundle, other(tmp_path / "other", "a/b.png")]
    path = write_comparison(tmp_path / "both.html", both, compare(both), plots=plot)
    page = Page(path.read_text(encoding="utf-8"))
    assert "mine, theirs, compared" in page.text and "30.00" in page.text and "28.00" in page.text
    alts = [str(one["alt"]) for one in page.of("img")]
    assert alts[0] == "A plot" and "a/b.png, rebuilt by theirs" in alts and "c.png, rebuilt by theirs" not in alts
    assert all((one.get("href") or "#").startswith("#") for one in page.of("a"))
    with pytest.raises(QLIPError, match="compare them as mixed"):
        compare([mine, bundle])
    assert not (tmp_path / "no.html").exists()


def test_html__a_model_at_two_sizes_shows_what_it_rebuilt_at_both(folder: Path, tmp_path: Path) -> None:
    mine = read_bundle(folder)
    first = mine.result.measured[0]
    small = Bundle(mine.result.model_copy(update={"measured": [first]}), mine.metric_results[:1], mine.images)
    larger = first.model_copy(update={"preparation": "128x128, bicubic, centre crop"})
    large = Bundle(mine.result.model_copy(update={"measured": [larger]}), mine.metric_results[:1], mine.images)
    page = Page(
        write_comparison(tmp_path / "both.html", [small, large], compare([small, large], mixed=True)).read_text(
            encoding="utf-8"
        )
    )
    alts = {str(one["alt"]) for one in page.of("img")}
    name = mine.result.subject["name"]
    assert "a/b.png, original; PSNR 20 by mine" in alts and f"a/b.png, rebuilt by {name}, {larger.prepared}" in alts


def test_html__an_image_that_is_gone_is_named(folder: Path) -> None:
    bundle = read_bundle(folder)
    name = "01-codebook"
    broken = Bundle(bundle.result, bundle.metric_results, {**bundle.images, name: folder / "gone.png"})
    with pytest.raises(QLIPError, match=re.escape("gone.png: cannot be read (No such file or directory)")):
        report(broken)
