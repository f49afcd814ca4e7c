"""The vision-language model: image tokens at their places, packed rows, early exit, and its folder."""

from __future__ import annotations

import copy
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qlip import QLIPError
from qlip.modeling.model import QLIPModel
from qlip.vlm.config import IGNORED, IMAGE_ID
from qlip.vlm.model import VisionLanguageModel, load_tower, trained_labels
from tests.vlm.conftest import tiny

N = 16


@dataclass
class Rows:
    """Inputs of the model's forward."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    documents: Tensor
    images: Tensor
    features: Tensor | None = None


def document(seed: int, images: int, text: int = 7) -> tuple[list[int], list[int]]:
    """Ids and labels: images, then text whose last three ids are labelled."""
    rng = torch.Generator().manual_seed(seed)
    words = torch.randint(3, 300, (text,), generator=rng).tolist()
    ids = [IMAGE_ID] * N * images + words
    return ids, [IGNORED] * (len(ids) - 3) + words[-3:]


def rows(documents: list[list[tuple[list[int], list[int]]]], images: Tensor) -> Rows:
    """Rows of several documents each, padded at the right."""
    length = max(sum(len(ids) for ids, _ in row) for row in documents)
    shape = (len(documents), length)
    found = Rows(
        torch.zeros(shape, dtype=torch.int64),
        torch.full(shape, IGNORED),
        torch.zeros(shape, dtype=torch.int64),
        torch.full(shape, -1),
        images,
    )
    for number, row in enumerate(documents):
        begin = 0
        for count, (ids, labels) in enumerate(row):
            part = slice(begin, begin + len(ids))
            found.ids[number, part] = torch.tensor(ids)
            found.labels[number, part] = torch.tensor(labels)
            found.positions[number, part] = torch.arange(len(ids))
            found.documents[number, part] = count
            begin += len(ids)
    return found


def pixels(count: int) -> Tensor:
    return torch.randn(count, 3, 64, 64, generator=torch.Generator().manual_seed(5)).clamp(-1, 1)


def gradients(model: VisionLanguageModel, batch: Rows) -> tuple[Tensor, dict[str, Tensor]]:
    model = copy.deepcopy(model)
    nats = model(batch)
    nats.sum().backward()
    return nats.detach(), {name: one.grad for name, one in model.named_parameters() if one.grad is not None}


def test_packed__equals_unpacked_in_nats_and_gradients(vlm: VisionLanguageModel) -> None:
    one, two, three = document(1, 1), document(2, 0, 9), document(3, 2)
    images = pixels(3)
    apart, apart_gradients = gradients(vlm, rows([[one], [two], [three]], images))
    packed, packed_gradients = gradients(vlm, rows([[one, two, three]], images))
    assert int((packed > 0).sum()) == 9
    assert torch.allclose(packed[packed > 0], apart[apart > 0], rtol=1e-5, atol=1e-5)
    assert packed_gradients.keys() == apart_gradients.keys()
    assert any(name.startswith("projector") for name in packed_gradients)
    for name, gradient in packed_gradients.items():
        scale = float(apart_gradients[name].abs().max())
        assert torch.allclose(gradient, apart_gradients[name], rtol=1e-4, atol=1e-4 * scale), name


def test_packed__first_label_of_a_document_is_not_predicted_from_the_one_before(vlm: VisionLanguageModel) -> None:
    words = [5, 6, 7]
    batch = rows([[document(1, 1), (words, words)]], pixels(1))
    wanted = trained_labels(batch.labels, batch.documents)
    assert int(wanted.sum()) == 3 + 2
    nats = vlm(batch)
    assert torch.equal(nats > 0, wanted)


def test_forward__nats_are_those_of_the_logits(vlm: VisionLanguageModel) -> None:
    batch = rows([[document(1, 1)], [document(2, 1, 5)]], pixels(2))
    nats = vlm(batch)
    hidden = vlm.llm.hidden(vlm.embed(batch.ids, batch.images), batch.positions, batch.documents)
    logp = vlm.llm.logits(hidden).float().log_softmax(-1)
    for row, place in (trained_labels(batch.labels, batch.documents)).nonzero().tolist():
        assert nats[row, place].item() == pytest.approx(
            -logp[row, place - 1, batch.labels[row, place]].item(), rel=1e-4
        )


def test_embed__images_stand_in_order_of_occurrence(vlm: VisionLanguageModel) -> None:
    """Two images in one sample, then one in the next; text between and after."""
    images = pixels(3)
    ids = torch.tensor([[4] + [IMAGE_ID] * N + [5] + [IMAGE_ID] * N + [6], [7] * (N + 3) + [IMAGE_ID] * N])
    x = vlm.embed(ids, images)
    tokens = vlm.projector(vlm.image_features(images))
    assert torch.equal(x[0, 1 : N + 1], tokens[0]) and torch.equal(x[0, N + 2 : 2 * N + 2], tokens[1])
    assert torch.equal(x[1, N + 3 :], tokens[2])
    assert torch.equal(x[0, [0, N + 1, -1]], vlm.llm.embed(torch.tensor([4, 5, 6])))
    assert torch.equal(vlm.embed(ids, features=vlm.image_features(images)), x)


def test_embed__positions_and_tokens_must_agree(vlm: VisionLanguageModel) -> None:
    ids = torch.tensor([[IMAGE_ID] * (N - 1) + [3]])
    with pytest.raises(QLIPError, match="15 image positions, but the 1 images have 16 tokens, 16 each"):
        vlm.embed(ids, pixels(1))
    with pytest.raises(QLIPError, match="15 image positions, but the 0 images have 0 tokens"):
        vlm.embed(ids)
    with pytest.raises(QLIPError, match="width 5: this model's projector reads 768"):
        vlm.embed(torch.full((1, N), IMAGE_ID), features=torch.zeros(1, N, 5))


def test_text_only__the_tower_never_runs(vlm: VisionLanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The projector has a gradient of zero, so that ranks with and without images agree on what has one."""
    model = copy.deepcopy(vlm).train()
    model.tower.requires_grad_(False)
    monkeypatch.setattr(model.tower, "run_encoder", None)
    nats = model(rows([[document(1, 0)], [document(2, 0, 4)]], torch.zeros(0, 3, 64, 64)))
    nats.sum().backward()
    assert torch.isfinite(nats).all()
    assert all(one.grad is not None and not one.grad.any() for one in model.projector.parameters())
    assert all(one.grad is not None and torch.isfinite(one.grad).all() for one in model.llm.parameters())


def test_image_features__frozen_tower_leaves_no_graph(vlm: VisionLanguageModel) -> None:
    model = copy.deepcopy(vlm)
    assert model.image_features(pixels(1)).requires_grad
    model.tower.requires_grad_(False)
    assert not model.image_features(pixels(1)).requires_grad


@pytest.mark.parametrize("layer", [-1, -2, 1])
def test_image_features__early_exit_is_the_hidden_state(layer: int) -> None:
    qlip, model = QLIPModel.from_pretrained("bundled"), tiny(pool=1, layer=layer)
    ran: list[int] = []
    for number, block in enumerate(model.tower.encoder.layers):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    features = model.image_features(pixels(2))
    states = qlip(pixels(2), output_hidden_states=True, reconstruct=False).vision_model_output.hidden_states
    assert torch.equal(features, states[layer][:, 1:])
    depth = len(model.tower.encoder.layers)
    assert ran == list(range(layer % (depth + 1)))


def test_image_features__quantized_are_the_codes_at_the_decoders_width() -> None:
    qlip, model = QLIPModel.from_pretrained("bundled"), tiny(pool=1, layer="quantized")
    found = qlip(pixels(2), reconstruct=False).vision_model_output.last_hidden_state
    assert torch.equal(model.image_features(pixels(2)), found)


def test_image_features__pooled_tokens_are_blocks_of_four_patches() -> None:
    """Upper left, upper right, lower left, lower right, in raster order of the blocks; also where H is not W."""
    plain, pooled = tiny(pool=1), tiny(pool=2)
    images = torch.randn(2, 3, 32, 64, generator=torch.Generator().manual_seed(1))
    patches = plain.image_features(images).unflatten(1, (4, 8))
    blocks = pooled.image_features(images).unflatten(1, (2, 4)).unflatten(-1, (2, 2, -1))
    for row in range(4):
        for column in range(8):
            assert torch.equal(blocks[:, row // 2, column // 2, row % 2, column % 2], patches[:, row, column])
    assert pooled.config.num_image_tokens((32, 64)) == 8
    with pytest.raises(QLIPError, match="image size 72 x 64 is not a multiple of 16"):
        pooled.image_features(torch.zeros(1, 3, 72, 64))


# ---------------------------------------------------------------- files


def test_folder__round_trip_to_the_bit(vlm: VisionLanguageModel, vlm_folder: Path) -> None:
    loaded = VisionLanguageModel.from_pretrained(vlm_folder)
    assert vlm.config.to_dict().items() <= loaded.config.to_dict().items() and not loaded.training
    batch = rows([[document(1, 1)], [document(2, 2)]], pixels(3))
    assert torch.equal(loaded(batch), vlm(batch))
    names = load_file(vlm_folder / "model.safetensors")
    assert {name.partition(".")[0] for name in names} == {"projector", "llm"}


def test_folder__keeps_a_trained_tower(tmp_path: Path) -> None:
    model = tiny(own_tower=True)
    torch.nn.init.normal_(model.tower.embeddings.class_embedding)
    model.save_pretrained(tmp_path)
    loaded = VisionLanguageModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.image_features(pixels(1)), model.image_features(pixels(1)))
    assert not torch.equal(loaded.image_features(pixels(1)), tiny().image_features(pixels(1)))


def test_folder__names_the_text_decoder_whose_weights_it_lacks(tmp_path: Path) -> None:
    model = tiny(language_model=str(tmp_path / "llm"))
    model.llm.save_pretrained(tmp_path / "llm")
    model.save_pretrained(tmp_path / "vlm")
    assert {name.partition(".")[0] for name in load_file(tmp_path / "vlm/model.safetensors")} == {"projector"}
    batch = rows([[document(1, 1)]], pixels(1))
    assert torch.equal(VisionLanguageModel.from_pretrained(tmp_path / "vlm")(batch), model(batch))


def test_folder__another_text_decoder_of_that_name_is_refused(tmp_path: Path) -> None:
    model = tiny(language_model=str(tmp_path / "llm"))
    model.config = model.config.model_copy(update={"language_fingerprint": model.llm.fingerprint})
    model.llm.save_pretrained(tmp_path / "llm")
    model.save_pretrained(tmp_path / "vlm")
    assert VisionLanguageModel.from_pretrained(tmp_path / "vlm").llm.fingerprint == model.llm.fingerprint
    weight = model.llm.output_weight.detach()
    weight[0, 0] += 1  # one value
    model.llm.save_pretrained(tmp_path / "llm")
    with pytest.raises(QLIPError, match=r"llm: is not the text decoder that .*vlm was trained with"):
        VisionLanguageModel.from_pretrained(tmp_path / "vlm")
    tiny(vocab_size=290).llm.save_pretrained(tmp_path / "llm")
    with pytest.raises(QLIPError, match=r"llm: is not the text decoder that .*vlm was trained with"):
        VisionLanguageModel.from_pretrained(tmp_path / "vlm")
    shutil.rmtree(tmp_path / "llm")
    with pytest.raises(QLIPError, match=r"vlm: its text decoder: .*llm: no such folder"):
        VisionLanguageModel.from_pretrained(tmp_path / "vlm")


def changed(folder: Path, into: Path, **changes: object) -> Path:
    """Copy of a folder with other values in its config.json."""
    into.mkdir()
    (into / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    values = json.loads((folder / "config.json").read_text()) | changes
    (into / "config.json").write_text(json.dumps(values))
    return into


def test_folder__missing_projector_is_an_error(vlm_folder: Path, tmp_path: Path) -> None:
    folder = changed(vlm_folder, tmp_path / "without")
    tensors = load_file(folder / "model.safetensors")
    kept = {name: one for name, one in tensors.items() if not name.startswith("projector.")}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(QLIPError, match="without: has no projector"):
        VisionLanguageModel.from_pretrained(folder)
    save_file({name: one for name, one in tensors.items() if name != "projector.2.bias"}, folder / "model.safetensors")
    with pytest.raises(QLIPError, match="'projector.2.bias' is missing"):
        VisionLanguageModel.from_pretrained(folder)
    one = next(name for name in tensors if name.startswith("llm."))
    save_file({name: value for name, value in tensors.items() if name != one}, folder / "model.safetensors")
    with pytest.raises(QLIPError, match=re.escape(f"{one!r} is missing")):
        VisionLanguageModel.from_pretrained(folder)


def test_folder__projector_of_another_width_names_both(vlm_folder: Path, tmp_path: Path) -> None:
    folder = changed(vlm_folder, tmp_path / "other", pool=1)
    with pytest.raises(QLIPError, match="projector reads features of width 768, but config.json makes it 192"):
        VisionLanguageModel.from_pretrained(folder)


def test_folder__another_tower_is_refused(vlm_folder: Path, tmp_path: Path) -> None:
    folder = changed(vlm_folder, tmp_path / "other", vision_fingerprint="f" * 64)
    with pytest.raises(QLIPError, match="was trained with the tower ffffffffffff, but bundled is"):
        VisionLanguageModel.from_pretrained(folder)
    with pytest.raises(QLIPError, match="model_type 'clip' is no vision-language model"):
        VisionLanguageModel.from_pretrained("bundled")
    assert load_tower("bundled") is not None
