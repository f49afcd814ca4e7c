"""Exported decoders, as plain transformers reads and runs them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.lm.conditions import Condition
from qlip.lm.config import DecoderConfig
from qlip.lm.export import CLASSES, Format, check_export, export_decoder
from qlip.lm.generate import generate
from qlip.lm.guidance import Constant
from qlip.lm.heads import DepthHead, FlatHead
from qlip.lm.model import DecoderModel
from qlip.lm.rotary import rotary_table
from qlip.lm.sampling import Sampling
from tests.lm.test_model import conditions, randomized, some_indices, tiny

transformers = pytest.importorskip("transformers", reason='needs pip install "qlip[hf]"')

TOLERANCE = 1e-5
GREEDY = Sampling(temperature=0.0)
TURNS = (0.5, 0.0, -1.5, 2.0)
MODELS: dict[str, tuple[Format, dict[str, Any]]] = {
    "classes": ("llama", {"num_groups": 1, "rotary": "1d"}),
    "classes, still": ("llama", {"num_groups": 2, "prefix_rotary": "identity", "rotary_base": 500.0}),
    "tokens, GQA": ("llama", {"condition": "tokens", "prefix_length": 4, "num_groups": 2, "num_key_value_heads": 1}),
    "features": ("llama", {"condition": "features", "prefix_length": 4, "num_groups": 1}),
    "QK-norm": ("qwen3", {"condition": "tokens", "prefix_length": 4, "num_groups": 1, "qk_norm": True, "head_dim": 12}),
    "frequencies": (
        "qwen3",
        {
            "condition": "features",
            "prefix_length": 4,
            "qk_norm": True,
            "shared_embeddings": True,
            "rotary": "frequencies",
            "rotary_frequencies": TURNS,
        },
    ),
    "depth": ("csm", {"head": "depth", "rotary": "1d"}),
    "depth, tokens": ("csm", {"head": "depth", "condition": "tokens", "prefix_length": 4, "num_key_value_heads": 1}),
    "depth, features": (
        "csm",
        {"head": "depth", "condition": "features", "prefix_length": 4, "num_groups": 2, "shared_embeddings": True},
    ),
}
FLAT = [name for name, (format, _) in MODELS.items() if format != "csm"]
DEPTH = [name for name in MODELS if name not in FLAT]


def decoder(name: str) -> DecoderModel:
    format, changes = MODELS[name]
    return randomized(tiny(**{"head": "depth" if format == "csm" else "flat"} | changes)).requires_grad_(False)


def exported(name: str, folder: Path) -> tuple[DecoderModel, Any]:
    """A decoder and what transformers makes of its export, every tensor of which it uses."""
    format, model = MODELS[name][0], decoder(name)
    export_decoder(model, format, folder)
    theirs, info = getattr(transformers, CLASSES[format]).from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model, theirs.eval()


def prompts(model: DecoderModel) -> tuple[Condition, dict[str, Tensor]]:
    """Conditions, of several lengths, and the inputs of the exported model that they are."""
    config = model.config
    given = conditions(config)
    if config.condition == "class":
        return given, {"input_ids": given.values[:, None]}
    prefix = model.condition(given)
    assert prefix.start is not None
    mask = (torch.arange(config.prefix_length) >= prefix.start[:, None]).long()
    if config.condition == "features":
        return given, {"inputs_embeds": prefix.embeddings, "attention_mask": mask}
    table: Tensor = model.condition.embedding.weight  # type: ignore[attr-defined]
    ids = (prefix.embeddings[:, :, None] == table).all(-1).long().argmax(-1)
    return given, {"input_ids": ids, "attention_mask": mask}


def first_id(model: DecoderModel) -> int:
    config = model.config
    return config.prefix_length if config.condition == "features" else config.condition_size + 1


@pytest.mark.parametrize("name", FLAT)
def test_causal_export__has_our_logits(name: str, tmp_path: Path) -> None:
    model, theirs = exported(name, tmp_path)
    config, (given, inputs) = model.config, prompts(model)
    indices, begin, values = some_indices(config), first_id(model), model.config.codebook_size
    group = torch.arange(config.num_steps) % config.num_groups
    ids = begin + group * values + indices.flatten(1)
    if "input_ids" in inputs:
        inputs["input_ids"] = torch.cat([inputs["input_ids"], ids], 1)
    else:
        inputs["inputs_embeds"] = torch.cat([inputs["inputs_embeds"], theirs.model.embed_tokens(ids)], 1)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = F.pad(inputs["attention_mask"], (0, config.num_steps), value=1)
    logits = theirs(**inputs).logits[:, config.prefix_length - 1 : -1, begin:].unflatten(-1, (-1, values))
    logits = logits[:, torch.arange(config.num_steps), group]  # (B, S, V) of the group of each step
    hidden = model.hidden(indices, model.condition(given))
    assert isinstance(model.head, FlatHead)
    ours = torch.stack([F.linear(hidden[:, s], model.head.group_weight(int(k))) for s, k in enumerate(group)], 1)
    torch.testing.assert_close(logits, ours, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FLAT)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_causal_export__draws_our_tokens(name: str, scale: float, tmp_path: Path) -> None:
    model, theirs = exported(name, tmp_path)
    config, (given, inputs), begin = model.config, prompts(model), first_id(model)
    options: dict[str, Any] = {"do_sample": False}
    start = inputs["input_ids"].shape[1] if "input_ids" in inputs else 0
    if scale != 1:
        null = torch.arange(begin).expand(3, -1) if config.condition == "features" else torch.full((3, 1), begin - 1)
        options |= {"guidance_scale": scale, "negative_prompt_ids": null}
        if config.condition == "features":
            options["negative_prompt_attention_mask"] = inputs["attention_mask"]
    if config.num_groups > 1:
        values, count = config.codebook_size, config.num_groups
        groups = torch.arange(begin, begin + count * values).view(count, values).tolist()
        options["prefix_allowed_tokens_fn"] = lambda row, ids: groups[(len(ids) - start) % count]
    drawn = theirs.generate(**inputs, **options)[:, start:]
    ours = generate(model, given, sampling=GREEDY, guidance=Constant(scale))
    assert torch.equal((drawn - begin).view(ours.shape) % config.codebook_size, ours)


@pytest.mark.parametrize("name", DEPTH)
def test_csm_export__has_our_logits_and_draws_our_tokens(name: str, tmp_path: Path) -> None:
    model, theirs = exported(name, tmp_path)
    given, inputs = prompts(model)
    ours = generate(model, given, sampling=GREEDY)
    with torch.no_grad():
        drawn = theirs.generate(**inputs, do_sample=False, depth_decoder_do_sample=False)
    assert torch.equal(drawn, ours)

    hidden = model.hidden(ours, model.condition(given))
    prompt = inputs.get("inputs_embeds")
    if prompt is None:
        prompt = theirs.embed_text_tokens(inputs["input_ids"])
    embeds = torch.cat([prompt, theirs.backbone_model.embed_tokens(ours)], 1)
    mask = inputs.get("attention_mask")
    mask = None if mask is None else F.pad(mask, (0, ours.shape[1]), value=1)
    found = theirs.backbone_model(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
    found = found[:, model.config.prefix_length - 1 : -1]
    torch.testing.assert_close(found, hidden, atol=TOLERANCE, rtol=0)
    head = model.head
    assert isinstance(head, DepthHead)
    torch.testing.assert_close(theirs.lm_head(found), head.output(hidden), atol=TOLERANCE, rtol=0)
    state, rows = hidden.flatten(0, 1), ours.flatten(0, 1)
    depth = theirs.depth_decoder(input_ids=F.pad(rows[:, :-1], (1, 0)), backbone_last_hidden_state=state).logits
    inner = head._run(state, rows[:, :-1])[:, 1:]
    expected = torch.einsum("mkd,kvd->mkv", inner, head.outputs)
    torch.testing.assert_close(depth, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_readme__runs_and_draws_our_tokens(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedily, which is a change of generation_config.json, so that tokens can be compared."""
    model = decoder(name)
    config = model.config
    export_decoder(model, MODELS[name][0], tmp_path)
    settings = tmp_path / "generation_config.json"
    settings.write_text(settings.read_text().replace('do_sample": true', 'do_sample": false'))
    code = re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.DOTALL)
    assert code is not None
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(code[1], names)
    given = {
        "class": Condition(torch.tensor([0, 1])),
        "tokens": Condition(torch.zeros(2, 2, dtype=torch.int64)),
        "features": Condition(torch.zeros(2, config.prefix_length, config.condition_size)),
    }[config.condition]
    guidance = Constant(1.0 if config.head.kind == "depth" else 2.0)
    assert torch.equal(names["indices"], generate(model, given, sampling=GREEDY, guidance=guidance))


def test_sampling__never_draws_ids_of_prompts(tmp_path: Path) -> None:
    model, theirs = exported("classes", tmp_path)
    torch.manual_seed(0)
    drawn = theirs.generate(torch.arange(5).repeat(20)[:, None])[:, 1:]
    assert drawn.shape == (100, 6) and int(drawn.min()) == 6 and set(drawn.unique().tolist()) == {6, 7, 8, 9}


@pytest.mark.parametrize("rotary", ["1d", "raster"])
def test_rotary__has_the_very_same_angles_at_real_sizes(rotary: str, tmp_path: Path) -> None:
    config = DecoderConfig.from_dict(
        tiny().to_dict()
        | {"head": {"kind": "flat"}, "rotary": rotary, "head_dim": 64, "grid": (24, 24), "num_groups": 1}
    )
    export_decoder(DecoderModel(config), "llama", tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).model
    cos, sin = theirs.rotary_emb(torch.zeros(1), torch.arange(config.length)[None])
    table = rotary_table(config)
    assert torch.equal(torch.stack([cos[0, :, :32], sin[0, :, :32]], -1), table)


@pytest.mark.parametrize("name", ["QK-norm", "depth, features"])
def test_dtype__is_that_of_all_weights(name: str, tmp_path: Path) -> None:
    written = export_decoder(decoder(name), MODELS[name][0], tmp_path, torch.bfloat16)
    assert written == sorted(tmp_path.iterdir())
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
    theirs = getattr(transformers, CLASSES[MODELS[name][0]]).from_pretrained(tmp_path, dtype="auto")
    assert theirs.lm_head.weight.dtype == torch.bfloat16


def test_config__says_what_the_tokens_are(tmp_path: Path) -> None:
    config = tiny(head="flat", code_fingerprint="a" * 64)
    export_decoder(DecoderModel(config), "llama", tmp_path)
    expected = {"grid": [3, 2], "num_groups": 3, "codebook_size": 4, "code_fingerprint": "a" * 64, "first_id": 6}
    assert json.loads((tmp_path / "config.json").read_text())["image_tokens"] == expected
    assert transformers.AutoConfig.from_pretrained(tmp_path).image_tokens == expected
    assert "a" * 64 in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize(
    ("format", "changes", "said"),
    [
        *[
            ("llama", {"head": kind}, f"head '{kind}': no stock")
            for kind in ("parallel", "chain", "bits", "masked_bits")
        ],
        ("llama", {"head": "depth"}, "head 'depth': .* export it as csm"),
        ("csm", {"head": "flat"}, "head 'flat': .* export it as llama or qwen3"),
        ("llama", {"head": "flat", "rotary": "axial", "prefix_rotary": "zero"}, "rotary 'axial'"),
        ("llama", {"head": "flat", "prefix_rotary": "zero"}, "prefix_rotary 'zero'"),
        (
            "llama",
            {"head": "flat", "prefix_rotary": "identity", "condition": "tokens", "prefix_length": 2},
            "prefix_rotary 'identity'",
        ),
        ("llama", {"head": "flat", "qk_norm": True}, "qk_norm true: .* export it as qwen3"),
        ("qwen3", {"head": "flat"}, "qk_norm false: .* export it as llama"),
        ("csm", {"head": "depth", "qk_norm": True}, "no norm of queries and keys"),
        ("csm", {"head": "depth", "num_groups": 1}, "needs two groups"),
        ("llama", {"head": "flat", "num_groups": 1, "target_positions": True}, "target_positions, for random order"),
        ("llama", {"head": "flat", "num_attention_heads": 3, "head_dim": 4}, "hidden_size 16: .* attention heads, 3"),
    ],
)
def test_check__refuses_what_no_stock_class_holds(format: Format, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(QLIPError, match=said) as caught:
        check_export(tiny(**changes), format)
    assert "\n" not in str(caught.value)


def test_csm_export__without_transformers_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(QLIPError, match=r"this needs the package 'transformers': .*\[hf"):
        export_decoder(decoder("depth"), "csm", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert export_decoder(decoder("classes"), "llama", tmp_path / "out")
