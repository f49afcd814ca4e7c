"""Reading and continuing text beside transformers, at the size of SmolLM2-135M: ``python -m benchmarks.completion``.

All have equal random weights and run in one process; transformers runs the saved folder. They take turns, one prompt
or a few steps each, so that disturbances of the machine affect all equally; ratios are medians over the turns. No
other program should run on the machine.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.decoder import WARM_UP, Pause, Stepped, in_turns
from benchmarks.report import publish
from qlip.lm import CausalConfig, CausalModel, complete, pack

PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- completion: begin -->", "<!-- completion: end -->"
TOLERANCE = 1e-4
"""Largest difference between float32 logits, which have a standard deviation of about 1."""
TRANSFORMERS, OURS, INT8 = "transformers", "qlip, float32", "qlip, int8"
PREFILL_AIM, DECODE_AIM = 1.2, 1.5
"""Least speeds of float32 relative to transformers: of reading, and of continuing 8 texts."""


@dataclass(frozen=True)
class Shape:
    """A model and what is timed.

    Attributes:
        name: of the rows.
        config: of the model.
        prompt: ids per text.
        turns: that are timed, of reading and of continuing.
        steps: new ids per text and turn.
    """

    name: str
    config: CausalConfig
    prompt: int
    turns: int
    steps: int


def shape(name: str, turns: int = 9) -> Shape:
    """A shape by name: ``smollm2``, or ``tiny``, to test the benchmark itself."""
    fixed = {"rms_norm_eps": 1e-5, "rope_theta": 1e5, "tie_word_embeddings": True, "max_position_embeddings": 8192}
    if name == "tiny":
        sizes = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
        return Shape(name, CausalConfig.from_dict(sizes | heads | fixed), 6, 3, 2)
    sizes = {"vocab_size": 49152, "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3}
    return Shape(name, CausalConfig.from_dict(sizes | heads | fixed), 128, turns, 4)


def main() -> None:
    """Measure, print the table, and write the file that was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.completion", description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="smollm2", help="smollm2 or tiny (default: smollm2)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="texts at a time (default: 1 8)")
    parser.add_argument("--turns", type=int, default=9, help="timed turns (default: 9)")
    parser.add_argument("--threads", type=int, default=1, help="number of PyTorch threads (default: 1)")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/README.md")
    options = parser.parse_args()
    measure.prepare(options.threads, options.shape == "tiny")
    lines = table(Ways(shape(options.shape, options.turns)), options.batches)
    publish("greedy; medians over turns", lines, PAGE, BEGIN, END, options.write)


@dataclass(frozen=True)
class Row:
    """Seconds per id of each way, turn by turn.

    Attributes:
        what: "prefill" or "decode".
        batch: texts.
        seconds: divided by the ids of all texts.
    """

    what: str
    batch: int
    seconds: dict[str, list[float]]

    def rate(self, way: str) -> float:
        """Median ids per second, of all texts together."""
        return 1 / measure.median(self.seconds[way])

    def ratio(self, way: str) -> float:
        """Median over turns of transformers' time over this way's."""
        pairs = zip(self.seconds[way], self.seconds[TRANSFORMERS], strict=True)
        return measure.median([theirs / ours for ours, theirs in pairs])


def table(ways: Ways, batches: Sequence[int]) -> Iterator[str]:
    """Measure, and make the lines of the table."""
    one = ways.shape
    yield "| work | texts | transformers, ids per second | qlip, float32 | int8 | float32 / transformers | int8 | aim |"
    yield "|---|---|---|---|---|---|---|---|"
    for batch in batches:
        for row in (ways.prefill(batch), ways.decode(batch)):
            aim = PREFILL_AIM if row.what == "prefill" else DECODE_AIM if batch == 8 else None
            found = row.ratio(OURS)
            met = "" if aim is None else f"{aim}x: {'met' if found >= aim else '**not met**'}"
            rates = " | ".join(f"{row.rate(way):.1f}" for way in (TRANSFORMERS, OURS, INT8))
            yield f"| {row.what} | {batch} | {rates} | {found:.2f}x | {row.ratio(INT8):.2f}x | {met} |"
    yield ""
    yield (
        f"{one.name}: {ways.parameters / 1e6:.1f}M parameters, random weights; prefill reads {one.prompt} ids per text"
        f" and draws one, decode draws {one.turns * one.steps} more one by one. int8 changes logits by"
        f" {ways.int8_change():.3f} of their deviation."
    )


class Ways:
    """The ways to continue a text, with equal weights."""

    def __init__(self, shape: Shape) -> None:
        from transformers import LlamaForCausalLM

        self.shape = shape
        torch.manual_seed(0)
        model = CausalModel(shape.config).eval()
        with torch.no_grad():
            model.tok_embeddings.weight.normal_(std=shape.config.hidden_size**-0.5)  # logits of deviation 1
        self.parameters = model.num_parameters()
        with tempfile.TemporaryDirectory(prefix="qlip-completion-") as folder:
            model.save_pretrained(folder)
            self.llama = LlamaForCausalLM.from_pretrained(folder).eval()
        self.int8 = pack(copy.deepcopy(model), "int8")
        self.packed = pack(model)

    def prompts(self, batch: int) -> Tensor:
        """Random ids (B, T)."""
        generator = torch.Generator().manual_seed(1)
        return torch.randint(self.shape.config.vocab_size, (batch, self.shape.prompt), generator=generator)

    def prefill(self, batch: int) -> Row:
        """Read prompts, and find the first id of each continuation.

        Raises:
            RuntimeError: the float32 logits differ.
        """
        ids = self.prompts(batch)
        self._check_logits(ids)
        work = {
            TRANSFORMERS: lambda: self._read(ids),
            OURS: lambda: next(complete(self.packed, self.packed.embed(ids), max_tokens=1)),
            INT8: lambda: next(complete(self.int8, self.int8.embed(ids), max_tokens=1)),
        }
        found = measure.interleaved(work, self.shape.turns)
        return Row("prefill", batch, {way: [one / ids.numel() for one in times] for way, times in found.items()})

    def decode(self, batch: int) -> Row:
        """Continue prompts id by id.

        Raises:
            RuntimeError: the float32 ways drew different ids.
        """
        turns, steps, ids = self.shape.turns + WARM_UP, self.shape.steps, self.prompts(batch)
        total = turns * steps + 1  # the first belongs to reading
        runs = {
            TRANSFORMERS: Stepped(lambda pause: self._generate(ids, total, pause)),
            OURS: Stepped(lambda pause: _complete(self.packed, ids, total, pause)),
            INT8: Stepped(lambda pause: _complete(self.int8, ids, total, pause)),
        }
        for run in runs.values():
            run.step()
        seconds = in_turns(runs, turns, steps)
        drawn = {way: run.finish() for way, run in runs.items()}
        if not torch.equal(drawn[TRANSFORMERS], drawn[OURS]):
            raise RuntimeError("transformers drew other ids than qlip; the comparison is of different models")
        return Row("decode", batch, {way: [one / batch for one in times] for way, times in seconds.items()})

    @torch.inference_mode()
    def int8_change(self) -> float:
        """Deviation of int8's logits from float32's, over that of the logits."""
        ids = self.prompts(1)
        exact, rounded = (model.logits(model.hidden(model.embed(ids))) for model in (self.packed, self.int8))
        return float((rounded - exact).std() / exact.std())

    @torch.inference_mode()
    def _read(self, ids: Tensor) -> None:
        self.llama(ids, logits_to_keep=1, use_cache=True).logits.argmax(-1)

    def _generate(self, ids: Tensor, total: int, pause: Pause) -> None:
        def paused(drawn: Tensor, scores: Any, **_: Any) -> Tensor:
            pause(drawn[:, ids.shape[1] :])
            return torch.zeros(len(drawn), dtype=torch.bool)

        self.llama.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=total,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=[paused],
        )

    @torch.inference_mode()
    def _check_logits(self, ids: Tensor) -> None:
        theirs = self.llama(ids[:1]).logits
        ours = self.packed.logits(self.packed.hidden(self.packed.embed(ids[:1])))
        if not torch.allclose(ours, theirs, rtol=0, atol=TOLERANCE):
            raise RuntimeError("transformers: logits differ from qlip's; the comparison is of different models")


def _complete(model: CausalModel, ids: Tensor, total: int, pause: Pause) -> None:
    drawn = list[Tensor]()
    for one in complete(model, model.embed(ids), max_tokens=total):
        drawn.append(one)
        pause(torch.stack(drawn, 1))


if __name__ == "__main__":
    main()
