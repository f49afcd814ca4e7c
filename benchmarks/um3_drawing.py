"""Drawing with guidance by a UM3 beside transformers: ``python -m benchmarks.um3_drawing``.

Both have equal random weights and run in one process; transformers runs the saved folder, a stock Qwen3, with the mask
as ``prefix_allowed_tokens_fn`` and its own guidance. They take turns, one batch of images each; the ratio is the median
over the turns. No other program should run on the machine.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from qlip.lm import CausalConfig, pack
from qlip.lm.guidance import Constant
from qlip.lm.sampling import Sampling
from qlip.um3 import UM3, UM3Config, generate

TRANSFORMERS, OURS = "transformers", "qlip"
AIM = 2.0
"""Least speed relative to transformers, at a batch of 8."""
SCALE = 3.0
BEGIN, END = 3, 4


@dataclass(frozen=True)
class Shape:
    """A model and what is timed.

    Attributes:
        name: of the row.
        config: of the model.
        prompt: ids per prompt.
        turns: that are timed.
    """

    name: str
    config: UM3Config
    prompt: int
    turns: int


def shape(name: str, turns: int = 5) -> Shape:
    """A shape by name: ``smollm2``, ``nano``, or ``tiny``, to test the benchmark itself."""
    every = {
        "tiny": ({"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}, 4, 3, (2, 2)),
        "nano": (
            {"vocab_size": 4096, "hidden_size": 256, "num_hidden_layers": 6, "intermediate_size": 704},
            4,
            7,
            (8, 8),
        ),
        "smollm2": (
            {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536},
            9,
            14,
            (4, 4),
        ),
    }
    sizes, heads, bits, grid = every[name]
    text = CausalConfig.from_dict(
        sizes
        | {"num_attention_heads": heads, "qk_norm": True, "tie_word_embeddings": True, "max_position_embeddings": 1024}
    )
    config = UM3Config.extend(
        text, begin_image=BEGIN, end_image=END, group_size=bits, num_groups=28 // bits if bits > 3 else 2, grid=grid
    )
    return Shape(name, config, 16, turns)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.um3_drawing", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="smollm2", help="smollm2, nano or tiny (default: smollm2)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="images at a time (default: 1 8)")
    parser.add_argument("--turns", type=int, default=5, help="timed turns (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="number of PyTorch threads (default: 1)")
    options = parser.parse_args()
    measure.prepare(options.threads, options.shape == "tiny")
    for line in table(Ways(shape(options.shape, options.turns)), options.batches):
        print(line)


def table(ways: Ways, batches: list[int]) -> Iterator[str]:
    """Measure, and make the lines of the table."""
    yield "| images | transformers, ids per second | qlip | qlip / transformers | aim |"
    yield "|---|---|---|---|---|"
    for batch in batches:
        seconds = ways.draw(batch)
        ids = batch * ways.shape.config.image_length
        found = measure.median([theirs / ours for theirs, ours in zip(*seconds.values(), strict=True)])
        rates = " | ".join(f"{ids / measure.median(times):.1f}" for times in seconds.values())
        aim = f"{AIM:g}x: {'met' if found >= AIM else '**not met**'}" if batch == 8 else ""
        yield f"| {batch} | {rates} | {found:.2f}x | {aim} |"


class Ways:
    """The ways to draw, with equal weights."""

    def __init__(self, shape: Shape) -> None:
        from transformers import AutoModelForCausalLM

        self.shape = shape
        torch.manual_seed(0)
        self.model = UM3.from_scratch(shape.config, start="random").eval()
        with torch.no_grad():
            self.model.decoder.tok_embeddings.weight.normal_(std=shape.config.decoder.hidden_size**-0.5)
        with tempfile.TemporaryDirectory(prefix="qlip-um3-") as folder:
            self.model.save_pretrained(folder)
            self.stock: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        pack(self.model.decoder)
        self.ids = [self.model.grammar.allowed(place).ids() for place in range(shape.config.image_length + 1)]

    def draw(self, batch: int) -> dict[str, list[float]]:
        """Seconds per turn of each way to draw a batch of images, the likeliest ids.

        Raises:
            RuntimeError: they drew different ids.
        """
        generator = torch.Generator().manual_seed(1)
        prompts = torch.randint(
            BEGIN + 2, self.shape.config.text_vocab_size, (batch, self.shape.prompt), generator=generator
        )
        drawn: dict[str, Tensor] = {}

        def ours() -> None:
            found = generate(
                self.model,
                prompts.tolist(),
                generation_mode="image",
                sampling=Sampling(temperature=0.0),
                guidance=Constant(SCALE),
            )
            drawn[OURS] = torch.tensor(found)[:, :-1]

        def theirs() -> None:
            drawn[TRANSFORMERS] = self._stock(prompts)

        seconds = measure.interleaved({TRANSFORMERS: theirs, OURS: ours}, self.shape.turns)
        if not torch.equal(drawn[OURS], drawn[TRANSFORMERS]):
            raise RuntimeError("transformers drew other ids than qlip; the comparison is of different models")
        return seconds

    def _stock(self, prompts: Tensor) -> Tensor:
        begin = prompts.new_full((len(prompts), 1), BEGIN)
        ids = torch.cat([prompts, begin], 1)
        found: Tensor = self.stock.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=self.shape.config.image_length,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            guidance_scale=SCALE,
            negative_prompt_ids=begin,
            prefix_allowed_tokens_fn=lambda _, row: self.ids[len(row) - ids.shape[1]],
        )
        return found[:, ids.shape[1] :]


if __name__ == "__main__":
    main()
