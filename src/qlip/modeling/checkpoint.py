"""Read and write checkpoint folders in Hugging Face's layout, from disk or the Hub, safetensors only."""

from __future__ import annotations

import hashlib
import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub import HfApi, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qlip import assets
from qlip.errors import QLIPError, nearest
from qlip.files import cache_folder, sha256_of, write_text, written_aside
from qlip.modeling.config import REFUSAL, QLIPConfig
from qlip.modeling.fingerprint import Side, compute
from qlip.modeling.hub import hub_errors
from qlip.modeling.vision import compute_rope_tables
from qlip.runtime.finite import require_finite
from qlip.runtime.machine import survive_fork

if TYPE_CHECKING:
    from qlip.modeling.model import QLIPModel

    Model = TypeVar("Model", bound=QLIPModel)

PUBLISHED = {name: f"nvidia/{name}" for name in ("QLIP-B-16-256", "QLIP-B-8-256", "QLIP-L-14-392")}
"""Hub repositories of the published models, by bare name."""

FETCHED = ("smollm2",)
"""Models that `qlip data get` writes to the cache."""

_OPTIONS = frozenset(inspect.signature(snapshot_download).parameters)
"""Options of ``huggingface_hub``."""

_WANTED = ["*.json", "*.safetensors", "*.jinja", "merges.txt", "README.md"]
_COMPUTED = ("rope.freqs_cos", "rope.freqs_sin", "embeddings.position_ids", "rotary_emb.inv_freq")
"""Endings of tensors that older software stores; they are computed, never loaded."""
_NO_STOCK_CLIP = (
    "none: this is a QLIP, of which transformers alone would make a half-random CLIP;"
    " load it with qlip.QLIPModel or qlip.hf.QLIPHFModel"
)
"""Value of `REFUSAL`, the file that transformers reads in place of model.safetensors: its error quotes it.
``model_type`` stays the published one, of which AutoModel makes its own CLIP, half of it random, without an error."""


def resolve(name: str | Path, **hub: Any) -> Path:
    """Return the folder of a checkpoint, downloaded if need be; the one place that knows what "bundled" means.

    Args:
        name: a folder, a Hub id, a published model's bare name, "bundled", or one of `FETCHED`.
        **hub: ``revision``, ``token``, ``cache_dir``, ``local_files_only`` for ``huggingface_hub``.

    Raises:
        QLIPError: no such folder or repository, no permission, or offline and not cached.
    """
    name = str(name)
    if not name.strip():
        raise QLIPError('the name of the model is empty; give a folder, a Hub id or "bundled"')
    if wrong := sorted(set(hub) - _OPTIONS):
        raise QLIPError(f"{wrong[0]}: no such option of a model{nearest(wrong[0], {'dtype', 'device', *_OPTIONS})}")
    if name in ("bundled", assets.BUNDLED):
        return assets.path(assets.BUNDLED)
    if name in assets.BUNDLED_DECODERS:
        return assets.path(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise QLIPError(f"{name}: is a file; give the checkpoint folder that holds it")
    if name in FETCHED:
        folder = cache_folder() / "datasets" / name
        if not (folder / "manifest.json").is_file():
            raise QLIPError(f"{name}: not in {folder.parent}; fetch it with `qlip data get {name}`")
        return folder
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise QLIPError(f"{name}: no such folder; a checkpoint is a folder with config.json and model.safetensors")
    repo_id = PUBLISHED.get(name, name)
    if "/" not in repo_id:
        names = [*PUBLISHED, *FETCHED, assets.BUNDLED, *assets.BUNDLED_DECODERS, "bundled"]
        raise QLIPError(
            f"{name}: no such folder, and no model of that name{nearest(name, names)}; Hub ids look like owner/name"
        )
    with hub_errors(repo_id, "download"):
        return Path(snapshot_download(repo_id, allow_patterns=_WANTED, **hub))


def lasting(name: str) -> str:
    """Name of a checkpoint that is the same from every working folder: a local folder's path becomes absolute."""
    folder = Path(name).expanduser()
    ours = name in ("bundled", assets.BUNDLED, *assets.BUNDLED_DECODERS)
    return str(folder.absolute()) if folder.is_dir() and not ours else name


def copy(source: Path, folder: Path, weights: bool = True) -> None:
    """Copy the files of a checkpoint's folder, unchanged, into another, created if absent; all, or all but weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        wanted = path.is_file() and any(path.match(pattern) for pattern in _WANTED)
        if wanted and (weights or ".safetensors" not in path.suffixes):
            shutil.copyfile(path, folder / path.name)


class Files:
    """Files of a checkpoint on disk, in the Hub's cache, or in this package.

    Args:
        name_or_path: a folder, a Hub id, a published model's bare name, or ``"bundled"``.
        **hub: options ``revision``, ``token``, ``cache_dir``, ``local_files_only`` for ``huggingface_hub``.

    Raises:
        QLIPError: no such folder or repository, no permission, or offline and not cached.
    """

    def __init__(self, name_or_path: str | Path, **hub: Any) -> None:
        self.name = str(name_or_path)
        self.folder = resolve(self.name, **hub)

    def path(self, name: str) -> Path | None:
        """Path of a file of the checkpoint, or None if it has none of that name."""
        path = self.folder / name
        return path if path.is_file() else None

    def config(self) -> QLIPConfig:
        """The checked ``config.json``."""
        return QLIPConfig.from_file(self.folder / "config.json")

    def weights(self) -> list[Path]:
        """``model.safetensors``, or the shards of ``model.safetensors.index.json``."""
        if (single := self.path("model.safetensors")) is not None:
            return [single]
        index = self.path("model.safetensors.index.json")
        if index is None:
            pickled = sorted(path.name for path in self.folder.iterdir() if path.suffix in (".bin", ".pt", ".pth"))
            why = f"; {pickled[0]} is a pickle and is never loaded: convert it to safetensors" if pickled else ""
            raise QLIPError(f"{self.name}: holds no model.safetensors{why}")
        try:
            shards = sorted(
                {str(shard) for shard in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()}
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise QLIPError(f"{index}: not an index of shards; fetch the file again") from None
        for shard in shards:
            if Path(shard).name != shard or self.path(shard) is None:
                raise QLIPError(f"{index}: names {shard!r}, which is not in the folder; fetch the checkpoint again")
        return [self.folder / shard for shard in shards]

    def digest(self) -> str:
        """SHA-256 (hex) over those of ``config.json`` and of the files of the weights."""
        paths = [self.folder / "config.json", *self.weights()]
        return hashlib.sha256("".join(map(sha256_of, paths)).encode()).hexdigest()

    def dtype(self) -> torch.dtype:
        """Data type of the first tensor of the stored weights."""
        path = self.weights()[0]
        for _, _, read_one in tensors_of(path):
            return read_one().dtype
        raise QLIPError(f"{path}: holds no tensors; fetch it again")


def load(
    cls: type[Model], files: Files, dtype: torch.dtype, device: torch.device, without: tuple[str, ...] = ()
) -> Model:
    """Build a model and fill it; see :meth:`QLIPModel.from_pretrained`.

    Args:
        cls: class of the model.
        files: the checkpoint's.
        dtype: dtype of the weights in memory.
        device: device of the weights.
        without: modules that the model is built without; the checkpoint must hold them, but they are not read.
    """
    config = files.config()
    with torch.device("meta"):  # no random weights, which would be overwritten
        model = cls(config)
    state = read(files, shapes_of(model), without)
    for name in without:
        model.register_module(name, None)
    model.load_state_dict(state, assign=True)
    compute_rope_tables(model)
    model.requires_grad_(True)
    if dtype != torch.float32:
        # fingerprints belong to the stored weights, in every precision
        known: dict[Side, str] = {side: compute(model, side) for side in ("codes", "decoder")}
        model.to(dtype)
        model.to(device)
        model._fingerprints.carry(model, known)
    return model.to(device).eval()


def shapes_of(model: QLIPModel) -> dict[str, torch.Size]:
    """Names and shapes of the tensors in a checkpoint of the model."""
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def stored_shapes(files: Files) -> dict[str, torch.Size]:
    """Names and shapes of the tensors that a checkpoint holds."""
    return {name: shape for path in files.weights() for name, shape, _ in tensors_of(path)}


def read(
    files: Files,
    shapes: Mapping[str, torch.Size],
    without: tuple[str, ...] = (),
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint; all are checked before any is returned.

    Args:
        files: the checkpoint's.
        shapes: exact set of tensors that it must hold, with their shapes.
        without: modules whose tensors are checked but not read.
        dtype: of the returned tensors.

    Raises:
        QLIPError: a tensor is missing, unexpected, of another shape or not finite, or a file is damaged.
    """
    survive_fork()  # every model's weights come through here, and the check below starts threads
    state: dict[str, Tensor | None] = {}
    left_out = tuple(f"{name}." for name in without)
    for path in files.weights():
        for stored, shape, read_one in tensors_of(path):
            name = stored.replace("_orig_mod.", "").removeprefix("module.")  # of torch.compile and DDP
            if name.endswith(_COMPUTED):
                continue
            if name not in shapes:
                raise QLIPError(
                    f"{path}: unexpected tensor {name!r}{nearest(name, shapes)}; is config.json this file's?"
                )
            if shape != shapes[name]:
                raise QLIPError(
                    f"{path}: tensor {name!r} has shape {tuple(shape)}, config.json makes it {tuple(shapes[name])}"
                )
            if name.startswith(left_out):
                state[name] = None
                continue
            tensor = read_one()
            if not tensor.is_floating_point():
                raise QLIPError(f"{path}: tensor {stored!r} has type {tensor.dtype}; only floating weights are read")
            state[name] = tensor = tensor.to(dtype)
            require_finite(
                tensor[None], f"{path}: the weights of {name!r}", "this checkpoint is broken; take an earlier one"
            )
    if missing := sorted(shapes.keys() - state.keys()):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise QLIPError(f"{files.name}: tensor {missing[0]!r}{more} is missing; is config.json this checkpoint's?")
    return {name: tensor for name, tensor in state.items() if tensor is not None}


def tensors_of(path: Path) -> Iterator[tuple[str, torch.Size, Callable[[], Tensor]]]:
    """Yield name, shape and reader of each tensor in a file. Raises QLIPError if it is not a whole safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                yield name, torch.Size(file.get_slice(name).get_shape()), partial(file.get_tensor, name)
    except (SafetensorError, OSError) as error:
        raise QLIPError(f"{path}: not a whole safetensors file ({error}); fetch it again") from None


def save(
    model: QLIPModel, folder: Path, dtype: torch.dtype | None, tensors: Mapping[str, Tensor] | None = None
) -> None:
    """Write config and weights; see :meth:`QLIPModel.save_pretrained`."""
    save_weights(model.state_dict() if tensors is None else tensors, folder, dtype)
    config = {"architectures": ["QLIPModel"], "model_type": "clip"} | model.config.to_json_dict()
    if config["model_type"] == "clip":
        for part in (config, config["vision_config"]):
            part[REFUSAL] = _NO_STOCK_CLIP
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def save_weights(
    tensors: Mapping[str, Tensor], folder: Path, dtype: torch.dtype | None = None, file: str = "model.safetensors"
) -> None:
    """Write a file of weights, whole or not at all.

    Args:
        tensors: weights by name, on any device.
        folder: created if absent.
        dtype: of the written weights; None keeps each tensor's.
        file: name of the file.

    Raises:
        QLIPError: the disk is full, or the folder is not writable.
    """
    state = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    with written_aside(folder / file) as aside:
        try:
            save_file(state, aside, metadata={"format": "pt"})
        except SafetensorError as error:  # wraps the operating system's errors
            raise OSError(str(error)) from None
        aside.chmod(0o644)  # safetensors makes it readable only to its owner


def push(
    writers: Sequence[Callable[[Path], None]], repo_id: str, *, private: bool, token: str | None, **options: Any
) -> str:
    """Upload the files that ``writers`` write to a folder; see :meth:`QLIPModel.push_to_hub`."""
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        for write in writers:
            write(Path(folder))
        with hub_errors(repo_id, "upload"):
            api.create_repo(repo_id, private=private, exist_ok=True)
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))
