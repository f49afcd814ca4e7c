"""Trained models of `qlip.vlm` as stock LLaVA: equal logits, prompts and pixels."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from qlip import QLIPError, QLIPProcessor
from qlip.cli.main import run as qlip
from qlip.hf.chat_template import jinja_of, template_fault
from qlip.hf.vlm import export_vlm
from qlip.lm.sampling import AnswerSettings
from qlip.lm.tokenizer import LLMTokenizer
from qlip.vlm.config import IMAGE_ID
from qlip.vlm.conversations import Conversation, Turn
from qlip.vlm.images import pixels_of, read_vlm_preprocessing
from qlip.vlm.model import VisionLanguageModel
from qlip.vlm.prompts import prompt_of
from qlip.vlm.templates import TEMPLATES
from tests.vlm.conftest import save_tokenizer, tiny

QUESTION = "What colour is the circle?"
WIDE = Image.effect_noise((90, 60), 80).convert("RGB")


def save_model(folder: Path, **changes: Any) -> VisionLanguageModel:
    """Write a tiny model with a tokenizer."""
    folder.mkdir()
    save_tokenizer(folder, [QUESTION, "dark blue"])
    model = tiny(LLMTokenizer.from_folder(folder).size, **{"pool": 1, **changes})
    model.save_pretrained(folder)
    QLIPProcessor(QLIPProcessor.from_pretrained("bundled").preprocessing).save_pretrained(folder)
    return model


@torch.no_grad()
@pytest.mark.parametrize(("template", "layer", "pad"), [("qa", -2, False), ("chatml", -1, True)])
def test_export_vlm__stock_llava_gives_our_logits(template: str, layer: int, pad: bool, tmp_path: Path) -> None:
    source, folder = tmp_path / "vlm", tmp_path / "llava"
    ours = save_model(source, template=template, layer=layer, pad_images=pad)
    assert qlip(["export", "--format", "transformers", "--llava", str(source), "-o", str(folder)]) == 0
    turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}
    processor = AutoProcessor.from_pretrained(folder)
    prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    given = dict(processor(images=WIDE, text=prompt, return_tensors="pt"))

    preprocessing = read_vlm_preprocessing(source, ours.config)
    pixels = pixels_of(WIDE, preprocessing, pad)[None]
    assert torch.equal(given["pixel_values"], pixels)
    conversation = Conversation("one", ("image",), (Turn("user", f"<image>\n{QUESTION}"),))
    ids = torch.tensor([prompt_of(conversation, TEMPLATES[template], LLMTokenizer.from_folder(source), 64)])
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    places = ids == IMAGE_ID
    assert torch.equal(given["input_ids"], ids.masked_fill(places, model.config.image_token_id))

    expected = ours.llm.logits(ours.llm.hidden(ours.embed(ids, pixels)))
    found = model(**given).logits
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected, rtol=1e-4, atol=1e-4)
    greedy = model.generate(**given, max_new_tokens=3, do_sample=False)
    assert greedy[0, ids.shape[1]] == expected[0, -1].argmax()
    assert "new (random" not in (folder / "README.md").read_text()


def test_export_vlm__answers_end_where_the_chat_ends_them(tmp_path: Path) -> None:
    save_model(tmp_path / "vlm", template="chatml")
    (tmp_path / "vlm" / "generation_config.json").write_text('{"eos_token_id": [5, 7], "max_new_tokens": 9}')
    export_vlm(tmp_path / "vlm", tmp_path / "llava")
    settings = AnswerSettings.from_folder(tmp_path / "llava")
    tokenizer = LLMTokenizer.from_folder(tmp_path / "vlm")
    assert set(settings.ends) == {tokenizer.eos, tokenizer.token("<|im_end|>"), 5, 7}
    assert settings.max_new_tokens == 9


def test_export_vlm__writes_beside_its_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders of temporary files are too small for a large text decoder."""
    save_model(tmp_path / "vlm")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "absent"))
    written = export_vlm(tmp_path / "vlm", tmp_path / "out" / "llava")
    assert set(written) == set((tmp_path / "out" / "llava").iterdir())
    assert all(path.is_file() for path in written) and len(list((tmp_path / "out").iterdir())) == 1


def test_export__names_the_files_that_it_wrote_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_model(tmp_path / "vlm")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for options in ([], ["--format", "transformers"], ["--format", "transformers", "--llava", str(tmp_path / "vlm")]):
        assert qlip(["export", *options, "-o", str(out), "--json"]) == 0
        written = {Path(path).name for path in json.loads(capsys.readouterr().out)["files"]}
        assert "config.json" in written and "notes.txt" not in written
    assert (out / "notes.txt").read_text() == "mine"


def test_export__a_template_that_is_no_jinja_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        template_fault("{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% break %}{% endfor %}")
        is None
    )
    (tmp_path / "bad.jinja").write_text("one\n{% for m in messages %}{{ m.content ")
    arguments = ["--llava", str(tmp_path), "--chat-template", str(tmp_path / "bad.jinja"), "-o", str(tmp_path / "out")]
    assert qlip(["export", "--format", "transformers", *arguments]) == 1
    assert "bad.jinja: not a Jinja template, line 2: unexpected end of template" in capsys.readouterr().err


@pytest.mark.parametrize("name", TEMPLATES)
def test_jinja__gives_the_text_of_training(name: str) -> None:
    from transformers.utils.chat_template_utils import _compile_jinja_template

    turns = [
        Turn("user", " <image>\nwhat is 'this'? "),
        Turn("assistant", "a {cat}"),
        Turn("user", "and <image> that?"),
    ]
    whole = [*turns, Turn("assistant", "")]
    if TEMPLATES[name].system:
        whole = [Turn("system", "be short"), *whole]
    conversation = Conversation("one", ("a", "b"), tuple(whole))
    messages = [{"role": turn.role, "content": [{"type": "text", "text": turn.text}]} for turn in whole]
    render = _compile_jinja_template(jinja_of(TEMPLATES[name], "<s>", "</s>")).render
    assert render(messages=messages) == TEMPLATES[name].render(conversation, "<s>", "</s>")
    asked = TEMPLATES[name].render(conversation, "<s>", "</s>").removesuffix(TEMPLATES[name].after)
    asked = asked.removesuffix(TEMPLATES[name].end.replace("{eos}", "</s>"))
    assert render(messages=messages[:-1], add_generation_prompt=True) == asked


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pool": 2}, "has one token per 2 x 2 patches, stock LLaVA one per patch"),
        ({"layer": "quantized"}, "reads features behind the quantizer"),
    ],
)
def test_export_vlm__refuses_what_stock_llava_cannot_hold(changes: Any, said: str, tmp_path: Path) -> None:
    save_model(tmp_path / "vlm", **changes)
    with pytest.raises(QLIPError, match=said):
        export_vlm(tmp_path / "vlm", tmp_path / "llava")
    assert not (tmp_path / "llava").exists()
