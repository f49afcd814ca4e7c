"""`Drawer`: diffusers' call, its steps, its settings, and prompts that cannot be drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qlip import QLIPError
from qlip.errors import QLIPWarning
from qlip.lm.guidance import Constant
from qlip.lm.text_encoders import open_text_encoder
from qlip.t2i import Drawer, DrawSettings
from qlip.tokens import ImageCodec
from tests.t2i.conftest import tiny


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_drawer__several_images_of_each_prompt(drawer: Drawer) -> None:
    out = drawer(["a red circle", "a cat"], num_images_per_prompt=2, generator=seeded())
    assert [image.size for image in out.images] == [(64, 64)] * 4 and out.indices.shape == (4, 64, 4)
    again = drawer(["a red circle", "a cat"], num_images_per_prompt=2, generator=seeded())
    assert torch.equal(again.indices, out.indices)
    other = drawer(["a red circle", "a cat"], num_images_per_prompt=2, generator=seeded(1))
    assert not torch.equal(other.indices, out.indices)
    assert len({one.tobytes() for one in out.indices.numpy()}) == 4


def test_drawer__an_image_depends_on_prompt_seed_and_number_alone(drawer: Drawer) -> None:
    together = drawer.draw(drawer.condition(["a red circle", "a cat", "a dog"]), seed=5, numbers=[7, 8, 9])
    for number, prompt in enumerate(["a red circle", "a cat", "a dog"]):
        alone = drawer.draw(drawer.condition([prompt]), seed=5, numbers=[7 + number])
        assert torch.equal(alone[0], together[number])


def test_drawer__more_images_than_one_batch(drawer: Drawer, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = drawer("a cat", num_images_per_prompt=5, negative_prompt="a dog", generator=seeded()).indices
    monkeypatch.setattr(Drawer, "AT_ONCE", 2)
    parts = drawer("a cat", num_images_per_prompt=5, negative_prompt="a dog", generator=seeded()).indices
    assert torch.equal(parts, whole)


def test_drawer__reads_the_negative_prompt_of_all_prompts_once(drawer: Drawer, monkeypatch: pytest.MonkeyPatch) -> None:
    each = drawer(["a cat", "a red circle"], negative_prompt=["a dog"] * 2, generator=seeded()).indices
    prompts, read = drawer.prompts, []
    monkeypatch.setattr(drawer, "prompts", lambda texts: read.append(texts) or prompts(texts))
    once = drawer(["a cat", "a red circle"], negative_prompt="a dog", generator=seeded()).indices
    assert torch.equal(once, each) and read == [["a cat", "a red circle"], ["a dog"]]


def test_drawer__a_generator_per_image(drawer: Drawer) -> None:
    pair = drawer("a cat", num_images_per_prompt=2, generator=[seeded(1), seeded(2)]).indices
    turned = drawer("a cat", num_images_per_prompt=2, generator=[seeded(2), seeded(1)]).indices
    assert torch.equal(pair, turned.flip(0))
    with pytest.raises(QLIPError, match="3 generators for 2 images"):
        drawer("a cat", num_images_per_prompt=2, generator=[seeded()] * 3)


def test_drawer__types_of_output(drawer: Drawer) -> None:
    [images] = drawer("a cat", generator=seeded(), output_type="pt", return_dict=False)
    assert images.shape == (1, 3, 64, 64) and float(images.min()) >= 0 and float(images.max()) <= 1
    array: Any = drawer("a cat", generator=seeded(), output_type="np").images
    np.testing.assert_array_equal(array, images.permute(0, 2, 3, 1).numpy())
    pil: Any = drawer("a cat", generator=seeded()).images
    np.testing.assert_allclose(np.asarray(pil[0]), 255 * array[0], atol=0.51)
    with pytest.raises(QLIPError, match="pil, np or pt"):
        drawer("a cat", output_type="latent")  # type: ignore[arg-type]


def test_drawer__guidance_and_negative_prompt_change_what_is_drawn(drawer: Drawer) -> None:
    plain = drawer("a cat", guidance_scale=1, generator=seeded()).indices
    guided = drawer("a cat", guidance_scale=4, generator=seeded()).indices
    away = drawer("a cat", guidance_scale=4, negative_prompt="a dog", generator=seeded()).indices
    assert not torch.equal(plain, guided) and not torch.equal(guided, away)
    assert torch.equal(drawer("a cat", negative_prompt="a dog", guidance_scale=1, generator=seeded()).indices, plain)
    own = drawer("a cat", generator=seeded()).indices
    assert torch.equal(own, drawer("a cat", guidance_scale=Constant(2.0), generator=seeded()).indices)
    # away from itself: both branches are equal
    same = drawer("a cat", guidance_scale=4, negative_prompt="a cat", generator=seeded()).indices
    assert torch.equal(same, plain)
    with pytest.raises(QLIPError, match="2 negative prompts for 1 prompts"):
        drawer("a cat", negative_prompt=["a", "b"])


def test_drawer__callback_sees_each_step(drawer: Drawer) -> None:
    seen: list[tuple[int, int]] = []

    def callback(its: Drawer, step: int, timestep: int, values: dict[str, Any]) -> dict[str, Any]:
        assert its is drawer and step == timestep
        seen.append((step, values["indices"].shape[1]))
        return values

    drawer("a cat", callback_on_step_end=callback)
    assert seen == [(step, step + 1) for step in range(64)]


def test_drawer__rows_so_far_are_a_shorter_image(drawer: Drawer) -> None:
    indices = drawer("a cat", generator=seeded()).indices
    assert drawer.images(indices[:, :24], rows=3)[0].size == (64, 24)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "empty prompt"),
        (" \n", "empty prompt"),
        ("красный круг", "have no а"),
        ("赤い丸", "have no"),
        ("a red circle and " * 12, "22 word pieces"),
        (7, "give a string"),
    ],
)
def test_drawer__prompts_that_cannot_be_drawn(drawer: Drawer, prompt: Any, message: str) -> None:
    with pytest.raises(QLIPError, match=message):
        drawer.condition(["a cat", prompt])


def test_drawer__one_prompt_is_no_list_of_letters(drawer: Drawer) -> None:
    assert torch.equal(drawer.condition("cat").values, drawer.condition(["cat"]).values)


@pytest.mark.parametrize("scale", ["3", np.float32(3), torch.tensor(3.0).item(), Constant(3)])
def test_drawer__guidance_as_any_number_or_short_form(drawer: Drawer, scale: Any) -> None:
    drawn = drawer("a cat", guidance_scale=scale, generator=seeded()).indices
    assert torch.equal(drawn, drawer("a cat", guidance_scale=3, generator=seeded()).indices)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt": None}, "prompt None: give a string, or several"),
        ({"negative_prompt": 3}, "negative_prompt 3: give a string, or several"),
        ({"generator": 42}, "generator 42: give a torch.Generator, or a list"),
        ({"generator": [42]}, r"generator \[42\]: give a torch.Generator, or a list"),
        ({"guidance_scale": "much"}, "guidance 'much': give a number"),
        ({"guidance_scale": [2]}, r"guidance '\[2\]': give a number"),
        ({"guidance_scale": True}, "guidance 'True': give a number"),
        ({"guidance_scale": float("nan")}, "value nan: give a number"),
    ],
)
def test_drawer__arguments_of_other_types(drawer: Drawer, options: dict[str, Any], message: str) -> None:
    with pytest.raises(QLIPError, match=message):
        drawer(**{"prompt": "a cat"} | options)


def test_drawer__names_of_diffusers_and_a_revision_of_its_own(
    drawer_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []
    load = ImageCodec.from_pretrained

    def from_pretrained(name: Any, **options: Any) -> ImageCodec:
        given.append(options)
        return load(name, **options)

    monkeypatch.setattr(ImageCodec, "from_pretrained", from_pretrained)
    loaded = Drawer.from_pretrained(drawer_folder, revision="v2", torch_dtype=torch.bfloat16, device_map="cpu")
    assert loaded.decoder.dtype == torch.bfloat16 and loaded.decoder.device.type == "cpu"
    assert [options.keys() & {"revision"} for options in given] == [set()]


def test_drawer__conditions_are_on_the_decoders_device(drawer: Drawer) -> None:
    elsewhere = Drawer(tiny().to("meta"), drawer.codec, drawer.prompts, drawer.settings, "elsewhere")
    assert elsewhere.condition(["a cat"]).rows([0, 0]).values.is_meta


def test_drawer__classes_by_name_or_number(tmp_path: Path) -> None:
    for name, classes in (("named", ("cat", "dog", "ship")), ("numbered", None)):
        tiny("class", classes=classes).save_pretrained(tmp_path / name)
    named = Drawer.from_pretrained(tmp_path / "named", device="cpu")
    assert named.condition(["ship", "cat"]).values.tolist() == [2, 0]
    with pytest.raises(QLIPError, match="did you mean 'ship'.*cat, dog, ship"):
        named.condition(["shp"])
    assert Drawer.from_pretrained(tmp_path / "numbered", device="cpu").condition(["2"]).values.tolist() == [2]


def test_drawer__reads_prompts_with_its_text_encoder(tmp_path: Path) -> None:
    encoder = open_text_encoder("qlip:bundled")
    sizes = {"condition_size": encoder.size, "prefix_length": encoder.length, "text_encoder": "qlip:bundled"}
    tiny("features", **sizes, text_fingerprint=encoder.fingerprint).save_pretrained(tmp_path / "drawer")
    drawer = Drawer.from_pretrained(tmp_path / "drawer", device="cpu")
    condition = drawer.condition(["a cat"])
    assert torch.equal(condition.values, encoder.features(["a cat"])[0])
    assert drawer("a cat", guidance_scale=2).images[0].size == (64, 64)
    with pytest.raises(QLIPError, match="prompt '赤い丸': .* have no"):
        drawer.condition(["赤い丸"])
    with pytest.warns(QLIPWarning, match="prompt 'a red circle and .*its end has no effect"):
        drawer.condition(["a cat", "a red circle and " * 12])
    for changes, message in (
        ({"text_fingerprint": "0" * 64}, "another text encoder"),
        ({"text_encoder": None, "text_fingerprint": None}, "names no text encoder"),
        ({"condition_size": 64, "text_fingerprint": None}, "24 positions of 128 features"),
    ):
        tiny("features", **sizes | changes).save_pretrained(tmp_path / "other")
        with pytest.raises(QLIPError, match=message):
            Drawer.from_pretrained(tmp_path / "other", device="cpu")


def test_drawer__another_tokenizer_is_refused(tmp_path: Path) -> None:
    tiny("class", code_fingerprint="0" * 64).save_pretrained(tmp_path)
    with pytest.raises(QLIPError, match="another tokenizer"):
        Drawer.from_pretrained(tmp_path, device="cpu")


def test_drawer__a_folder_without_its_vocabulary(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    with pytest.raises(QLIPError, match="no vocabulary"):
        Drawer.from_pretrained(tmp_path, device="cpu")


def test_settings__kept_in_the_folder(tmp_path: Path) -> None:
    settings = DrawSettings(guidance="power:4:2.5", temperature=0.9, top_k=40, tokenizer="someone/model")
    settings.save(tmp_path)
    assert DrawSettings.from_folder(tmp_path) == settings
    assert DrawSettings.from_folder(tmp_path / "none") == DrawSettings()
    (tmp_path / "generation_config.json").write_text('{"guidance": 3.5}')  # as a person writes it
    assert DrawSettings.from_folder(tmp_path).guidance == "3.5"
    for broken in (
        {"guidance": "much"},
        {"guidance": float("nan")},
        {"guidance": True},
        {"temperature": -1},
        {"top_k": "x"},
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps(broken))
        with pytest.raises(QLIPError, match=r"generation_config\.json"):
            DrawSettings.from_folder(tmp_path)
