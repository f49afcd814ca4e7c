"""Schedules of classifier-free guidance: the scale of each token.

logits = null + scale * (conditional - null). A scale of 1 or less is the conditional branch alone, as in LlamaGen.

`parse` reads the short form of the command line; `to_dict` is the form of result files.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from qlip.errors import QLIPError


@dataclass(frozen=True)
class Guidance:
    """Base class of schedules."""

    name: ClassVar[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
                raise QLIPError(f"guidance {self.name}: {field.name} {value!r}: give a number of 0 or more")

    def scale(self, token: int, num_tokens: int) -> float:
        """Scale of a token of an image of ``num_tokens``."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        """Name and settings, for JSON."""
        return {"name": self.name} | asdict(self)

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{value:g}" for value in asdict(self).values())])


@dataclass(frozen=True)
class Constant(Guidance):
    """One scale for all tokens."""

    name = "constant"
    value: float = 1.0

    def scale(self, token: int, num_tokens: int) -> float:
        """See :class:`Guidance`."""
        return self.value

    def __str__(self) -> str:
        return f"{self.value:g}"


@dataclass(frozen=True)
class Interval(Guidance):
    """A scale for the first tokens, then none: LlamaGen's ``cfg_interval``.

    Attributes:
        value: scale of the first ``last + 2`` tokens.
        last: last guided step of decoding; the first token is drawn before step 0.
    """

    name = "interval"
    value: float
    last: int

    def scale(self, token: int, num_tokens: int) -> float:
        """See :class:`Guidance`."""
        return self.value if token <= self.last + 1 else 1.0


@dataclass(frozen=True)
class Linear(Guidance):
    """A scale that changes evenly from the first token to the last."""

    name = "linear"
    first: float
    last: float

    def scale(self, token: int, num_tokens: int) -> float:
        """See :class:`Guidance`."""
        return self.first + (self.last - self.first) * token / max(1, num_tokens - 1)


@dataclass(frozen=True)
class Power(Guidance):
    """1 + (value - 1) (1 - cos(pi (t / N)^power)) / 2 for token t of N: from 1 at the first token to ``value``.

    The schedule of RAR (arXiv 2411.00776).
    """

    name = "power"
    value: float
    power: float

    def scale(self, token: int, num_tokens: int) -> float:
        """See :class:`Guidance`."""
        progress = (token / num_tokens) ** self.power
        return 1 + (self.value - 1) * (1 - math.cos(math.pi * progress)) / 2


SCHEDULES: dict[str, type[Guidance]] = {one.name: one for one in (Constant, Interval, Linear, Power)}


def parse(text: str) -> Guidance:
    """Read a schedule: a number, or a name and its settings, such as ``interval:4:5`` or ``power:4:2.5``.

    Raises:
        QLIPError: no such schedule, another number of settings, or no numbers.
    """
    name, _, rest = text.partition(":")
    values = rest.split(":") if rest else []
    if name not in SCHEDULES:
        name, values = "constant", text.split(":")
    names = [field.name for field in fields(SCHEDULES[name])]
    form = "a number" if name == "constant" else ":".join([name, *(one.upper() for one in names)])
    try:
        settings = [float(one) for one in values]
    except ValueError:
        raise QLIPError(
            f"guidance {text!r}: give a number, or one of {', '.join(SCHEDULES)} with its settings, as power:4:2.5"
        ) from None
    if len(settings) != len(names):
        raise QLIPError(f"guidance {text!r}: give {form}")
    if name == "interval":
        if settings[1] != int(settings[1]):
            raise QLIPError(f"guidance {text!r}: LAST is a number of steps, an integer")
        return Interval(settings[0], int(settings[1]))
    return SCHEDULES[name](*settings)


def mix(conditional: Tensor, null: Tensor, scale: float) -> Tensor:
    """Guided logits: null + scale (conditional - null); the conditional ones alone for a scale of 1 or less."""
    return null + scale * (conditional - null) if scale > 1 else conditional
