"""Captions of made scenes: seven families, a parser, and splits with combinations that training never shows.

A `Description` says what a caption claims: things with colour and shape, and a size, cell, relation or order of sizes.
`Description.caption` writes it, `parse_caption` reads it, and `describe` samples one with a scene that fits. Whether an
image fits is for :mod:`qlip.evaluation.metrics.scenes` to say. The families, with GenEval's nearest task (arXiv
2310.11513):

    single     a red circle                                   single_object, colors
    size       a small blue square
    position   a green cross in the top right corner
    count      three purple circles                           counting
    two        a red circle and a blue square                 two_object
    relation   a red circle to the left of a blue square      position
    binding    a small red circle and a large blue square     color_attr
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from qlip.data.public.builder import PublicDataset, encode
from qlip.data.public.scenes import (
    BACKGROUNDS,
    COLOURS,
    HARD,
    SIDE,
    STANDARD,
    TRIES,
    Design,
    Scene,
    SceneImages,
    Thing,
    choose,
    draw,
    placed,
)
from qlip.data.sources.base import CaptionedImages, RawSample
from qlip.errors import QLIPError
from qlip.runtime.rng import generator

Family = Literal["single", "size", "position", "count", "two", "relation", "binding"]
FAMILIES: tuple[Family, ...] = get_args(Family)
Relation = Literal["left", "right", "above", "below"]

NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5}
CELLS = (
    "in the top left corner",
    "at the top",
    "in the top right corner",
    "on the left",
    "in the centre",
    "on the right",
    "in the bottom left corner",
    "at the bottom",
    "in the bottom right corner",
)
"""Thirds of the image by row and column, in raster order; the centre of the thing lies in it."""
RELATIONS: dict[Relation, str] = {
    "left": "to the left of",
    "right": "to the right of",
    "above": "above",
    "below": "below",
}
CLEARLY = 4
"""Pixels by which the centres are further apart on the named axis than on the other, in scenes made for a relation."""
INSIDE = 1.5
"""Minimum distance of a centre from the edges of its cell, pixels, in scenes made for a cell."""

HELD_OUT_PAIRS = frozenset(
    {("red", "triangle"), ("blue", "circle"), ("green", "cross"), ("orange", "square"), ("cyan", "circle")}
)
"""Colours and shapes that are never together in training."""
HELD_OUT_COUNTS = {"circle": 3, "square": 4, "triangle": 2, "cross": 5}
"""The number of a shape that training never counts."""
SPLITS = {
    "captioned": "200,000 with captions, for training: no held-out pair, count or relation",
    "seen": "2,000 with captions, of the same kind as captioned",
    "unseen_pair": "2,000 with a pair of colour and shape that captioned does not show",
    "unseen_count": "2,000 with a number of a shape that captioned does not show",
    "unseen_relation": "2,000 with a relation of two colours that captioned does not show",
    "hard": "2,000 of six shapes, with captions",
}
LENGTHS = dict.fromkeys(SPLITS, 2_000) | {"captioned": 200_000}


def held_out_relation(first: str, second: str) -> Relation:
    """The relation of things of two colours that training never shows: one per ordered pair of colours.

    It is chosen so that the inverted caption, of the colours the other way round, is held out too.
    """
    low, high = sorted((first, second), key=tuple(COLOURS).index)
    pairs = list(itertools.combinations_with_replacement(COLOURS, 2))
    relation: Relation = get_args(Relation)[pairs.index((low, high)) % 4]
    return relation if first == low else inverted(relation)


def inverted(relation: Relation) -> Relation:
    """The relation that holds when both things change their places."""
    opposite: dict[Relation, Relation] = {"left": "right", "right": "left", "above": "below", "below": "above"}
    return opposite[relation]


@dataclass(frozen=True)
class Item:
    """A thing that a caption names; `size` is None where it names none."""

    colour: str
    shape: str
    size: str | None = None

    def __str__(self) -> str:
        named = f"{self.size} {self.colour}" if self.size else self.colour
        return f"{'an' if named[0] in 'aeiou' else 'a'} {named} {self.shape}"


@dataclass(frozen=True)
class Description:
    """Content of a caption.

    Attributes:
        family: kind of the caption.
        items: things; those of ``count`` are equal.
        cell: place in `CELLS`, of ``position``.
        relation: of the first to the second, of ``relation``.
        background: name, or None where the caption names none.
    """

    family: Family
    items: tuple[Item, ...]
    cell: int | None = None
    relation: Relation | None = None
    background: str | None = None

    @property
    def caption(self) -> str:
        """Text of the caption, lower case without punctuation."""
        first = self.items[0]
        if self.family == "count":
            number = next(word for word, value in NUMBERS.items() if value == len(self.items))
            text = f"{number} {first.colour} {plural(first.shape)}"
        elif self.cell is not None:
            text = f"{first} {CELLS[self.cell]}"
        elif self.relation is not None:
            text = f"{first} {RELATIONS[self.relation]} {self.items[1]}"
        else:
            text = " and ".join(map(str, self.items))
        return text if self.background is None else f"{text} on {self.background}"


def plural(shape: str) -> str:
    """Plural of a shape's name."""
    return f"{shape}es" if shape.endswith("s") else f"{shape}s"


_WORD = {
    "colour": "|".join(COLOURS),
    "size": "|".join(STANDARD.sizes),
    "shape": "|".join(HARD.shapes),
    "shapes": "|".join(map(plural, HARD.shapes)),
    "number": "|".join(NUMBERS),
    "cell": "|".join(CELLS),
    "relation": "|".join(RELATIONS.values()),
    "background": "|".join(BACKGROUNDS),
}
_ITEM = "an? (?:({size}) )?({colour}) ({shape})".format(**_WORD)
_COUNT = re.compile("({number}) ({colour}) ({shapes})".format(**_WORD))
_THINGS = re.compile(f"{_ITEM}(?: ({_WORD['cell']})| ({_WORD['relation']}|and) {_ITEM})?")
_ON = re.compile(f"(.*) on (?:a )?({_WORD['background']})(?: background)?")


def parse_caption(caption: str) -> Description:
    """Read a caption of one of the families.

    Case, surrounding spaces, a final full stop, and the spelling of "center" do not matter; a background may follow as
    "on black" or "on a black background".

    Raises:
        QLIPError: it is of no family.
    """
    text = " ".join(caption.lower().split()).rstrip(".").strip().replace("center", "centre")
    background = None
    if on := _ON.fullmatch(text):
        text, background = on.groups()
    if found := _COUNT.fullmatch(text):
        number, colour, shapes = found.groups()
        shape = next(one for one in HARD.shapes if plural(one) == shapes)
        return Description("count", (Item(colour, shape),) * NUMBERS[number], background=background)
    found = _THINGS.fullmatch(text)
    if found is None:
        raise QLIPError(
            f"caption {caption!r}: describes no made scene; one reads like 'a red circle above a blue square'"
        )
    size, colour, shape, cell, link, other_size, other_colour, other_shape = found.groups()
    first = Item(colour, shape, size)
    if cell is not None:
        return Description("position", (first,), cell=CELLS.index(cell), background=background)
    if link is None:
        return Description("size" if size else "single", (first,), background=background)
    items = (first, Item(other_colour, other_shape, other_size))
    if link != "and":
        relation = next(name for name, words in RELATIONS.items() if words == link)
        return Description("relation", items, relation=relation, background=background)
    return Description("binding" if size or other_size else "two", items, background=background)


def contradiction(description: Description) -> Description:
    """The caption with one change that makes it false: another colour, size, cell or number, or the inverted relation.

    A caption without any of these gets another colour for its first thing; ``binding`` has its sizes exchanged.
    """
    items = description.items
    first = items[0]
    match description.family:
        case "relation":
            assert description.relation is not None
            return replace(description, relation=inverted(description.relation))
        case "position":
            assert description.cell is not None
            return replace(description, cell=(description.cell + 1) % len(CELLS))
        case "size":
            return replace(description, items=(replace(first, size=_next(tuple(STANDARD.sizes), first.size)),))
        case "binding":
            sizes = [one.size for one in items]
            swapped = tuple(replace(one, size=size) for one, size in zip(items, reversed(sizes), strict=True))
            return replace(description, items=swapped)
        case "count":
            count = len(items) - 1 if len(items) > 2 else len(items) + 1
            return replace(description, items=(first,) * count)
    return replace(description, items=(replace(first, colour=_next(tuple(COLOURS), first.colour)), *items[1:]))


def _next(names: tuple[str, ...], name: str | None) -> str:
    return names[0] if name is None else names[(names.index(name) + 1) % len(names)]


def describe(rng: np.random.Generator, split: str) -> tuple[Description, Scene]:
    """Sample a caption and a scene that it describes.

    Args:
        rng: all choices are uniform where the split allows several.
        split: one of `SPLITS`.

    Returns:
        The description, whose background is named in half of the cases, and the scene.
    """
    design = HARD if split == "hard" else STANDARD
    while True:
        description = _description(rng, split, design)
        if _belongs(description, split) and (scene := _scene(rng, description, design)) is not None:
            return description, scene


class CaptionedScenes(CaptionedImages):
    """Scenes with a caption, drawn when they are read; the label is the family.

    Args:
        split: one of `SPLITS`; it seeds the scenes.
    """

    def __init__(self, split: str) -> None:
        self.name, self.split = f"scenes:{split}", split

    def __len__(self) -> int:
        return LENGTHS[self.split]

    def key(self, index: int) -> str:
        """Number of the sample, six digits."""
        return f"{index:06d}"

    def scene(self, index: int) -> tuple[Description, Scene]:
        """Description and scene of sample `index`, a function of the split and the index."""
        return describe(generator("scenes", self.split, index), self.split)

    def read(self, index: int) -> RawSample:
        """Draw sample `index`, a PNG file."""
        description, scene = self.scene(index)
        return RawSample(encode(draw(scene), "png"), (description.caption,), description.family, self.key(index))


def _belongs(description: Description, split: str) -> bool:
    """Return whether a description may be in a split."""
    pairs = {(one.colour, one.shape) for one in description.items}
    pair = bool(pairs & HELD_OUT_PAIRS)
    first, last = description.items[0], description.items[-1]
    count = description.family == "count" and HELD_OUT_COUNTS.get(first.shape) == len(description.items)
    relation = description.relation == held_out_relation(first.colour, last.colour)
    held_out = {"unseen_pair": pair, "unseen_count": count, "unseen_relation": relation}
    if split == "hard":
        return True
    return all(found == (name == split) for name, found in held_out.items())


def _description(rng: np.random.Generator, split: str, design: Design) -> Description:
    families: dict[str, tuple[Family, ...]] = {"unseen_count": ("count",), "unseen_relation": ("relation",)}
    family = choose(rng, families.get(split, FAMILIES))

    def item(size: str | None = None) -> Item:
        return Item(choose(rng, tuple(COLOURS)), choose(rng, design.shapes), size)

    background = choose(rng, tuple(BACKGROUNDS)) if rng.random() < 0.5 else None
    if family == "size":
        items: tuple[Item, ...] = (item(choose(rng, tuple(design.sizes))),)
    elif family == "count":
        items = (item(),) * choose(rng, range(2, design.max_things + 1))
    elif family == "binding":
        sizes = ("small", "large") if rng.random() < 0.5 else ("large", "small")
        items = (item(sizes[0]), item(sizes[1]))
    else:
        items = (item(),) if family in ("single", "position") else (item(), item())
    cell = choose(rng, range(len(CELLS))) if family == "position" else None
    relation = choose(rng, tuple(RELATIONS)) if family == "relation" else None
    return Description(family, items, cell, relation, background)


def _scene(rng: np.random.Generator, description: Description, design: Design) -> Scene | None:
    """A scene for a description; None where no place was found, or the things cannot be told apart."""
    pairs = [(one.colour, one.shape) for one in description.items]
    if description.family in ("two", "relation", "binding") and pairs[0] == pairs[1]:
        return None
    background = description.background or choose(rng, tuple(BACKGROUNDS))
    for _ in range(TRIES):
        things = list[Thing]()
        while len(things) < len(description.items):
            item = description.items[len(things)]
            size = item.size or choose(rng, tuple(design.sizes))
            thing = placed(rng, item.shape, item.colour, size, things, design)
            if thing is None:
                break
            things.append(thing)
        if len(things) == len(description.items) and _placed_as_said(description, things):
            return Scene(background, tuple(things), design)
    return None


def _placed_as_said(description: Description, things: Sequence[Thing]) -> bool:
    first, last = things[0], things[-1]
    if description.cell is not None:
        corners = itertools.product((first.x - INSIDE, first.x + INSIDE), (first.y - INSIDE, first.y + INSIDE))
        return {cell_of(x, y) for x, y in corners} == {description.cell}
    return description.relation is None or holds(description.relation, last.x - first.x, last.y - first.y, CLEARLY)


def cell_of(x: float, y: float) -> int:
    """Place in `CELLS` of a centre, pixels."""
    row, column = (min(2, max(0, int(3 * one / SIDE))) for one in (y, x))
    return 3 * row + column


def holds(relation: Relation, right: float, down: float, margin: float = 0.0) -> bool:
    """Return whether a relation holds from a first to a second thing.

    Args:
        relation: of the first to the second.
        right, down: centre of the second less that of the first, pixels.
        margin: pixels by which the named axis must exceed the other.
    """
    along, across = {
        "left": (right, down),
        "right": (-right, down),
        "above": (down, right),
        "below": (-down, right),
    }[relation]
    return along > abs(across) + margin


def _open(split: str) -> CaptionedImages:
    return CaptionedScenes(split) if split in SPLITS else SceneImages(split)


DATASET = PublicDataset(
    "scenes",
    "coloured shapes on black and white, 64 px, with and without captions; drawn when they are read",
    "made by this package; CC0-1.0",
    build=None,
    download=0,
    disk=0,
    splits={"train": "100,000 without captions, each a function of its number"} | SPLITS,
    draw=_open,
)
