"""Stems of English words (Porter, 1980), in the paper's steps and with its names: m, *v*, *d, *o."""

from __future__ import annotations

from functools import cache

Rules = tuple[tuple[str, str], ...]

_STEP_2: Rules = (
    ("ational", "ate"), ("tional", "tion"), ("enci", "ence"), ("anci", "ance"), ("izer", "ize"), ("abli", "able"),
    ("alli", "al"), ("entli", "ent"), ("eli", "e"), ("ousli", "ous"), ("ization", "ize"), ("ation", "ate"),
    ("ator", "ate"), ("alism", "al"), ("iveness", "ive"), ("fulness", "ful"), ("ousness", "ous"), ("aliti", "al"),
    ("iviti", "ive"), ("biliti", "ble"),
)  # fmt: skip
_STEP_3: Rules = (
    ("icate", "ic"), ("ative", ""), ("alize", "al"), ("iciti", "ic"), ("ical", "ic"), ("ful", ""), ("ness", ""),
)  # fmt: skip
_STEP_4 = (
    "al ance ence er ic able ible ant ement ment ent ion ou ism ate iti ous ive ize"
).split()  # fmt: skip


@cache
def stem(word: str) -> str:
    """A word in lower case to its stem; words of one or two letters, and those of other scripts, are left alone."""
    if len(word) <= 2 or not (word.isascii() and word.isalpha()):
        return word
    word = _step_1a(word)
    word = _step_1b(word)
    if word.endswith("y") and _has_vowel(word[:-1]):
        word = word[:-1] + "i"
    word = _replaced(word, _STEP_2)
    word = _replaced(word, _STEP_3)
    word = _step_4(word)
    return _step_5(word)


def _step_1a(word: str) -> str:
    """Plurals."""
    if word.endswith(("sses", "ies")):
        return word[:-2]
    return word[:-1] if word.endswith("s") and not word.endswith("ss") else word


def _step_1b(word: str) -> str:
    """-eed, -ed, -ing."""
    if word.endswith("eed"):
        return word[:-1] if _measure(word[:-3]) > 0 else word
    ending = next((one for one in ("ed", "ing") if word.endswith(one)), None)
    if ending is None or not _has_vowel(word[: -len(ending)]):
        return word
    word = word[: -len(ending)]
    if word.endswith(("at", "bl", "iz")):
        return word + "e"
    if _double(word) and word[-1] not in "lsz":
        return word[:-1]
    return word + "e" if _measure(word) == 1 and _short(word) else word


def _replaced(word: str, rules: Rules) -> str:
    """Only the longest ending that fits is looked at, and replaced where m > 0 before it."""
    ending, by = max((one for one in rules if word.endswith(one[0])), key=lambda one: len(one[0]), default=("", ""))
    if not ending or _measure(word[: -len(ending)]) == 0:
        return word
    return word[: -len(ending)] + by


def _step_4(word: str) -> str:
    """Endings that go where m > 1; -ion only after s or t."""
    ending = max((one for one in _STEP_4 if word.endswith(one)), key=len, default="")
    rest = word[: len(word) - len(ending)]
    if not ending or _measure(rest) <= 1 or (ending == "ion" and not rest.endswith(("s", "t"))):
        return word
    return rest


def _step_5(word: str) -> str:
    """A last e, and the second of two l."""
    if word.endswith("e"):
        measure = _measure(word[:-1])
        if measure > 1 or (measure == 1 and not _short(word[:-1])):
            word = word[:-1]
    return word[:-1] if word.endswith("ll") and _measure(word) > 1 else word


def _consonant(word: str, at: int) -> bool:
    """y is one at the start and after a vowel."""
    if word[at] == "y":
        return at == 0 or not _consonant(word, at - 1)
    return word[at] not in "aeiou"


def _kinds(word: str) -> str:
    return "".join("c" if _consonant(word, at) else "v" for at in range(len(word)))


def _measure(word: str) -> int:
    """m: how often a consonant follows a vowel."""
    return _kinds(word).count("vc")


def _has_vowel(word: str) -> bool:
    """*v*."""
    return "v" in _kinds(word)


def _double(word: str) -> bool:
    """*d: it ends with two of one consonant."""
    return len(word) > 1 and word[-1] == word[-2] and _consonant(word, len(word) - 1)


def _short(word: str) -> bool:
    """*o: consonant, vowel, consonant at the end, and that one not w, x or y."""
    return _kinds(word).endswith("cvc") and word[-1] not in "wxy"
