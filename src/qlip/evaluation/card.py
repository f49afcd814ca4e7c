"""The figures of the bundled model's card: one list, so that the card, the README and the log quote the same thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from qlip.data.captions import load_templates
from qlip.data.datasets import open_named
from qlip.evaluation.protocol import Measurement, open_evaluation
from qlip.evaluation.reconstruction import measure_reconstruction
from qlip.evaluation.zero_shot import measure_classification
from qlip.modeling import QLIPModel, QLIPProcessor

EMOJI_TEMPLATES = ("{}", "an emoji of {}", "{} emoji")


@dataclass(frozen=True)
class Row:
    """One measurement to make; ``run`` takes model, processor, a limit of pictures, and a progress callback."""

    title: str
    data: str
    run: Callable[[QLIPModel, QLIPProcessor, int | None, Callable[[int], None]], Measurement]


def _reconstruct(title: str, data: str) -> Row:
    def run(
        model: QLIPModel, processor: QLIPProcessor, limit: int | None, advance: Callable[[int], None]
    ) -> Measurement:
        return measure_reconstruction(model, processor, open_evaluation(data, processor, limit), advance=advance)

    return Row(title, data, run)


def _name(
    title: str, data: str, templates: Callable[[], tuple[str, ...]], keep: Callable[[str], bool], protocol: str
) -> Row:
    def run(
        model: QLIPModel, processor: QLIPProcessor, limit: int | None, advance: Callable[[int], None]
    ) -> Measurement:
        evaluation = open_evaluation(data, processor, limit)
        return measure_classification(
            model, processor, evaluation, templates(), protocol=protocol, keep=keep, advance=advance
        )

    return Row(title, data, run)


def _never_named(label: str) -> bool:
    """Emoji names that no picture of the training had, of any source.

    Skin tones make five near-copies of a concept; the yellow one stands for all.
    """
    return "skin tone" not in label and label not in _clipart_titles()


@cache
def _clipart_titles() -> frozenset[str]:
    images = open_named("clipart:train")
    samples = (images.read(index) for index in range(len(images)))
    return frozenset(text for sample in samples for text in (sample.label, *sample.captions) if text)


CARD = (
    _reconstruct("small photographs", "cifar10:test"),
    _reconstruct("large photographs, shrunk", "wallpapers:test"),
    _reconstruct("emoji of a vendor never seen", "emoji:twemoji"),
    _reconstruct("clip art", "clipart:test"),
    _name(
        "ten classes that training named",
        "cifar10:test",
        lambda: load_templates("cifar"),
        lambda label: True,
        "prompt accuracy on trained classes",
    ),
    _name(
        "emoji concepts that no training picture had",
        "emoji:twemoji-heldout",
        lambda: EMOJI_TEMPLATES,
        _never_named,
        "zero-shot accuracy",
    ),
)
"""All on held-out pictures of the sets that `qlip data get` fetches."""
