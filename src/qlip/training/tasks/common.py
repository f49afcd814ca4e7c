"""Terms of the quantizer, which both stages have."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from qlip.modeling.quantizer import LossWeights, Quantizer, losses_of_means
from qlip.modeling.reduce import all_reduce_sum
from qlip.training.task import LossInputs
from qlip.training.tasks.recipe_schema import EntropySection, Ramp


class QuantizerTerms:
    """L_bsq (eq. 1) and commitment out of the sums of the global batch, with weights that may follow ramps.

    Args:
        quantizer: of the model; its estimator is set to the recipe's.
        settings: of the recipe.
    """

    def __init__(self, quantizer: Quantizer, settings: EntropySection) -> None:
        self.num_bits, self.own, self.settings = quantizer.num_bits, quantizer.weights, settings
        if settings.estimator is not None:
            quantizer.estimator = settings.estimator
        self.weights = quantizer.weights
        self.at(0)

    def at(self, step: int) -> None:
        """Set the weights of a step."""
        own = self.own
        persample = value_at(self.settings.persample, step, own.gamma_0)
        codebook = value_at(self.settings.codebook, step, own.gamma_1)
        self.weights = LossWeights(own.beta, persample, codebook, own.inv_temperature)

    def __call__(
        self, inputs: LossInputs, sums: Mapping[str, Tensor], tokens: float
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """L_bsq and the commitment, and what is logged of them.

        Args:
            inputs: of this rank, for the codebook's pool.
            sums, tokens: of all ranks.
        """
        codebook = all_reduce_sum(inputs.mean_stats["codebook"]) / tokens
        found = losses_of_means(sums["persample"] / tokens, codebook, sums["commitment"] / tokens, self.weights)
        report = {
            "bsq": found.loss,
            "persample_bits": found.persample_entropy / math.log(2),
            "codebook_use": found.codebook_entropy / (math.log(2) * self.num_bits),
            "commitment": found.commitment,
        }
        return found.loss, found.commitment, report


def value_at(setting: float | Ramp | None, step: int, default: float) -> float:
    """A number of the recipe at a step."""
    if setting is None:
        return default
    return setting.at(step) if isinstance(setting, Ramp) else setting
