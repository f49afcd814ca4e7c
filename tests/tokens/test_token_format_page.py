"""docs/token-format.md: its example makes its dump, and its C reader accepts and refuses the same files as Python."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from qlip.errors import QLIPError
from qlip.tokens import TokenCodec, TokenFile
from tests.tokens.samples import CODES, DECODER, PREPARATION, entropy_tables, rare_ones, token_file
from tests.tokens.test_token_file import GOLDEN_2
from tests.tokens.test_token_file_fuzz import cases

PAGE = Path(__file__).parents[2] / "docs" / "token-format.md"


def block(language: str) -> str:
    """Return the page's only code block of a language."""
    blocks = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 1
    return str(blocks[0])


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (compiler := shutil.which("cc")) is None:
        pytest.skip("no C compiler (cc) on this machine")
    folder = tmp_path_factory.mktemp("reader")
    (folder / "read_qlip.c").write_text(block("c"))
    options = ["-std=c99", "-O1", "-Wall", "-Wextra", "-Wconversion", "-pedantic", "-Werror"]
    subprocess.run([compiler, *options, "-o", "read_qlip", "read_qlip.c"], cwd=folder, check=True)
    return folder / "read_qlip"


def run(reader: Path, path: Path, group_size: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run([reader, path, str(group_size)], capture_output=True, text=True, timeout=10)


def test_python_example__makes_the_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(block("python"), {})
    data = Path("tiny.qlip").read_bytes()
    rows = [data[start : start + 16] for start in range(0, len(data), 16)]
    lines = [
        f"{16 * number:08x}: {row.hex(' '):<47}  {''.join(chr(b) if 32 <= b < 127 else '.' for b in row)}"
        for number, row in enumerate(rows)
    ]
    assert block("text").splitlines() == lines


def test_dump_of_version_2__is_the_golden_file() -> None:
    rows = re.findall(r"^[0-9a-f]{8}: ((?:[0-9a-f]{2} )+)", block("hexdump"), re.M)
    assert "".join(rows).replace(" ", "") == GOLDEN_2


def test_python_decoder__decodes_coded_files(tmp_path: Path) -> None:
    tables = entropy_tables(num_bits=7)
    tables.save(tmp_path / "tables.safetensors")
    names: dict[str, Any] = {}
    exec(block("py"), names)
    for grid in ((3, 4), (1, 1), (2, 5)):
        raw = token_file(grid, 7, 7)
        [coded] = TokenCodec(tables).encode([raw.bits], grid)
        bits = names["decode"](coded, *grid, tmp_path / "tables.safetensors")
        assert torch.equal(torch.tensor(bits).flatten(0, 1), raw.indices(1))


@pytest.mark.parametrize(
    ("grid", "num_bits", "group_size"),
    [((1, 3), 7, 7), ((8, 8), 28, 7), ((8, 8), 28, 28), ((5, 3), 63, 63), ((3, 5), 63, 9)],
)
@pytest.mark.parametrize("version", [1, 2])
def test_c_reader__reads_the_same_tokens(
    reader: Path, tmp_path: Path, grid: tuple[int, int], num_bits: int, group_size: int, version: int
) -> None:
    more = {} if version == 1 else {"preparation": PREPARATION, "tiles": (1, grid[1])}
    made = token_file(grid, num_bits, group_size, **more)
    made.save(tmp_path / "f.qlip")
    result = run(reader, tmp_path / "f.qlip", group_size)
    assert result.returncode == 0, result.stderr
    expected = [
        f"grid {grid[0]} {grid[1]}",
        "original 640 480",
        f"bits {num_bits}",
        f"codes {made.code_fingerprint}",
        f"decoder {made.decoder_fingerprint}",
        *([f"preparation {PREPARATION}", f"tiles 1 {grid[1]}"] if version == 2 else []),
        *(" ".join(map(str, token)) for token in made.indices(group_size).tolist()),
    ]
    assert result.stdout.splitlines() == expected


def test_c_reader__refuses_the_same_files(reader: Path, tmp_path: Path) -> None:
    path = tmp_path / "f.qlip"
    for data, _ in cases(600, seed=3):
        path.write_bytes(data)
        result = run(reader, path, 1)
        try:
            TokenFile.from_bytes(data)
        except QLIPError:
            assert result.returncode == 1 and result.stderr.count("\n") == 1, data.hex()
        else:
            assert result.returncode == 0, (result.stderr, data.hex())


def test_c_reader__entropy_coded_needs_the_tables(reader: Path, tmp_path: Path) -> None:
    tokens = TokenFile(rare_ones(64, seed=0), (8, 8), (64, 64), 8, CODES, DECODER)
    tokens.save(tmp_path / "f.qlip", TokenCodec(entropy_tables(8, bias=-6000, scale_down=9)))
    result = run(reader, tmp_path / "f.qlip", 8)
    assert (result.returncode, result.stdout) == (1, "")
    assert "entropy-coded: reading it needs the tables of the model" in result.stderr
