"""The text decoder: a stock model's numbers, from and to stock folders; faults of such folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from qlip.errors import QLIPError
from qlip.lm.causal import CausalModel, param_groups, stock_weights
from qlip.lm.causal_config import CausalConfig
from qlip.lm.packed import Weights, pack

FOLDER = Path(__file__).parents[1] / "fixtures" / "decoder"
NAMES = ["llama_untied", "qwen3_untied"]
TOLERANCE = 1e-5


class Stock:
    """A fixture: the model loaded from its folder, with inputs, outputs and gradients."""

    def __init__(self, name: str) -> None:
        self.model = CausalModel.from_pretrained(FOLDER / name)
        self.inputs, self.outputs, self.grads = (
            load_file(FOLDER / name / f"{kind}.safetensors") for kind in ("inputs", "outputs", "grads")
        )


@pytest.fixture(params=NAMES)
def stock(request: pytest.FixtureRequest) -> Stock:
    return Stock(request.param)


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def tiny(**changes: Any) -> CausalModel:
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = CausalModel(CausalConfig(**{**sizes, **changes}))
    for one in model.parameters():
        torch.nn.init.normal_(one, std=0.3)
    return model.eval()


# ---------------------------------------------------------------- arithmetic


def test_causal_model__has_a_stock_models_states_and_gradients(stock: Stock) -> None:
    model, ids, labels = stock.model, stock.inputs["input_ids"], stock.inputs["labels"]
    states = [model.embed(ids)]
    hidden = model.hidden(states[0], hidden_states=states)
    for number, state in enumerate([*states[:-1], hidden]):
        close(state, stock.outputs[f"hidden_states.{number}"])
    close(model(ids), stock.outputs["logits"])
    read = labels[:, 1:] != -100
    loss = model.nats(hidden[:, :-1][read], labels[:, 1:][read]).mean()
    close(loss, stock.outputs["loss"])
    close(F.cross_entropy(model.logits(hidden)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()), loss)
    loss.backward()
    gradients = stock_weights({name: one.grad for name, one in model.named_parameters()}, model.config)
    assert gradients.keys() == stock.grads.keys()
    for name, gradient in stock.grads.items():
        close(gradients[name], gradient)


@torch.no_grad()
def test_causal_model__left_padding(stock: Stock) -> None:
    model, real = stock.model, stock.inputs["padded_attention_mask"].bool()
    ids, documents = stock.inputs["padded_input_ids"], stock.inputs["padded_attention_mask"].long() - 1
    cache = model.new_cache(len(ids), ids.shape[1])
    cached = model.logits(model.hidden(model.embed(ids), documents=documents, cache=cache))
    for logits in (model(ids, documents=documents), cached):
        assert logits.isfinite().all()
        close(logits * real[..., None], stock.outputs["padded_logits"] * real[..., None])


@torch.no_grad()
def test_causal_model__packed_documents_do_not_see_each_other(stock: Stock) -> None:
    ids, lengths = stock.inputs["input_ids"][:1], stock.inputs["packed_lengths"]
    documents = torch.arange(len(lengths)).repeat_interleave(lengths)[None]
    close(stock.model(ids, documents=documents), stock.outputs["packed_logits"][None].view(1, 20, -1))
    positions = stock.inputs["packed_position_ids"].view(1, 20)
    close(stock.model(ids, positions, documents), stock.outputs["packed_logits"].view(1, 20, -1))


@pytest.mark.parametrize("compiled", [False, True])
def test_causal_model__packed_documents_train_as_each_alone(compiled: bool) -> None:
    lengths = [[3, 70, 1, 90, 36], [200], [], [64, 64], [1, 1, 1, 1]]  # the rest of a row of 200 is padding
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(40, (len(lengths), 200), generator=generator)
    documents = torch.full(ids.shape, -1)
    for row, several in enumerate(lengths):
        documents[row, : sum(several)] = torch.arange(len(several)).repeat_interleave(
            torch.tensor(several, dtype=torch.int64)
        )
    weights = torch.randn(*ids.shape, 16, generator=generator)

    model, alone = tiny(max_position_embeddings=256), tiny(max_position_embeddings=256)
    if compiled:
        for block in model.layers:
            block.compile(backend="aot_eager")
    states, own = list[Tensor](), list[Tensor]()
    hidden = model.hidden(model.embed(ids), documents=documents, hidden_states=states)
    assert not hidden[documents < 0].any()
    (hidden * weights).sum().backward()
    for row, several in enumerate(lengths):
        for number in range(len(several)):
            inside = documents[row] == number
            expected = alone.hidden(alone.embed(ids[row, inside][None]), hidden_states=own)
            close(hidden[row, inside], expected[0])
            for state, other in zip(states, own[-len(states) :], strict=True):
                close(state[row, inside], other[0])
            (expected[0] * weights[row, inside]).sum().backward()
    expected_grads = {name: one.grad for name, one in alone.named_parameters()}
    for name, one in model.named_parameters():
        torch.testing.assert_close(one.grad, expected_grads[name], atol=1e-3, rtol=1e-4, msg=name)


def test_causal_model__a_batch_of_padding_alone_runs_all_layers() -> None:
    model = tiny()
    hidden = model.hidden(model.embed(torch.zeros(2, 3, dtype=torch.int64)), documents=torch.full((2, 3), -1))
    (0 * hidden).sum().backward()
    assert hidden.shape == (2, 3, 16) and hidden.isfinite().all()
    assert all(one.grad is not None and not one.grad.any() for one in model.layers.parameters())


@torch.no_grad()
@pytest.mark.parametrize(("tag", "prompt"), [("greedy", 8), ("padded_greedy", 12)])
def test_causal_model__cached_greedy_ids_are_a_stock_models(stock: Stock, tag: str, prompt: int) -> None:
    padded = tag.startswith("padded")
    ids = stock.inputs["padded_input_ids" if padded else "input_ids"][:, :prompt]
    documents = stock.inputs["padded_attention_mask"].long()[:, :prompt] - 1 if padded else None
    expected = stock.outputs[tag]
    cache = stock.model.new_cache(len(ids), expected.shape[1])
    while ids.shape[1] < expected.shape[1]:
        states = stock.model.hidden(stock.model.embed(ids[:, cache.length :]), documents=documents, cache=cache)
        ids, documents = torch.cat([ids, stock.model.logits(states[:, -1:]).argmax(-1)], 1), None
    assert torch.equal(ids, expected)


@torch.no_grad()
def test_cache__padding_may_stand_between_a_shared_beginning_and_questions_of_other_lengths() -> None:
    model, generator = tiny(), torch.Generator().manual_seed(1)
    prefix = torch.randint(40, (1, 5), generator=generator)
    questions = [torch.randint(40, (1, count), generator=generator) for count in (4, 2)]
    cache = model.new_cache(1, 16)
    model.hidden(model.embed(prefix), cache=cache)
    both = cache.select(torch.tensor([0, 0]))
    padded = torch.cat([questions[0], F.pad(questions[1], (2, 0))])
    documents = torch.tensor([[0, 0, 0, 0], [-1, -1, 0, 0]])
    model.hidden(model.embed(padded), documents=documents, cache=both)
    last = torch.tensor([[3], [7]])
    found = model.hidden(model.embed(last), cache=both)
    for row, question in enumerate(questions):
        alone = model.hidden(model.embed(torch.cat([prefix, question, last[row : row + 1]], 1)))
        close(found[row], alone[0, -1:])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("theta", [1e5, 1e6])
def test_folder__is_a_stock_model(kind: str, theta: float, tied: bool, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}
    options: dict[str, Any] = {"rope_scaling": scaling} if theta == 1e6 else {}
    model = tiny(qk_norm=kind == "qwen3", rope_theta=theta, tie_word_embeddings=tied, eos_token_id=(2, 3), **options)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.config.model_type == kind and theirs.config.tie_word_embeddings == tied
    ids = torch.randint(40, (2, 60), generator=torch.Generator().manual_seed(2))
    expected = theirs(ids).logits
    close(model(ids), expected)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="4KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").is_file()
    again = CausalModel.from_pretrained(tmp_path / "theirs")
    assert again.config.to_dict().items() >= {"rope_theta": theta, "eos_token_id": (2, 3)}.items()
    assert torch.equal(again(ids), model(ids))


def test_param_groups__embeddings_and_norms_do_not_decay() -> None:
    model = tiny()
    groups = param_groups(model)
    decaying = {name.removeprefix("layers.0.") for name, _ in model.named_parameters() if groups.decays(name)}
    decaying = {name for name in decaying if not name.startswith("layers.1.")}
    matrices = {"attention.wqkv.weight", "attention.wo.weight"} | {f"feed_forward.w{n}.weight" for n in (1, 2, 3)}
    assert decaying == matrices | {"output.weight"}


# ---------------------------------------------------------------- folders


def edited(tmp_path: Path, **changes: Any) -> Path:
    """Copy of the Llama fixture with other values in config.json."""
    folder = shutil.copytree(FOLDER / "llama_untied", tmp_path / "edited")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4.0}}, "'linear' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "gemma"}, "model_type 'gemma': need a language model of type llama or qwen3"),
        ({"logit_scale": 0.5}, "logit_scale"),
        ({"model_type": "qwen3", "use_sliding_window": True}, "use_sliding_window True is not supported"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide"),
        ({"hidden_size": 50}, "num_attention_heads 4 does not divide hidden_size 50"),
        ({"hidden_size": 96}, "tensor '[a-z_.]*' has shape"),
    ],
)
def test_folder__that_the_model_cannot_hold_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(QLIPError, match=message):
        CausalModel.from_pretrained(edited(tmp_path, **changes))


@pytest.mark.parametrize("fault", ["missing", "unexpected", "nan", "pickle", "tied"])
def test_folder__that_is_damaged_is_one_line(fault: str, tmp_path: Path) -> None:
    folder = edited(tmp_path, tie_word_embeddings=fault == "tied")
    weights = load_file(folder / "model.safetensors")
    if fault == "missing":
        del weights["model.layers.1.mlp.up_proj.weight"]
    elif fault == "unexpected":
        weights["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(48)
    elif fault == "nan":
        weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors")
    if fault == "pickle":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    expected = {
        "missing": "'model.layers.1.mlp.up_proj.weight' is missing",
        "unexpected": "unexpected tensor 'model.layers.1.self_attn.q_proj.bias'",
        "nan": "not finite|NaN",
        "pickle": "pytorch_model.bin is a pickle and is never loaded",
        "tied": "tie_word_embeddings is true, but 'lm_head.weight' is not 'model.embed_tokens.weight'",
    }
    with pytest.raises(QLIPError, match=expected[fault]) as caught:
        CausalModel.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_folder__tied_weights_may_be_stored_twice(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, tmp_path / "model.safetensors")
    ids = torch.arange(12).view(2, 6)
    assert torch.equal(CausalModel.from_pretrained(tmp_path)(ids), model(ids))


def test_folder__in_bfloat16(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path, torch.bfloat16)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    loaded = CausalModel.from_pretrained(tmp_path, dtype="bfloat16")
    assert {one.dtype for one in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.norm.weight, model.norm.weight.bfloat16())


def test_hidden__beyond_the_context_is_refused() -> None:
    model = tiny(max_position_embeddings=8)
    with pytest.raises(QLIPError, match="9 positions: the language model's context is 8"):
        model(torch.zeros(1, 9, dtype=torch.int64))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("weights", [None, "plain", "float32"])
def test_logits__of_some_ids_are_those_of_all(weights: Weights | None, tied: bool) -> None:
    if weights == "float32" and not torch.backends.mkldnn.is_available():
        pytest.skip("this PyTorch has no oneDNN")
    model = tiny(tie_word_embeddings=tied).eval()
    hidden = torch.randn(2, model.config.hidden_size)
    whole = model.logits(hidden)
    fast = model if weights is None else pack(model, weights)
    torch.testing.assert_close(fast.logits(hidden, 5, 20), whole[:, 5:20])
    torch.testing.assert_close(fast.logits(hidden, 20), whole[:, 20:])
