"""Our metrics beside the packages that the field uses: ``python -m benchmarks.metrics --write``.

The packages are installed, without their dependencies, in a virtual environment of their own in a temporary folder,
which also sees the packages of this one (PyTorch, NumPy, SciPy, scikit-learn). torchvision is not installed: packages
that import it get empty modules, and LPIPS' backbones are built here with the weights of ``qlip data get lpips``.
Metrics of sets are compared on equal features, since the packages download their networks from places of their own.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import importlib.metadata
import io
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks.report import publish
from qlip import assets
from qlip.evaluation.evaluators.base import Chunk, Rows
from qlip.evaluation.evaluators.retrieval import Retrieval
from qlip.evaluation.metrics.frechet import Moments, frechet_distance
from qlip.evaluation.metrics.kid import kernel_distance
from qlip.evaluation.metrics.pixel import l1, ms_ssim, psnr, ssim
from qlip.evaluation.metrics.precision_recall import precision_recall
from qlip.evaluation.metrics.ranking import accuracies, ranks_of
from qlip.evaluation.models.base import ENCODE_IMAGE, ENCODE_TEXT, EvalModel
from qlip.evaluation.networks.inception import resize_like_tensorflow
from qlip.evaluation.networks.lpips import _LAYERS, LPIPS
from qlip.modeling import Preprocessing

PACKAGES = {
    "scikit-image": "0.26.0",
    "torchmetrics": "1.9.0",
    "piq": "0.8.0",
    "pytorch-msssim": "1.0.0",
    "lpips": "0.1.4",
    "torch-fidelity": "0.4.0",
    "clean-fid": "0.1.35",
    "clip-benchmark": "1.6.2",
}
DOCS = Path(__file__).parents[1] / "docs" / "evaluation.md"
BEGIN, END = "<!-- metrics: begin -->", "<!-- metrics: end -->"
SIDE = 256


@dataclass(frozen=True)
class Row:
    """A metric computed by us and by a package.

    Attributes:
        metric: name of ours.
        package: its name and version.
        ours, theirs: mean over images, or the value of the set.
        difference: largest absolute difference of an image, or that of the set.
        remark: reason of a difference.
    """

    metric: str
    package: str
    ours: float
    theirs: float
    difference: float
    remark: str = ""


def main() -> None:
    """Install the packages, compare, print the table, and write it if asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.metrics", description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the table to docs/evaluation.md")
    parser.add_argument("--compare", action="store_true", help=argparse.SUPPRESS)  # inside the environment
    options = parser.parse_args()
    if options.compare:
        print(json.dumps([asdict(row) for row in compare()]))
        return
    with tempfile.TemporaryDirectory() as folder:
        python, missing = install(Path(folder))
        command = [str(python), "-m", "benchmarks.metrics", "--compare"]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        ran = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    rows = [Row(**values) for values in json.loads(ran.stdout.splitlines()[-1])]
    publish("no GPU", list(table(rows, missing)), DOCS, BEGIN, END, options.write)


def install(folder: Path) -> tuple[Path, list[str]]:
    """Make the environment; return its interpreter and the packages that could not be installed."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = subprocess.run([python, "-c", script], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    (Path(own) / "base.pth").write_text(sysconfig.get_path("purelib") + "\n")
    missing = []
    for name, version in PACKAGES.items():
        command = [python, "-m", "pip", "install", "--quiet", "--no-deps", f"{name}=={version}"]
        if subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode:
            missing.append(name)
    return python, missing


def table(rows: Sequence[Row], missing: Sequence[str]) -> Iterator[str]:
    """Lines of the table in Markdown."""
    yield "| metric | package | ours | theirs | largest difference | |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        numbers = f"{row.ours:.6g} | {row.theirs:.6g} | {row.difference:.1e}"
        yield f"| {row.metric} | {row.package} | {numbers} | {row.remark} |"
    if missing:
        yield ""
        yield f"Could not be installed: {', '.join(missing)}."


def compare() -> Iterator[Row]:
    """Compute every metric in both ways; packages that are not installed are left out."""
    sys.meta_path.append(_NoTorchvision())
    for part in (_pixels, _lpips, _sets, _resize, _classification, _retrieval):
        try:
            yield from part()
        except ModuleNotFoundError as error:
            print(f"{part.__name__}: no package {error.name}", file=sys.stderr)


def images() -> tuple[Tensor, Tensor]:
    """The package's photographs and the same after JPEG of quality 30: (B, 3, 256, 256) in [0, 1] each."""
    prepared = Preprocessing((SIDE, SIDE), SIDE)
    originals, rebuilt = [], []
    for path in sorted(assets.path("images").glob("*.jpg")):
        image = prepared.resized(Image.open(path).convert("RGB"))
        file = io.BytesIO()
        image.save(file, "JPEG", quality=30)
        for found, one in ((originals, image), (rebuilt, Image.open(file))):
            found.append(torch.from_numpy(np.array(one)).permute(2, 0, 1).float() / 255)
    return torch.stack(originals), torch.stack(rebuilt)


def _pixels() -> Iterator[Row]:
    import piq
    import pytorch_msssim
    import skimage.metrics
    import torchmetrics.functional.image as tm
    from torchmetrics.functional import mean_absolute_error

    originals, rebuilt = images()
    pairs = list(zip(rebuilt.split(1), originals.split(1), strict=True))

    def arrays(a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
        return b[0].permute(1, 2, 0).double().numpy(), a[0].permute(1, 2, 0).double().numpy()

    gaussian = {"gaussian_weights": True, "use_sample_covariance": False, "channel_axis": -1, "data_range": 1}
    border = "leaves out the border of 5 pixels, where the window does not fit"
    powers = f"{border}; powers of each channel"
    calls: list[tuple[Callable[[Tensor, Tensor], Tensor], str, Callable[[Tensor, Tensor], Any], str]] = [
        (psnr, "scikit-image", lambda a, b: skimage.metrics.peak_signal_noise_ratio(*arrays(a, b), data_range=1), ""),
        (psnr, "torchmetrics", lambda a, b: tm.peak_signal_noise_ratio(a, b, data_range=1.0), ""),
        (psnr, "piq", lambda a, b: piq.psnr(a, b), "adds 1e-8 to the error"),
        (l1, "torchmetrics", lambda a, b: mean_absolute_error(a.contiguous(), b.contiguous()), ""),
        (ssim, "torchmetrics", lambda a, b: tm.structural_similarity_index_measure(a, b, data_range=1.0), ""),
        (ssim, "scikit-image", lambda a, b: skimage.metrics.structural_similarity(*arrays(a, b), **gaussian), border),
        (ssim, "pytorch-msssim", lambda a, b: pytorch_msssim.ssim(a, b, data_range=1.0), border),
        (ssim, "piq", lambda a, b: piq.ssim(a, b, downsample=False), border),
        (
            ms_ssim,
            "torchmetrics",
            lambda a, b: tm.multiscale_structural_similarity_index_measure(a, b, data_range=1.0),
            "",
        ),
        (ms_ssim, "pytorch-msssim", lambda a, b: pytorch_msssim.ms_ssim(a, b, data_range=1.0), powers),
        (ms_ssim, "piq", lambda a, b: piq.multi_scale_ssim(a, b), powers),
    ]
    for metric, package, theirs, remark in calls:
        found = torch.tensor([float(theirs(*pair)) for pair in pairs], dtype=torch.float64)
        yield _row(metric.__name__, package, metric(rebuilt, originals), found, remark)


def _lpips() -> Iterator[Row]:
    import lpips

    originals, rebuilt = images()
    torchvision: Any = sys.modules["torchvision.models"]
    torchvision.vgg16 = torchvision.alexnet = lambda pretrained: None
    for net in ("vgg", "alex"):
        ours = LPIPS.from_cache(net)  # type: ignore[arg-type]
        features = _backbone(net)
        state = {name: one for name, one in ours.state_dict().items() if name.startswith("features.")}
        for place, layer in enumerate(one for one in features if isinstance(one, nn.Conv2d)):
            layer.load_state_dict({kind: state[f"features.{place}.{kind}"] for kind in ("weight", "bias")})
        holder = type("Model", (), {"features": features})()
        torchvision.vgg16 = torchvision.alexnet = lambda pretrained, holder=holder: holder
        theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
        with torch.inference_mode():
            own = ours(2 * rebuilt - 1, 2 * originals - 1)
            found = theirs(rebuilt, originals, normalize=True).flatten()
        yield _row(f"lpips_{net}", "lpips", own, found, "its own linear weights, our backbone's")


def _backbone(net: str) -> nn.Sequential:
    """Convolutions in the order and places of torchvision's models."""
    layers: list[nn.Module] = []
    before = 3
    for one in _LAYERS[net]:  # type: ignore[index]
        if isinstance(one, int):
            layers.append(nn.MaxPool2d(one, 2))
            continue
        layers += [nn.Conv2d(before, one[0], one[1], one[2], one[3]), nn.ReLU()]
        before = one[0]
    return nn.Sequential(*layers, nn.MaxPool2d(2, 2))


def _sets() -> Iterator[Row]:
    import cleanfid.fid
    import piq
    import torch_fidelity.metric_fid as tf_fid
    import torch_fidelity.metric_kid as tf_kid
    import torch_fidelity.metric_prc as tf_prc
    import torchmetrics.image.fid as tm_fid
    import torchmetrics.image.kid as tm_kid

    draw = torch.Generator().manual_seed(0)
    mix = torch.randn(64, 64, generator=draw)
    real = torch.randn(400, 64, generator=draw) @ mix / 8
    made = (torch.randn(400, 64, generator=draw) * 0.9 + 0.2) @ mix / 8
    moments = [Moments(64) for _ in range(2)]
    for one, features in zip(moments, (real, made), strict=True):
        one.add(features)
    ours = frechet_distance(*moments).distance
    arrays = [(one.mean.numpy(), one.covariance.numpy()) for one in moments]
    stats = [tf_fid.fid_features_to_statistics(one) for one in (real, made)]
    fidelity = tf_fid.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    given = [value for one in moments for value in (one.mean, one.covariance)]
    for package, value, remark in (
        ("torch-fidelity", fidelity, ""),
        ("clean-fid", cleanfid.fid.frechet_distance(*arrays[0], *arrays[1]), ""),
        ("torchmetrics", tm_fid._compute_fid(*given), ""),
        ("piq", piq.FID()(made, real), "its root by Newton and Schulz stops at a tolerance of 1e-5"),
    ):
        yield _row("Frechet distance", package, ours, value, remark)
    kernel = kernel_distance(real, made).mean  # all 400 of each: one subset
    options: dict[str, Any] = {"kid_subsets": 1, "kid_subset_size": 400, "verbose": False}
    fidelity = tf_kid.kid_features_to_metric(real, made, **options)["kernel_inception_distance_mean"]
    for package, value in (
        ("torch-fidelity", fidelity),
        ("clean-fid", cleanfid.fid.kernel_distance(real.double().numpy(), made.double().numpy(), 1)),
        ("torchmetrics", tm_kid.poly_mmd(real.double(), made.double())),
    ):
        yield _row("kernel distance", package, kernel, value)
    covered = precision_recall(real, made)
    own = [100 * float(one.double().mean()) for one in (covered.precise, covered.recalled)]
    options = {"prc_neighborhood": 3, "prc_batch_size": 100, "save_cpu_ram": True, "verbose": False}
    found = tf_prc.prc_features_to_metric(made, real, **options)
    pairs = {"torch-fidelity": (found["precision"], found["recall"]), "piq": piq.PR(nearest_k=3)(real, made)}
    for package, values in pairs.items():
        for name, mine, value in zip(("precision, %", "recall, %"), own, values, strict=True):
            yield _row(name, package, mine, 100 * float(value))


def _resize() -> Iterator[Row]:
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    originals, _ = images()
    ours = resize_like_tensorflow(255 * originals, 299)
    theirs = interpolate_bilinear_2d_like_tensorflow1x(255 * originals, (299, 299), align_corners=False)
    yield _row("Inception's resize, 0 to 255", "torch-fidelity", ours, theirs)


def _classification() -> Iterator[Row]:
    draw = torch.Generator().manual_seed(0)
    scores, targets = torch.randn(500, 20, generator=draw), torch.randint(20, (500,), generator=draw)
    scores[range(500), targets] += 2
    ours = accuracies(ranks_of(scores, targets))
    for k in (1, 5):
        theirs = 100 * float((scores.topk(k).indices == targets[:, None]).any(1).double().mean())
        remark = "its definition, `output.topk`; its function fails with NumPy 2.4"
        yield _row(f"top-{k}, %", "clip-benchmark", ours[f"top{k}"].value, theirs, remark)


class _Texts(EvalModel):
    """Texts are numbers; their vectors are given."""

    def __init__(self, vectors: Tensor) -> None:
        self.name, self.capabilities, self.device = "given", frozenset({ENCODE_IMAGE, ENCODE_TEXT}), torch.device("cpu")
        self.preprocessing, self.fingerprint, self.vectors = (
            Preprocessing((8, 8), 8),
            str(float(vectors.sum())),
            vectors,
        )

    def encode_text(self, texts: Any) -> Tensor:
        """Vectors of numbers, as strings or a tensor."""
        return self.vectors[[int(one) for one in texts]]

    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """Images are their embeddings."""
        return pixel_values


def _retrieval() -> Iterator[Row]:
    from clip_benchmark.metrics.zeroshot_retrieval import evaluate

    draw = torch.Generator().manual_seed(0)
    embeddings = nn.functional.normalize(torch.randn(60, 16, generator=draw), dim=1)
    for texts, kind, remark in (
        (300, "", ""),
        (40, ", captions repeat", "there a caption has one right image, and an equal one of another image is wrong"),
    ):
        own = torch.arange(300) % texts
        owner = torch.arange(300) // 5
        vectors = torch.zeros(texts, 16).index_add_(0, own, embeddings[owner])
        vectors = nn.functional.normalize(vectors + torch.randn(texts, 16, generator=draw) * 0.6, dim=1)
        captions = [tuple(str(int(one)) for one in own[owner == image]) for image in range(60)]
        keys: list[str] = [str(image) for image in range(60)]
        labels: list[str | None] = [None] * 60
        chunk = Chunk(0, {"embedding": embeddings}, keys, labels, captions, [], "")
        model = _Texts(vectors)
        ours = Retrieval().summarize(model, Rows(lambda chunk=chunk: iter([chunk]))).values  # type: ignore[misc]
        numbers = lambda given: torch.tensor([int(one) for one in given])  # noqa: E731
        theirs = evaluate(model, [(embeddings, captions)], numbers, "cpu", amp=False, recall_k_list=[5])
        for name, other in (("text_to_image_r5", "image"), ("image_to_text_r5", "text")):
            value = 100 * theirs[f"{other}_retrieval_recall@5"]
            yield _row(f"{name}, %{kind}", "clip-benchmark", ours[name].value, value, remark)


def _row(metric: str, package: str, ours: Any, theirs: Any, remark: str = "") -> Row:
    own, other = (torch.as_tensor(one, dtype=torch.float64) for one in (ours, theirs))
    version = importlib.metadata.version(package)
    difference = float((own - other).abs().max())
    return Row(metric, f"{package} {version}", float(own.mean()), float(other.mean()), difference, remark)


class _Empty(ModuleType):
    """A module in which every name is an empty module or class."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name.islower():
            return importlib.import_module(f"{self.__name__}.{name}")
        return type(name, (nn.Module,), {})


class _NoTorchvision(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules in the place of torchvision."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """Find torchvision and everything in it."""
        if name.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Make an empty module."""
        return _Empty(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Do nothing."""


if __name__ == "__main__":
    main()
