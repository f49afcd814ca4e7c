"""Cleaning of captions before T5, as DeepFloyd IF does it and LlamaGen after it: twice, in the order below."""

from __future__ import annotations

import html
import re
from html.parser import HTMLParser
from urllib.parse import unquote_plus

from qlip.errors import require

CLEANING = "deepfloyd"
"""Name of these rules in fingerprints; a rule that changes gets another name."""

_HOSTS = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b\/?(?!@)"
_ADDRESSES = [
    (r"<person>", "person"),
    (rf"\b((?:https?:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_HOSTS}))", ""),
    (rf"\b((?:www:(?:\/{{1,3}}|[a-zA-Z0-9%])|{_HOSTS}))", ""),
]
_SYMBOLS = [
    (r"@[\w\d]+\b", ""),  # names of users
    (r"[\u31c0-\u9fff]+", ""),  # CJK; kana and hangul stay
    (
        r"[\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030\u30A0\uFE31\uFE32\uFE58"
        r"\uFE63\uFF0D]+",
        "-",
    ),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses of machines
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (r"[\S]+\.(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)", ""),
    (r"[\"\']{2,}", '"'),
    (r"[\.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
]
_TRASH = [
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # jc6640
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),  # jc6640vc
    (r"\b\d+[a-zA-Z]+\d+\b", ""),  # 6640vc231
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (r"\b(?:png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4)(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),  # j2d1a2a
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # 1024x768, with the Cyrillic letter too
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    (r"^[\"\']([\w\W]+)[\"\']$", r"\1"),
    (r"^[\'\_,\-\:;]", ""),
    (r"[\'\_,\-\:\-\+]$", ""),
    (r"^\.\S+$", ""),
]
_JOINED = re.compile(r"[-_]")


def clean_caption(caption: str) -> str:
    """Clean a caption twice. Raises QLIPError: the package ftfy is not installed."""
    return _once(_once(caption))


def _once(text: str) -> str:
    text = _replaced(unquote_plus(text).strip().lower(), _ADDRESSES)
    text = _replaced(_Text.of(text), _SYMBOLS)
    if len(_JOINED.findall(text)) > 3:  # this-is-my-cute-cat
        text = _JOINED.sub(" ", text)
    text = html.unescape(html.unescape(require("ftfy", extra="hf").fix_text(text)))
    return _replaced(text, _TRASH).strip()


def _replaced(text: str, rules: list[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


class _Text(HTMLParser):
    """Text of an HTML fragment, without tags, comments, scripts and styles."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.parts: list[str] = []
        self.hidden = 0

    @classmethod
    def of(cls, fragment: str) -> str:
        parser = cls()
        try:
            parser.feed(fragment)
            parser.close()
        except AssertionError:  # the parser's way to reject markup such as "<![a"
            return fragment
        return "".join(parser.parts)

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)

    def handle_charref(self, name: str) -> None:
        self.handle_data(html.unescape(f"&#{name};"))

    def handle_entityref(self, name: str) -> None:
        character = html.unescape(f"&{name};")
        self.handle_data(f"&{name}" if character.endswith(";") else character)

    def unknown_decl(self, data: str) -> None:
        self.handle_data(data[6:] if data[:6].upper() == "CDATA[" else "")

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden += tag in ("script", "style", "template")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style", "template") and self.hidden > 0
