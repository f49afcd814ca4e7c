"""A QLIP whose towers are pretrained: found, fitted, put in place, and accounted for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.modeling.config import QLIPConfig
from qlip.modeling.convert import configs
from qlip.modeling.convert.configs import AUTO, Sizes
from qlip.modeling.convert.layouts import TEMPERATURE, Part
from qlip.modeling.convert.processing import build_processor
from qlip.modeling.convert.reading import Source, read
from qlip.modeling.convert.report import Recognised, Report, Row, Status
from qlip.modeling.convert.resample import resample_patches, resample_positions
from qlip.modeling.convert.taking import leftovers, take
from qlip.modeling.convert.tower import NAMES, PROJECTIONS, ROOTS, Taken, Tower
from qlip.modeling.model import QLIPModel
from qlip.modeling.processor import QLIPProcessor

_OTHER_PARTS = {
    "vision_model.quant_embed": "bottleneck: no pretrained tower has one",
    "vision_decoder.": "decoder: no pretrained tower has one",
}
_TOWER_MAY_LACK = {
    "self_attn.inner_attn_ln.": "the source has no norm inside attention: starts at weight 1, bias 0",
    "vision_model.post_layernorm.": "the source has no norm of [CLS]: starts at weight 1, bias 0",
    "projection.weight": "the source has no projection",
    "projection.bias": "the source's projection has none: starts at 0",
    "patch_embedding.bias": "the source's patch embedding has none: starts at 0",
}


@dataclass(frozen=True)
class Conversion:
    """What :func:`convert` makes.

    Attributes:
        model: in eval mode, float32.
        processor: how the image tower was shown images; the vocabulary where there is one.
        report: what became of every tensor.
    """

    model: QLIPModel
    processor: QLIPProcessor
    report: Report

    def save(self, folder: str | Path) -> None:
        """Write the whole checkpoint folder: config, weights, preprocessing, vocabulary."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)


def convert(
    vision: str | Path | None = None,
    text: str | Path | None = None,
    *,
    config: QLIPConfig | str | Path = AUTO,
    sizes: Sizes | None = None,
    tokenizer: str | Path | None = None,
    quick_gelu: bool | None = None,
    approximate: bool = False,
    seed: int = 0,
) -> Conversion:
    """A QLIP that starts from pretrained towers; what they do not hold is random.

    Args:
        vision: weights of an EVA-02, EVA-CLIP or (approximately) OpenCLIP image tower, or a QLIP checkpoint folder.
        text: weights of an EVA-CLIP or OpenCLIP text tower, or a QLIP checkpoint folder; may be the same file.
        config: a configuration, its name or file, or ``"auto"``: built from the sources.
        sizes: what ``"auto"`` leaves open.
        tokenizer: CLIP's merges, or a folder with a vocabulary's files.
        quick_gelu: the activation of CLIP towers, which no file says; by default QuickGELU for OpenAI's own files only.
        approximate: go on where a source has what a QLIP has no place for, and drop that.
        seed: of the random parts.

    Raises:
        QLIPError: neither source, one that cannot be read or is not known, or one that does not fit the configuration.
    """
    if vision is None and text is None:
        raise QLIPError("nothing to convert: give an image tower (--vision), a text tower (--text), or both")
    sizes = sizes or Sizes()
    named = configs.resolve(config, sizes)
    image, words = _towers(vision, text, quick_gelu, approximate)
    towers = [tower for tower in (image, words) if tower is not None]
    if quick_gelu is not None and not any(tower.asked_activation for tower in towers):
        raise QLIPError(
            "quick_gelu (--quick-gelu) is read for CLIP text towers and OpenCLIP image towers; neither is here"
        )
    where = f'config "{AUTO}"' if named is None else str(config) if isinstance(config, str | Path) else "the config"
    chosen = configs.build(image, words, sizes) if named is None else named
    for tower in towers:
        configs.check(tower, chosen, where)
    chosen, changes = configs.adopt(chosen, towers, where)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = QLIPModel(chosen).eval()
    report = Report([Recognised(tower.part, tower.source.name, _in_words(tower)) for tower in towers])
    for tower in towers:
        report.rows += [*_place(tower, model), *tower.rows]
    for source in {id(tower.source): tower.source for tower in towers}.values():
        mine = [tower for tower in towers if tower.source is source]
        report.rows += [*_temperature(source, mine, model), *leftovers(source, mine, approximate)]
    report.rows += _fresh(model, towers, report)
    processor, said = build_processor(chosen, image, words, tokenizer)
    report.notes = [note for tower in towers for note in tower.notes] + _differences(report) + changes + said
    return Conversion(model, processor, report)


def _towers(
    vision: str | Path | None, text: str | Path | None, quick_gelu: bool | None, approximate: bool
) -> tuple[Tower | None, Tower | None]:
    """The two towers, from one reading where both are in one file."""
    image = None if vision is None else take(read(vision), "vision", quick_gelu, approximate)
    if text is None:
        return image, None
    same = image is not None and vision is not None and Path(vision).expanduser() == Path(text).expanduser()
    source = image.source if image is not None and same else read(text)
    return image, take(source, "text", quick_gelu, approximate)


def _in_words(tower: Tower) -> str:
    details = [f"names behind {tower.prefix!r}" if tower.prefix else "", tower.source.unwrapped]
    more = ", ".join(detail for detail in details if detail)
    return f"{tower.kind}; {more}" if more else tower.kind


def _place(tower: Tower, model: QLIPModel) -> list[Row]:
    """Copy a tower into the model; rows of what was copied."""
    parameters = dict(model.named_parameters())
    rows = []
    for taken in tower.taken:
        status, how = _fate(tower, taken, model.config)
        for name, tensor in taken.parts.items():
            if name not in parameters:
                raise QLIPError(f"{tower.source.name}: {taken.key!r} has no place: this config makes no {name!r}")
            if status == "resampled":
                tensor = _resampled(taken, tensor, model.config)
            if tensor.shape != parameters[name].shape:
                wanted = tuple(parameters[name].shape)
                raise QLIPError(
                    f"{tower.source.name}: tensor {taken.key!r} gives {name!r} of shape {tuple(tensor.shape)},"
                    f" the config makes it {wanted}; is the file whole?"
                )
            parameters[name].data.copy_(tensor)
        rows.append(Row(status, tower.source.name, (taken.key,), tuple(taken.parts), how))
    return rows


def _fate(tower: Tower, taken: Taken, config: QLIPConfig) -> tuple[Status, str]:
    """Whether a tensor has to be resampled, and what is done to it in words."""
    patch, grid = config.vision_config.patch_size, config.vision_config.grid_size
    match taken.rule.how:
        case "patches" if patch != tower.patch_size:
            return "resampled", f"patch {tower.patch_size} to {patch}, pseudo-inverse resize (FlexiViT)"
        case "positions" if grid != tower.grid:
            return "resampled", f"grid {tower.grid} to {grid}, bicubic"
        case "split":
            return "mapped", f"split in {len(taken.parts)}"
        case "transposed":
            return "mapped", "transposed"
    return "mapped", ""


def _resampled(taken: Taken, tensor: Tensor, config: QLIPConfig) -> Tensor:
    if taken.rule.how == "patches":
        return resample_patches(tensor, config.vision_config.patch_size)
    return resample_positions(tensor, config.vision_config.grid_size)


def _temperature(source: Source, mine: list[Tower], model: QLIPModel) -> list[Row]:
    """The temperature goes with a pair of towers: for one of them with another partner it would be far too sharp."""
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


def _fresh(model: QLIPModel, towers: list[Tower], report: Report) -> list[Row]:
    """Rows of the parameters that no source filled. Raises QLIPError for one that a source should have filled."""
    filled = {name for row in report.rows for name in row.target_keys}
    return [
        Row("fresh", None, (), (name,), _why_fresh(name, towers))
        for name, _ in model.named_parameters()
        if name not in filled
    ]


def _why_fresh(name: str, towers: list[Tower]) -> str:
    if name == "logit_scale":
        return "temperature: no pair of towers brings one"
    for start, reason in _OTHER_PARTS.items():
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


def _differences(report: Report) -> list[str]:
    """Where a tower computes something else than its source."""
    lacking = _TOWER_MAY_LACK["self_attn.inner_attn_ln."]
    if not any(row.how == lacking for row in report.rows):
        return []
    return [
        f"{NAMES['vision']}: the source's blocks have no norm inside attention (EVA-02's have none before their CLIP"
        " training), a QLIP's with sub-LN have: the encoder computes something else until it is trained"
    ]
