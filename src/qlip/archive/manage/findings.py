"""What `verify` finds, and where two copies of the same bytes part."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from qlip.archive.manage.damage import Damage


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        file: inside the dataset.
        what: in words, one line.
        damage: of a part, where it lies; without the right bytes.
        mended: whether it was put right.
        mendable: whether `verify --mend` can put it right.
    """

    file: str
    what: str
    damage: Damage | None = None
    mended: bool = False
    mendable: bool = False


@dataclass
class Verified:
    """A dataset, checked.

    Attributes:
        parts, rows, images, broken, bytes: that the manifest counts; broken images are those left out.
        findings: what is wrong.
        notes: what a reader may want to know, and is no fault.
    """

    parts: int = 0
    rows: int = 0
    pictures: int = 0
    broken: int = 0
    bytes: int = 0
    findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Nothing is wrong, or all of it was mended."""
        return all(finding.mended for finding in self.findings)

    def add(
        self, file: str, what: str, damage: Damage | None = None, *, mendable: bool = False, mended: bool = False
    ) -> None:
        """Note something wrong."""
        if damage is not None:
            damage = replace(damage, mended=None)  # a whole part, which nobody asks for later
        self.findings.append(Finding(file, what, damage, mended, mendable or mended))


def one_bit(wrong: bytes, right: bytes) -> tuple[int, int] | None:
    """The one bit in which bytes of one length differ, as (byte, bit), bit 0 worth 1; None where it is not one."""
    if len(wrong) != len(right):
        return None
    places = [place for place, (one, other) in enumerate(zip(wrong, right, strict=True)) if one != other]
    if len(places) != 1:
        return None
    difference = wrong[places[0]] ^ right[places[0]]
    return (places[0], difference.bit_length() - 1) if difference & (difference - 1) == 0 else None


def where_differs(wrong: bytes, right: bytes, start: int = 0) -> str:
    """The same in words; of larger damage, the first byte. Bytes are counted from `start` on."""
    bit = one_bit(wrong, right)
    if bit is not None:
        return f"one bit is flipped: byte {start + bit[0]:,}, bit {bit[1]}"
    short = min(len(wrong), len(right))
    first = next((place for place in range(short) if wrong[place] != right[place]), short)
    return f"from byte {start + first:,} on, it is not what was written"
