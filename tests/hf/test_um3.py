"""A UM3's export: the stock class behind the mask, and the remote code, draw what qlip draws."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from transformers.feature_extraction_utils import BatchFeature

from qlip.hf.um3 import CODE, EXAMPLE, export_um3
from qlip.lm.guidance import Constant
from qlip.lm.sampling import Sampling, draw_from, uniforms
from qlip.um3.generate import SAMPLING, generate
from qlip.um3.session import UM3Chat
from tests.um3.chats import save_um3

GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module", params=["Qwen3, shared rows", "Llama, rows per group"])
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, llama = tmp_path_factory.mktemp("export"), request.param.startswith("Llama")
    save_um3(folder / "own", rows="per_group" if llama else "shared", qk_norm=not llama)
    export_um3(folder / "own", folder / "um3")
    return folder / "um3"


@pytest.fixture(scope="module")
def chat(exported: Path) -> UM3Chat:
    """The exported folder, as qlip reads it."""
    return UM3Chat.from_pretrained(exported, device="cpu")


@pytest.fixture(scope="module")
def remote(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        return AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True).eval()


def example(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("example", folder / EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("sampled", [False, True])
def test_export_um3__stock_class_behind_the_example_mask_draws_the_same_ids(
    exported: Path, chat: UM3Chat, sampled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=False).eval()
    assert type(model).__module__.startswith("transformers.")
    config = chat.model.config
    prompt, new = [*chat.encode("a red circle"), config.begin_image], 2 * config.image_length + 30
    expected = generate(chat.model, [prompt], max_tokens=new, sampling=SAMPLING if sampled else GREEDY, seed=0)[0]
    if sampled:
        noise = iter(uniforms(0, [0], new, 1)[0, :, 0])
        monkeypatch.setattr(torch, "multinomial", lambda p, **_: draw_from(p, next(noise)[None])[:, None])
    allowed, _, _ = example(exported).prefix_allowed_tokens_fn(exported, len(prompt) + new)
    options = {"do_sample": sampled, "top_k": 0, **({"temperature": 1.0, "top_p": 0.95} if sampled else {})}
    found = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=new,
        prefix_allowed_tokens_fn=allowed,
        **options,
    )
    assert found[0, len(prompt) :].tolist() == expected
    assert config.end_image in expected and len(expected) > config.image_length + 1


def test_export_um3__remote_code_draws_reads_and_interleaves(exported: Path, chat: UM3Chat, remote: Any) -> None:
    assert remote.output_modalities == ("text", "image")
    processor = AutoProcessor.from_pretrained(exported, trust_remote_code=True)
    inputs = processor(text=["a red circle", "a"], return_tensors="pt")
    assert isinstance(inputs, BatchFeature)
    options = {"do_sample": False, "temperature": None, "top_p": None}
    ids = remote.generate(**inputs, generation_mode="image", **options)
    expected = generate(
        chat.model, [chat.encode("a red circle"), chat.encode("a")], generation_mode="image", sampling=GREEDY
    )
    assert ids.tolist() == [one[:-1] for one in expected]
    images = processor.post_process_multimodal_output(remote.decode_image_tokens(ids), generation_mode="image")
    for image, ours in zip(images, chat.decode_image_tokens(ids), strict=True):
        assert isinstance(image, Image.Image) and image.tobytes() == ours.tobytes()
    inputs = processor(images=images[0], text="red", return_tensors="pt")
    found = remote.generate(**inputs, generation_mode="text", max_new_tokens=5, **options)
    prompt = chat.encode([images[0], "red"])
    assert found[0, : len(prompt)].tolist() == prompt
    [new] = generate(chat.model, [prompt], generation_mode="text", max_tokens=5, sampling=GREEDY)
    assert found[0, len(prompt) :].tolist() == new
    texts = processor.post_process_multimodal_output(found, generation_mode="text")  # without the image's ids
    assert texts == ["red" + "".join(part for part in chat.decode(new) if isinstance(part, str))]
    length = chat.model.config.image_length + 20
    inputs = processor(text="a", return_tensors="pt")
    found = remote.generate(**inputs, generation_mode="interleaved", max_new_tokens=length, **options)
    [new] = generate(chat.model, [chat.encode("a")], max_tokens=length, sampling=GREEDY)
    assert found[0, len(chat.encode("a")) :].tolist() == new
    for text in ("a red circle", "blue", "colour", "square"):  # by default there is room for an image, and for text
        [new] = generate(chat.model, [chat.encode(text)], sampling=GREEDY)
        if chat.model.config.end_image in new:
            break
    inputs = processor(text=text, return_tensors="pt")
    found = remote.generate(**inputs, generation_mode="interleaved", **options)
    assert found[0, len(chat.encode(text)) :].tolist() == new and chat.model.config.end_image in new


def test_export_um3__remote_code_refuses_what_cannot_hold_an_image(chat: UM3Chat, remote: Any) -> None:
    ids = torch.tensor([chat.encode("a red circle")])
    for mode in ("image", "interleaved"):
        with pytest.raises(ValueError, match=f"max_new_tokens 10: an image has {chat.model.config.image_length} ids"):
            remote.generate(ids, generation_mode=mode, max_new_tokens=10)
    long = torch.full((1, chat.model.config.decoder.length), 5)
    with pytest.raises(ValueError, match="leave no room for an image; shorten the prompt"):
        remote.generate(long, generation_mode="image")


def test_export_um3__remote_code_guides(exported: Path, chat: UM3Chat, remote: Any) -> None:
    prompt = chat.encode("a red circle")
    found = remote.generate(
        torch.tensor([prompt]),
        generation_mode="image",
        guidance_scale=2.5,
        do_sample=False,
        temperature=None,
        top_p=None,
    )
    [expected] = generate(chat.model, [prompt], generation_mode="image", sampling=GREEDY, guidance=Constant(2.5))
    assert found[0].tolist() == expected[:-1]


def test_export_um3__folder_says_that_modalities_mix(exported: Path) -> None:
    card = (exported / "README.md").read_text(encoding="utf-8")
    assert "**A stock class does not know which ids may follow which: without a mask it mixes" in card
    assert "import qlip" not in (exported / CODE).read_text(encoding="utf-8")
    assert AutoTokenizer.from_pretrained(exported).padding_side == "left"


def test_export_um3__example_runs(exported: Path, chat: UM3Chat, capsys: pytest.CaptureFixture[str]) -> None:
    example(exported).main(str(exported), "a red circle")
    ids = json.loads(capsys.readouterr().out)
    [image] = chat.decode_image_tokens(torch.tensor([ids]))  # whole, and of visual ids alone
    assert image.size == (64, 64)


def test_export_um3__saved_again_it_still_draws(remote: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remote.save_pretrained(tmp_path / "again")
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", trust_remote_code=True)
    ids = torch.tensor([[300, 9, 30]]).remainder(remote.um3.text_vocab_size - 10)
    drawn = [one.generate(ids, generation_mode="image", do_sample=False) for one in (remote, again)]
    assert torch.equal(*drawn)
    first, second = (one.decode_image_tokens(drawn[0])[0].tobytes() for one in (remote, again))
    assert first == second
