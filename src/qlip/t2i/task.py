"""The task ``t2i``: a decoder transformer over image tokens, by the likelihood of each group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from qlip.archive.dataset.dataset import TokenDataset
from qlip.archive.dataset.labelled import LabelledTokens
from qlip.data.loader.feed import PositionFeed
from qlip.data.sources.captions import load_templates
from qlip.errors import QLIPError, nearest
from qlip.files import written_aside
from qlip.lm.conditions import Condition
from qlip.lm.config import DecoderConfig
from qlip.lm.model import DecoderModel, param_groups
from qlip.lm.text_encoders import CachedTextEncoder, open_text_encoder
from qlip.modeling.checkpoint import resolve
from qlip.modeling.indices import regroup
from qlip.modeling.processor import QLIPProcessor
from qlip.modeling.tokenizer import CLIPTokenizer
from qlip.t2i.data import (
    ReadCaptions,
    T2IBatch,
    captions_of_labels,
    condition_kind,
    open_feed,
    read_rows,
    unread_captions,
)
from qlip.t2i.llamagen_codes import open_codes
from qlip.t2i.recipe import T2IRecipe
from qlip.t2i.settings import DrawSettings
from qlip.t2i.token_source import ConditionKind, TokenSource, open_dataset, open_scenes
from qlip.tokens.image_codec import ImageCodec
from qlip.training.costs import without_memory
from qlip.training.job import Hook, Job
from qlip.training.linear_task import LinearTask
from qlip.training.log.eval_context import Applied, evaluating
from qlip.training.log.runlog import RunLog
from qlip.training.parallel.distributed import Parallel
from qlip.training.plan import SAMPLES, Plan
from qlip.training.task import Losses, LossInputs, Report, Wrap, unwrapped

FIRST_BATCH = "first-batch.png"
NAMED = ("code_fingerprint", "text_encoder", "text_fingerprint")
"""Keys of a decoder's configuration that name other models; they have checks of their own."""
SHOWN, COLUMNS = 16, 8
"""Images of the first batch that are shown, and in a row of them."""


class T2ITask(LinearTask[T2IBatch]):
    """Mean negative log-likelihood of all groups; reports bits per image, and per group of a token.

    Args:
        model: in training mode.
        recipe: of the run.
        tokenizer: of captions; saved beside the model.
        settings: to draw with; saved beside the model.
        wrap: wraps the network for distributed training.
    """

    def __init__(
        self,
        model: DecoderModel,
        recipe: T2IRecipe,
        tokenizer: CLIPTokenizer | None,
        settings: DrawSettings,
        wrap: Wrap = unwrapped,
    ) -> None:
        super().__init__(model, recipe.optimizer, param_groups(model), wrap)
        self.decoder, self.recipe, self.tokenizer, self.settings = model, recipe, tokenizer, settings
        self.groups = model.config.num_groups
        self.terms = {f"group{number}": "tokens" for number in range(self.groups)}  # type: ignore[misc]
        self.in_random_order = 0.0

    def before_step(self, step: int) -> None:
        """Set the share of images in random order."""
        if self.recipe.random_order is not None:
            self.in_random_order = self.recipe.random_order.share(step)

    def counts(self, batch: T2IBatch) -> Mapping[str, int]:
        """Number of tokens."""
        return {"tokens": len(batch) * self.decoder.config.num_tokens}

    def sums(self, batch: T2IBatch) -> Mapping[str, Tensor]:
        """Summed nats of each group of a token."""
        weight = 1.0
        if not len(batch):
            batch, weight = self._dummy(batch), 0.0
        order = batch.order
        if order is not None:
            raster = torch.arange(order.shape[1], device=order.device)
            order = torch.where(batch.turn[:, None] < self.in_random_order, order, raster)
        nats = self.network(batch.indices, batch.condition, batch.inputs, batch.dropped, order)  # (B, N, K)
        return {f"group{number}": weight * one.sum() for number, one in enumerate(nats.unbind(-1))}

    def losses(self, means: Mapping[str, Tensor]) -> Losses:
        """Mean over the groups."""
        return {name: mean / self.groups for name, mean in means.items()}

    def loss(self, inputs: LossInputs) -> tuple[Losses, Report]:
        """See :class:`LinearTask`; the report is in bits."""
        losses, means = super().loss(inputs)
        bits = {name: mean / math.log(2) for name, mean in means.items()}
        whole = torch.stack(list(bits.values())).sum() * self.decoder.config.num_tokens
        return losses, {"bits_per_image": whole} | (bits if self.groups > 1 else {})

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """Write the decoder's folder, with its settings to draw with and the vocabulary of its captions."""
        self.decoder.save_pretrained(folder, state=weights)
        self.settings.save(folder)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)

    def _dummy(self, batch: T2IBatch) -> T2IBatch:
        """One sample of zeros, for a rank without samples."""

        def one(tensor: Tensor) -> Tensor:
            return tensor.new_zeros(1, *tensor.shape[1:])

        mask = None if batch.mask is None else one(batch.mask) + 1
        order = None if batch.order is None else torch.arange(batch.order.shape[1], device=batch.order.device)[None]
        indices = batch.indices.new_zeros(1, self.decoder.config.num_tokens, self.groups)
        return T2IBatch(indices, indices, one(batch.values), mask, one(batch.dropped), order, one(batch.turn))


class BitsHook:
    """Logs bits per image of held-out tokens, with shuffled conditions as the control.

    Args:
        measure: indices and conditions to nats (B, N, K), on all ranks together.
        model: that trains.
        rows: held-out indices (B, N, K) and conditions.
        name: of the set.
        every: steps between two measurements.
    """

    AT_ONCE = 64

    def __init__(
        self,
        measure: Callable[..., Tensor],
        model: DecoderModel,
        rows: tuple[Tensor, Condition],
        name: str,
        every: int,
    ) -> None:
        self.measure, self.model, self.name, self.every = measure, model, name, every
        self.indices, self.condition = rows

    def __call__(self, step: int, log: RunLog, applied: Applied = nullcontext) -> None:
        """Measure if it is due; all ranks call it."""
        if step % self.every:
            return
        with evaluating(self.model.device, log.clock, applied, self.model), torch.no_grad():
            values = {"bits_per_image": self._bits(0), "bits_per_image_shuffled": self._bits(1)}
        log.validation(step, self.name, values)

    def _bits(self, shift: int) -> float:
        """Mean bits per image, with the conditions of the images ``shift`` further."""
        total, device = 0.0, self.model.device
        place = (torch.arange(len(self.indices)) + shift) % len(self.indices)
        for part in torch.arange(len(self.indices)).split(self.AT_ONCE):
            mask = self.condition.mask
            condition = Condition(
                self.condition.values[place[part]].to(device), None if mask is None else mask[place[part]].to(device)
            )
            total += float(self.measure(self.indices[part].to(device), condition).sum())
        return total / math.log(2) / len(self.indices)


@dataclass(frozen=True)
class _Data:
    """A recipe's tokens and conditions."""

    tokens: TokenSource
    kind: ConditionKind
    settings: DrawSettings
    tokenizer: CLIPTokenizer | None = None
    encoder: CachedTextEncoder | None = None
    classes: list[str] | None = None
    num_classes: int = 1
    templates: tuple[str, ...] = ()
    unread: str | None = None  # captions of which a part is not read

    @classmethod
    def open(cls, recipe: T2IRecipe) -> Self:
        section, settings = recipe.data, _settings(recipe)
        common = {"batch_size": recipe.batch_size, "num_workers": section.num_workers}
        if section.codes:
            folders = (section.codes,) if isinstance(section.codes, str) else section.codes
            codes = open_codes(folders, section.codebook_size, section.num_classes, recipe.seed, **common)
            return cls(codes, "class", settings, num_classes=section.num_classes)
        if section.scenes:
            scenes = open_scenes(section.scenes, recipe.tokenizer, section.group_size, **common)
            return cls._of_captions(recipe, scenes, settings)
        assert section.tokens is not None
        dataset = TokenDataset(section.tokens, section.group_size)
        templates = () if section.templates is None else load_templates(section.templates)
        kind = condition_kind(dataset, _wanted(recipe), templates=bool(templates))
        tokens = open_dataset(dataset, recipe)
        if kind == "caption":
            classes = settings.classes | captions_of_labels(dataset, templates)
            found = cls._of_captions(recipe, tokens, settings.model_copy(update={"classes": classes}), templates)
            source = found.encoder or found.tokenizer
            assert source is not None
            return replace(found, unread=unread_captions(dataset, source))
        if kind == "none":
            return cls(tokens, kind, settings)
        names = list(LabelledTokens(dataset).classes)
        return cls(tokens, kind, settings, classes=names, num_classes=len(names))

    @classmethod
    def _of_captions(
        cls, recipe: T2IRecipe, tokens: TokenSource, settings: DrawSettings, templates: tuple[str, ...] = ()
    ) -> Self:
        encoder = recipe.data.text_encoder
        if encoder is None and recipe.model.init is not None:
            encoder = _config_of(recipe.model.init).text_encoder
        if encoder is None:
            return cls(tokens, "caption", settings, tokenizer=_vocabulary(recipe), templates=templates)
        opened = CachedTextEncoder(open_text_encoder(encoder))
        return cls(tokens, "caption", settings, encoder=opened, templates=templates)

    @property
    def read(self) -> ReadCaptions | None:
        return self.tokenizer if self.encoder is None else self.encoder.features

    def condition(self) -> dict[str, Any]:
        """Keys of the decoder's configuration that say what it draws from."""
        if (encoder := self.encoder) is not None:
            return {
                "condition": "features",
                "condition_size": encoder.size,
                "prefix_length": encoder.length,
                "text_encoder": encoder.name,
                "text_fingerprint": encoder.fingerprint,
            }
        if self.tokenizer is not None:
            return {
                "condition": "tokens",
                "condition_size": self.tokenizer.vocab_size,
                "prefix_length": self.tokenizer.length,
            }
        classes = self.classes
        return {
            "condition": "class",
            "condition_size": self.num_classes,
            "prefix_length": 1,
            "classes": None if classes is None else tuple(classes),
        }

    def feed(self, recipe: T2IRecipe, config: DecoderConfig) -> PositionFeed[T2IBatch]:
        dropout = config.condition_dropout if recipe.condition_dropout is None else recipe.condition_dropout
        dropout = 0.0 if self.kind == "none" else dropout
        return open_feed(recipe, self.tokens, self.kind, self.read, self.templates, dropout)

    @property
    def describe(self) -> str:
        return f"{self.tokens.size} of {self.tokens.name}, condition: {self.kind}"


class T2IKind:
    """The entry point ``t2i`` of the group ``qlip.tasks``."""

    Recipe = T2IRecipe
    folders: ClassVar = ()

    def build(self, recipe: T2IRecipe, parallel: Parallel, folder: Path) -> Job[Any]:
        """See :class:`qlip.training.job.Kind`."""
        data = parallel.all_or_none(lambda: _Data.open(recipe))
        model = parallel.all_or_none(lambda: _build_decoder(recipe, data))
        feed = data.feed(recipe, model.config)
        if data.unread:
            parallel.say(f"{data.tokens.name}: {data.unread}")
        task = T2ITask(model.to(parallel.device), recipe, data.tokenizer, data.settings, parallel.wrap)
        hooks = [] if recipe.validation is None else [parallel.all_or_none(lambda: _bits_hook(recipe, data, task))]
        parallel.on_rank0(partial(_show_first_batch, recipe, data, feed, parallel, folder / FIRST_BATCH))
        return Job(task, feed, hooks, unit="images", describe=data.describe)

    def plan(self, recipe: T2IRecipe) -> Plan:
        """See :class:`qlip.training.plan.Planned`."""
        data = _Data.open(recipe)
        with without_memory():
            model = _build_decoder(recipe, data, lambda name: DecoderModel(_config_of(name)))
            task = T2ITask(model, recipe, data.tokenizer, data.settings)
        batch: Any = data.feed(recipe, model.config).make(np.arange(min(SAMPLES, recipe.batch_size)))
        units = {"image tokens": float(model.config.num_tokens)}
        return Plan(
            task,
            batch,
            units,
            config=model.config.to_dict(),
            notes=[f"data: {data.describe}", *filter(None, [data.unread])],
        )


def _config_of(name: str) -> DecoderConfig:
    return DecoderConfig.from_file(resolve(name) / "config.json")


def _bits_hook(recipe: T2IRecipe, data: _Data, task: T2ITask) -> Hook:
    assert recipe.validation is not None
    name = recipe.validation.tokens
    held_out = TokenDataset(name, data.tokens.group_size)
    task.decoder.check_tokenizer(held_out.info.code_fingerprint, name)
    if held_out.info.grid != data.tokens.grid:
        raise QLIPError(f"{name}: images of {held_out.info.grid} tokens, those to train on have {data.tokens.grid}")
    rows = read_rows(held_out, recipe.validation.limit, data.kind, data.read, data.templates, data.classes)
    return BitsHook(task.network, task.decoder, rows, Path(name).name, recipe.validation.every)


def _build_decoder(
    recipe: T2IRecipe, data: _Data, load: Callable[[str], DecoderModel] = DecoderModel.from_pretrained
) -> DecoderModel:
    """Build the model, in training mode, on the CPU.

    Raises:
        QLIPError: the data do not fit ``model.init``.
    """
    tokens = data.tokens
    decided: dict[str, Any] = {
        "grid": tokens.grid,
        "codebook_size": tokens.codebook_size,
        "num_groups": tokens.num_groups,
        "code_fingerprint": tokens.code_fingerprint,
        "target_positions": recipe.random_order is not None,
        **data.condition(),
    }
    if recipe.model.init is None:
        return DecoderModel(recipe.model.build(**decided)).train()
    model = load(recipe.model.init)
    if tokens.code_fingerprint is not None:
        model.check_tokenizer(tokens.code_fingerprint, tokens.name)
    if (encoder := data.encoder) is not None:
        model.check_text_encoder(encoder.fingerprint, encoder.name)
        names = {"text_encoder": encoder.name, "text_fingerprint": encoder.fingerprint}
        model.config = model.config.model_copy(update=names)  # LlamaGen's decoders do not name theirs
    _check_classes(data, model.config, recipe.model.init)
    for name, value in decided.items():
        own = getattr(model.config, name)
        if name not in NAMED and own != value:
            raise QLIPError(
                f"{tokens.name}: these data make {name} {value!s:.60}, but {recipe.model.init} has {own!s:.60}; choose"
                " data or a decoder that fit each other"
            )
    return model.train()


def _check_classes(data: _Data, config: DecoderConfig, name: str) -> None:
    """Refuse to continue with other classes than a decoder's."""
    mine, known = data.classes, config.classes
    if mine is None or known is None or tuple(mine) == known:
        return
    unknown = next((one for one in mine if one not in known), None)
    if unknown is not None:
        what = f"label {unknown!r} is none of the {len(known):,} classes of {name}{nearest(unknown, known)}"
    else:
        what = f"has labels of {len(mine):,} of the {len(known):,} classes of {name}; it needs images of all"
    raise QLIPError(f"{data.tokens.name}: {what}")


def _show_first_batch(recipe: T2IRecipe, data: _Data, feed: Any, parallel: Parallel, path: Path) -> None:
    """Decode images of the first batch to a file, so that wrong tokens are seen before a long training."""
    tokens = data.tokens
    if tokens.code_fingerprint is None:
        parallel.say(f"no {path.name}: LlamaGen's codes are decoded by its own tokenizer")
        return
    try:
        codec = ImageCodec.from_pretrained(recipe.tokenizer, device="cpu")
    except QLIPError as error:
        parallel.say(f"no {path.name}: {error}")
        return
    model = codec.model
    if model.code_fingerprint != tokens.code_fingerprint:
        parallel.say(f"no {path.name}: {recipe.tokenizer} did not make these tokens; name their model as tokenizer")
        return
    batch: T2IBatch = feed.make(np.arange(min(SHOWN, recipe.batch_size)))
    if not len(batch):
        return
    indices = regroup(batch.inputs, model.group_size, from_group_size=tokens.group_size)
    with torch.inference_mode():
        images = codec.processor.to_images(model.decode(indices, tokens.grid))
    width, height = images[0].size
    columns = min(COLUMNS, len(images))
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * width, number // columns * height))
    with written_aside(path) as aside:
        sheet.save(aside, format="PNG")
    parallel.say(f"first batch, decoded: {path}")


def _wanted(recipe: T2IRecipe) -> ConditionKind | None:
    """Kind of condition that a recipe names, or that its settings of captions or its decoder to start from need."""
    section, init = recipe.data, recipe.model.init
    if section.condition is not None:
        return section.condition
    if section.text_encoder or section.templates or section.short_caption:
        return "caption"
    if init is None:
        return None
    config = _config_of(init)
    if config.condition == "class":
        return None if config.classes is None else "class"
    return "caption"


def _settings(recipe: T2IRecipe) -> DrawSettings:
    """Settings to draw with: each the recipe's, else that of the decoder to start from, else the default."""
    init, own = recipe.model.init, recipe.drawing
    found = DrawSettings() if init is None else DrawSettings.from_folder(resolve(init))
    found = found.model_copy(update={"tokenizer": recipe.tokenizer})
    return found if own is None else own.over(found)


def _vocabulary(recipe: T2IRecipe) -> CLIPTokenizer:
    """The vocabulary of the decoder to start from, else that of ``data.vocabulary``."""
    if (init := recipe.model.init) is not None and (config := _config_of(init)).condition == "tokens":
        own = CLIPTokenizer.from_folder(resolve(init), config.prefix_length)
        if own is not None:
            return own
    name = recipe.data.vocabulary
    tokenizer = QLIPProcessor.from_pretrained(name).tokenizer
    if tokenizer is None:
        raise QLIPError(f"{name}: has no vocabulary for captions; name a checkpoint that has one as data.vocabulary")
    return tokenizer
