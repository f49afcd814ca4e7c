"""Nine entry points of transformers, with the classes of `qlip.hf` registered and with remote code alone: our numbers.

`make test-transformers4` runs this file in an environment with transformers 4.57.6.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from qlip import QLIPError, QLIPModel, assets
from qlip.cli.main import run as qlip
from qlip.hf.remote_code import FILE, remote_code
from tests.hf import entry_points
from tests.hf.entry_points import WAYS, Found, Ways

TEMPLATE = (
    "{% for turn in messages %}{{ turn['role'] + ': ' + turn['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def save_tokenizer(folder: Path, **settings: Any) -> int:
    """Write a byte-level tokenizer with a limit on its length; return its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["what is this"],
        trainers.BpeTrainer(
            vocab_size=270, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.enable_truncation(24)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "tokenizer_class": "LlamaTokenizer"} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return tokenizer.get_vocab_size()


@pytest.fixture(scope="session")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama, its output layer apart from its embeddings, without a row for an image token."""
    folder = tmp_path_factory.mktemp("llama")
    size = save_tokenizer(folder, chat_template=TEMPLATE)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=size, num_key_value_heads=1, bos_token_id=0, eos_token_id=1, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tokenizer"
    assert qlip(["export", "--format", "transformers", "-o", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def llava(language: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "llava"
    assert qlip(["export", "--format", "transformers", "--llava", str(language), "-o", str(folder)]) == 0
    return folder


@pytest.fixture(scope="session")
def ways(folder: Path, llava: Path, images: list[Image.Image], tmp_path_factory: pytest.TempPathFactory) -> Ways:
    """The ways where `qlip.hf` is imported; they take no `trust_remote_code`."""
    import qlip.hf  # noqa: F401

    return Ways(str(folder), str(llava), tmp_path_factory.mktemp("ways"), images, trust=None)


@pytest.fixture(scope="session")
def without_qlip(folder: Path, llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of a process in which this package cannot be imported."""
    work = tmp_path_factory.mktemp("without-qlip")
    images = sorted(assets.path("images").glob("*.jpg"))[:3]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules")}
    command = [sys.executable, entry_points.__file__, str(folder), str(llava), str(work), *map(str, images)]
    ran = subprocess.run(
        command, capture_output=True, text=True, check=False, env=environment, stdin=subprocess.DEVNULL
    )
    assert ran.returncode == 0, ran.stderr
    return work


@pytest.fixture(scope="session")
@torch.no_grad()
def expected(ours: QLIPModel, inputs: dict[str, Tensor], language: Path, llava: Path) -> dict[str, Found]:
    """What each way must give, computed by our model and the text decoder alone."""
    whole = ours(**inputs)
    names = "logits_per_image logits_per_text image_embeds text_embeds reconstructions indices".split()

    tokenizer = Tokenizer.from_file(str(language / "tokenizer.json"))
    tokenizer.no_truncation()
    size = tokenizer.get_vocab_size()
    before, after = tokenizer.encode("user: ").ids, tokenizer.encode("\nwhat is this</s>assistant:").ids
    ids = torch.tensor([*before, *[size] * 64, *after])
    projector = {
        name.removeprefix("model.multi_modal_projector."): value
        for name, value in load_file(sorted(llava.glob("*.safetensors"))[-1]).items()
        if "projector" in name
    }
    features = ours.get_patch_features(inputs["pixel_values"][:1])[0]
    for layer in ("linear_1", "linear_2"):
        features = features if layer == "linear_1" else torch.nn.functional.gelu(features)
        features = torch.nn.functional.linear(features, projector[f"{layer}.weight"], projector[f"{layer}.bias"])
    decoder = LlamaForCausalLM.from_pretrained(language)
    table = decoder.get_input_embeddings().weight
    start = torch.cat((table[before], features, table[after]))[None]
    answer = decoder.generate(inputs_embeds=start, attention_mask=torch.ones(start.shape[:2]), **entry_points.GREEDY)
    logits = decoder(inputs_embeds=start).logits
    return {
        "AutoModel": {name: getattr(whole, name) for name in names},
        "AutoImageProcessor": {"pixel_values": inputs["pixel_values"], "llava": inputs["pixel_values"]},
        "AutoProcessor": inputs | {"llava": ids[None]},
        "zero-shot pipeline": {"scores": whole.logits_per_image[0].softmax(-1)},
        "feature pipeline": {"embedding": whole.image_embeds[:1]},
        "LlavaForConditionalGeneration": {"logits": logits},
        "AutoModelForImageTextToText": {"logits": logits, "answer": torch.cat((ids[None], answer), 1)},
        "image-text-to-text pipeline": {"answer": torch.tensor([*map(ord, tokenizer.decode(answer[0].tolist()))])},
        "save and reload": {"logits_per_image": whole.logits_per_image, "logits": logits, "llava": ids[None]},
    }


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("classes", ["registered", "remote code"])
def test_entry_point__gives_our_numbers(
    classes: str, way: str, ways: Ways, expected: dict[str, Found], request: pytest.FixtureRequest
) -> None:
    remote = classes == "remote code"
    found = entry_points.results(request.getfixturevalue("without_qlip"), way) if remote else WAYS[way](ways)
    assert found.keys() == expected[way].keys()
    for name, wanted in expected[way].items():
        if name == "logits":  # two classes' arithmetic; one more row than the decoder has, for the image token
            largest = found[name][..., :-1].max(-1).values
            assert found[name].shape[-1] == wanted.shape[-1] + 1 and bool((found[name][..., -1] <= largest).all())
            torch.testing.assert_close(found[name][..., :-1], wanted, rtol=1e-5, atol=1e-5)
        elif name in ("scores", "embedding"):  # of one image: where weights lie in memory changes a last bit
            torch.testing.assert_close(found[name], wanted)
        else:
            assert torch.equal(found[name], wanted), name


def test_remote_code__defines_each_name_once_and_imports_two_packages() -> None:
    tree = ast.parse(remote_code(llava=True))
    names = Counter(node.name for node in tree.body if isinstance(node, ast.ClassDef | ast.FunctionDef))
    assert not {name for name, times in names.items() if times > 1}
    imports = {node.module.split(".")[0] for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
    assert imports - set(sys.stdlib_module_names) == {"torch", "transformers"}


def test_remote_code__saves_names_that_both_versions_read(without_qlip: Path) -> None:
    # transformers 4.57 saved "language_model.lm_head.weight", and 5 drew that layer at random with a mere warning
    assert "lm_head.weight" in load_file(without_qlip / "logits" / "model.safetensors")


def test_export__holds_the_code_that_the_sources_make(folder: Path, llava: Path, ours: QLIPModel) -> None:
    assert (folder / FILE).read_text() == remote_code()
    assert (llava / FILE).read_text() == remote_code(llava=True)
    assert QLIPModel.from_pretrained(folder).code_fingerprint == ours.code_fingerprint


def test_llava__says_that_its_projector_is_new_and_is_seeded(
    llava: Path, language: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qlip(["export", "--format", "transformers", "--llava", str(language), "-o", str(tmp_path / "again")]) == 0
    assert "its projector is new (random): train it" in capsys.readouterr().out
    assert "**Its projector is new (random" in (llava / "README.md").read_text()
    for file in sorted(path.name for path in llava.glob("*.safetensors")):
        assert (llava / file).read_bytes() == (tmp_path / "again" / file).read_bytes()
    config = json.loads((llava / "config.json").read_text())
    assert (config["image_seq_length"], config["vision_feature_layer"], config["image_token_index"]) == (64, -2, 266)


def test_llava__takes_a_spare_row_for_the_image_token_and_tied_layers(tmp_path: Path) -> None:
    from transformers import LlavaForConditionalGeneration

    from qlip.hf.llava import export_llava

    source = tmp_path / "qwen"
    source.mkdir()
    size = save_tokenizer(source)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2Config(vocab_size=size + 10, tie_word_embeddings=True, num_key_value_heads=1, **sizes)
    decoder = Qwen2ForCausalLM(config)
    decoder.save_pretrained(source)
    export_llava("bundled", source, tmp_path / "llava", torch.bfloat16)
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "llava", dtype=torch.bfloat16)
    assert (model.config.image_token_id, model.config.text_config.vocab_size) == (size, size + 10)
    table = model.get_input_embeddings().weight
    assert table is model.lm_head.weight and torch.equal(table, decoder.get_input_embeddings().weight.bfloat16())
    assert not (tmp_path / "llava" / "chat_template.jinja").exists()


def _without(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _with_index(text: str) -> Any:
    def change(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "b.safetensors")
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def _other_config(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 47}
    (folder / "config.json").write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without("tokenizer.json"), "has no tokenizer.json; save its tokenizer there"),
        (_without("model.safetensors"), "has no model.safetensors; only safetensors are read"),
        (_with_index('{"weight_map": ["a"]}'), "not an index of shards"),
        (
            _with_index('{"weight_map": {"a": "../b.safetensors"}}'),
            "names '../b.safetensors', which is not in the folder",
        ),
        (_without("config.json"), "has no config.json with a model_type"),
        (_other_config, "has shape (32, 48), config.json makes it (32, 47)"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "t5"}'), "'t5' is no decoder of text"),
    ],
)
def test_llava__faults_of_the_decoders_folder_are_one_line(
    change: Any, said: str, language: Path, tmp_path: Path
) -> None:
    from qlip.hf.llava import export_llava

    source = tmp_path / "source"
    source.mkdir()
    for path in language.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    change(source)
    with pytest.raises(QLIPError) as error:
        export_llava("bundled", source, tmp_path / "llava")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "llava").exists()
