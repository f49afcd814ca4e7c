"""gFID's protocol: a folder or a stream of generated images against stored statistics of one network and size."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from qlip import QLIPError, QLIPProcessor
from qlip.data import FolderImages
from qlip.data.loader.eval_set import EvalSet
from qlip.evaluation import open_evaluation
from qlip.evaluation.generation import measure_generated, statistics_of
from qlip.evaluation.metrics.frechet import Moments, frechet_distance
from qlip.evaluation.metrics.statistics import Statistics

from ..tiny import Tiny, TinyInception, write_images

SIZE = 64


@pytest.fixture(scope="module")
def processor() -> QLIPProcessor:
    return QLIPProcessor.from_pretrained("bundled")


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    write_images(folder, 30, SIZE, 0)
    return folder


@pytest.fixture(scope="module")
def generated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Duller than the real ones."""
    folder = tmp_path_factory.mktemp("generated")
    write_images(folder, 25, SIZE, 1, contrast=0.5)
    return folder


def reference(real: Path, processor: QLIPProcessor, **options: int) -> Statistics:
    data: EvalSet = open_evaluation(str(real), processor)
    prepared = processor.preprocessing
    return statistics_of(data, prepared, Tiny(), preparation="64x64, bicubic", batch_size=7, **options)


def test_generated_images__statistics_are_of_every_image_and_say_so(
    real: Path, processor: QLIPProcessor, tmp_path: Path
) -> None:
    statistics = reference(real, processor, kept=10)
    pixels = [np.asarray(Image.open(path)) for path in sorted(real.iterdir())]
    origin = statistics.origin
    assert (origin.count, origin.size, origin.kept, origin.preparation) == (30, (SIZE, SIZE), 10, "64x64, bicubic")
    assert origin.digest == hashlib.sha256(np.stack(pixels).tobytes()).hexdigest()
    assert origin.network == Tiny().described() and origin.source
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.png").write_bytes(b"no image")
    with pytest.raises(QLIPError, match="x.png: .*; statistics of .*broken need every image"):
        reference(tmp_path / "broken", processor)


def test_generated_images__a_folder_and_a_stream_give_one_result(
    real: Path, generated: Path, processor: QLIPProcessor, tmp_path: Path
) -> None:
    reference(real, processor).save(tmp_path / "real.safetensors")
    statistics, network = Statistics.load(tmp_path / "real.safetensors"), Tiny()
    found = measure_generated(generated, statistics, network, batch_size=4)
    assert set(found.values) == {"fd_tiny", "kd_tiny", "precision_tiny", "recall_tiny"}
    moments = Moments(5)
    for path in sorted(generated.iterdir()):
        pixels = np.asarray(Image.open(path), dtype=np.float32) / 255
        moments.add(network.features(torch.from_numpy(pixels).permute(2, 0, 1)[None]))
    expected = frechet_distance(statistics.moments, moments).distance
    assert found.values["fd_tiny"].value == pytest.approx(expected, rel=1e-4)
    assert found.values["fd_tiny"].count == 25
    stream = (Image.open(path) for path in sorted(generated.iterdir()))
    again = measure_generated(stream, statistics, network, batch_size=4, expected=25)
    assert again == found == measure_generated(FolderImages(generated), statistics, network, batch_size=4)
    assert found.notes["reference"].startswith(f"{statistics.origin.source}: 30 images, 64x64, bicubic, SHA-256 ")
    # duller images lie inside what the real ones fill, and leave much of it out
    assert found.values["precision_tiny"].value > found.values["recall_tiny"].value


def test_generated_images__the_real_images_themselves_are_no_way_off(real: Path, processor: QLIPProcessor) -> None:
    found = measure_generated(real, reference(real, processor), Tiny())
    assert found.values["fd_tiny"].value == pytest.approx(0, abs=1e-6)
    assert found.values["precision_tiny"].value == found.values["recall_tiny"].value == 1


def test_generated_images__what_may_not_be_compared(
    real: Path, generated: Path, processor: QLIPProcessor, tmp_path: Path
) -> None:
    statistics = reference(real, processor)
    write_images(tmp_path / "small", 3, 32, 2)
    with pytest.raises(QLIPError, match="are of 64x64 pixels, these images have 32x32; make both of one size"):
        measure_generated(tmp_path / "small", statistics, Tiny())
    mixed = [Image.new("RGB", (SIZE, SIZE)), Image.new("RGB", (SIZE, SIZE + 2))]
    with pytest.raises(QLIPError, match="image 1: has 64x66 pixels, image 0 has 64x64; generated images are"):
        measure_generated(mixed, statistics, Tiny())
    with pytest.raises(QLIPError, match="weights is .*, here it is"):
        measure_generated(generated, statistics, Tiny(seed=1))
    with pytest.raises(QLIPError, match="50 images are needed, got 25"):
        measure_generated(generated, statistics, Tiny(), expected=50)
    with pytest.raises(QLIPError, match="generated images: two or more images are needed, got 0"):
        measure_generated([], statistics, Tiny())
    (tmp_path / "small" / "001.png").write_bytes(b"no image")
    with pytest.raises(QLIPError, match="001.png: not an image that can be read"):
        measure_generated(
            tmp_path / "small", reference(tmp_path / "small2", processor) if False else statistics, Tiny()
        )


def test_generated_images__over_inception_it_is_called_gfid(
    real: Path, generated: Path, processor: QLIPProcessor
) -> None:
    network, data = TinyInception(), open_evaluation(str(real), processor)
    statistics = statistics_of(data, processor.preprocessing, network, preparation="64x64, bicubic")
    found = measure_generated(generated, statistics, network)
    assert set(found.values) == {"gfid", "kid", "precision_inception", "recall_inception"}
    with pytest.raises(QLIPError, match="network is fid, here it is fd_tiny"):
        measure_generated(generated, statistics, Tiny())
