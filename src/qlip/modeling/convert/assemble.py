"""Build a QLIP from pretrained towers: read them, fit a config, copy the weights, report every tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from qlip.errors import QLIPError
from qlip.files import folder_written_aside
from qlip.modeling.config import QLIPConfig
from qlip.modeling.convert import configs, open_clip, qlip
from qlip.modeling.convert.configs import AUTO, Sizes
from qlip.modeling.convert.eva import EVA
from qlip.modeling.convert.open_clip import CLIP_TEXT, TEMPERATURE, choose_activation
from qlip.modeling.convert.processor import build_processor, describe_normalization
from qlip.modeling.convert.qlip import OWN_TEXT, OWN_VISION
from qlip.modeling.convert.report import Recognised, Report, Row
from qlip.modeling.convert.resample import resample_patches, resample_positions
from qlip.modeling.convert.rules import NAMES, PATCHES, POSITIONS, PROJECTIONS, ROOTS, Format, Part, Tower, match
from qlip.modeling.convert.weights_file import Source, read
from qlip.modeling.model import QLIPModel
from qlip.modeling.parts import DECODER, QUANT_EMBED, QUANT_EMBED_POST
from qlip.modeling.processor import Preprocessing, QLIPProcessor

FORMATS: tuple[Format, ...] = (EVA, CLIP_TEXT, OWN_VISION, OWN_TEXT)
_BESIDE = {**open_clip.BESIDE, **qlip.BESIDE}

_EXPECTED: dict[Part, str] = {
    "vision": "EVA's names (cls_token, pos_embed, patch_embed.proj.weight, blocks.0.norm1.weight), bare or under"
    " 'visual.'",
    "text": "CLIP's names (token_embedding.weight, transformer.resblocks.0.attn.in_proj_weight), bare or under 'text.'",
}

_LACKS_INNER_NORM = "the source has no norm inside attention: starts at weight 1, bias 0"

_WHY_FRESH = {
    QUANT_EMBED: "bottleneck: no pretrained tower has one",
    QUANT_EMBED_POST: "bottleneck: no pretrained tower has one",
    DECODER: "decoder: no pretrained tower has one",
}
_TOWER_MAY_LACK = {
    "self_attn.inner_attn_ln.": _LACKS_INNER_NORM,
    "vision_model.post_layernorm.": "the source has no norm of [CLS]: starts at weight 1, bias 0",
    "projection.weight": "the source has no projection",
    "projection.bias": "the source's projection has no bias: starts at 0",
    "patch_embedding.bias": "the source's patch embedding has no bias: starts at 0",
}


@dataclass(frozen=True)
class Conversion:
    """Result of :func:`convert`.

    Attributes:
        model: in eval mode, float32.
        processor: preprocessing that the image tower was trained with; the vocabulary if there is one.
        report: fate of every tensor.
    """

    model: QLIPModel
    processor: QLIPProcessor
    report: Report

    def save(self, folder: str | Path) -> None:
        """Write the checkpoint folder (config, weights, preprocessing, vocabulary): all of it, or nothing."""
        with folder_written_aside(Path(folder)) as aside:
            self.model.save_pretrained(aside)
            self.processor.save_pretrained(aside)


def convert(
    vision: str | Path | None = None,
    text: str | Path | None = None,
    *,
    config: QLIPConfig | str | Path = AUTO,
    sizes: Sizes | None = None,
    tokenizer: str | Path | None = None,
    quick_gelu: bool | None = None,
    seed: int = 0,
    fold_normalization: bool = False,
) -> Conversion:
    """Build a QLIP from pretrained towers; the parts that they do not hold are random.

    Args:
        vision: weights of an EVA-02 or EVA-CLIP image tower, or a QLIP checkpoint folder.
        text: weights of an EVA-CLIP or OpenCLIP text tower, or a QLIP checkpoint folder; may be the same file.
        config: a configuration, its name or file, or ``"auto"``: built from the sources.
        sizes: sizes for ``"auto"``.
        tokenizer: CLIP's merges, or a folder with a vocabulary's files.
        quick_gelu: use QuickGELU in a CLIP text tower, whose file does not say it; by default only for OpenAI's files.
        seed: random seed of the newly initialised parts.
        fold_normalization: move the image tower's normalisation of pixels into its patch embedding. Pixels then have
            mean and deviation 0.5, as in a model from scratch, so that the same alpha_r weighs the same; what the tower
            computes of an image is equal.

    Raises:
        QLIPError: no source, one that cannot be read or is not known, or one that does not fit the configuration.
    """
    if vision is None and text is None:
        raise QLIPError("nothing to convert: give an image tower, a text tower, or both")
    sizes = sizes or Sizes()
    named = configs.resolve(config, sizes)
    image, captions = _towers(vision, text)
    towers = [tower for tower in (image, captions) if tower is not None]
    if captions is not None and captions.format is CLIP_TEXT:
        choose_activation(captions, quick_gelu)
    elif quick_gelu is not None:
        raise QLIPError("quick_gelu applies to CLIP text towers only, and there is none; leave it out")
    where = f'config "{AUTO}"' if named is None else str(config) if isinstance(config, str | Path) else "the config"
    chosen = configs.build(image, captions, sizes) if named is None else named
    for tower in towers:
        configs.check(tower, chosen, where)
    chosen, changes = configs.adopt(chosen, towers, where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = QLIPModel(chosen).eval()
    report = Report([Recognised(tower.part, tower.source.name, _description(tower)) for tower in towers])
    for tower in towers:
        report.rows += _place(tower, model)
    for source in {id(tower.source): tower.source for tower in towers}.values():
        mine = [tower for tower in towers if tower.source is source]
        report.rows += [*_temperature(source, mine, model), *leftovers(source, mine)]
    report.rows += _fresh(model, towers, report.rows)
    processor, about_processor = build_processor(chosen, image, captions, tokenizer)
    if fold_normalization:
        processor = _fold_normalization(model, processor)
    about_processor.append(describe_normalization(processor.preprocessing))
    report.notes = [note for tower in towers for note in tower.notes]
    if any(row.how == _LACKS_INNER_NORM for row in report.rows):
        report.notes.append(
            f"{NAMES['vision']}: the source's blocks have no norm inside attention (EVA-02's have none before their"
            " CLIP training), a QLIP's with sub-LN do: the encoder computes something else until it is trained"
        )
    report.notes += changes + about_processor
    return Conversion(model, processor, report)


def _towers(vision: str | Path | None, text: str | Path | None) -> tuple[Tower | None, Tower | None]:
    """The image and the text tower; a file that holds both is read once."""
    image = None if vision is None else take(read(vision), "vision")
    if text is None:
        return image, None
    same = vision is not None and Path(vision).expanduser() == Path(text).expanduser()
    return image, take(image.source if image is not None and same else read(text), "text")


def take(source: Source, part: Part) -> Tower:
    """Find a tower in a file and read its tensors and facts.

    Raises:
        QLIPError: no known format, a key that must not be dropped, or a tensor of an impossible shape.
    """
    tower = _recognise(source, part)
    tower.sort_keys()
    tower.format.read_facts(tower)
    tower.read_projection()
    return tower


def _recognise(source: Source, part: Part) -> Tower:
    keys = source.tensors
    for format in FORMATS:
        if (format.part, format.own) != (part, source.config is not None):
            continue
        if (prefix := format.prefix_in(keys)) is not None:
            kind, further = format.variant(keys, prefix)
            return Tower(source, format, prefix, format.name + kind, {**format.rules, **further})
    if not keys:
        raise QLIPError(f"{source.name}: holds no tensors")
    if any(format.own and format.prefix_in(keys) is not None for format in FORMATS):
        raise QLIPError(
            f"{source.name}: has the names of a QLIP or of Hugging Face's CLIP; give a QLIP checkpoint's folder instead"
        )
    if part == "vision" and open_clip.is_image_tower(keys):
        raise QLIPError(
            f"{source.name}: OpenCLIP's image tower has a norm before the blocks (ln_pre), a QLIP has none; take an EVA"
            " image tower"
        )
    begins = ", ".join(repr(key) for key in list(keys)[:2])
    raise QLIPError(f"{source.name}: holds no known {NAMES[part]}; expected {_EXPECTED[part]}; found {begins}, ...")


def _description(tower: Tower) -> str:
    details = [f"names under {tower.prefix!r}" if tower.prefix else "", tower.source.unwrapped]
    more = ", ".join(detail for detail in details if detail)
    return f"{tower.kind}; {more}" if more else tower.kind


def _place(tower: Tower, model: QLIPModel) -> list[Row]:
    """Copy a tower into the model. Returns the tower's rows, in which resampled tensors are marked."""
    parameters, file = dict(model.named_parameters()), tower.source.name
    patch, grid = model.config.vision_config.patch_size, model.config.vision_config.grid_size
    rows = []
    for row in tower.rows:
        for name in row.target_keys:
            tensor = tower.tensors[name]
            if name not in parameters:
                raise QLIPError(f"{file}: {row.source_keys[0]!r} is not needed: this config makes no {name!r}")
            if name == PATCHES and patch != tower.patch_size:
                tensor = resample_patches(tensor, patch)
                how = f"patch {tower.patch_size} to {patch}, pseudo-inverse resize (FlexiViT)"
                row = replace(row, status="resampled", how=how)
            elif name == POSITIONS and grid != tower.grid:
                tensor = resample_positions(tensor, grid)
                row = replace(row, status="resampled", how=f"grid {tower.grid} to {grid}, bicubic")
            if tensor.shape != parameters[name].shape:
                raise QLIPError(
                    f"{file}: tensor {row.source_keys[0]!r} gives {name!r} of shape {tuple(tensor.shape)}, the config"
                    f" makes it {tuple(parameters[name].shape)}; is the file whole?"
                )
            parameters[name].data.copy_(tensor)
        rows.append(row)
    return rows


def _fold_normalization(model: QLIPModel, processor: QLIPProcessor) -> QLIPProcessor:
    """Move the normalisation into the patch embedding: W(x - m)/s + b = W'(x - 0.5)/0.5 + b'. Returns the processor."""
    given = processor.preprocessing
    usual = Preprocessing(given.size, given.shortest_edge)
    mean, std, new_mean, new_std = (
        torch.tensor(values, dtype=torch.float64)[:, None, None]
        for values in (given.mean, given.std, usual.mean, usual.std)
    )
    patches = model.vision_model.embeddings.patch_embedding
    weight = patches.weight.data.double()  # (D, 3, p, p)
    assert patches.bias is not None
    patches.bias.data.add_((weight * ((new_mean - mean) / std)).sum((1, 2, 3)).float())
    patches.weight.data.copy_(weight * (new_std / std))
    return QLIPProcessor(replace(given, mean=usual.mean, std=usual.std), processor.tokenizer)


def _temperature(source: Source, mine: list[Tower], model: QLIPModel) -> list[Row]:
    """Copy the temperature if both towers come from one file: with a new partner it would be far too sharp."""
    rows: list[Row] = []
    for key in (key for key in TEMPERATURE if key in source.tensors):
        if len(mine) < 2 or rows:
            why = "given twice" if rows else "belongs to the pair of towers, of which one was taken"
            rows.append(Row("dropped", source.name, (key,), (), why))
            continue
        if source.tensors[key].numel() != 1:
            raise QLIPError(f"{source.name}: {key!r} has shape {tuple(source.tensors[key].shape)}, expected one number")
        model.logit_scale.data.copy_(source.tensors[key].float().reshape(()))
        rows.append(Row("mapped", source.name, (key,), ("logit_scale",)))
    return rows


def leftovers(source: Source, towers: Sequence[Tower]) -> list[Row]:
    """Rows for the keys of a file that no tower took or dropped, except the temperature's.

    Raises:
        QLIPError: a key that no format knows.
    """
    rows = [Row("dropped", source.name, (key,), (), reason) for key, reason in source.others.items()]
    accounted = {key for tower in towers for row in tower.rows for key in row.source_keys}
    asked = {tower.part for tower in towers}
    unknown = []
    for key in source.tensors:
        if key in accounted or key in TEMPERATURE:
            continue
        reasons = [drop.reason for pattern, drop in _BESIDE.items() if match(pattern, key)]
        reasons += [f"the {NAMES[part]} was not asked for" for part in _parts_of(source, key) - asked]
        if reasons:
            rows.append(Row("dropped", source.name, (key,), (), reasons[0]))
        else:
            unknown.append(key)
    if unknown:
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        kinds = " and ".join(dict.fromkeys(tower.kind for tower in towers))
        raise QLIPError(
            f"{source.name}: {unknown[0]!r}{more} is not a name of {kinds}, and its effect would be lost; remove the"
            " tensor from the file if the tower works without it"
        )
    return rows


def _parts_of(source: Source, key: str) -> set[Part]:
    """The parts that a key may belong to."""
    starts: tuple[tuple[str, Part], ...] = (("visual.", "vision"), ("text.", "text"))
    parts: set[Part] = {part for start, part in starts if key.startswith(start)}
    for format in FORMATS:
        prefix = format.prefix_in(source.tensors)
        if prefix is not None and key.startswith(prefix):
            parts |= {format.part for pattern in format.rules if match(pattern, key[len(prefix) :])}
    return parts


def _fresh(model: QLIPModel, towers: list[Tower], rows: list[Row]) -> list[Row]:
    """Rows of the parameters that no source filled. Raises QLIPError for one that a source should have filled."""
    filled = {name for row in rows for name in row.target_keys}
    left = (name for name, _ in model.named_parameters() if name not in filled)
    return [Row("fresh", None, (), (name,), _why_fresh(name, towers)) for name in left]


def _why_fresh(name: str, towers: list[Tower]) -> str:
    if name == "logit_scale":
        return "temperature: no pair of towers brings one"
    for start, reason in _WHY_FRESH.items():
        if name.startswith(start):
            return reason
    part: Part = "vision" if name.startswith((ROOTS["vision"], PROJECTIONS["vision"])) else "text"
    tower = next((tower for tower in towers if tower.part == part), None)
    if tower is None:
        return f"{NAMES[part]}: no source given"
    for place, reason in _TOWER_MAY_LACK.items():
        if place in name:
            return reason
    raise tower.missing(name)
