"""What shows and names images: reconstruct, classify, embed, info, demo."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlip import QLIPModel, QLIPProcessor, assets
from qlip.cli.image import contact_sheet as pictures
from qlip.evaluation.metrics.pixel import image_psnr
from qlip.tokens import Fit, ImageCodec
from tests.cli.conftest import SIDE, TOKEN_BYTES, WIDTH, Command, picture


def test_reconstruct_measures_what_it_shows(qlip: Command, model: Path, photos: Path) -> None:
    ran = qlip("reconstruct", photos, "-o", "grid.png", "-m", model, "--json")
    assert (ran.code, ran.err) == (0, "")
    assert Image.open("grid.png").format == "PNG"
    loaded, processor = QLIPModel.from_pretrained(model), QLIPProcessor.from_pretrained(model)
    for row, path in zip(ran.json["results"], ["cat.png", "dog.jpg", "sea/ship.webp"], strict=True):
        pixels = processor(images=photos / path)["pixel_values"]
        seen = np.asarray(processor.to_images(pixels)[0], float)
        rebuilt = np.asarray(processor.to_images(loaded.decode(loaded.encode(pixels)))[0], float)
        psnr = 10 * np.log10(255**2 / ((seen - rebuilt) ** 2).mean())
        assert row["psnr"] == pytest.approx(psnr, abs=0.01)
        assert (row["token_bytes"], row["size"], row["tiles"]) == (TOKEN_BYTES, [SIDE, SIDE], 1)


def test_reconstruct_into_a_folder(qlip: Command, model: Path, photos: Path) -> None:
    ran = qlip("reconstruct", photos, "-o", "shown", "-m", model)
    assert ran.code == 0
    assert sorted(str(path) for path in Path("shown").rglob("*.png")) == [
        "shown/cat.png",
        "shown/dog.png",
        "shown/sea/ship.png",
    ]
    assert "3 pictures in shown" in ran.out


def test_tiles_cut_and_join_a_larger_picture(qlip: Command, model: Path, photos: Path) -> None:
    picture(photos / "wide.png", (100, 70), seed=6)
    ran = qlip("reconstruct", photos / "wide.png", "-o", "t.png", "--tiles", "--batch-size", 4, "-m", model, "--json")
    (row,) = ran.json["results"]
    assert (row["size"], row["tiles"], row["token_bytes"]) == ([96, 64], 6, 6 * TOKEN_BYTES)
    assert qlip("encode", photos / "wide.png", "--tiles", "-m", model).code == 0
    assert qlip("decode", "wide.qlip", "-m", model).code == 0
    rebuilt = Image.open("wide.png").convert("RGB")
    codec = ImageCodec.from_pretrained(model, device="cpu")
    [again] = codec.decode(codec.encode([photos / "wide.png"], fit="tiles"))
    assert np.array_equal(np.asarray(rebuilt), np.asarray(again))
    whole = codec.prepare(photos / "wide.png", Fit("tiles")).image
    assert row["psnr"] == round(image_psnr(whole, rebuilt), 3)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-o", "grid.xyz"), "grid.xyz: .xyz is no picture format to write; use .png, .jpg or .webp"),
        (("--tiles", "--fit", "keep-aspect"), "--tiles and --fit keep-aspect exclude each other; give one"),
    ],
)
def test_reconstruct_typed_wrong(
    qlip: Command, model: Path, photos: Path, arguments: tuple[str, ...], said: str
) -> None:
    ran = qlip("reconstruct", photos, "-m", model, *arguments)
    assert (ran.code, ran.error_lines) == (2, [f"qlip: {said}"])


def test_a_grid_shows_the_pictures_and_their_difference_pixel_for_pixel() -> None:
    original = Image.new("RGB", (8, 8), (100, 50, 0))
    rebuilt = Image.new("RGB", (8, 8), (90, 70, 100))
    exhibit = pictures.comparison(original, rebuilt, "Ünï€ode name that is longer than its cell " * 3, "1.0 dB")
    assert exhibit.panels[2][1].getpixel((0, 0)) == (40, 80, 255)
    sheet = pictures.draw([exhibit])
    colours = {colour: count for count, colour in sheet.getcolors(1 << 20) or []}
    factor = 384 // 8
    assert colours[(100, 50, 0)] == colours[(90, 70, 100)] == colours[(40, 80, 255)] == (8 * factor) ** 2


def test_classify_ranks_by_cosine_with_averaged_prompts(qlip: Command, model: Path, photos: Path) -> None:
    Path("prompts.txt").write_text("a photo of a {}.\nmy {}\n")
    labels = ["cat", "dog", "fire truck"]
    ran = qlip(
        "classify", photos, "--labels", "cat, dog,fire truck,", "--templates", "prompts.txt", "-m", model, "--json"
    )
    assert ran.code == 0
    loaded, processor = QLIPModel.from_pretrained(model), QLIPProcessor.from_pretrained(model)
    with torch.no_grad():
        vectors = []
        for label in labels:
            words = processor(text=[f"a photo of a {label}.", f"my {label}"])
            features = loaded.get_text_features(words["input_ids"], words["attention_mask"])
            vectors.append(torch.nn.functional.normalize(features, dim=-1).mean(0))
        classes = torch.nn.functional.normalize(torch.stack(vectors), dim=-1)
        image = loaded.get_image_features(processor(images=photos / "cat.png")["pixel_values"])
        cosines = classes @ torch.nn.functional.normalize(image, dim=-1)[0]
        shares = (cosines * loaded.logit_scale.exp()).softmax(0)
    first = ran.json["results"][0]["labels"]
    assert [entry["label"] for entry in first] == [labels[i] for i in shares.argsort(descending=True)]
    assert [entry["probability"] for entry in first] == pytest.approx(sorted(shares.tolist(), reverse=True), abs=1e-4)
    assert sum(entry["probability"] for entry in first) == pytest.approx(1, abs=1e-4)


def test_classify_with_the_packages_prompts(qlip: Command, model: Path, photos: Path) -> None:
    shares = []
    for templates in ("cifar", "imagenet", "none"):
        ran = qlip("classify", photos / "cat.png", "-l", "cat,dog", "--templates", templates, "-m", model, "--json")
        shares.append(ran.json["results"][0]["labels"][0]["probability"])
    assert len(set(shares)) == 3
    ran = qlip("classify", photos / "cat.png", "-l", "cat,dog", "--templates", "cifarr", "-m", model)
    assert ran.code == 1 and len(ran.error_lines) == 1 and "cifarr" in ran.err


def test_classify_prints_the_best_and_the_next(qlip: Command, model: Path, photos: Path) -> None:
    Path("labels.txt").write_text("cat\ndog\n\nship\n")
    ran = qlip(
        "classify", photos / "cat.png", "--labels-file", "labels.txt", "--top", 2, "--templates", "none", "-m", model
    )
    assert ran.code == 0
    heading, line = ran.out.rstrip().splitlines()
    assert "looks like" in heading and line.count("%") == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "give the labels"),
        (("--labels", " , "), "no label given"),
        (("--labels-file", "missing.txt"), "missing.txt: cannot be read"),
        (("--labels", "a", "--labels-file", "b"), "give the labels, either"),
    ],
)
def test_classify_without_usable_labels(
    qlip: Command, model: Path, photos: Path, arguments: tuple[str, ...], said: str
) -> None:
    ran = qlip("classify", photos, "-m", model, *arguments)
    assert ran.code == 2 and said in ran.err and len(ran.error_lines) == 1


def test_embed_pictures_and_words(qlip: Command, model: Path, photos: Path) -> None:
    ran = qlip("embed", photos, "--text", "a cat", "-t", "a dog", "-o", "e.npy", "-m", model, "--json")
    assert ran.code == 0 and ran.json["shape"] == [5, WIDTH]
    assert [(row["row"], row["kind"]) for row in ran.json["results"]] == [
        (0, "image"),
        (1, "image"),
        (2, "image"),
        (3, "text"),
        (4, "text"),
    ]
    vectors = np.load("e.npy", allow_pickle=False)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(5), abs=1e-5)
    loaded, processor = QLIPModel.from_pretrained(model), QLIPProcessor.from_pretrained(model)
    with torch.no_grad():
        output = loaded(**processor(images=photos / "sea/ship.webp", text="a dog"))
    assert output.image_embeds is not None and output.text_embeds is not None
    assert vectors[2] == pytest.approx(output.image_embeds[0].numpy(), abs=1e-5)
    assert vectors[4] == pytest.approx(output.text_embeds[0].numpy(), abs=1e-5)


def test_embed_to_parquet(qlip: Command, model: Path, photos: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    assert qlip("embed", photos, "-t", "a cat", "-o", "e.parquet", "-m", model).code == 0
    table = parquet.read_table("e.parquet")
    assert table.column_names == ["kind", "input", "embedding"]
    assert table["kind"].to_pylist() == ["image"] * 3 + ["text"]
    qlip("embed", photos, "-t", "a cat", "-o", "e.npy", "-m", model)
    assert np.array(table["embedding"].to_pylist(), np.float32) == pytest.approx(np.load("e.npy"), abs=1e-6)


def test_embed_typed_wrong(qlip: Command, photos: Path) -> None:
    assert "nothing to embed" in qlip("embed").err
    ran = qlip("embed", photos, "-o", "e.csv")
    assert ran.code == 2 and ran.error_lines == ["qlip: e.csv: must end in .npy or .parquet"]


def test_info_on_a_model(qlip: Command, model: Path) -> None:
    report = qlip("info", model, "--json").json
    loaded = QLIPModel.from_pretrained(model)
    parts = ("encoder", "quantizer", "decoder", "text")
    assert report["parameters"] == sum(parameter.numel() for parameter in loaded.parameters())
    assert report["parameters"] == sum(report[f"{part}_parameters"] for part in parts)
    assert (report["tokens"], report["bits_per_token"], report["token_bytes"]) == (16, 20, TOKEN_BYTES)
    assert report["code_fingerprint"] == loaded.code_fingerprint


def test_info_on_a_published_name_fetches_nothing(qlip: Command) -> None:
    report = qlip("info", "QLIP-B-16-256", "--json").json
    assert report["parameters"] == 239_434_013
    assert (report["tokens"], report["compression"]) == (256, 219.4)


def test_info_on_a_token_file(qlip: Command, model: Path, photos: Path) -> None:
    qlip("encode", photos / "dog.jpg", "-m", model)
    report = qlip("info", "dog.qlip", "--json").json
    assert report["original_size"] == [64, 48] and report["grid"] == [4, 4]
    assert report["token_bytes"] == TOKEN_BYTES
    table = qlip("info", "dog.qlip")
    assert table.code == 0 and report["decoder_fingerprint"] in table.out


def test_demo_goes_the_whole_way(qlip: Command, model: Path) -> None:
    ran = qlip("demo", "-m", model)
    assert (ran.code, ran.err) == (0, "")
    folder = assets.path("images")
    names = {path.stem for path in folder.glob("*.jpg")} | {
        f"{path.stem}-drawn" for path in folder.glob("drawings/*.png")
    }
    assert {path.stem for path in Path("demo").glob("*.qlip")} == names
    assert Image.open("demo/demo.png").width > 500
    assert ran.out.splitlines()[-1].startswith("Look at demo/demo.png, then try your own: ")
    assert qlip("decode", "demo", "-o", "again", "-m", model).code == 0
    rebuilt, again = (np.asarray(Image.open(Path(folder) / "cat.png"), int) for folder in ("demo", "again"))
    assert np.abs(rebuilt - again).max() <= 1
