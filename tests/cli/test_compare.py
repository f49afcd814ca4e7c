"""`qlip compare`: tables, plots and the HTML page."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tests.cli.conftest import Command
from tests.evaluation.test_compare import of, rebuilt


def test_compare__tables_plots_and_page(qlip: Command, model: Path, other_model: Path, photos: Path) -> None:
    for name, one in (("a", model), ("b", other_model)):
        assert qlip("eval", "--model", one, "--data", photos, "-o", name, "--codecs").code == 0
        page = Path(name, "report.html").read_text()
        assert (
            page.startswith("<!") and "data:image/png;base64," in page and "://" not in page
        )  # nothing from elsewhere
    ran = qlip("compare", "a", "b", "--codecs", "-o", "c")
    assert ran.code == 0 and ran.out.count("PSNR") >= 1 and "WebP, 40 bytes" in ran.out
    assert Path("c/comparison.html").is_file() and Path("c/tables.tex").read_text().count("\\toprule") >= 1
    with Image.open("c/rate-distortion.png") as plot:
        assert plot.width > 300
    assert "SSIM" in Path("c/comparison.html").read_text()
    narrow = qlip("compare", "a", "b", "--metric", "l1", "-o", "d")
    page = Path("d/comparison.html").read_text()
    assert narrow.code == 0 and "L1" in page and not any(name in page for name in ("PSNR", "SSIM", "bits/pixel"))
    wrong = qlip("compare", "a", "b", "--metric", "ssim,psnrr")
    assert wrong.code == 1 and "did you mean 'psnr'" in wrong.err
    none = qlip("compare", "nowhere")
    assert none.code == 1 and "nowhere" in none.err


def test_compare__other_preparation_needs_an_option(qlip: Command, tmp_path: Path) -> None:
    for name, preparation in (("a", "64x64"), ("b", "96x96")):
        of(name, rebuilt(28.0, preparation=preparation)).save(tmp_path / name / "result.json")
    refused = qlip("compare", tmp_path / "a", tmp_path / "b")
    assert refused.code == 1 and "or compare them as mixed" in refused.err and refused.err.endswith("(--mixed)\n")
    assert "64x64" in qlip("compare", tmp_path / "a", tmp_path / "b", "--mixed").out
