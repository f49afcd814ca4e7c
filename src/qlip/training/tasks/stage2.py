"""Stage 2: bottleneck and decoder train: alpha_r L_mse + alpha_q L_bsq + alpha_p L_lpips + alpha_g L_gan.

arXiv 2502.05178, section 3.2. The encoder is frozen and leaves no graph; the text side is not even there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qlip.data.loader.batch import Batch
from qlip.errors import QLIPError
from qlip.evaluation.networks.lpips import LPIPS
from qlip.modeling import QLIPModel, QLIPProcessor
from qlip.modeling.parts import TEXT_SIDE, count_parameters, qlip_groups
from qlip.training.losses.adversarial import priced
from qlip.training.optim.optimizers import build_optimizers
from qlip.training.parallel.global_sums import filled, global_sums
from qlip.training.parallel.parallelize import placed
from qlip.training.task import Frozen, Losses, LossInputs, Phase, Report, Task, Wrap, unwrapped
from qlip.training.tasks.codebook_usage import UsageMonitor
from qlip.training.tasks.common import QuantizerTerms
from qlip.training.tasks.freezing import set_trainable
from qlip.training.tasks.gan import DiscriminatorPlayer
from qlip.training.tasks.recipe import Stage2Recipe
from qlip.training.tasks.stage2_checkpoint import export_whole


class Stage2Network(nn.Module):
    """Networks that run on a rank's images: one forward pass, whose outputs are plain tensors.

    Args:
        model: without its text side; the encoder frozen, so that no graph reaches into it.
    """

    def __init__(self, model: QLIPModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, rebuild: bool) -> dict[str, Tensor]:
        """Rebuild images.

        Args:
            pixel_values: (B, 3, H, W), B at least 1.
            rebuild: False leaves the decoder out.

        Returns:
            ``indices`` (B, N, K); ``rebuilt`` (B, 3, H, W) if asked for; with the quantizer in training mode
            ``persample``, ``codebook``, ``commitment``: see :class:`QuantizerStatistics`.
        """
        output = self.model(pixel_values=pixel_values, reconstruct=rebuild)
        assert output.vision_model_output is not None
        quantizer = output.vision_model_output.quantizer
        found = {"indices": quantizer.indices}
        if quantizer.statistics is not None:
            found |= {name: getattr(quantizer.statistics, name) for name in ("persample", "codebook", "commitment")}
        if rebuild:
            found["rebuilt"] = output.reconstructions
        return found


class Stage2(Task):
    """Fidelity: pixels, codes, a perceptual distance and a GAN; two players, two phases, two optimizers.

    Args:
        model: on its device. Its text side goes; :func:`qlip.training.tasks.stage2_checkpoint.load_without_text` never
        has it.
        processor: of the same checkpoint.
        recipe: losses, discriminator, locked parts, optimizer; ``model.init`` gives back the text side on export.
        wrap: makes networks run on all ranks.
        perceptual: instead of LPIPS over VGG16 from the cache, which is read only where alpha_p is not 0.

    Raises:
        QLIPError: nothing is left to train, LPIPS' weights are not in the cache, or options do not go together.
    """

    def __init__(
        self,
        model: QLIPModel,
        processor: QLIPProcessor,
        recipe: Stage2Recipe,
        wrap: Wrap = unwrapped,
        perceptual: LPIPS | None = None,
    ) -> None:
        self.model, self.processor, self.weights = model, processor, recipe.losses
        for name in TEXT_SIDE:
            model.register_module(name, None)  # where it was loaded at all
        assert recipe.model.init is not None
        self._init = recipe.model.init
        self._scored = bool(recipe.losses.alpha_q or recipe.losses.commitment)
        set_trainable(model, recipe)
        self._trained = frozenset(name for name, one in model.named_parameters() if one.requires_grad)
        self.terms = QuantizerTerms(model.vision_model.quantizer, recipe.losses.entropy)
        self.usage = UsageMonitor(model.num_bits, model.group_size).to(model.device)
        self.perceptual: LPIPS | None = None
        if recipe.losses.alpha_p:
            self.perceptual = placed(perceptual or LPIPS.from_cache("vgg"), model.device)
        train_mode(model, self._scored)
        self._network = wrap(Stage2Network(model), [model.logit_scale])
        groups, rates = qlip_groups(model), recipe.optimizer.parts
        optimizers = build_optimizers(model.named_parameters(), recipe.optimizer, groups, rates)
        trained = [one for optimizer in optimizers for group in optimizer.param_groups for one in group["params"]]
        phase = Phase("model", optimizers, trained, recipe.optimizer.clip, self.forward, self.loss, (self._network,))
        self._phases = [phase]
        self.second: DiscriminatorPlayer | None = None
        if (discriminator := recipe.active_discriminator) is not None:
            if discriminator.adaptive:
                _refuse_adaptive(recipe, self.shared_layer)
            self.second = DiscriminatorPlayer(discriminator, self.pair, processor.size, recipe.seed, wrap, model.device)
            self._phases.append(self.second.phase)

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        """The model without its text side, the use of its codes, and what the second player has."""
        found: dict[str, nn.Module] = {"model": self.model, "usage": self.usage}
        return found if self.second is None else found | dict(self.second.networks)

    @property
    def frozen(self) -> Mapping[str, Frozen]:
        """LPIPS, where it is a loss."""
        return {} if self.perceptual is None else {"lpips": Frozen(self.perceptual, "lpips:vgg")}

    @property
    def phases(self) -> Sequence[Phase]:
        """The generator's, then the discriminator's."""
        return self._phases

    @property
    def shared_layer(self) -> nn.Parameter:
        """The decoder's last layer: every term's gradient passes it."""
        weight = self.model.vision_decoder.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    # ---------------------------------------------------------------- a batch

    def signed(self, pixels: Tensor) -> Tensor:
        """The processor's normalised space to [-1, 1], float32, where LPIPS and discriminators are at home.

        Nothing is clamped: past the border a clamp would have no gradient, and a pixel that left would not come back.
        """
        preprocessing = self.processor.preprocessing
        mean, std = (pixels.new_tensor(one, dtype=torch.float32) for one in (preprocessing.mean, preprocessing.std))
        return pixels.float() * (2 * std)[:, None, None] + (2 * mean - 1)[:, None, None]

    def forward(self, batch: Batch, cached_only: bool) -> LossInputs:
        """Run the network, and let LPIPS and the discriminator judge what it made."""
        present = int(len(batch) > 0)
        inputs = LossInputs(counts={"pixels": batch.pixel_values.numel(), "samples": len(batch)})
        if self._scored or not cached_only:
            pixels = filled(batch.pixel_values)
            found = self._network(pixels, not cached_only)
        if self._scored:
            inputs.sums = {name: found[name] * present for name in ("persample", "commitment")}
            inputs.mean_stats = {"codebook": found["codebook"] * present}
            inputs.counts["tokens"] = found["indices"].shape[:2].numel() * present
        judges = self._judges()
        if cached_only:
            zero = torch.zeros((), device=self.model.device)
            inputs.sums |= dict.fromkeys(["squared_error", *judges], zero)
            return inputs
        rebuilt = found["rebuilt"].float()
        inputs.sums["squared_error"] = (rebuilt - pixels.float()).square().sum() * present
        seen, original = self.signed(rebuilt), self.signed(pixels)
        inputs.sums |= {name: judge(seen, original) * present for name, judge in judges.items()}
        self.usage.update(found["indices"][: len(batch)])
        return inputs

    def _judges(self) -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
        """Loss terms active at this step: reconstructed images and their originals in [-1, 1] to a sum over them."""
        judges: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
        if (perceptual := self.perceptual) is not None:
            judges["lpips"] = lambda rebuilt, original: priced(rebuilt, lambda seen: perceptual(seen, original))
        if (second := self.second) is not None and second.strength:
            judges["gan"] = lambda rebuilt, _: second.judge(rebuilt)
        return judges

    def loss(self, inputs: LossInputs) -> tuple[Losses, Report]:
        """alpha_r L_mse + alpha_q L_bsq + alpha_p L_lpips + alpha_g L_gan, over the global batch."""
        weights = self.weights
        sums, counts = global_sums(inputs, self.model.device)
        report: Report = {"mse": sums["squared_error"] / counts["pixels"]}
        losses: Losses = {"mse": weights.alpha_r * report["mse"]}
        if self._scored:
            bsq, commitment, of_codes = self.terms(inputs, sums, counts["tokens"])
            report |= of_codes
            if weights.alpha_q:
                losses["bsq"] = weights.alpha_q * bsq
            if weights.commitment:
                losses["commitment"] = weights.commitment * commitment
        if "lpips" in sums:
            report["lpips"] = sums["lpips"] / counts["samples"]
            losses["lpips"] = weights.alpha_p * report["lpips"]
        if "gan" in sums:
            assert self.second is not None
            report["gan"] = sums["gan"] / counts["samples"]
            fidelity = losses["mse"] + losses.get("lpips", 0.0)
            report["gan_weight"] = weights.alpha_g * self.second.weight(fidelity, report["gan"], self.shared_layer)
            losses["gan"] = report["gan_weight"] * report["gan"]
        return losses, {name: value.detach() for name, value in report.items()}

    @torch.no_grad()
    def pair(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) normalised pixels to what the discriminator tells apart, in [-1, 1]: originals and rebuilt."""
        rebuilt = self.model.decode(self.model.encode(pixel_values), self.model.grid_of(pixel_values))
        return self.signed(pixel_values), self.signed(rebuilt)

    # ---------------------------------------------------------------- around a step

    def before_step(self, step: int) -> None:
        """Move the entropies' weights and the discriminator's part in the step."""
        self.terms.at(step)
        if self.second is not None:
            self.second.before_step(step)

    def after_step(self) -> None:
        """Move what follows the discriminator's logits."""
        if self.second is not None:
            self.second.after_step()

    def summary(self) -> Report:
        """Use of bits and codes since the last one."""
        return self.usage.summary()

    @property
    def sizes(self) -> dict[str, int]:
        """Parameters of all that is in memory, by what they are."""
        counts = count_parameters(self.model.named_parameters())
        found = {"encoder": counts["encoder"], "bottleneck": counts["bottleneck"], "decoder": counts["decoder"]}
        if self.second is not None:
            found["discriminator"] = sum(one.numel() for one in self.second.network.parameters())
        if self.perceptual is not None:
            found["lpips"] = sum(one.numel() for one in self.perceptual.parameters())
        return found

    def export(self, folder: Path, weights: Mapping[str, Tensor]) -> None:
        """A whole checkpoint: what was trained, and everything else as stage 1 left it, the text side among it."""
        export_whole(self._init, weights, self._trained, folder)

    @torch.no_grad()
    def reconstruct(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) normalised pixels to originals and reconstructions in [0, 1]."""
        self.model.eval()
        rebuilt = self.model.decode(self.model.encode(pixel_values), self.model.grid_of(pixel_values))
        train_mode(self.model, self._scored)
        to_unit = self.processor.preprocessing.denormalize
        return to_unit(pixel_values), to_unit(rebuilt)


def train_mode(model: QLIPModel, scored: bool) -> None:
    """Set training mode, except of the encoder (no dropout) and, where no loss looks at codes, of the quantizer."""
    vision = model.vision_model
    model.train()
    vision.embeddings.eval()
    vision.encoder.eval()
    assert isinstance(vision.quantizer, nn.Module)
    vision.quantizer.train(scored)


def _refuse_adaptive(recipe: Stage2Recipe, shared: nn.Parameter) -> None:
    if recipe.micro_batch_size is not None:
        raise QLIPError("discriminator.adaptive needs a whole batch at once; set micro_batch_size=null")
    if hasattr(shared, "full_tensor"):
        raise QLIPError("discriminator.adaptive needs the decoder's last layer whole; set parallel.kind=ddp")
