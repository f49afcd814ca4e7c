"""Searching: by words, by an image, by a key; what is found equals a literal search, what does not fit is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from benchmarks import search as benchmark
from qlip import QLIPModel, QLIPProcessor, assets
from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.layout import Layout
from qlip.archive.dataset.schema import Views, arrow_schema
from qlip.archive.manage.decode import check_model, decode_batch
from qlip.archive.search import search
from qlip.archive.search.build_index import Build, build
from qlip.archive.search.embeddings import Floats, Found, Vectors
from qlip.archive.search.index import HEAD
from qlip.archive.search.search import Searcher, sample_texts
from qlip.cli import models
from qlip.cli.image import contact_sheet
from qlip.cli.main import run
from qlip.errors import QLIPError
from qlip.tokens import ImageCodec
from tests.archive.made import bundled_dataset, made
from tests.cli.conftest import Ran, save_checkpoint

Command = Callable[..., Ran]
ROOT = Path(__file__).parents[2]
CAT = assets.path("images", "cat.jpg")


@pytest.fixture(scope="module")
def tokenizer() -> ImageCodec:
    return models.load("bundled", "cpu")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package's images as a dataset, with an exact index."""
    layout = bundled_dataset(tmp_path_factory.mktemp("search") / "demo")
    build(Vectors(layout))
    return Path(layout.address)


@pytest.fixture
def qlip(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    tokenizer: ImageCodec,
) -> Command:
    """The command in an empty folder; the bundled model is loaded once."""
    load = models.load
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        models, "load", lambda name, *rest: tokenizer if name in ("bundled", tokenizer.name) else load(name, *rest)
    )

    def command(*arguments: object) -> Ran:
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return command


# -------------------------------------------------------------------- what is found


@pytest.mark.parametrize("crops", ["one", "flip", "ten"])
def test_search__best_view_of_each_image_equals_a_literal_search(tmp_path: Path, crops: str) -> None:
    layout = made(tmp_path / "many", parts=4, rows=30, embedding_dim=8, views=Views.model_validate({"crops": crops}))
    dataset, vectors = TokenDataset(layout.address), Vectors(layout)
    build(vectors, what=Build(kind="hnsw"))
    matrix, rows = dataset.embeddings().astype(np.float32), dataset.rows(range(len(dataset)))
    query = np.random.default_rng(3).standard_normal(8).astype(np.float32)
    query /= np.linalg.norm(query)
    scores = [float(np.dot(vector, query)) for vector in matrix]
    best: dict[tuple[int, str], tuple[float, int]] = {}
    for number, row in enumerate(rows):
        name = (number // 30, row.key)
        best[name] = max(best.get(name, (-np.inf, 0)), (scores[number], number))
    for scan in (True, False):
        searcher = Searcher(layout.address, scan=scan)
        assert (searcher.index is None) == scan
        for k in (1, 5, 16, 500):
            hits = searcher.search(query, k)
            wanted = sorted(best.items(), key=lambda one: -one[1][0])[:k]
            assert [(hit.part, hit.row.key) for hit in hits] == [name for name, _ in wanted]
            assert [hit.number for hit in hits] == [number for _, (_, number) in wanted]
            np.testing.assert_allclose([hit.score for hit in hits], [score for _, (score, _) in wanted], atol=1e-6)
            assert all(hit.row == rows[hit.number] for hit in hits)


def test_search__image_in_two_parts_is_shown_once_but_not_two_of_one_name(tmp_path: Path) -> None:
    """Of three parts the first two are equal; the third has the same keys and other images."""
    first, third = made(tmp_path / "one", parts=1), made(tmp_path / "other", parts=1, seed=9)
    layout, info = Layout(str(tmp_path / "merged")), first.read_info()
    layout.write_info(info)
    import pyarrow.parquet as parquet

    tables = [parquet.read_table(one.part_path(0), schema=arrow_schema(info)) for one in (first, first, third)]
    layout.write_manifest([layout.write_part(info, part, f"{part}", 5, table) for part, table in enumerate(tables)])
    searcher = Searcher(layout.address)
    hits = searcher.search(searcher.vectors.at(np.array([7]))[0], 20)
    assert len(hits) == 10 and hits[0].number == 2 and hits[0].score == pytest.approx(1, abs=2e-3)
    assert {hit.part for hit in hits} == {0, 2}
    assert searcher.find("000-0002") == (2, 0)  # the first of those called so


def test_a_search_asks_for_no_more_rows_than_it_may_and_never_again_for_what_is_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a thousand rows most are nearer than any row of another image; and an index may find fewer than asked."""
    layout = made(tmp_path / "many", parts=1, rows=1000, views=Views.model_validate({"crops": "ten"}))
    build(Vectors(layout), what=Build(kind="ivf", recall=0.1))
    asked: list[int] = []

    def counted(searcher: Searcher) -> Searcher:
        nearest = searcher.finder.nearest

        def count(queries: Floats, k: int) -> Found:
            asked.append(k)
            return nearest(queries, k)

        monkeypatch.setattr(searcher.finder, "nearest", count)
        return searcher

    exact, index = counted(Searcher(layout.address, scan=True)), counted(Searcher(layout.address))
    monkeypatch.setattr(search, "MAX_ROWS", 300)
    vector = exact.embedding(0)
    monkeypatch.setattr(exact.dataset, "keys", lambda rows: ["the same"] * len(rows))
    assert len(exact.search(vector, 2)) == 1 and asked == [20, 80, 300]
    asked.clear()
    assert len(exact.search(vector, 90)) == 1 and asked == [900]  # so many rows were asked for
    asked.clear()
    found = index.search(vector, 90)
    assert index.index is not None and index.index.info.effort == 1
    assert 0 < len(found) < 90 and asked == [900]


def test_search__texts_and_images_find_similar_images(qlip: Command, demo: Path) -> None:
    ran = qlip("search", demo, "a drawing of a frog", "-k", "3", "-o", "frog.png", "--json")
    assert ran.code == 0 and ran.err == ""
    report = ran.json
    assert report["query"] == {"text": "a drawing of a frog", "image": None, "like": None, "templates": None}
    assert report["searched"] == {"kind": "exact", "rows": 18, "effort": None, "recall": None}
    assert set(report["seconds"]) == {"open", "model", "query", "search", "rebuild"}
    scores = [one["score"] for one in report["results"]]
    assert scores == sorted(scores, reverse=True) and [one["rank"] for one in report["results"]] == [1, 2, 3]

    by_image = qlip("search", demo, "--image", CAT, "-k", "4", "--json").json
    best = by_image["results"][0]
    assert best["key"] == "cat" and best["score"] == pytest.approx(1, abs=1e-3) and best["label"] == "cat"
    assert best["captions"][0] == "the face of a tabby cat with green eyes" and best["token_bytes"] == 224
    by_key = qlip("search", demo, "--like", "cat", "-k", "3", "--json").json
    assert [one["key"] for one in by_key["results"]] == [one["key"] for one in by_image["results"][1:]]
    assert Path("results.png").exists() and by_key["output"] == "results.png"


def test_scores_are_the_models_own(qlip: Command, demo: Path, tokenizer: ImageCodec) -> None:
    """Against the model's forward pass on the text, and the mean over prompts."""
    matrix = TokenDataset(str(demo)).embeddings().astype(np.float32)
    for templates, prompts in ((None, ["a ship"]), ("prompts.txt", ["a photo of a ship.", "a drawing of a ship."])):
        Path("prompts.txt").write_text("a photo of a {}.\na drawing of a {}.\n")
        words = ["a ship"] if templates is None else ["ship"]
        extra = [] if templates is None else ["--templates", templates]
        found = qlip("search", demo, *words, "-k", "18", "--no-image", "--json", *extra).json
        with torch.inference_mode():
            vectors = tokenizer.model(input_ids=tokenizer.processor(text=prompts)["input_ids"]).text_embeds
        mean = torch.nn.functional.normalize(vectors.mean(0), dim=0).numpy()
        scores = {one["row"]: one["score"] for one in found["results"]}
        np.testing.assert_allclose([scores[row] for row in range(18)], matrix @ mean, atol=1e-5)
        assert found["output"] is None


def test_search__image_is_rebuilt_from_its_tokens(qlip: Command, demo: Path, tokenizer: ImageCodec) -> None:
    dataset, model = TokenDataset(str(demo), group_size=7), tokenizer.model
    images = decode_batch(dataset, [3, 0, 3], model, tokenizer.processor)
    whole = TokenDataset(str(demo))
    with torch.inference_mode():
        wanted = tokenizer.processor.to_images(model.decode(whole.batch([3, 0, 3])))
    assert [image.tobytes() for image in images] == [image.tobytes() for image in wanted]
    assert qlip("search", demo, "--like", "cat", "-k", "2", "-o", "sheet.png").code == 0
    sheet = Image.open("sheet.png").convert("RGB")
    hit = qlip("search", demo, "--like", "cat", "-k", "1", "--no-image", "--json").json["results"][0]
    shown = decode_batch(whole, [hit["row"]], model, tokenizer.processor)[0]
    large = shown.resize((contact_sheet.LARGE, contact_sheet.LARGE), Image.Resampling.NEAREST)
    assert _holds(sheet, large)
    qlip("search", demo, "--like", "cat", "-k", "2", "-o", "sheet.webp")
    assert Image.open("sheet.webp").format == "WEBP"


def _holds(sheet: Image.Image, image: Image.Image) -> bool:
    """Whether the image is somewhere on the sheet, pixel by pixel."""
    whole, part = np.asarray(sheet), np.asarray(image)
    corners = np.argwhere((whole[: -part.shape[0] + 1, : -part.shape[1] + 1] == part[0, 0]).all(-1))
    return any((whole[y : y + part.shape[0], x : x + part.shape[1]] == part).all() for y, x in corners)


def test_the_report_for_people(qlip: Command, demo: Path, tmp_path: Path) -> None:
    said = qlip("search", demo, "a cat", "-k", "2")
    lines = said.out.splitlines()
    assert lines[0].split() == ["score", "key", "part", "label", "caption"] and len(lines) == 6
    assert lines[-2] == "2 images of 18 rows, decoded in results.png"
    assert lines[-1].startswith("search ") and " ms (exact index); open " in lines[-1]
    assert said.err == ""
    flips = made(tmp_path / "flips", rows=6, views=Views(crops="flip"))
    scanned = qlip("search", flips.address, "--like", "000-0000", "-k", "2", "--no-image")
    assert "view" in scanned.out.splitlines()[0] and "(exact, all embeddings scanned)" in scanned.out
    assert scanned.error_lines == [
        f"no index, so all 18 embeddings are scanned; `qlip tokens index {flips.address}` makes searching faster"
    ]
    assert qlip("search", demo, "a cat", "--exact", "--no-image").error_lines == []


def test_indexing_from_the_command_line(qlip: Command, demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    made_now = qlip("tokens", "index", demo, "--kind", "hnsw", "--index", folder)
    first, head, row = made_now.out.splitlines()
    assert first.startswith(f"{folder}: hnsw, 18 embeddings of 128, ") and "made in" in first
    assert head.split()[:3] == ["efSearch", "recall@10,", "images"] and row.split() == [
        "16", "100.0%", "100.0%", row.split()[3], "in", "use",
    ]  # fmt: skip
    report = qlip("tokens", "index", demo, "--kind", "hnsw", "--index", folder, "--json").json
    assert report["made"] is False and report["kind"] == "hnsw" and report["recall"][0]["words"] == 1
    assert report["bytes"] == sum(path.stat().st_size for path in folder.glob("*.faiss"))
    before = (folder / HEAD).read_bytes()
    assert qlip("tokens", "index", demo, "--kind", "hnsw", "--index", folder, "--force", "--json").json["made"] is True
    assert (folder / HEAD).read_bytes() != before
    assert "ivf, 18" in qlip("tokens", "index", demo, "--kind", "ivf", "--index", folder).out
    found = qlip("search", demo, "--like", "cat", "--index", folder, "--no-image", "--json").json
    assert found["searched"]["kind"] == "ivf" and found["searched"]["recall"]["pictures"] == 1
    assert "up to date" in qlip("tokens", "index", demo).out


def test_recall_is_measured_without_words_where_the_model_is_not_here(qlip: Command, tmp_path: Path) -> None:
    layout = made(tmp_path / "dataset")
    ran = qlip("tokens", "index", layout.address, "--kind", "ivf")
    assert ran.code == 0 and len(ran.error_lines) == 1
    assert ran.error_lines[0].startswith("recall is measured with images only, not with texts: made up: ")
    assert ran.out.splitlines()[-1].split()[:3] == ["1", "100.0%", "-"]


def test_another_recall_is_measured_and_kept_and_the_index_is_not_made_again(qlip: Command, tmp_path: Path) -> None:
    address = made(tmp_path / "dataset", parts=2, rows=1000, embedding_dim=8, captions=False).address

    def index(*arguments: object) -> tuple[bool, bool, dict[int, float], int]:
        ran = qlip("tokens", "index", address, "--kind", "ivf", *arguments, "--json")
        assert ran.code == 0 and ran.error_lines == []
        report = ran.json
        assert json.loads((Path(address) / "index" / HEAD).read_text())["effort"] == report["effort"]
        recall = {one["effort"]: one["pictures"] for one in report["recall"]}
        return report["made"], report["measured"], recall, report["effort"]

    made_now, _, few, effort = index("--recall", 0.6)
    name = next((Path(address) / "index").glob("*.faiss")).name
    assert made_now and 0.6 <= few[effort] < 0.99
    assert index() == index("--recall", 0.6) == (False, False, few, effort)  # nothing else was asked for
    again, measured, more, further = index("--recall", 0.99)
    assert (again, measured) == (False, True) and further > effort and more[further] >= 0.99
    assert {one: more[one] for one in few} == few and all(share < 0.99 for one, share in more.items() if one < further)
    assert index() == index("--recall", 0.99) == (False, False, more, further)
    assert index("--recall", 0.6) == (False, True, few, effort)
    said = qlip("tokens", "index", address, "--kind", "ivf", "--recall", 1)
    assert "up to date, recall measured again" in said.out and said.err == ""
    assert "ivf" in qlip("tokens", "index", address).out  # of any kind: none was asked for
    assert next((Path(address) / "index").glob("*.faiss")).name == name


def test_words_of_the_dataset_are_different_ones_and_the_same_each_time(demo: Path, tmp_path: Path) -> None:
    words = sample_texts(TokenDataset(str(demo)), 10)
    assert len(set(words)) == 10 and words == sample_texts(TokenDataset(str(demo)), 10)
    assert "the face of a tabby cat with green eyes" in sample_texts(TokenDataset(str(demo)), 1000)
    assert sample_texts(TokenDataset(made(tmp_path / "mute", captions=False).address), 10) == []


def test_the_guides_python_runs(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "search.md").read_text(), re.DOTALL)
    (tmp_path / "tokens").symlink_to(demo)
    monkeypatch.chdir(tmp_path)
    exec(compile(program.replace("01007", "cat"), "docs/search.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all(line.endswith(" 224") and " cat cat" not in line for line in lines)


def test_the_benchmark_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And its made-up datasets are whole."""
    page = tmp_path / "search.md"
    page.write_text(f"before\n{benchmark.BEGIN}\nold\n{benchmark.END}\nafter\n")
    monkeypatch.setattr(benchmark, "PAGE", page)
    monkeypatch.setattr("sys.argv", ["search", "--tiny", "--rows", "300", "--dim", "8", "--queries", "2", "--write"])
    benchmark.main()
    written, shown = page.read_text(), capsys.readouterr().out
    assert written == f"before\n{benchmark.BEGIN}\n{shown}{benchmark.END}\nafter\n"
    rows = [line.split(" | ") for line in shown.splitlines() if line.startswith("| 300")]
    assert [row[1] for row in rows] == ["exact", "hnsw", "ivf", "none (scan)"]
    layout = benchmark.grown(tmp_path / "grown", np.eye(8, dtype=np.float32), 300)
    assert TokenDataset(layout.address)[0:300].shape == (300, 64, 4)
    lengths = np.linalg.norm(TokenDataset(layout.address).embeddings().astype(np.float32), axis=1)
    np.testing.assert_allclose(lengths, 1, atol=2e-3)


# -------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, 'nothing to search for; give one of: TEXT such as "a dog on a beach", --image FILE, --like KEY'),
        (["a cat", "--like", "cat"], 2, "nothing to search for; give one of"),
        (["  "], 2, "the text to search for is empty"),
        (["--like", "cat", "--templates", "cifar"], 2, "--templates needs a TEXT"),
        (["a cat", "-o", "sheet.xyz"], 2, "sheet.xyz: .xyz is not an image format that can be written"),
        (["a cat", "--templates", "nothing"], 1, "nothing"),
        (["--image", "missing.jpg"], 1, "missing.jpg: no such file"),
        (["--image", __file__], 1, "not an image that can be read"),
        (["--like", "dgo"], 1, "no image has the key 'dgo'; its first is 'astronaut'"),
        (["a cat", "--index", "nowhere"], 1, "nowhere: no index; make one with `qlip tokens index`"),
        (["a cat", "--index", "s3://bucket/index"], 1, "s3://bucket/index: an index is mapped into memory"),
        (["a cat", "--model", "no/where"], 1, "no/where"),
    ],
)
def test_a_question_that_makes_no_sense_is_one_line(
    qlip: Command, demo: Path, arguments: list[str], code: int, message: str
) -> None:
    ran = qlip("search", demo, *arguments)
    assert ran.code == code and ran.out == "" and len(ran.error_lines) == 1
    assert message in ran.error_lines[0]
    assert not Path("results.png").exists()


def test_datasets_that_cannot_be_searched(qlip: Command, tmp_path: Path) -> None:
    plain = made(tmp_path / "plain", embedding_dim=None).address
    for command in (["tokens", "index", plain], ["search", plain, "a cat"]):
        ran = qlip(*command)
        assert ran.code == 1 and ran.error_lines == [
            f"qlip: {plain}: has no embeddings; run `qlip tokenize` with --embeddings"
        ]
    assert "no token dataset" in qlip("search", tmp_path / "nothing", "a cat").err
    assert "choose one of auto, exact, hnsw, ivf" in qlip("tokens", "index", plain, "--kind", "tree").err
    made_up = made(tmp_path / "unknown").address
    lost = qlip("search", made_up, "a cat", "--exact")
    assert lost.code == 1 and "made up" in lost.err and "--model gives another name for it" in lost.error_lines[-1]


def test_a_stale_index_is_named_and_exact_goes_around_it(qlip: Command, tmp_path: Path) -> None:
    address = made(tmp_path / "grows").address
    assert qlip("tokens", "index", address).code == 0
    made(tmp_path / "grows", parts=4)
    stale = qlip("search", address, "--like", "000-0000", "--no-image")
    assert stale.code == 1 and stale.error_lines == [
        f"qlip: {address}/index: stale, the dataset changed since it was built (15 rows then, 20 now); "
        f"rebuild it with `qlip tokens index {address}`"
    ]
    assert qlip("search", address, "--like", "000-0000", "--no-image", "--exact").code == 0
    assert "made in" in qlip("tokens", "index", address).out
    assert qlip("search", address, "--like", "003-0000", "--no-image").code == 0


def test_a_model_that_does_not_fit_is_refused_by_what_differs(
    qlip: Command, demo: Path, tmp_path: Path, tokenizer: ImageCodec
) -> None:
    other = save_checkpoint(tmp_path / "other", seed=0)
    model, processor = QLIPModel.from_pretrained(other), QLIPProcessor.from_pretrained(other)
    info = TokenDataset(str(demo)).info
    for need, what in (
        (["text"], r"text 906ccd74fc85\) .*, which cannot compare with it"),
        (["decode"], r"decoder [0-9a-f]{12}\) .*, which cannot decode it"),
    ):
        pattern = what.replace("906ccd74fc85", (info.text_fingerprint or "")[:12])
        with pytest.raises(QLIPError, match=rf"made by another model \({info.model}, {pattern}; give the model"):
            check_model(info, str(demo), model, processor, "other", need)  # type: ignore[arg-type]
    # the same text tower before another encoder: words may be compared, images may not
    elsewhere = info.model_copy(update={"code_fingerprint": "0" * 64})
    fitting = (tokenizer.model, tokenizer.processor, tokenizer.name)
    check_model(elsewhere, "there", *fitting, ["text", "decode"])
    with pytest.raises(QLIPError, match="cannot compare images with it"):
        check_model(elsewhere, "there", *fitting, ["images"])
    ran = qlip("search", demo, "a cat", "--model", other)
    assert ran.code == 1 and len(ran.error_lines) == 1 and "made by another model" in ran.error_lines[0]
    # a search by key compares nothing: only rebuilding needs the model
    assert "cannot decode it" in qlip("search", demo, "--like", "cat", "--model", other).err
    assert qlip("search", demo, "--like", "cat", "--model", other, "--no-image").code == 0


def test_a_search_reads_no_more_than_it_needs(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an index, the embeddings' column of the dataset is not scanned."""
    searcher = Searcher(str(demo))
    vector = searcher.vectors.at(np.array([0]))[0]
    monkeypatch.setattr(Vectors, "blocks", lambda *arguments: pytest.fail("scanned"))
    assert len(searcher.search(vector, 3)) == 3


# -------------------------------------------------------------------- wrong arguments


def test_searcher__takes_any_vector_of_numbers_and_refuses_all_else(demo: Path) -> None:
    searcher = Searcher(str(demo), scan=True)
    vector = searcher.embedding(2)
    expected = [hit.number for hit in searcher.search(vector, 3)]
    for kind in (vector.astype(np.float64), vector.astype(np.float16), vector.tolist(), torch.tensor(vector).double()):
        assert [hit.number for hit in searcher.search(kind, 3)] == expected  # type: ignore[arg-type]
    nan = vector.copy()
    nan[5] = np.nan
    for wrong, said in (
        ("a dog", "a vector of 128 numbers, not str; embed a text with ImageCodec.embed_texts"),
        (None, "not NoneType"),
        (vector[:3], r"not an array of shape \(3,\)"),
        (vector[None], r"not an array of shape \(1, 128\)"),
        ({"a": 1}, "not dict"),
        (vector.astype(object), "not ndarray"),
        (nan, "the query has a value that is not finite, at 5"),
    ):
        with pytest.raises(QLIPError, match=said):
            searcher.search(wrong, 3)  # type: ignore[arg-type]
    for k in (0, -1, 2.0, "2", None):
        with pytest.raises(QLIPError, match="^k .*: give an integer, 1 or more"):
            searcher.search(vector, k)  # type: ignore[arg-type]
    for row in (-1, 10_000, "0", None):
        with pytest.raises(QLIPError, match="row"):
            searcher.embedding(row)  # type: ignore[arg-type]
    with pytest.raises(QLIPError, match="a key is a string, not int"):
        searcher.find(5)  # type: ignore[arg-type]


def test_searcher__an_embedding_of_nan_is_named_with_its_row_and_key(tmp_path: Path) -> None:
    layout = made(tmp_path / "tokens", parts=2, rows=5)
    path, info = Path(layout.part_path(1)), layout.read_info()
    rows = pq.read_table(path).to_pylist()
    rows[3]["embedding"][2] = float("nan")
    entry = layout.manifest()[1]
    layout.write_part(info, 1, entry.shard, entry.inputs, pa.Table.from_pylist(rows, arrow_schema(info)), entry.errors)
    layout.write_manifest(list(layout.finished().values()))
    searcher = Searcher(str(tmp_path / "tokens"))
    said = rf"part-00001\.parquet: row 3 \({rows[3]['key']}\): embedding not finite; tokenize it again"
    with pytest.raises(QLIPError, match=said):
        searcher.search(np.ones(searcher.vectors.dim), 2)
