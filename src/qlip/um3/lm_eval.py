"""Benchmarks of text by lm-eval: `TextLM` scores and continues texts by a UM3 or any text decoder.

    import lm_eval
    from qlip.um3.lm_eval import TextLM
    print(lm_eval.simple_evaluate(TextLM(folder), tasks=["arc_easy"])["results"])

Importing this module also registers the model `qlip` of ``simple_evaluate("qlip", model_args="pretrained=FOLDER")``.
A UM3 is normalised over its text rows alone (eq. 6), and writes no image.

Shapes: B rows of T positions, M targets, D width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from torch import Tensor

from qlip.errors import QLIPError, check_integer
from qlip.evaluation.models.harness import batch_size_of, batches, cut, stops_of
from qlip.lm.causal import CausalModel
from qlip.lm.complete import Steps, complete
from qlip.lm.sampling import AnswerSettings
from qlip.lm.tokenizer import AnswerText, LLMTokenizer
from qlip.modeling.checkpoint import resolve
from qlip.runtime.progress import progress
from qlip.um3.config import UM3Config, is_um3

MAX_TOKENS = 256
"""Longest continuation where a task names none."""
MAX_LOGITS = 1 << 24
"""Logits held at a time."""
Pair = tuple[Any, list[int], list[int]]
"""Anything, ids of a context, and ids of its continuation."""


@register_model("qlip")
class TextLM(TemplateLM):  # type: ignore[misc]  # lm-eval has no types
    """A text decoder for the tasks of lm-eval.

    A text that has no context is scored behind the tokenizer's BOS, or behind its end token where it has none.

    Args:
        pretrained: folder or Hub id of a UM3, or of a stock Llama or Qwen3 such as SmolLM2, with its tokenizer.
        device: such as cpu or cuda; "auto" takes a GPU where there is one.
        dtype: of the weights.
        batch_size: texts that are scored together.
        max_batch_size: not used; lm-eval passes it.

    Raises:
        QLIPError: no such model or tokenizer, or a batch size that is no number.
    """

    def __init__(
        self,
        pretrained: str,
        device: str | None = "auto",
        dtype: str = "float32",
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.batch_size = batch_size_of(batch_size)
        folder = resolve(pretrained)
        self.decoder = CausalModel.from_pretrained(folder, dtype=dtype, device=device or "auto")
        self.text = LLMTokenizer.from_folder(folder)
        self.rows, self.unwritten = self.decoder.config.vocab_size, list[int]()
        if is_um3(folder):
            config = UM3Config.from_folder(folder)
            self.rows, self.unwritten = config.text_vocab_size, [config.begin_image, config.end_image]

    @property
    def eot_token_id(self) -> int:
        """Id that ends a text."""
        return self.text.eos

    @property
    def prefix_token_id(self) -> int:
        """Id that stands before a text without context."""
        return self.text.eos if self.text.bos is None else self.text.bos

    @property
    def max_length(self) -> int:
        """Positions that the decoder reads."""
        return self.decoder.config.length

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **others: Any) -> list[int]:
        """Encode a text, behind BOS where the tokenizer has one and `add_special_tokens` is not False."""
        first = [] if self.text.bos is None or add_special_tokens is False else [self.text.bos]
        return [*first, *self.text.encode(string, first=True)]

    # ---------------------------------------------------------------- likelihood

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts in nats; longer ones than the context are scored window by window."""
        windows: list[list[Pair]] = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            windows.append([(None, *make_disjoint_window(one)) for one in cut])
        found = iter(self._loglikelihood_tokens([one for several in windows for one in several], disable_tqdm))
        totals = [math.fsum(next(found)[0] for _ in several) for several in windows]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    @torch.inference_mode()
    def _loglikelihood_tokens(
        self, requests: Sequence[Pair], disable_tqdm: bool = False, **others: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations; contexts are cut at the left where they are too long.

        Returns:
            For each its log-likelihood in nats, and whether each of its ids is the likeliest.

        Raises:
            QLIPError: a continuation that is longer than the decoder's context.
        """
        order = sorted(range(len(requests)), key=lambda number: -len(requests[number][1]) - len(requests[number][2]))
        found = [(0.0, True)] * len(requests)
        with progress("scoring", len(requests), "texts", quiet=disable_tqdm) as bar:
            for first in range(0, len(order), self.batch_size):
                numbers = order[first : first + self.batch_size]
                for number, score in zip(numbers, self._scores([requests[one] for one in numbers]), strict=True):
                    found[number] = score
                    if requests[number][0] is not None:
                        self.cache_hook.add_partial("loglikelihood", requests[number][0], score)
                bar.advance(len(numbers))
        return found

    def _scores(self, requests: Sequence[Pair]) -> list[tuple[float, bool]]:
        rows = [[*context, *continuation][-self.max_length - 1 :] for _, context, continuation in requests]
        counts = [len(continuation) for *_, continuation in requests]
        for row, count in zip(rows, counts, strict=True):
            if count >= len(row):
                raise QLIPError(
                    f"a continuation of {count:,} ids: the decoder reads {self.max_length:,} positions, with at least"
                    " one before it; leave the text out"
                )
        length = max(map(len, rows)) - 1
        ids = torch.tensor([row[:-1] + [0] * (length + 1 - len(row)) for row in rows], device=self.decoder.device)
        ends = torch.tensor([len(row) - 1 for row in rows], device=ids.device)
        documents = -(torch.arange(length, device=ids.device) >= ends[:, None]).long()  # (B, T)
        hidden = self.decoder.hidden(self.decoder.embed(ids), documents=documents)  # (B, T, D)
        states, targets = [], []
        for own, row, count in zip(hidden, rows, counts, strict=True):
            begin, end = len(row) - 1 - count, len(row) - 1
            states.append(own[begin:end])
            targets.append(torch.tensor(row[begin + 1 :], device=ids.device))
        nats, greedy = self._nats(torch.cat(states), torch.cat(targets))
        pieces = zip(nats.split(counts), greedy.split(counts), strict=True)
        return [(-float(one.double().sum()), bool(likeliest.all())) for one, likeliest in pieces]

    def _nats(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Nats (M,) of targets by states (M, D) over the text rows, and whether each is the likeliest."""
        nats, greedy = [], []
        at_once = max(1, MAX_LOGITS // self.rows)
        for some, wanted in zip(states.split(at_once), targets.split(at_once), strict=True):
            logits = self.decoder.logits(some, 0, self.rows).float()
            nats.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
            greedy.append(logits.argmax(-1) == wanted)
        return torch.cat(nats), torch.cat(greedy)

    # ---------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Continue texts, each up to the first of the task's ``until`` texts.

        Raises:
            QLIPError: a task that asks for beam search.
        """
        answers = dict[int, str]()
        with progress("continuing", len(requests), "texts", quiet=disable_tqdm) as bar:
            for numbers in batches([request.args[1] for request in requests], self.batch_size):
                texts = [requests[number].args[0] for number in numbers]
                for number, answer in zip(numbers, self._continue(texts, requests[numbers[0]].args[1]), strict=True):
                    answers[number] = answer
                    self.cache_hook.add_partial("generate_until", requests[number].args, answer)
                bar.advance(len(numbers))
        return [answers[number] for number in range(len(requests))]

    def _continue(self, texts: Sequence[str], given: Mapping[str, Any]) -> list[str]:
        if (beams := given.get("num_beams") or 1) != 1:
            raise QLIPError(f"num_beams {beams}: this model has no beam search; pass num_beams=1")
        stops = stops_of(given)
        limit = check_integer("max_gen_toks", given.get("max_gen_toks") or given.get("max_new_tokens") or MAX_TOKENS)
        settings = AnswerSettings(**{"do_sample": bool(given.get("temperature")), **given})
        most = max(1, self.max_length - limit)
        prompts = [(self.tok_encode(text) or [self.prefix_token_id])[-most:] for text in texts]
        length = max(map(len, prompts))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in prompts], device=self.decoder.device)
        start = torch.tensor([length - len(row) for row in prompts], device=ids.device)
        answers = [AnswerText(self.text, strip=False) for _ in prompts]
        said, running = [""] * len(prompts), set(range(len(prompts)))
        how = _TextSteps(self, settings)
        steps = complete(self.decoder, self.decoder.embed(ids), start, max_tokens=limit, stop=[self.text.eos], how=how)
        for step in steps:
            drawn = step.tolist()
            for row in sorted(running):
                if drawn[row] == self.text.eos:
                    running.remove(row)
                    continue
                said[row] += answers[row].add(drawn[row])
                if any(stop in said[row] for stop in stops):
                    running.remove(row)
            if not running:
                break
        return [cut(one + answer.rest(), stops) for one, answer in zip(said, answers, strict=True)]


class _TextSteps(Steps):
    """Draws ids of text alone."""

    def __init__(self, model: TextLM, settings: AnswerSettings) -> None:
        super().__init__(model.decoder, settings.sampling())
        self.rows, self.unwritten = model.rows, model.unwritten

    def draw(self, hidden: Tensor, noise: Tensor, left: int) -> Tensor:
        """See :class:`Steps`."""
        logits = self.model.logits(hidden, 0, self.rows).float()
        logits[:, self.unwritten] = float("-inf")
        return self.sampling.draw(logits, noise)
