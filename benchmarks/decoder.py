"""Our decoding beside transformers' ``generate`` and LlamaGen's, on a CPU: ``python -m benchmarks.decoder``.

All decode the same tokens greedily with equal weights, in one process; transformers runs the exported model. They take
turns of one or a few steps, so that disturbances of the machine affect all equally; ratios are medians over the turns.
No other program should run on the machine.
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import measure
from benchmarks.report import publish
from qlip.lm import Condition, DecoderConfig, DecoderModel, Sampling, generate, pack
from qlip.lm.export import export_decoder
from qlip.lm.guidance import Constant
from qlip.lm.heads import FlatHead
from qlip.lm.packed import PackedLinear
from qlip.lm.rotary import rotate
from qlip.lm.transformer import DecoderBlock

PAGE = Path(__file__).parent / "README.md"
BEGIN, END = "<!-- decoder: begin -->", "<!-- decoder: end -->"
SCALE = 3.0
"""Of guidance."""
TOLERANCE = 1e-5
"""Largest difference between logits of the float32 ways; the logits have a standard deviation of 1."""
CLASSES = 3
FIRST_ID = CLASSES + 1
"""First id of a value in the exported vocabulary."""
WARM_UP = 1
"""First turns, which are not counted."""
OURS, PLAIN, INT8 = "qlip, float32", "qlip, plain", "qlip, int8"
TRANSFORMERS, LLAMAGEN = "transformers", "LlamaGen's scheme"


@dataclass(frozen=True)
class Shape:
    """A decoder, the steps to time, and the speeds relative to transformers that we aim at.

    Attributes:
        name: of the row.
        config: of a flat head.
        turns: number of turns that are timed.
        steps: per turn; more than one where a step is so short that it would mostly find its weights out of the caches,
            which the other ways have used in between.
        aims: (batch size, guided, contender, ratio).
    """

    name: str
    config: DecoderConfig
    turns: int
    steps: int
    aims: tuple[tuple[int, bool, str, float], ...]


def shape(name: str) -> Shape:
    """A shape by name: ``100M``, ``3M``, or ``tiny``, to test the benchmark itself."""
    fixed = {"rotary": "1d", "condition_size": CLASSES, "head": {"kind": "flat"}}
    if name == "100M":
        config = DecoderConfig.named("LlamaGen-B", prefix_rotary="positions", **fixed)
        aims = ((1, False, OURS, 1.7), (8, False, OURS, 2.0), (1, True, OURS, 2.8), (1, False, INT8, 3.0))
        return Shape(name, config, 48, 1, aims)
    sizes = {"hidden_size": 192, "num_hidden_layers": 6, "num_attention_heads": 6, "grid": (8, 8)}
    if name == "tiny":
        sizes |= {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "grid": (2, 2)}
    config = DecoderConfig.from_dict({**sizes, **fixed, "codebook_size": 128, "num_groups": 4})
    steps = config.num_steps // 8
    aims = ((1, False, OURS, 2.0), (1, False, PLAIN, 2.0), (1, True, OURS, 4.0), (1, True, PLAIN, 4.0))
    return Shape(name, config, 8, steps, aims)


def main() -> None:
    """Measure, print the table, and write the file that was asked for."""
    options = _options()
    measure.prepare(options.threads, options.shapes == ["tiny"])
    lines = tables([shape(name) for name in options.shapes], options.batches)
    publish("greedy; medians over turns", lines, PAGE, BEGIN, END, options.write)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decoder", description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=["100M", "3M"], help="100M, 3M or tiny (default: 100M 3M)")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], help="images per step (default: 1 8)")
    parser.add_argument("--threads", type=int, default=1, help="number of PyTorch threads (default: 1)")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/README.md")
    return parser.parse_args()


@dataclass(frozen=True)
class Row:
    """Seconds per step of each way, turn by turn, for one batch size."""

    batch: int
    guided: bool
    seconds: dict[str, list[float]]

    def ratio(self, ours: str, theirs: str = TRANSFORMERS) -> float:
        """Median over turns of their time over ours."""
        return measure.median([b / a for a, b in zip(self.seconds[ours], self.seconds[theirs], strict=True)])


def tables(shapes: Sequence[Shape], batches: Sequence[int]) -> Iterator[str]:
    """Measure each shape, and make the lines of the tables."""
    verdicts = list[str]()
    yield (
        "| decoder | images | guidance | transformers, ms per step | LlamaGen's scheme | qlip, float32 | plain | int8"
        " | float32 / transformers | plain / transformers | int8 / transformers | float32 / LlamaGen's |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|---|---|"
    notes = list[str]()
    for one in shapes:
        ways = Ways(one)
        for batch, guided in [*((batch, False) for batch in batches), (1, True)]:
            row = ways.measured(batch, guided)
            times = (f"{1e3 * measure.median(row.seconds[n]):.2f}" for n in (TRANSFORMERS, LLAMAGEN, OURS, PLAIN, INT8))
            ratios = [*(row.ratio(name) for name in (OURS, PLAIN, INT8)), row.ratio(OURS, LLAMAGEN)]
            cells = [*times, *(f"{ratio:.2f}x" for ratio in ratios)]
            yield f"| {one.name} | {batch} | {'yes' if guided else 'no'} | {' | '.join(cells)} |"
            for size, wanted, way, aim in one.aims:
                if (size, wanted) == (batch, guided):
                    found = row.ratio(way)
                    name = f"{one.name}, {batch} image{'s' * (batch > 1)}{', guided' * guided}: {way} at least {aim}x"
                    verdicts.append(f"| {name} | {found:.2f}x | {'yes' if found >= aim else '**no**'} |")
        for rows in sorted({1, 2, 8, *batches}):
            for name, share in ways.bandwidth(rows).items():
                aim = f"{one.name}, {rows} row{'s' * (rows > 1)}: at least 0.8 of the bandwidth of one-row {name}"
                verdicts.append(f"| {aim} | {share:.2f} | {'yes' if share >= 0.8 else '**no**'} |")
        notes.append(ways.notes())
    yield ""
    yield from ("| aim | measured | met |", "|---|---|---|", *verdicts, "", *notes)


class Ways:
    """The ways to decode, with equal weights."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.config = shape, shape.config
        torch.manual_seed(0)
        model = DecoderModel(self.config).eval()
        assert isinstance(model.head, FlatHead)
        torch.nn.init.normal_(model.head.output.weight, std=self.config.hidden_size**-0.5)  # logits of deviation 1
        self.model = model
        self.llama = llama(model)
        self.llamagen = LlamaGenScheme(model)
        self.packed, self.int8 = pack(copy.deepcopy(model)), pack(copy.deepcopy(model), "int8")
        self.plain = pack(copy.deepcopy(model), "plain")

    def measured(self, batch: int, guided: bool) -> Row:
        """Decode with all ways, in turns.

        Raises:
            RuntimeError: the float32 ways drew different tokens, or their logits differ.
        """
        turns, steps = self.shape.turns, self.shape.steps
        labels = torch.arange(batch) % CLASSES
        runs = {
            TRANSFORMERS: Stepped(lambda pause: self._transformers(labels, guided, pause)),
            LLAMAGEN: Stepped(lambda pause: self.llamagen.decode(labels, guided, turns * steps, pause)),
            OURS: Stepped(lambda pause: self._ours(self.packed, labels, guided, pause)),
            PLAIN: Stepped(lambda pause: self._ours(self.plain, labels, guided, pause)),
            INT8: Stepped(lambda pause: self._ours(self.int8, labels, guided, pause)),
        }
        seconds = in_turns(runs, turns, steps)
        drawn = {name: run.finish() for name, run in runs.items()}
        for name in (TRANSFORMERS, LLAMAGEN, PLAIN):
            if not torch.equal(drawn[name], drawn[OURS]):
                raise RuntimeError(f"{name} drew other tokens than qlip; the comparison is of different models")
        self._check_logits(labels, drawn[OURS])
        return Row(batch, guided, seconds)

    def _transformers(self, labels: Tensor, guided: bool, pause: Pause) -> None:
        """Run `generate`; ids are the classes and the null class, then those of the values of each group."""
        options = dict[str, Any]()
        if guided:
            options = {"guidance_scale": SCALE, "negative_prompt_ids": torch.full((len(labels), 1), CLASSES)}
        group = _GroupOfStep(self.config)
        self.llama.generate(
            labels[:, None],
            attention_mask=torch.ones(len(labels), 1, dtype=torch.int64),
            max_new_tokens=self.shape.turns * self.shape.steps,
            do_sample=False,
            logits_processor=[group] if self.config.num_groups > 1 else [],
            stopping_criteria=[_Pausing(lambda ids: pause((ids[:, 1:] - FIRST_ID) % self.config.codebook_size))],
            **options,
        )

    def _ours(self, model: DecoderModel, labels: Tensor, guided: bool, pause: Pause) -> None:
        generate(
            model,
            Condition(labels),
            sampling=Sampling(temperature=0.0),
            guidance=Constant(SCALE if guided else 1.0),
            on_step=lambda step, drawn: pause(drawn[..., 0]),
        )

    @torch.inference_mode()
    def _check_logits(self, labels: Tensor, drawn: Tensor) -> None:
        """Compare logits of all float32 ways on the tokens drawn."""
        config, count = self.config, drawn.shape[1]
        found = dict[str, Tensor]()
        for name, model in ((OURS, self.packed), (PLAIN, self.plain), ("the model", self.model)):
            prefix = model.condition(Condition(labels)).embeddings
            x = torch.cat([prefix, model.embed_steps(drawn[:, :-1, None])], 1)
            found[name] = F.linear(model.run(x), self.model.head.output.weight)
        offsets = FIRST_ID + torch.arange(count - 1) % config.num_groups * config.codebook_size
        found[TRANSFORMERS] = self.llama(torch.cat([labels[:, None], drawn[:, :-1] + offsets], 1)).logits[
            ..., FIRST_ID:
        ]
        cache = self.llamagen.cache(len(labels))
        ways = [self.llamagen.logits(x[:, at], at, cache) for at in range(count)]
        found[LLAMAGEN] = torch.stack(ways, 1)
        for name, logits in found.items():
            difference = float((logits - found[OURS]).abs().max())
            if difference > TOLERANCE:
                raise RuntimeError(f"{name}: logits differ from qlip's by {difference:.1e}")

    @torch.inference_mode()
    def bandwidth(self, rows: int) -> dict[str, float]:
        """Time of one-row products with all weights over that of a step: nn.Linear's products, and packed ones."""
        weights = [one.weight for one in self.model.layers.modules() if isinstance(one, nn.Linear)]
        weights.append(self.model.head.output.weight[: self.config.codebook_size])  # a step's rows
        products = [one for one in self.packed.layers.modules() if isinstance(one, PackedLinear)]
        products.append(PackedLinear(weights[-1]))
        inputs = {one.shape[1]: torch.randn(1, one.shape[1]) for one in weights}

        def linear() -> None:
            for one in weights:
                F.linear(inputs[one.shape[1]], one)

        def packed() -> None:
            for one in products:
                one(inputs[one.in_features])

        pairs: dict[str, list[float]] = {"nn.Linear": [], "packed products": []}
        run = Stepped(lambda pause: self._ours(self.packed, torch.zeros(rows, dtype=torch.int64), False, pause))
        for _ in range(self.shape.turns):
            taken = list[float]()
            for work in (linear, packed):
                began = time.perf_counter()
                for _ in range(self.shape.steps):
                    work()
                taken.append(time.perf_counter() - began)
            ours = sum(run.step() for _ in range(self.shape.steps))
            for times, one in zip(pairs.values(), taken, strict=True):
                times.append(one / ours)
        run.finish()
        return {name: measure.median(times[WARM_UP:]) for name, times in pairs.items()}

    @torch.inference_mode()
    def notes(self) -> str:
        """Bits per image of the float32 model's own images, and what int8 adds."""
        condition = Condition(torch.arange(2))
        indices = generate(self.packed, condition, seed=1)
        exact, rounded = (float(one.bits_per_image(indices, condition).mean()) for one in (self.packed, self.int8))
        return (
            f"{self.shape.name}: {self.model.num_parameters() / 1e6:.1f}M parameters, random weights; its own images"
            f" have {exact:.1f} bits, and {rounded - exact:+.2f} with int8 weights ({rounded / exact - 1:+.3%})."
        )


class _Done(Exception):
    """Ends a run after its last step."""


Pause = Callable[[Tensor], None]
"""Called with the values (B, s) drawn so far after each step; returns when the next may begin."""


class Stepped:
    """A decoding loop that runs step by step in a thread of its own; only one thread runs at any time.

    Args:
        work: decodes, and calls its argument after each step.
    """

    def __init__(self, work: Callable[[Pause], None]) -> None:
        self._go, self._paused = threading.Semaphore(0), threading.Semaphore(0)
        self._work, self._ending = work, False
        self._began, self._taken = 0.0, 0.0
        self._error: Exception | None = None
        self._drawn = torch.empty(0)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._wait()
            self._work(self._pause)
        except _Done:
            pass
        except Exception as error:  # noqa: BLE001 - handed to the thread that waits
            self._error = error
        self._paused.release()

    def _wait(self) -> None:
        self._go.acquire()
        if self._ending:
            raise _Done
        self._began = time.perf_counter()

    def _pause(self, drawn: Tensor) -> None:
        self._taken = time.perf_counter() - self._began
        self._drawn = drawn.clone()
        self._paused.release()
        self._wait()

    def step(self) -> float:
        """Run to the next pause, and return the seconds that it took."""
        self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error
        return self._taken

    def finish(self) -> Tensor:
        """End the run, and return the values drawn, (B, s)."""
        self._ending = True
        self._go.release()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._drawn


def in_turns(runs: Mapping[str, Stepped], turns: int, steps: int) -> dict[str, list[float]]:
    """Time runs in turns, each of which takes some steps of every run, in rotating order.

    Returns:
        Seconds per step of each run, turn by turn, without the `WARM_UP`.
    """
    names = list(runs)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(turns):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(sum(runs[name].step() for _ in range(steps)) / steps)
    return {name: times[WARM_UP:] for name, times in seconds.items()}


class LlamaGenScheme:
    """LlamaGen's decoding: guidance doubles the batch, attention reads the whole cache under a mask, step by step.

    Its products are `nn.Linear`'s, queries, keys and values in one, gate and up apart.
    """

    def __init__(self, model: DecoderModel) -> None:
        self.model, self.config = model, model.config
        length = -(-self.config.length // 8) * 8
        self.length, self.mask = length, torch.ones(length, length, dtype=torch.bool).tril()

    def cache(self, rows: int) -> list[tuple[Tensor, Tensor]]:
        """Keys and values per layer, (R, H, C, d)."""
        shape = (rows, self.config.kv_heads, self.length, self.config.head_width)
        return [(torch.zeros(shape), torch.zeros(shape)) for _ in self.model.layers]

    @torch.inference_mode()
    def decode(self, labels: Tensor, guided: bool, steps: int, pause: Pause) -> None:
        """Decode greedily."""
        model, images = self.model, len(labels)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, CLASSES)])
        cache = self.cache(len(labels))
        x = model.condition.embedding(labels)  # type: ignore[union-attr, operator]
        drawn = labels.new_zeros(images, steps)
        for step in range(steps):
            first = step % self.config.num_groups * self.config.codebook_size
            logits = self.logits(x, step, cache)[:, first : first + self.config.codebook_size]
            if guided:
                given, null = logits.split(images)
                logits = null + SCALE * (given - null)
            drawn[:, step] = logits.argmax(-1)
            pause(drawn[:, : step + 1])
            x = model.tok_embeddings(drawn[:, step] + first).repeat(1 + guided, 1)

    def logits(self, x: Tensor, position: int, cache: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Logits (R, K V) from the embedding (R, D) at a position."""
        at = torch.tensor([position])
        turns, mask, x = self.model.rotary()[at], self.mask[None, None, at], x[:, None]
        for (keys, values), block in zip(cache, self.model.layers, strict=True):
            x = self._block(block, x, turns, mask, at, keys, values)  # type: ignore[arg-type]
        return self.model.head.output(self._norm(x, self.model.norm.weight))[:, 0]  # type: ignore[no-any-return, operator]

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.config.rms_norm_eps) * weight

    def _block(
        self, block: DecoderBlock, x: Tensor, turns: Tensor, mask: Tensor, at: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        attention, ffn = block.attention, block.feed_forward
        q, k, v = attention.wqkv(self._norm(x, block.attention_norm.weight)).split(attention.sizes, -1)
        q, k, v = (one.unflatten(-1, (-1, self.config.head_width)) for one in (q, k, v))
        q, k, v = (one.transpose(1, 2) for one in (rotate(q, turns), rotate(k, turns), v))
        keys[:, :, at], values[:, :, at] = k, v
        weights = (q @ keys.transpose(-2, -1) * self.config.head_width**-0.5).masked_fill(~mask, -math.inf)
        x = x + attention.wo((weights.softmax(-1) @ values).transpose(1, 2).flatten(2))
        normed = self._norm(x, block.ffn_norm.weight)
        return x + ffn.w2(F.silu(ffn.w1(normed)) * ffn.w3(normed))  # type: ignore[no-any-return]


class _Pausing:
    """Calls a function after each step of `generate`; a StoppingCriteria that never stops."""

    def __init__(self, pause: Callable[[Tensor], None]) -> None:
        self.pause = pause

    def __call__(self, ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        self.pause(ids)
        return torch.zeros(len(ids), dtype=torch.bool)


class _GroupOfStep:
    """Allows the ids of the step's group; a LogitsProcessor."""

    def __init__(self, config: DecoderConfig) -> None:
        ids = torch.arange(FIRST_ID + config.num_groups * config.codebook_size) - FIRST_ID
        groups = torch.arange(config.num_groups)[:, None]
        self.added = torch.where(ids.div(config.codebook_size, rounding_mode="floor") == groups, 0.0, -math.inf)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        return scores + self.added[(ids.shape[1] - 1) % len(self.added)]


def llama(model: DecoderModel) -> Any:
    """Export a decoder, and load it with transformers."""
    from transformers import LlamaForCausalLM

    with tempfile.TemporaryDirectory(prefix="qlip-decoder-") as folder:
        export_decoder(model, "llama", Path(folder) / "llama")
        return LlamaForCausalLM.from_pretrained(Path(folder) / "llama").eval()


if __name__ == "__main__":
    main()
