"""What a tower's tensors say of its architecture, and what has to be assumed because no file says it."""

from __future__ import annotations

import re

from torch import Tensor

from qlip.errors import QLIPError
from qlip.modeling.attention import rope_tables
from qlip.modeling.convert.layouts import EVA, OPEN_CLIP_VISION, Part
from qlip.modeling.convert.resample import grid_of
from qlip.modeling.convert.tower import NAMES, PROJECTIONS, ROOTS, Tower

_ROPE_TOLERANCE = 1e-2  # tables may be stored in bfloat16
_OPENAI = ("input_resolution", "context_length", "vocab_size")


def read_facts(tower: Tower, quick_gelu: bool | None) -> None:
    """Fill in a tower's facts and notes.

    Args:
        tower: with its tensors.
        quick_gelu: the activation of towers whose file cannot say; None decides by the layout.

    Raises:
        QLIPError: a tensor that shows the architecture is missing or has an impossible shape.
    """
    if tower.layout.own:
        _facts_of_own(tower)
    else:
        _common_facts(tower)
        (_vision_facts if tower.part == "vision" else _text_facts)(tower)
        _activation(tower, quick_gelu)
    projection = PROJECTIONS[tower.part]
    if projection + "weight" in tower.tensors:
        tower.projection_dim = tower.sizes(projection + "weight", 2)[0]
    tower.projection_bias = projection + "bias" in tower.tensors


def _common_facts(tower: Tower) -> None:
    """What the names and shapes of the first block say."""
    root = ROOTS[tower.part] + "encoder.layers."
    tensors = tower.tensors
    layers = {int(found[1]) for name in tensors if (found := re.match(re.escape(root) + r"(\d+)\.", name))}
    first = root + "0."
    swiglu = first + "mlp.w1.weight" in tensors
    inner, width = tower.sizes(first + ("mlp.w1.weight" if swiglu else "mlp.fc1.weight"), 2)
    tower.facts = {
        "hidden_size": width,
        "num_hidden_layers": 1 + max(layers),
        "intermediate_size": inner,
        "num_attention_heads": None,
        "swiglu": swiglu,
        "subln": first + "mlp.ffn_ln.weight" in tensors,
        **{f"{name}_bias": f"{first}self_attn.{name}_proj.bias" in tensors for name in "qkv"},
        "layer_norm_eps": tower.layout.eps,
    }


def _vision_facts(tower: Tower) -> None:
    _, channels, tower.patch_size, _ = tower.sizes("vision_model.embeddings.patch_embedding.weight", 4)
    positions = tower.tensors["vision_model.embeddings.position_embedding.weight"]
    try:
        tower.grid = grid_of(positions)
    except QLIPError as error:
        raise QLIPError(f"{tower.source.name}: {error}") from None
    tower.facts["num_channels"] = channels
    tower.facts["rope"] = tower.layout is EVA and bool(tower.facts["swiglu"])  # EVA-02 has it, EVA-01 has not
    if tower.layout is EVA:
        _read_rope(tower)
    elif tower.layout is OPEN_CLIP_VISION:
        tower.notes.append(f"{NAMES['vision']}: taken to end at [CLS], as most of {tower.layout.name}s do")


def _read_rope(tower: Tower) -> None:
    """Heads from the stored rotary tables, and whether they are a QLIP's function of row and column."""
    tables: dict[str, Tensor] = {}
    for key, tensor in tower.source.tensors.items():
        if key.startswith(tower.prefix) and (found := re.search(r"rope\.freqs_(cos|sin)$", key)):
            tables.setdefault(found[1], tensor)
    if not tables:
        if tower.facts["rope"]:
            tower.notes.append(f"{NAMES['vision']}: no rotary tables in the file; taken to be EVA-02's")
        return
    tower.facts["rope"] = True
    width, where = tower.facts["hidden_size"], f"{NAMES['vision']}: the file's rotary tables"
    shapes = {tuple(table.shape) for table in tables.values()}
    rows, lanes = next(iter(shapes)) if len(shapes) == 1 and len(next(iter(shapes))) == 2 else (0, 0)
    if not lanes or width % lanes or lanes % 4 or rows != tower.grid**2:
        tower.notes.append(f"{where} are not of its grid and width; a QLIP's own are used, which may differ")
        return
    tower.facts["num_attention_heads"] = width // lanes
    ours = dict(zip(("cos", "sin"), rope_tables((tower.grid, tower.grid), lanes, 0), strict=True))
    worst = max(
        (table.float() - ours[name].repeat_interleave(2, -1)).abs().max().item() for name, table in tables.items()
    )
    if worst <= _ROPE_TOLERANCE:
        tower.notes.append(f"{where} equal a QLIP's (largest difference {worst:.1g})")
    else:
        tower.notes.append(
            f"{where} differ from a QLIP's by up to {worst:.2g}: its coordinates do not span 16 units a side, so that"
            " attention computes something else until it is trained"
        )


def _text_facts(tower: Tower) -> None:
    vocabulary, _ = tower.sizes("text_model.embeddings.token_embedding.weight", 2)
    length, _ = tower.sizes("text_model.embeddings.position_embedding.weight", 2)
    # CLIP pools at the largest id, which is the last of its vocabulary
    tower.facts |= {
        "vocab_size": vocabulary,
        "max_position_embeddings": length,
        "bos_token_id": vocabulary - 2,
        "eos_token_id": vocabulary - 1,
    }


def _activation(tower: Tower, quick_gelu: bool | None) -> None:
    if tower.facts["swiglu"]:
        return
    if tower.layout is EVA:
        tower.facts["hidden_act"] = "gelu"
        return
    tower.asked_activation = True
    openai = all(name in tower.source.tensors for name in _OPENAI)
    quick = openai if quick_gelu is None else quick_gelu
    if quick_gelu is not None:
        why = "as asked"
    else:
        why = "OpenAI's file" if openai else "the default; --quick-gelu for OpenAI's, DFN's and MetaCLIP's weights"
    tower.facts["hidden_act"] = "quick_gelu" if quick else "gelu"
    tower.notes.append(f"{NAMES[tower.part]}: hidden_act {tower.facts['hidden_act']} ({why}); no file says it")


def _facts_of_own(tower: Tower) -> None:
    config = tower.source.config
    assert config is not None
    section = config.vision_config if tower.part == "vision" else config.text_config
    kept = set(_common_fields(tower.part))
    tower.facts = {name: value for name, value in section.to_dict().items() if name in kept}
    if tower.part == "vision":
        tower.patch_size, tower.grid = config.vision_config.patch_size, config.vision_config.grid_size


def _common_fields(part: Part) -> tuple[str, ...]:
    fields = (
        "hidden_size num_hidden_layers intermediate_size num_attention_heads swiglu subln q_bias k_bias v_bias"
        " layer_norm_eps hidden_act"
    )
    mine = {"vision": "num_channels rope", "text": "vocab_size max_position_embeddings eos_token_id bos_token_id"}
    return tuple(f"{fields} {mine[part]}".split())
