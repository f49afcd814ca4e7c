"""Stage 1: everything trains (SPEC section 2): alpha_r L_mse + alpha_q L_bsq + alpha_a L_align."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from qlip.data.stream import Batch
from qlip.modeling import QLIPModel, QLIPOutput, QLIPProcessor
from qlip.training.losses import info_nce, pixel_mse
from qlip.training.optimizers import build_optimizers
from qlip.training.recipe import LossSection, OptimizerSection
from qlip.training.task import Losses, Phase, Report


class Stage1:
    """Reconstruction, quantisation and alignment, one model and one backward pass.

    Args:
        model: in training mode.
        processor: saved beside the weights.
        weights: the recipe's loss section.
        optimizer: the recipe's optimizer section.
    """

    def __init__(
        self, model: QLIPModel, processor: QLIPProcessor, weights: LossSection, optimizer: OptimizerSection
    ) -> None:
        self.model, self.processor, self.weights = model, processor, weights
        optimizers = build_optimizers(model.named_parameters(), optimizer)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._phases = (Phase("model", optimizers, parameters, optimizer.clip, self.losses),)

    @property
    def phases(self) -> Sequence[Phase]:
        """The one phase."""
        return self._phases

    def losses(self, batch: Batch) -> tuple[Losses, Report]:
        """Weighted terms of a batch. Pictures without words train reconstruction and codes only."""
        weights = self.weights
        output = self.model(pixel_values=batch.pixel_values)
        mse = pixel_mse(output.reconstructions, batch.pixel_values)
        losses: Losses = {
            "mse": weights.alpha_r * mse,
            "bsq": weights.alpha_q * output.quantizer_loss,
        }
        if weights.commitment:
            losses["commitment"] = weights.commitment * output.commitment
        align = self._align(output, batch)
        if align is not None:
            losses["align"] = weights.alpha_a * align
        return losses, self._report(output, mse, align)

    def _align(self, output: QLIPOutput, batch: Batch) -> Tensor | None:
        worded = batch.has_caption
        if not self.weights.alpha_a or not worded.any():
            return None
        text = self.model(input_ids=batch.input_ids[worded]).text_embeds
        assert output.image_embeds is not None
        return info_nce(output.image_embeds[worded], text, self.model.logit_scale, batch.match_ids[worded])

    def _report(self, output: QLIPOutput, mse: Tensor, align: Tensor | None) -> Report:
        assert output.quantizer_loss is not None and output.persample_entropy is not None
        assert output.codebook_entropy is not None and output.commitment is not None
        bit_nats = math.log(2) * self.model.num_bits
        report: Report = {
            "mse": mse,
            "bsq": output.quantizer_loss,
            "persample_bits": output.persample_entropy / math.log(2),
            "codebook_use": output.codebook_entropy / bit_nats,
            "commitment": output.commitment,
            "temperature": 1 / self.model.logit_scale.exp(),
        }
        if align is not None:
            report["align"] = align
        return {name: value.detach() for name, value in report.items()}

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep the temperature above CLIP's bound."""
        self.model.logit_scale.clamp_(max=math.log(self.weights.max_logit_scale))

    def export(self, folder: Path) -> None:
        """A whole checkpoint: weights, config, preprocessing, vocabulary."""
        self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) normalised pixels to originals and reconstructions in [0, 1]."""
        self.model.eval()
        rebuilt = self.model.decode(self.model.encode(pixel_values), self.model.grid_of(pixel_values))
        self.model.train()
        to_unit = self.processor.preprocessing.denormalize
        return to_unit(pixel_values), to_unit(rebuilt)
