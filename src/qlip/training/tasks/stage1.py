"""Stage 1: everything trains: alpha_r L_mse + alpha_q L_bsq + alpha_a L_align (arXiv 2502.05178, section 3.2)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qlip.data.loader.batch import Batch
from qlip.data.sources.training_text import TrainingText
from qlip.errors import QLIPError
from qlip.modeling import QLIPModel, QLIPProcessor
from qlip.modeling.parts import qlip_groups
from qlip.modeling.transformer import Layer, SwiGLU
from qlip.training.losses import info_nce, siglip
from qlip.training.losses.balance import GradientNormBalance, UncertaintyBalance
from qlip.training.optim.optimizers import adamw, build_optimizers
from qlip.training.parallel.collectives import gather_rows, shares_of
from qlip.training.parallel.global_sums import filled, global_sums
from qlip.training.parallel.parallelize import placed
from qlip.training.task import Losses, LossInputs, Phase, Report, Task, Wrap, unwrapped
from qlip.training.tasks.codebook_usage import UsageMonitor
from qlip.training.tasks.common import QuantizerTerms
from qlip.training.tasks.freezing import set_trainable
from qlip.training.tasks.recipe import Stage1Recipe
from qlip.training.tasks.recipe_schema import Stage1Losses


class Stage1Network(nn.Module):
    """Networks that run on a rank's images and captions: one forward pass, whose outputs are plain tensors.

    Args:
        model: in training mode.
        weights: a term of weight 0 needs no network: without alignment no words are read, without reconstruction no
            image is rebuilt.
    """

    def __init__(self, model: QLIPModel, weights: Stage1Losses) -> None:
        super().__init__()
        self.model, self.weights = model, weights

    def forward(self, pixel_values: Tensor, input_ids: Tensor, rebuild: bool) -> dict[str, Tensor]:
        """Images, and the words of some of them.

        Args:
            pixel_values: (B, 3, H, W), B at least 1.
            input_ids: (B_text, N) int64, B_text at least 1.
            rebuild: also the squared error.

        Returns:
            ``image_embeds`` (B, E) and ``text_embeds`` (B_text, E), where aligned; ``squared_error``, a scalar, where
            rebuilt; ``persample``, ``codebook``, ``commitment``: see :class:`QuantizerStatistics`; ``indices``.
        """
        rebuild = rebuild and self.weights.alpha_r > 0
        # words first, the decoder last: left out or not, what runs before it draws the same random numbers
        text_embeds = self.model(input_ids=input_ids).text_embeds if self.weights.alpha_a else None
        output = self.model(pixel_values=pixel_values, reconstruct=rebuild)
        assert output.vision_model_output is not None
        quantizer = output.vision_model_output.quantizer
        statistics = quantizer.statistics
        assert statistics is not None, "the model must be in training mode"
        found = {
            "persample": statistics.persample,
            "codebook": statistics.codebook,
            "commitment": statistics.commitment,
            "indices": quantizer.indices,
        }
        if self.weights.alpha_a:
            found["image_embeds"] = output.image_embeds
            found["text_embeds"] = text_embeds
        if rebuild:
            found["squared_error"] = (output.reconstructions.float() - pixel_values.float()).square().sum()
        return found


class Stage1(Task):
    """Reconstruction, quantisation and alignment, one model and one backward pass.

    Args:
        model: on its device, in training mode.
        processor: saved beside the weights.
        recipe: losses, locked parts, optimizer.
        wrap: makes the network run on all ranks.

    Attributes:
        training_text: record of the captions, exported with the weights; None leaves it out.

    Raises:
        QLIPError: nothing is left to train, or options that do not go together.
    """

    training_text: TrainingText | None = None

    def __init__(
        self, model: QLIPModel, processor: QLIPProcessor, recipe: Stage1Recipe, wrap: Wrap = unwrapped
    ) -> None:
        self.model, self.processor, self.weights = model, processor, recipe.losses
        set_trainable(model, recipe)
        self.terms = QuantizerTerms(model.vision_model.quantizer, recipe.losses.entropy)
        self.usage = UsageMonitor(model.num_bits, model.group_size).to(model.device)
        self.extra = nn.ParameterDict()
        if recipe.losses.align.kind == "siglip" and recipe.losses.alpha_a:
            self.extra["siglip_bias"] = nn.Parameter(torch.tensor(recipe.losses.align.bias, device=model.device))
        self.balance = _balance(recipe.losses)
        combined = [model.logit_scale, *self.extra.values()]
        if self.balance is not None:
            placed(self.balance, model.device)
            combined += list(self.balance.parameters())
        self._network = wrap(Stage1Network(model, recipe.losses), [model.logit_scale])
        settings = recipe.optimizer
        optimizers = build_optimizers(model.named_parameters(), settings, qlip_groups(model), settings.parts)
        added = [
            (name, one) for module in (self.extra, self.balance) if module for name, one in module.named_parameters()
        ]
        if added:
            group = {"params": added, "weight_decay": 0.0, "lr": settings.lr, "initial_lr": settings.lr}
            optimizers.append(adamw([group], settings.lr, settings.betas, settings.eps, 0.0))
        trained = [one for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]]
        self._phases = (
            Phase(
                "model",
                optimizers,
                trained,
                settings.clip,
                self.forward,
                self.loss,
                (self._network,),
                [one for one in combined if one.requires_grad],
            ),
        )

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The model, the use of its codes, and what the losses learn beside it."""
        found: dict[str, nn.Module] = {"model": self.model, "usage": self.usage}
        if len(self.extra):
            found["extra"] = self.extra
        if self.balance is not None:
            found["balance"] = self.balance
        return found

    @property
    def phases(self) -> Sequence[Phase]:
        """The one phase."""
        return self._phases

    @property
    def shared_layer(self) -> nn.Parameter:
        """The last linear layer of the encoder's last MLP, as in the paper."""
        layer = self.model.vision_model.encoder.layers[-1]
        assert isinstance(layer, Layer)
        last = layer.mlp.w3 if isinstance(layer.mlp, SwiGLU) else layer.mlp.fc2
        assert isinstance(last, nn.Linear) and isinstance(last.weight, nn.Parameter)
        return last.weight

    # ---------------------------------------------------------------- a batch

    def forward(self, batch: Batch, cached_only: bool) -> LossInputs:
        """Run the network; images without words train reconstruction and codes only."""
        worded = batch.has_caption.nonzero().squeeze(1)[: None if self.weights.alpha_a else 0]  # (B_text,)
        words, real = len(worded), int(len(batch) > 0)
        pixels = filled(batch.pixel_values)
        found = self._network(pixels, filled(batch.input_ids[worded]), not cached_only)
        inputs = LossInputs(counts={"pixels": batch.pixel_values.numel(), "words": words})
        inputs.sums = {name: found[name] * real for name in ("persample", "commitment")}
        inputs.mean_stats = {"codebook": found["codebook"] * real}
        inputs.counts["tokens"] = found["indices"].shape[:2].numel() * real
        if self.weights.alpha_r:
            inputs.sums["squared_error"] = found.get("squared_error", torch.zeros_like(found["persample"])) * real
        if self.weights.alpha_a:
            images = found["image_embeds"][: len(batch)][worded]
            inputs.embeddings = {"images": images, "texts": found["text_embeds"][:words]}
            inputs.metadata = {"match_ids": batch.match_ids[worded]}
        if not cached_only:
            self.usage.update(found["indices"][: len(batch)])
        return inputs

    def loss(self, inputs: LossInputs) -> tuple[Losses, Report]:
        """alpha_r L_mse + alpha_q L_bsq + alpha_a L_align, over the global batch."""
        weights, losses = self.weights, Losses()
        sums, counts = global_sums(inputs, self.model.device)
        bsq, commitment, report = self.terms(inputs, sums, counts["tokens"])
        if weights.alpha_r:
            report["mse"] = sums["squared_error"] / counts["pixels"]
            losses["mse"] = weights.alpha_r * report["mse"]
        if weights.alpha_q:
            losses["bsq"] = weights.alpha_q * bsq
        if weights.commitment:
            losses["commitment"] = weights.commitment * commitment
        if weights.alpha_a and counts["words"]:
            align, floor = self._align(inputs)
            losses["align"] = weights.alpha_a * align
            report |= {"align": align, "align_floor": floor, "temperature": 1 / self.model.logit_scale.exp()}
        if not losses:  # alignment alone, and no caption in the global batch
            losses["align"] = torch.stack([rows.sum() for rows in inputs.embeddings.values()]).sum() * 0
        if self.balance is not None:
            losses, factors = self.balance(losses, self.shared_layer)
            report |= factors
        return losses, {name: value.detach() for name, value in report.items()}

    def _align(self, inputs: LossInputs) -> tuple[Tensor, Tensor]:
        """The loss, and the least it can be where equals share their target: the mean entropy of the targets."""
        settings, images, texts = self.weights.align, inputs.embeddings["images"], inputs.embeddings["texts"]
        ids = inputs.metadata["match_ids"] if settings.share_targets else None
        scale = self.model.logit_scale
        if settings.kind == "siglip":
            loss = siglip(images, texts, scale, self.extra["siglip_bias"], ids, chunk_size=settings.chunk_size)
            return loss, torch.zeros_like(loss)
        loss = info_nce(images, texts, scale, ids, chunk_size=settings.chunk_size)
        return loss, torch.zeros_like(loss) if ids is None else mean_target_entropy(ids)

    # ---------------------------------------------------------------- around a step

    def before_step(self, step: int) -> None:
        """Move the entropies' weights."""
        self.terms.at(step)

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the temperature above CLIP's bound."""
        if self.weights.alpha_a:
            self.model.logit_scale.clamp_(max=math.log(self.weights.align.max_logit_scale))

    def summary(self) -> Report:
        """Use of bits and codes since the last one."""
        return self.usage.summary()

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """A whole checkpoint: weights, config, preprocessing, vocabulary, and the record of the captions if set."""
        self.model.save_pretrained(folder, state=weights)
        self.processor.save_pretrained(folder)
        if self.training_text is not None:
            self.training_text.save(folder)

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) normalised pixels to originals and reconstructions in [0, 1]."""
        self.model.eval()
        rebuilt = self.model.decode(self.model.encode(pixel_values), self.model.grid_of(pixel_values))
        self.model.train()
        to_unit = self.processor.preprocessing.denormalize
        return to_unit(pixel_values), to_unit(rebuilt)


def _balance(weights: Stage1Losses) -> GradientNormBalance | UncertaintyBalance | None:
    alphas = {"mse": weights.alpha_r, "align": weights.alpha_a}
    if weights.balance == "fixed":
        return None
    if not all(alphas.values()):
        raise QLIPError(
            f"losses.balance={weights.balance} balances two objectives; alpha_r and alpha_a must be above 0"
        )
    if weights.balance == "gradient_norm":
        # the terms have their weights already: equal norms, or alpha_r would count twice
        return GradientNormBalance(dict.fromkeys(alphas, 1.0), reference="align")
    return UncertaintyBalance(list(alphas))


@torch.no_grad()
def mean_target_entropy(match_ids: Tensor) -> Tensor:
    """The floor of InfoNCE with shared targets: the mean over the global batch of the logarithm of a pair's twins.

    Args:
        match_ids: (b,) int64 of this rank.

    Returns:
        Scalar float32, in nats.
    """
    (ids,) = gather_rows([match_ids], shares_of(len(match_ids), match_ids.device))
    counts: Tensor = ids.unique(return_counts=True)[1].float()
    floor: Tensor = (counts * counts.log()).sum() / counts.sum()
    return floor
