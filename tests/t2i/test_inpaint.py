"""Inpainting: kept tokens stay, the hole is drawn given what comes after it, masks are read exactly."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from qlip.errors import QLIPError
from qlip.lm import Condition, DecoderModel, generate
from qlip.lm.guidance import Constant
from qlip.t2i import Drawer
from qlip.t2i import inpaint as module
from qlip.t2i.inpaint import inpaint, read_edit, read_hole, tail
from qlip.tokens import ImageCodec
from tests.lm.test_devices import OneDevice
from tests.lm.test_model import HEADS, conditions, randomized, some_indices, tiny
from tests.t2i.conftest import tiny as tiny_drawer

HOLE = torch.tensor([False, True, False, False, True, False])


@pytest.mark.parametrize("kind", HEADS)
def test_inpaint__kept_tokens_never_change(kind: str) -> None:
    config = tiny(head=kind, condition="tokens", prefix_length=4)
    model, given, indices = randomized(config), conditions(config), some_indices(config)
    for hole in (HOLE, ~HOLE, torch.arange(6) >= 4, torch.zeros(6, dtype=torch.bool)):
        drawn = inpaint(model, given, indices, hole, candidates=3, guidance=Constant(2.0), seed=4)
        assert torch.equal(drawn[:, ~hole], indices[:, ~hole])
        other = torch.where(hole[:, None], (indices + 1) % 4, indices)
        assert torch.equal(inpaint(model, given, other, hole, candidates=3, guidance=Constant(2.0), seed=4), drawn)


def test_inpaint__an_image_depends_on_its_seed_and_number_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(head="chain")
    model, given, indices = randomized(config), conditions(config), some_indices(config)
    together = inpaint(model, given, indices, HOLE, candidates=4, seed=1, numbers=[7, 0, 3])
    monkeypatch.setattr(module, "ROWS", 5)
    assert torch.equal(inpaint(model, given, indices, HOLE, candidates=4, seed=1, numbers=[7, 0, 3]), together)
    alone = inpaint(model, Condition(given.values[:1]), indices[:1], HOLE, candidates=4, seed=1, numbers=[7])
    assert torch.equal(alone[0], together[0])


def test_inpaint__stays_on_the_models_device() -> None:
    config = tiny(head="depth")
    with torch.device("meta"):
        model, given = DecoderModel(config).eval(), Condition(torch.zeros(2, dtype=torch.int64))
        indices = torch.zeros(2, 6, 3, dtype=torch.int64)
    with OneDevice():
        assert inpaint(model, given, indices, HOLE, candidates=2, guidance=Constant(2.0)).is_meta


def test_inpaint__one_candidate_is_what_generate_draws() -> None:
    config = tiny(head="chain")
    model, given, indices = randomized(config), conditions(config), some_indices(config)
    drawn = inpaint(model, given, indices, HOLE, candidates=1, seed=2)
    assert torch.equal(drawn, generate(model, given, seed=2, indices=indices, keep=~HOLE.expand(3, -1)))
    behind = tail(6, 0.5)  # nothing is kept after the hole, so there is nothing to weigh candidates by
    assert torch.equal(
        inpaint(model, given, indices, behind, candidates=8, seed=2),
        inpaint(model, given, indices, behind, candidates=1, seed=2),
    )


def posterior(model: torch.nn.Module, image: Tensor, hole: Tensor) -> Tensor:
    """Exact probabilities of the 16 fillings of a hole of two tokens, given the kept tokens, (16,)."""
    whole = image.repeat(16, 1, 1)
    whole[:, hole, 0] = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    with torch.no_grad():
        nats = model(whole, Condition(torch.ones(16, dtype=torch.int64))).sum((1, 2))
    return (-nats).softmax(0)


@pytest.mark.parametrize(
    ("hole", "kept"), [([0, 1], [2, 2]), ([0, 2], [3, 0])], ids=["before the kept tokens", "between them"]
)
def test_inpaint__many_candidates_have_the_exact_posterior(
    hole: list[int], kept: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare how often each filling is chosen with its probability given the kept tokens before and after the hole."""
    monkeypatch.setattr(module, "ROWS", 1 << 15)
    config = tiny(head="parallel", grid=(2, 2), num_groups=1)
    model, count = randomized(config, seed=3), 800
    where = torch.zeros(4, dtype=torch.bool).index_fill_(0, torch.tensor(hole), True)
    image = torch.zeros(1, 4, 1, dtype=torch.int64)
    image[0, ~where, 0] = torch.tensor(kept)
    expected = posterior(model, image, where)
    given = Condition(torch.ones(count, dtype=torch.int64))

    def distance(candidates: int) -> float:
        """Total variation between the choices and the posterior."""
        drawn = inpaint(model, given, image.expand(count, -1, -1), where, candidates=candidates)[:, where, 0]
        seen = torch.bincount(drawn @ torch.tensor([4, 1]), minlength=16) / count
        return float((seen - expected).abs().sum() / 2)

    assert distance(1) > 0.3
    assert distance(32) < 0.1  # 0.06 is the mean of exact draws


def test_inpaint__temperature_0_of_the_choice_takes_the_likeliest_candidate() -> None:
    config = tiny(head="parallel", grid=(2, 2), num_groups=1)
    model, image, where = randomized(config), torch.tensor([[[1], [2], [0], [3]]]), torch.tensor([1, 1, 0, 0]).bool()
    given, numbers = Condition(torch.tensor([1])), [c * module.STRIDE % (1 << 64) for c in range(8)]
    drawn = generate(
        model,
        given,
        images_per_condition=8,
        numbers=numbers,
        indices=image.expand(8, -1, -1),
        keep=~where.expand(8, -1),
    )
    with torch.no_grad():
        nats = model(drawn, Condition(torch.ones(8, dtype=torch.int64)))[:, 2:].sum((1, 2))
    best = inpaint(model, given, image, where, candidates=8, choice_temperature=0.0)
    assert torch.equal(best[0], drawn[nats.argmin()])


def test_inpaint__faults_are_one_line() -> None:
    config = tiny()
    model, given, indices = randomized(config), conditions(config), some_indices(config)
    with pytest.raises(QLIPError, match="give a bool per token"):
        inpaint(model, given, indices, HOLE[:5])
    with pytest.raises(QLIPError, match="candidates 0"):
        inpaint(model, given, indices, HOLE, candidates=0)
    with pytest.raises(QLIPError, match="one per image"):
        inpaint(model, given, indices, HOLE, numbers=[1])


def test_edit__of_an_image_by_mask_or_share(drawer: Drawer) -> None:
    image, mask = Image.new("RGB", (128, 128), "red"), mask_of((128, 128), (0, 0, 64, 64))
    [tokens] = drawer.codec.encode([image])
    edit = drawer.edit(image, mask, candidates=3)
    assert torch.equal(edit.indices, tokens.indices(7)) and edit.hole.sum() == 16
    drawn = drawer("a cat", image=image, mask_image=mask, num_images_per_prompt=2).indices
    assert torch.equal(drawn[:, ~edit.hole], edit.indices[~edit.hole].expand(2, -1, -1))
    half = drawer("a cat", image=image, keep=0.5, generator=[torch.Generator().manual_seed(1)]).indices[0]
    assert torch.equal(half[:32], edit.indices[:32]) and not torch.equal(half[32:], edit.indices[32:])
    for values, message in (
        ({"image": image}, "either a mask or the share"),
        ({"image": image, "mask_image": mask, "keep": 0.5}, "either a mask or the share"),
        ({"keep": 0.5}, "without an image"),
    ):
        with pytest.raises(QLIPError, match=message):
            drawer("a cat", **values)


def test_edit__for_a_decoder_of_another_grid_and_other_groups(codec: ImageCodec) -> None:
    config = tiny_drawer(grid=(4, 8), codebook_size=1 << 14, num_groups=2).config
    with torch.device("meta"):
        decoder = DecoderModel(config)
    edit = read_edit(decoder, codec, Image.new("RGB", (64, 32)), mask_of((64, 32), (56, 24, 64, 32)))
    assert edit.indices.shape == (32, 2) and edit.hole.nonzero().tolist() == [[31]]


def test_tail__is_all_but_the_first_share() -> None:
    assert tail(64, 0.5).tolist() == [False] * 32 + [True] * 32
    assert tail(4, 0).all()
    for share in (-0.1, 1.0, 0.999, float("nan")):
        with pytest.raises(QLIPError, match="from 0 to less than 1"):
            tail(4, share)


# ---------------------------------------------------------------- masks


@pytest.fixture(scope="module")
def codec() -> ImageCodec:
    return ImageCodec.from_pretrained("bundled")


def mask_of(size: tuple[int, int], *boxes: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", size)
    for box in boxes:
        mask.paste(255, box)
    return mask


def test_hole__has_the_tokens_with_a_white_pixel(codec: ImageCodec) -> None:
    image = Image.new("RGB", (64, 64))
    hole = read_hole(codec, image, mask_of((64, 64), (7, 16, 17, 17))).reshape(8, 8)
    assert hole.nonzero().tolist() == [[2, 0], [2, 1], [2, 2]]
    grey = mask_of((64, 64), (0, 0, 8, 8)).point(lambda level: max(level, 127))
    assert read_hole(codec, image, grey).nonzero().tolist() == [[0]]


def test_hole__of_a_large_image_loses_no_pixel_and_follows_the_crop(codec: ImageCodec) -> None:
    """A pixel of an image 24 times as large is in its token; 1,536 pixels of the width lie outside the square."""
    image = Image.new("RGB", (3072, 1536))
    for row, column in ((0, 0), (3, 5), (7, 7)):
        x, y = 768 + 192 * column + 191, 192 * row + 1
        hole = read_hole(codec, image, mask_of(image.size, (x, y, x + 1, y + 1)))
        assert hole.nonzero().tolist() == [[8 * row + column]]


def test_hole__follows_the_orientation_of_a_photo(codec: ImageCodec) -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: stored 80 x 64, shown 64 x 80
    Image.new("RGB", (80, 64)).save(file, "jpeg", exif=exif)
    hole = read_hole(codec, file.getvalue(), mask_of((64, 80), (0, 8, 1, 9)))
    assert hole.nonzero().tolist() == [[0]]


def test_mask__faults_are_one_line(codec: ImageCodec, tmp_path: Path) -> None:
    image, path = Image.new("RGB", (96, 64)), tmp_path / "mask.png"
    for mask, message in (
        (mask_of((64, 64), (0, 0, 9, 9)), "mask.png: 64 x 64 pixels, but the image has 96 x 64"),
        (mask_of((96, 64)), "mask.png: no white pixel; paint"),
        (mask_of((96, 64), (0, 0, 16, 64)), "mask.png: no white pixel in the centre"),
        (mask_of((96, 64), (16, 0, 80, 64)), "mask.png: white everywhere"),
        (Image.fromarray(np.zeros((64, 96, 4), np.uint8)), "mask.png: white everywhere.*transparent"),
    ):
        mask.save(path)
        with pytest.raises(QLIPError, match=message):
            read_hole(codec, image, path)
    with pytest.raises(QLIPError, match="nothing.png: no such file"):
        read_hole(codec, image, tmp_path / "nothing.png")
