"""METEOR with exact words and stems (Banerjee and Lavie, 2005); its third module, WordNet's synonyms, is left out.

So it is no figure of the METEOR that COCO runs (version 1.5: paraphrases, tuned weights), and is called
``meteor_exact_stem``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from qlip.evaluation.generation.stem import stem

BEAM = 40
"""Alignments kept in the search; captions seldom repeat words so often that one more would be better."""

Pair = tuple[int, int]
"""Place in the candidate, place in the reference."""


def meteor(candidate: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """The best score against any one reference, 0 to 1.

    With m words matched, P = m / candidate's words, R = m / reference's words and c chunks of matches that are
    adjacent and in one order in both: 10 P R / (R + 9 P) times 1 - (c / m)^3 / 2.

    Args:
        candidate: words.
        references: words of each.
    """
    return max(_score(candidate, reference) for reference in references)


def _score(candidate: Sequence[str], reference: Sequence[str]) -> float:
    pairs = aligned(candidate, reference)
    if not pairs:
        return 0.0
    matched = len(pairs)
    precision, recall = matched / len(candidate), matched / len(reference)
    mean = 10 * precision * recall / (recall + 9 * precision)
    return mean * (1 - 0.5 * (chunks(pairs) / matched) ** 3)


def aligned(candidate: Sequence[str], reference: Sequence[str]) -> list[Pair]:
    """As many matches as there can be, first of equal words, then of equal stems among the words left over.

    Of alignments with as many matches the one with fewest crossings is taken, as the paper says, and of those the one
    with fewest chunks. Matches of the first stage stay in the second.
    """
    pairs: list[Pair] = []
    for key in (str, stem):
        free = [at for at in range(len(candidate)) if at not in {own for own, _ in pairs}]
        other_free = [at for at in range(len(reference)) if at not in {other for _, other in pairs}]
        pairs = _stage(
            [(at, key(candidate[at])) for at in free], [(at, key(reference[at])) for at in other_free], pairs
        )
    return pairs


def chunks(pairs: Sequence[Pair]) -> int:
    """Runs of matches that are next to each other in both; pairs in the candidate's order."""
    return sum(number == 0 or pairs[number - 1] != (own - 1, other - 1) for number, (own, other) in enumerate(pairs))


@dataclass(frozen=True)
class _State:
    """An alignment of the words so far: matches in order, crossings among them, and per word the last place used."""

    pairs: tuple[Pair, ...]
    crossings: int
    last: dict[str, int]


def _stage(own: list[tuple[int, str]], other: list[tuple[int, str]], fixed: list[Pair]) -> list[Pair]:
    """Pairs of equal words beside those that are fixed, all in the candidate's order."""
    places: defaultdict[str, list[int]] = defaultdict(list)
    for at, word in other:
        places[word].append(at)
    left: defaultdict[str, int] = defaultdict(int)  # of each word, in what is still to come
    for _, word in own:
        left[word] += 1
    needed = {word: min(count, len(places[word])) for word, count in left.items()}
    states = [_State((), 0, {})]
    for at, word in own:
        left[word] -= 1
        if needed[word]:
            states = [new for state in states for new in _extended(state, at, word, places, left, needed, fixed)]
            states = sorted(states, key=lambda one: (one.crossings, chunks(sorted([*fixed, *one.pairs]))))[:BEAM]
    return sorted([*fixed, *states[0].pairs])


def _extended(
    state: _State,
    at: int,
    word: str,
    places: dict[str, list[int]],
    left: dict[str, int],
    needed: dict[str, int],
    fixed: list[Pair],
) -> list[_State]:
    """The alignment with each choice for one more word; equal words never cross, for uncrossing them is no worse."""
    used = [pair for pair in state.pairs if pair[1] in places[word]]
    missing = needed[word] - len(used)
    found = [state] if missing <= left[word] else []  # leave it out: there are enough to come
    if missing:
        free = [place for place in places[word] if place > state.last.get(word, -1)]
        for place in free[: len(free) - missing + 1]:
            crossed = sum((at - one) * (place - another) < 0 for one, another in (*fixed, *state.pairs))
            pairs = (*state.pairs, (at, place))
            found.append(_State(pairs, state.crossings + crossed, {**state.last, word: place}))
    return found
