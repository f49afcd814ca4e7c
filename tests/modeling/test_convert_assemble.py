"""Pretrained towers as the start of a QLIP: what they compute, which config they fit, what became of every tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from qlip import QLIPConfig, QLIPError, QLIPModel
from qlip.modeling import Preprocessing
from qlip.modeling.convert import Conversion, Sizes, convert
from qlip.modeling.convert.assemble import take
from qlip.modeling.convert.rules import Part
from qlip.modeling.convert.weights_file import read
from tests.modeling import convert_sources as sources
from tests.modeling.convert_sources import SIZES, config_of, make, published_sizes, shapes
from tests.modeling.helpers import assert_close

SIDE = SIZES["patch"] * SIZES["grid"]
PRE_NORM_GELU = {"swiglu": False, "rope": False, "subln": False}


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ids() -> Tensor:
    """Texts of different lengths, the end token last, padded with 0 as OpenCLIP pads."""
    end = SIZES["vocabulary"] - 1
    return torch.tensor([[58, 5, 9, 33, end, 0, 0, 0, 0, 0], [58, 40, 41, 7, 2, 11, 3, 52, 1, end]])


def saved(state: dict[str, Tensor], path: Path) -> Path:
    save_file({key: value.clone().contiguous() for key, value in state.items()}, path)
    return path


def config(**changes: Any) -> QLIPConfig:
    return QLIPConfig.from_dict(config_of(**changes))


def assert_accounted(made: Conversion, states: dict[Path, dict[str, Tensor]]) -> None:
    """Every key of every source, and every parameter, is in exactly one row."""
    rows = made.report.rows
    assert {row.file for row in rows} - {None} == {str(path) for path in states}
    for path, state in states.items():
        keys = [key for row in rows if row.file == str(path) for key in row.source_keys]
        assert sorted(keys) == sorted(state)
    assert sorted(key for row in rows for key in row.target_keys) == sorted(
        name for name, _ in made.model.named_parameters()
    )
    for row in rows:
        assert bool(row.source_keys) == (row.status != "fresh") and bool(row.target_keys) == (row.status != "dropped")
        assert row.how or row.status == "mapped"
    counts = made.report.counts()
    table = made.report.table()
    assert {status: sum(int(row["tensors"]) for row in table if row["status"] == status) for status in counts} == counts
    assert len(table) < 70


@torch.no_grad()
def hidden_states(model: QLIPModel, pixels: Tensor) -> list[Tensor]:
    states: list[Tensor] = []
    model.vision_model.run_encoder(pixels, states)
    return states


# --- what the towers compute --------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["clip", "custom"])
def test_convert__whole_eva_clip_computes_the_same(tmp_path: Path, pixels: Tensor, ids: Tensor, names: str) -> None:
    state = make("eva02_clip_base")
    prefix = "text." if names == "custom" else ""
    if prefix:  # CustomCLIP keeps the text tower in a module of its own
        state = {key if key.startswith(("visual.", "logit")) else prefix + key: value for key, value in state.items()}
    path = saved(state, tmp_path / "clip.safetensors")
    made = convert(path, path, config=config())
    model = made.model
    for ours, theirs in zip(hidden_states(model, pixels), sources.eva_tower(state, pixels, "visual."), strict=True):
        assert_close("hidden state", ours, theirs)
    cls, image = sources.eva_embedding(state, pixels, "visual.")
    with torch.no_grad():
        output = model(pixels, ids, output_hidden_states=True)
        assert_close("cls", output.vision_model_output.pooler_output, cls)
        assert_close("image", model.get_image_features(pixels), image)
        every, text = sources.clip_text(state, ids, prefix)
        assert_close("text states", output.text_model_output.last_hidden_state, every)
        assert_close("text", model.get_text_features(ids), text)
        similarity = torch.cosine_similarity(text[:, None], image[None], -1)
        assert_close("logits", output.logits_per_text, similarity * 37.0)
    assert_accounted(made, {path: state})
    assert made.report.counts()["dropped"] == 2 + 2 * SIZES["depth"]  # the rotary tables
    assert any("rotary tables equal a QLIP's" in note for note in made.report.notes)


@pytest.mark.parametrize("project", ["eva02_mim_base", "eva02_mim_small", "eva01_clip_g", "open_clip_eva02_b16"])
def test_convert__image_towers_compute_the_same(tmp_path: Path, pixels: Tensor, project: str) -> None:
    state = make(project)
    path = saved(state, tmp_path / "tower.safetensors")
    lacks_inner_norm = project == "eva02_mim_base"
    flags: dict[str, Any] = {
        "eva02_mim_base": {},
        "eva02_mim_small": {"subln": False},
        "eva01_clip_g": PRE_NORM_GELU,
        "open_clip_eva02_b16": {},
    }[project]
    made = convert(path, config=config(vision=flags))
    literal, prefix = state, "visual." if project == "eva01_clip_g" else ""
    if project == "open_clip_eva02_b16":
        prefix = "visual.trunk."
        cos, sin = sources.eva_rope(SIZES["grid"], SIZES["width"] // SIZES["heads"])
        literal = sources.from_timm(state) | {prefix + "rope.freqs_cos": cos, prefix + "rope.freqs_sin": sin}
    theirs = sources.eva_tower(literal, pixels, prefix, inner_norm_of_ones=lacks_inner_norm)
    for one, other in zip(hidden_states(made.model, pixels), theirs, strict=True):
        assert_close("hidden state", one, other)
    cls = sources.norm(literal, prefix + "norm", theirs[-1][:, 0], 1e-6)
    with torch.no_grad():
        assert_close("cls", made.model(pixels).vision_model_output.pooler_output, cls)
        if "head.weight" in {key.removeprefix(prefix) for key in state}:
            head = cls @ state[prefix + "head.weight"].t() + state[prefix + "head.bias"]
            assert_close("image", made.model.get_image_features(pixels), head)
    assert_accounted(made, {path: state})
    assert lacks_inner_norm == any("no norm inside attention" in note for note in made.report.notes)


@pytest.mark.parametrize("quick", [False, True])
def test_convert__open_clip_text_tower_computes_the_same(tmp_path: Path, ids: Tensor, quick: bool) -> None:
    state = make("open_clip_vit_b16")
    path = saved(state, tmp_path / "clip.safetensors")
    made = convert(text=path, config=config(), quick_gelu=quick or None)
    assert made.model.config.text_config.hidden_act == ("quick_gelu" if quick else "gelu")
    every, text = sources.clip_text(state, ids, quick=quick)
    with torch.no_grad():
        assert_close("states", made.model.text_model(ids).last_hidden_state, every)
        assert_close("text", made.model.get_text_features(ids), text)
    other = sources.clip_text(state, ids, quick=not quick)[1]
    assert (text - other).abs().max() > 1e-3  # the two kinds can be told apart
    assert_accounted(made, {path: state})
    assert_reasons(made, "image tower was not asked for", "visual.conv1.weight")
    (scale,) = (row for row in made.report.rows if row.source_keys == ("logit_scale",))
    assert scale.status == "dropped" and "pair of towers" in scale.how


def assert_reasons(made: Conversion, reason: str, key: str) -> None:
    (row,) = (row for row in made.report.rows if key in (*row.source_keys, *row.target_keys))
    assert reason in row.how


def test_convert__openai_files_use_quick_gelu(tmp_path: Path) -> None:
    numbers = {"input_resolution": 28, "context_length": 10, "vocab_size": 60}
    state = make("open_clip_vit_b16") | {name: torch.tensor(value) for name, value in numbers.items()}
    path = saved(state, tmp_path / "openai.safetensors")
    made = convert(text=path, config=config())
    assert made.model.config.text_config.hidden_act == "quick_gelu"
    assert_accounted(made, {path: state})
    assert convert(text=path, config=config(), quick_gelu=False).model.config.text_config.hidden_act == "gelu"


@pytest.mark.parametrize("prefix", ["visual.", ""])
def test_convert__open_clip_image_tower_is_refused_for_its_first_norm(tmp_path: Path, prefix: str) -> None:
    state = make("open_clip_vit_b16")
    if not prefix:
        state = {key.removeprefix("visual."): value for key, value in state.items() if key.startswith("visual.")}
    path = saved(state, tmp_path / "clip.safetensors")
    with pytest.raises(QLIPError, match=r"OpenCLIP's image tower has a norm before the blocks \(ln_pre\), .* an EVA"):
        convert(path, config=config())


def test_convert__fused_and_separate_projections_are_equal(tmp_path: Path) -> None:
    fused = make("eva02_mim_small")
    apart = {key: value for key, value in fused.items() if ".qkv." not in key and ".w12." not in key}
    for layer in range(SIZES["depth"]):
        block = f"blocks.{layer}."
        for name, part in zip("qkv", fused[block + "attn.qkv.weight"].chunk(3), strict=True):
            apart[f"{block}attn.{name}_proj.weight"] = part
        for leaf in ("weight", "bias"):
            for name, part in zip(("w1", "w2"), fused[f"{block}mlp.w12.{leaf}"].chunk(2), strict=True):
                apart[f"{block}mlp.{name}.{leaf}"] = part
    one, other = (
        convert(
            saved(state, tmp_path / f"{name}.safetensors"), config=config(vision={"subln": False})
        ).model.state_dict()
        for name, state in {"fused": fused, "apart": apart}.items()
    )
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_convert__half_precision_and_wrapped_files_are_equal(tmp_path: Path) -> None:
    state = {key: value.half() for key, value in make("eva02_clip_base").items()}
    plain = saved(state, tmp_path / "plain.safetensors")
    wrapped = tmp_path / "training.pt"
    inner = {"module." + key: value for key, value in state.items()}
    torch.save({"epoch": 3, "state_dict": inner, "optimizer": {"state": {}}}, wrapped)
    one = convert(plain, plain, config=config())
    other = convert(wrapped, wrapped, config=config())
    for name, tensor in one.model.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, other.model.state_dict()[name])
    assert_accounted(other, {wrapped: state | {"epoch": torch.empty(0), "optimizer": torch.empty(0)}})
    assert "under 'state_dict', names without 'module.'" in other.report.sources[0].layout


# --- other sizes --------------------------------------------------------------------------------------------


def test_convert__larger_patch_keeps_grid_and_outputs_for_resized_images(tmp_path: Path, pixels: Tensor) -> None:
    """For larger patches the pseudo-inverse is exact: each patch resized is answered as before."""
    state = make("eva02_clip_base")
    path = saved(state, tmp_path / "clip.safetensors")
    made = convert(path, config="auto", sizes=Sizes(patch_size=9, bits=12, group_size=4))
    vision = made.model.config.vision_config
    assert (vision.image_size, vision.patch_size, made.model.num_bits) == (36, 9, 12)
    grid, patch = SIZES["grid"], SIZES["patch"]
    cells = pixels.unfold(2, patch, patch).unfold(3, patch, patch).flatten(0, 3)[:, None]
    larger = torch.nn.functional.interpolate(cells, size=(9, 9), mode="bicubic", align_corners=False)
    mosaic = larger.view(2, 3, grid, grid, 9, 9).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 36, 36)
    with torch.no_grad():
        assert_close("image", made.model.get_image_features(mosaic), sources.eva_embedding(state, pixels, "visual.")[1])
    assert [row.source_keys for row in made.report.rows if row.status == "resampled"] == [
        ("visual.patch_embed.proj.weight",)
    ]
    assert_accounted(made, {path: state})


def test_convert__another_grid_resamples_positions_only(tmp_path: Path) -> None:
    state = make("eva02_mim_base")
    path = saved(state, tmp_path / "mim.safetensors")
    made = convert(path, config=config(vision={"image_size": SIDE * 2}))
    (row,) = (row for row in made.report.rows if row.status == "resampled")
    assert row.source_keys == ("pos_embed",) and row.how == "grid 4 to 8, bicubic"
    table = made.model.vision_model.embeddings.position_embedding.weight
    assert table.shape[0] == 65 and torch.equal(table[0], state["pos_embed"][0, 0])
    means = table[1:].mean(0), state["pos_embed"][0, 1:].mean(0)
    assert (means[0] - means[1]).abs().max() < 0.1
    assert_accounted(made, {path: state})


# --- configurations -----------------------------------------------------------------------------------------


def test_auto_config__describes_the_source(tmp_path: Path) -> None:
    state = make("eva02_clip_base", text_width=128, text_heads=2)
    path = saved(state, tmp_path / "clip.safetensors")
    made = convert(path, path, config="auto", sizes=Sizes(bits=20, group_size=5))
    found = made.model.config
    wanted = config(text={"hidden_size": 128, "num_attention_heads": 2}).to_dict()
    wanted["vision_config"]["quantizer_cfg"].update(embed_dim=20, group_size=5)
    for part in ("vision_config", "text_config"):
        assert found.to_dict()[part] == wanted[part]
    twin = found.decoder_config.to_dict()
    assert {name: twin[name] for name in ("hidden_size", "k_bias", "rope", "swiglu", "subln")} == {
        "hidden_size": 32,
        "k_bias": False,
        "rope": True,
        "swiglu": True,
        "subln": True,
    }
    assert (found.projection_dim, found.vision_projection_bias, found.text_projection_bias) == (16, True, False)
    assert any("text tower: the file does not say the number of heads; 2" in note for note in made.report.notes)


def test_auto_config__takes_published_sizes_for_absent_parts(tmp_path: Path) -> None:
    found = convert(saved(make("eva02_mim_base"), tmp_path / "mim.safetensors")).model.config
    assert (found.projection_dim, found.vision_config.quantizer_cfg.embed_dim) == (512, 28)
    assert found.text_config.vocab_size == 49408 and found.vision_projection_bias


def test_auto_config__gives_a_text_tower_alone_the_published_image_tower(tmp_path: Path, ids: Tensor) -> None:
    state = make("open_clip_vit_b16", text_width=128, text_heads=2)
    path = saved(state, tmp_path / "clip.safetensors")
    made = convert(text=path, sizes=Sizes(image_size=32, bits=12, group_size=4))
    vision, published = made.model.config.vision_config, QLIPConfig.named("QLIP-B-16-256").vision_config
    assert (vision.hidden_size, vision.patch_size, vision.image_size) == (published.hidden_size, 16, 32)
    assert (made.model.config.projection_dim, vision.quantizer_cfg.embed_dim) == (SIZES["shared"], 12)
    with torch.no_grad():
        assert_close("text", made.model.get_text_features(ids), sources.clip_text(state, ids, heads=2)[1])
    assert_accounted(made, {path: state})


@pytest.mark.parametrize("part", ["vision", "text"])
@pytest.mark.parametrize(
    ("width", "image_heads", "text_heads"), [(768, 12, 12), (1024, 16, 16), (1280, 16, 20), (1664, 16, 26)]
)
def test_conventional_heads__are_the_published_towers(
    tmp_path: Path, part: Part, width: int, image_heads: int, text_heads: int
) -> None:
    state = make("eva02_clip_base", width=64, text_width=64, depth=1, text_depth=1)
    tower = take(read(saved(state, tmp_path / "clip.safetensors")), part)
    tower.facts["hidden_size"] = width
    assert tower.conventional_heads == (image_heads if part == "vision" else text_heads)


def test_convert__timm_names_of_a_pretrained_tower_keep_the_final_norm(tmp_path: Path, pixels: Tensor) -> None:
    mim = make("eva02_mim_base")
    kept = {key: value for key, value in mim.items() if "rope" not in key and not key.startswith(("mask", "lm_head"))}
    names = {"norm.weight": "fc_norm.weight", "norm.bias": "fc_norm.bias"}
    timm = {names.get(key, key).replace("mlp.ffn_ln", "mlp.norm"): value for key, value in kept.items()}
    assert "fc_norm.bias" in timm
    one = convert(saved(mim, tmp_path / "mim.safetensors"), config=config())
    other = convert(saved(timm, tmp_path / "timm.safetensors"), config=config())
    assert other.report.sources[0].layout == "EVA image tower (masked image modelling, timm's names)"
    for name, tensor in one.model.vision_model.post_layernorm.state_dict().items():
        assert torch.equal(tensor, mim[f"norm.{name}"])
        assert torch.equal(other.model.vision_model.post_layernorm.state_dict()[name], tensor)
    classifier = timm | {"head.weight": torch.ones(7, SIZES["width"]), "head.bias": torch.ones(7)}
    fresh = convert(saved(classifier, tmp_path / "tuned.safetensors"), config=config()).model
    assert torch.equal(fresh.vision_model.post_layernorm.weight, torch.ones(SIZES["width"]))


@pytest.mark.parametrize(
    ("vocabulary", "biased", "said"),
    [
        (32_000, False, "vocabulary of 32000, as CLIPA's or SigLIP's text towers"),
        (256_000, False, "vocabulary of 256000, as SigLIP 2's"),
        (60, True, "a projection with a bias, as SigLIP's text towers"),
    ],
)
def test_convert__text_towers_without_a_causal_mask_are_refused(
    tmp_path: Path, vocabulary: int, biased: bool, said: str
) -> None:
    state = make("open_clip_vit_b16", text_width=64, text_depth=1, vocabulary=vocabulary)
    if biased:
        projection = state.pop("text_projection").t()
        state |= {"text_projection.weight": projection, "text_projection.bias": torch.zeros(len(projection))}
    path = saved(
        {f"text.{key}": value for key, value in state.items() if "visual" not in key}, tmp_path / "s.safetensors"
    )
    with pytest.raises(QLIPError, match=f"{said}.*a QLIP's is causal") as error:
        convert(text=path)
    assert "\n" not in str(error.value)


def test_convert__a_causal_mask_is_assumed_and_said(tmp_path: Path) -> None:
    path = saved(make("eva02_clip_base"), tmp_path / "clip.safetensors")
    assert any("attention is taken to be causal" in note for note in convert(path, path, config=config()).report.notes)


def test_convert__folded_normalization_computes_the_same_of_an_image(tmp_path: Path) -> None:
    path = saved(make("eva02_clip_base"), tmp_path / "clip.safetensors")
    source, folded = (convert(path, path, config=config(), fold_normalization=fold) for fold in (False, True))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8))
    seen = []
    for made in (source, folded):
        with torch.no_grad():
            seen.append(made.model.get_image_features(**made.processor(images=image)))
    assert_close("image", seen[1], seen[0])
    assert folded.processor.preprocessing == Preprocessing((SIDE, SIDE), SIDE, patch_size=SIZES["patch"])
    assert any("weigh 3.5 times as much as in a model from scratch" in note for note in source.report.notes)
    assert not any("times as much" in note for note in folded.report.notes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"vision": {"num_hidden_layers": 2}},
            r"vision_config\.num_hidden_layers is 3 in this EVA .*, 2 in .*\"auto\"",
        ),
        ({"vision": {"hidden_size": 48}}, r"vision_config\.hidden_size is 32"),
        ({"vision": {"num_attention_heads": 4}}, r"vision_config\.num_attention_heads is 2"),
        ({"vision": {"intermediate_size": 48}}, r"vision_config\.intermediate_size is 40"),
        ({"vision": {"swiglu": False}}, r"vision_config\.swiglu is True"),
        ({"vision": {"subln": False}}, r"vision_config\.subln is True"),
        ({"vision": {"rope": False}}, r"vision_config\.rope is True"),
        ({"vision": {"k_bias": True}}, r"vision_config\.k_bias is False"),
        ({"text": {"num_hidden_layers": 1}}, r"text_config\.num_hidden_layers is 2 in this EVA-CLIP or OpenCLIP text"),
        ({"text": {"vocab_size": 70, "eos_token_id": 59}}, r"text_config\.vocab_size is 60"),
        ({"text": {"max_position_embeddings": 12}}, r"text_config\.max_position_embeddings is 10"),
        ({"text": {"eos_token_id": 50}}, r"text_config\.eos_token_id is 59"),
        ({"projection_dim": 8}, r"projection_dim is 16"),
        ({"vision_projection_bias": False}, r"vision_projection_bias is True"),
    ],
)
def test_config__mismatch_names_the_first_difference(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    path = saved(make("eva02_clip_base"), tmp_path / "clip.safetensors")
    with pytest.raises(QLIPError, match=said) as error:
        convert(path, path, config=config(**changes))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_config__settings_without_a_shape_follow_the_source(tmp_path: Path) -> None:
    path = saved(make("eva02_clip_base"), tmp_path / "clip.safetensors")
    made = convert(path, config=config(vision={"layer_norm_eps": 1e-5}))
    assert made.model.config.vision_config.layer_norm_eps == 1e-6
    assert made.model.config.decoder_config.layer_norm_eps == 1e-5  # the decoder has no source
    assert "vision_config.layer_norm_eps: 1e-06, the source's, instead of 1e-05" in made.report.notes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "nothing to convert"),
        (
            {"vision": "clip", "config": "QLIP-B-16-256", "sizes": Sizes(bits=20)},
            'bits applies to config "auto" only',
        ),
        ({"vision": "clip", "config": "QLIP-B-16-265"}, r"QLIP-B-16-265: no such configuration \(did you mean"),
        ({"vision": "clip", "sizes": Sizes(image_size=30)}, "patch_size 7 does not divide image_size 30"),
        ({"vision": "clip", "sizes": Sizes(bits=20)}, "group_size 7 does not divide embed_dim 20"),
        (
            {"vision": "clip", "quick_gelu": True},
            "quick_gelu applies to CLIP text towers only, and there is none",
        ),
        ({"vision": "mim", "text": "wide"}, "projects to 20, .* to 16; a QLIP's towers share one space"),
        ({"vision": "nameless"}, "the file does not say the number of heads, and the width 32 is not a multiple of 64"),
    ],
)
def test_convert__wrong_arguments_are_refused(tmp_path: Path, arguments: dict[str, Any], said: str) -> None:
    files = {
        "clip": make("eva02_clip_base"),
        "mim": make("eva02_clip_base"),
        "wide": make("eva02_clip_base", shared=20),
        "nameless": make("eva01_clip_g"),
    }
    for part in ("vision", "text"):
        if part in arguments:
            name = arguments[part]
            arguments = arguments | {part: saved(files[name], tmp_path / f"{name}.safetensors")}
    with pytest.raises(QLIPError, match=said):
        convert(**arguments)


@pytest.mark.parametrize(
    ("project", "named", "parts"),
    [
        ("eva02_mim_base", "QLIP-B-16-256", ("vision",)),
        ("eva02_clip_base", "QLIP-B-8-256", ("vision", "text")),
        ("open_clip_vit_b16", "QLIP-B-16-256", ("text",)),
        ("open_clip_eva02_b16", "QLIP-B-16-256", ("vision", "text")),
    ],
)
def test_published_configs__fit_the_published_towers(project: str, named: str, parts: tuple[str, ...]) -> None:
    """By shapes alone: no weights of that size are here."""
    from qlip.modeling.convert.assemble import leftovers, take
    from qlip.modeling.convert.configs import check
    from qlip.modeling.convert.weights_file import Source

    sizes = published_sizes(project)
    state = {
        key: torch.empty(shape, device="meta") for key, shape in shapes(project, sizes).items() if "rope" not in key
    }
    source, wanted = Source("file", state), QLIPConfig.named(named)
    towers = [take(source, "vision" if part == "vision" else "text") for part in parts]
    leftovers(source, towers)
    with torch.device("meta"):
        expected = {name: parameter.shape for name, parameter in QLIPModel(wanted).named_parameters()}
    for tower in towers:
        check(tower, wanted, named)
        for name, tensor in tower.tensors.items():
            if "patch_embedding.weight" not in name and "position_embedding" not in name:
                assert tensor.shape == expected[name], name
        assert tower.conventional_heads == sizes["heads" if tower.part == "vision" else "text_heads"]


# --- a QLIP as the source -----------------------------------------------------------------------------------


def test_convert__a_qlip_gives_only_its_towers(tmp_path: Path, pixels: Tensor, ids: Tensor) -> None:
    torch.manual_seed(5)
    trained = QLIPModel(config(text={"hidden_act": "quick_gelu"})).eval()
    trained.logit_scale.data.fill_(3.25)
    trained.save_pretrained(tmp_path / "trained")
    state = dict(trained.state_dict())
    made = convert(tmp_path / "trained", tmp_path / "trained", seed=7)
    with torch.no_grad():
        assert torch.equal(made.model.get_image_features(pixels), trained.get_image_features(pixels))
        assert torch.equal(made.model.get_text_features(ids), trained.get_text_features(ids))
    assert made.model.config.to_dict() == trained.config.to_dict() and made.model.logit_scale == 3.25
    assert made.model.decoder_fingerprint != trained.decoder_fingerprint
    assert made.model.code_fingerprint != trained.code_fingerprint  # a new bottleneck behind the same encoder
    assert_accounted(made, {tmp_path / "trained": state})
    larger = convert(tmp_path / "trained", sizes=Sizes(image_size=2 * SIDE, bits=8))
    assert larger.model.config.vision_config.quantizer_cfg.embed_dim == 8 and larger.model.grid == (8, 8)
    assert larger.model.logit_scale != 3.25  # the text tower it was learned with is gone


def test_convert__seed_decides_fresh_parts_and_leaves_global_rng(tmp_path: Path) -> None:
    path = saved(make("eva02_clip_base"), tmp_path / "clip.safetensors")
    before = torch.get_rng_state()
    one, same, other = (convert(path, config=config(), seed=seed).model for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert one.decoder_fingerprint == same.decoder_fingerprint != other.decoder_fingerprint
    assert torch.equal(
        one.vision_model.encoder.layers[0].layer_norm1.weight, make("eva02_clip_base")["visual.blocks.0.norm1.weight"]
    )
