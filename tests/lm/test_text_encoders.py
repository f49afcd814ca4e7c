"""Text encoders: features per token, their cache, and the decoders that read them."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qlip import QLIPError, QLIPModel, QLIPProcessor
from qlip.lm import Condition, DecoderConfig, DecoderModel, generate
from qlip.lm.text_encoders import CachedTextEncoder, TextEncoder, open_text_encoder
from qlip.lm.text_encoders.encoders import TextFeatures

TEXTS = ["a red circle above a blue square", "a cat", "", "two small green triangles to the left of a yellow cross"]


@pytest.fixture(scope="module")
def tower() -> TextEncoder:
    """The bundled model's text tower."""
    return open_text_encoder("qlip:bundled")


def cosine(first: Tensor, second: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first.flatten(), second.flatten(), dim=0))


class Counting:
    """A text encoder that records what it was asked for."""

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder, self.asked = encoder, list[str]()
        self.name, self.size, self.length = encoder.name, encoder.size, encoder.length
        self.fingerprint = encoder.fingerprint

    def features(self, texts: list[str]) -> TextFeatures:
        self.asked += texts
        return self.encoder.features(texts)


def test_qlip_tower__gives_the_states_after_its_last_norm(tower: TextEncoder) -> None:
    model, tokenizer = QLIPModel.from_pretrained("bundled"), QLIPProcessor.from_pretrained("bundled").tokenizer
    assert tokenizer is not None
    ids, mask = tokenizer(TEXTS)
    features, real = tower.features(TEXTS)
    assert features.shape == (4, tower.length, tower.size) == (4, 24, model.config.text_config.hidden_size)
    assert features.dtype == torch.float32 and real.dtype == torch.bool and not features.requires_grad
    with torch.no_grad():
        states = model.text_model(ids).last_hidden_state
    for row in range(len(TEXTS)):
        count = int(mask[row].sum())
        assert real[row].tolist() == [False] * (24 - count) + [True] * count  # the real ones come last
        torch.testing.assert_close(features[row, 24 - count :], states[row, :count])
        assert not features[row, : 24 - count].any()


def test_qlip_tower__tells_swapped_objects_apart(tower: TextEncoder) -> None:
    """The pooled vectors of the two captions, of the end token, are nearly equal; the sequences are not."""
    features, _ = tower.features(["a red circle above a blue square", "a blue square above a red circle"])
    assert cosine(features[0, -1], features[1, -1]) > 0.9
    assert cosine(features[0], features[1]) < 0.5


def test_features__of_a_text_do_not_depend_on_the_others(tower: TextEncoder) -> None:
    together, mask = tower.features(TEXTS)
    for row, text in enumerate(TEXTS):
        alone, own = tower.features([text])
        assert torch.equal(own[0], mask[row])
        torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-6)
    none, empty = tower.features([])
    assert none.shape == (0, 24, tower.size) and empty.shape == (0, 24)


def test_text_encoder__pickles_for_reading_processes(tower: TextEncoder, tmp_path: Path) -> None:
    copy = pickle.loads(pickle.dumps(CachedTextEncoder(tower, tmp_path)))
    assert all(map(torch.equal, copy.features(TEXTS), tower.features(TEXTS)))


@pytest.mark.parametrize("name", ["qlip", "qlip:", "clip:bundled", "bundled", "qlip:no-such-model"])
def test_open_text_encoder__refuses_unknown_names(name: str) -> None:
    with pytest.raises(QLIPError, match=name.removeprefix("qlip:") or name):
        open_text_encoder(name)


def test_features__refuse_a_single_string(tower: TextEncoder, tmp_path: Path) -> None:
    for encoder in (tower, CachedTextEncoder(tower, tmp_path)):
        with pytest.raises(QLIPError, match=r"write \[text\]"):
            encoder.features("a cat")
        with pytest.raises(QLIPError, match="not a string"):
            encoder.features([None])  # type: ignore[list-item]


def test_cache__equals_the_encoder_and_computes_once(tower: TextEncoder, tmp_path: Path) -> None:
    counting = Counting(tower)
    wanted = tower.features([*TEXTS, TEXTS[0]])
    for _ in range(2):  # the second with nothing in memory
        cached = CachedTextEncoder(counting, tmp_path)
        assert (cached.name, cached.size, cached.length) == ("qlip:bundled", 128, 24)
        found = cached.features([*TEXTS, TEXTS[0]])
        assert all(map(torch.equal, found, wanted))
    assert counting.asked == TEXTS
    assert [one.shape for one in cached.features([])] == [(0, 24, 128), (0, 24)]


def test_cache__another_encoder_has_its_own_files(tower: TextEncoder, tmp_path: Path) -> None:
    first, second = Counting(tower), Counting(tower)
    second.fingerprint = "0" * 64
    CachedTextEncoder(first, tmp_path).features(TEXTS)
    CachedTextEncoder(second, tmp_path).features(TEXTS)
    assert second.asked == TEXTS


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "nan"])
def test_cache__a_damaged_file_is_computed_again(tower: TextEncoder, tmp_path: Path, damage: str) -> None:
    counting = Counting(tower)
    cached = CachedTextEncoder(counting, tmp_path)
    wanted = cached.features(TEXTS)
    path = next(tmp_path.rglob("*.npy"))
    data = path.read_bytes()
    path.write_bytes(
        {"cut": data[:-7], "empty": b"", "other": data[:60] + data[90:], "nan": data[:-4] + b"\0\0\xc0\x7f"}[damage]
    )
    for _ in range(2):
        assert all(map(torch.equal, cached.features(TEXTS), wanted))
    assert len(counting.asked) == len(TEXTS) + 1 and path.read_bytes() == data


def test_cache__a_folder_that_cannot_be_written_costs_time_alone(tower: TextEncoder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = CachedTextEncoder(tower, tmp_path / "file").features(TEXTS)
    assert all(map(torch.equal, found, tower.features(TEXTS)))


def decoder_of(encoder: TextEncoder) -> DecoderModel:
    config = DecoderConfig(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        grid=(2, 2),
        codebook_size=8,
        condition="features",
        condition_size=encoder.size,
        prefix_length=encoder.length,
        text_encoder=encoder.name,
        text_fingerprint=encoder.fingerprint,
    )
    torch.manual_seed(0)
    return DecoderModel(config).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoder__reads_and_draws_from_features(tower: TextEncoder, dtype: torch.dtype) -> None:
    model = decoder_of(tower).to(dtype)
    torch.nn.init.normal_(next(iter(model.head.last_layers())))
    condition, indices = Condition(*tower.features(TEXTS)), torch.randint(8, (4, 4, 1))
    model(indices, condition).sum().backward()
    assert model.condition.fc1.weight.grad.abs().sum() > 0  # type: ignore[attr-defined]
    drawn = generate(model, condition, seed=1)
    assert drawn.shape == (4, 4, 1)
    assert torch.equal(drawn[1:2], generate(model, Condition(*tower.features(TEXTS[1:2])), seed=1, numbers=[1]))


def test_decoder__names_its_text_encoder_in_its_folder(tower: TextEncoder, tmp_path: Path) -> None:
    decoder_of(tower).save_pretrained(tmp_path)
    model = DecoderModel.from_pretrained(tmp_path)
    assert (model.config.text_encoder, model.config.text_fingerprint) == ("qlip:bundled", tower.fingerprint)
    model.check_text_encoder(tower.fingerprint, "qlip:bundled")
    with pytest.raises(QLIPError, match="minilm: another text encoder .*qlip:bundled"):
        model.check_text_encoder("0" * 64, "minilm")


def test_config__text_encoder_needs_features() -> None:
    with pytest.raises(QLIPError, match="text_encoder is used only with condition features"):
        DecoderConfig.named("LlamaGen-B", text_encoder="minilm")
    assert DecoderConfig.named("LlamaGen-B", condition="features").text_encoder is None
