"""`qlip info`: describe a model, a `.qlip` file or a recipe."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qlip.cli import options
from qlip.cli.console import new_table, note, plural, print_json, print_table, show, usage_error

if TYPE_CHECKING:
    from qlip import QLIPConfig
    from qlip.lm import DecoderConfig


def info(
    name: Annotated[
        str,
        typer.Argument(
            metavar="[MODEL|FILE.qlip|RECIPE]", help="Model as --model accepts it, .qlip file, or training recipe."
        ),
    ] = options.DEFAULT_MODEL,
    as_json: options.Json = False,
) -> None:
    """Describe a tokenizer, a decoder of image tokens, a model of text and images, a .qlip file or a recipe.

    For a published model's name, prints the architecture without downloading the weights.
    """
    report = describe(name)
    if as_json:
        print_json(report)
        return
    if "recipe" in report:
        show(report["yaml"].removesuffix("\n"))
        return
    table = new_table("", "")
    table.show_header = False
    for key, value in report.items():
        table.add_row(key.replace("_", " "), _format(value))
    print_table(table)


def describe(name: str) -> dict[str, Any]:
    """Return the report of `qlip info`.

    Raises:
        QLIPError: the name leads to nothing, or to something broken.
    """
    from qlip import recipes
    from qlip.modeling.checkpoint import PUBLISHED

    path = Path(name)
    if path.suffix == ".qlip":
        return _token_file(path)
    if path.suffix in (".yaml", ".yml") or recipes.path(name) is not None:
        return _recipe(name)
    if (path / "dataset.json").is_file():
        usage_error(f"{name}: a token dataset, which `qlip tokens info {name}` describes")
    if name in PUBLISHED and not path.is_dir():
        return _architecture(name)
    return _model(name)


def _token_file(path: Path) -> dict[str, Any]:
    from qlip.tokens import TokenFile
    from qlip.tokens.entropy.registry import TAG_BYTES
    from qlip.tokens.token_file import ENTROPY_CODED, HEADER_BYTES, OVERHEAD_BYTES, read_header

    header = read_header(path)
    if header.coding == ENTROPY_CODED:  # reading further needs the tables
        tables = path.read_bytes()[HEADER_BYTES[header.version] :][:TAG_BYTES].hex()
        coding = f"entropy-coded, tables {tables}"
    else:
        TokenFile.load(path)
        coding = "raw bits"
    pixels = header.original_width * header.original_height
    return {
        "token_file": str(path),
        "original_size": [header.original_width, header.original_height],
        "grid": [header.grid_height, header.grid_width],
        "tiles": [header.tile_rows, header.tile_columns],
        "tokens": header.grid_height * header.grid_width,
        "bits_per_token": header.bits_per_token,
        "coding": coding,
        "token_bytes": header.payload_bytes,
        "file_bytes": OVERHEAD_BYTES[header.version] + header.payload_bytes,
        "bits_per_original_pixel": round(8 * header.payload_bytes / max(1, pixels), 4),
        "code_fingerprint": header.code_fingerprint.hex(),
        "decoder_fingerprint": header.decoder_fingerprint.hex(),
        "preparation": header.preparation.hex() or None,
    }


def _recipe(name: str) -> dict[str, Any]:
    from qlip.training import load_recipe

    recipe = load_recipe(name, on_note=note)
    return {"recipe": name, "values": recipe.model_dump(mode="json"), "yaml": recipe.to_yaml()}


def _architecture(name: str) -> dict[str, Any]:
    import torch

    from qlip import QLIPConfig, QLIPModel

    config = QLIPConfig.named(name)
    with torch.device("meta"):
        counts = _parameters(QLIPModel(config))
    report = {"model": name, "weights": "not fetched", **_config(config), **counts}
    report["group_size"] = None  # not published; a checkpoint's config has it
    return report


def _model(name: str) -> dict[str, Any]:
    from qlip import QLIPModel, QLIPProcessor
    from qlip.lm.config import is_decoder
    from qlip.modeling.checkpoint import resolve
    from qlip.um3.config import is_um3
    from qlip.vlm.config import is_vlm

    if is_decoder(folder := resolve(name)):
        return _decoder(name, folder)
    if is_um3(folder):
        return _um3(name, folder)
    if is_vlm(folder):
        return _talker(name, folder)
    model, processor = QLIPModel.from_pretrained(name), QLIPProcessor.from_pretrained(name)
    preprocessing = processor.preprocessing
    return {
        "model": name,
        **_config(model.config),
        **_parameters(model),
        "vocabulary": processor.tokenizer.vocab_size if processor.tokenizer else None,
        "pixel_mean": list(preprocessing.mean),
        "pixel_std": list(preprocessing.std),
        "code_fingerprint": model.code_fingerprint,
        "decoder_fingerprint": model.decoder_fingerprint,
    }


def _decoder(name: str, folder: Path) -> dict[str, Any]:
    import torch

    from qlip.lm import DecoderConfig, DecoderModel
    from qlip.lm.export import FORMATS, holds
    from qlip.modeling.checkpoint import Files

    config = DecoderConfig.from_file(folder / "config.json")
    with torch.device("meta"):
        parameters = DecoderModel(config).num_parameters()
    drawing = _drawing(name, folder, config)
    stock = [format for format in FORMATS if holds(config, format)]
    return {
        "decoder": name,
        "condition": f"{config.condition}, {config.condition_size:,}, {plural(config.prefix_length, 'position')}",
        "grid": list(config.grid),
        "tokens": config.num_tokens,
        "groups_per_token": config.num_groups,
        "values_per_group": config.codebook_size,
        "head": config.head.kind,
        "transformer": f"{config.num_hidden_layers} layers x {config.hidden_size}, {config.num_attention_heads} heads",
        "rotary": config.rotary,
        "parameters": parameters,
        "bytes": sum(path.stat().st_size for path in Files(folder).weights()),
        "exports": ", ".join(["safetensors", *stock, *(["diffusers"] if drawing else [])]),
        "code_fingerprint": config.code_fingerprint,
        **({"text_encoder": config.text_encoder} if config.text_encoder else {}),
        **drawing,
    }


def _talker(name: str, folder: Path) -> dict[str, Any]:
    import torch

    from qlip.lm.causal import CausalModel
    from qlip.lm.sampling import AnswerSettings
    from qlip.modeling.checkpoint import Files
    from qlip.vlm.config import VLMConfig
    from qlip.vlm.images import read_vlm_preprocessing

    config = VLMConfig.from_file(folder / "config.json")
    text, size = config.text_config, read_vlm_preprocessing(folder, config).size
    with torch.device("meta"):
        parameters = CausalModel(text).num_parameters()
    sampling = AnswerSettings.from_folder(folder).sampling()
    return {
        "vision_language_model": name,
        "vision_tower": "in this folder" if config.own_tower else config.vision_tower,
        "vision_fingerprint": config.vision_fingerprint,
        "layer": str(config.layer),
        "image_size": list(size),
        "tokens_per_image": config.num_image_tokens(size),
        "text_decoder": config.language_model or "in this folder",
        "transformer": f"{text.num_hidden_layers} layers x {text.hidden_size}, {text.num_attention_heads} heads",
        "text_decoder_parameters": parameters,
        "vocabulary": text.vocab_size,
        "context": text.length,
        "template": config.template,
        "temperature": sampling.temperature,
        "bytes": sum(path.stat().st_size for path in Files(folder).weights()),
        "example": shlex.join(["qlip", "chat", "photo.jpg", "-m", name]),
    }


def _um3(name: str, folder: Path) -> dict[str, Any]:
    import torch

    from qlip.modeling.checkpoint import Files
    from qlip.um3 import UM3, UM3Config

    config = UM3Config.from_folder(folder)
    text = config.decoder
    with torch.device("meta"):
        parameters = UM3(config).decoder.num_parameters()
    return {
        "model_of_text_and_images": name,
        "vision_tower": config.vision_tower,
        "vision_fingerprint": config.vision_fingerprint,
        "grid": list(config.grid),
        "ids_per_image": config.image_length,
        "groups_per_token": config.num_groups,
        "values_per_group": 1 << config.group_size,
        "text_rows": config.text_vocab_size,
        "visual_rows": f"{config.visual_rows:,}, {config.rows.replace('_', ' ')}",
        "softmax": config.softmax,
        "transformer": f"{text.num_hidden_layers} layers x {text.hidden_size}, {text.num_attention_heads} heads",
        "query_key_norm": "yes" if text.qk_norm else "no",
        "parameters": parameters,
        "context": text.length,
        "bytes": sum(path.stat().st_size for path in Files(folder).weights()),
    }


def _drawing(name: str, folder: Path, config: DecoderConfig) -> dict[str, Any]:
    """How a decoder draws by default, and a command that does; empty for one that reads no prompts."""
    from qlip.t2i.settings import DrawSettings

    if config.condition != "class" and config.text_encoder is None and not (folder / "tokenizer.json").is_file():
        return {}
    settings = DrawSettings.from_folder(folder)
    prompt = ["a red circle above a blue square"]
    if config.condition == "class":
        prompt = ["--class", config.classes[0] if config.classes else "0"]
    return {
        "guidance": settings.guidance,
        "temperature": settings.temperature,
        "top_k": settings.top_k,
        "tokenizer": str(settings.tokenizer_inside(folder) or settings.tokenizer),
        "example": shlex.join(["qlip", "draw", *prompt, "-m", name]),
    }


def _config(config: QLIPConfig) -> dict[str, Any]:
    vision, decoder, text = config.vision_config, config.decoder_config, config.text_config
    bits, tokens = vision.quantizer_cfg.embed_dim, vision.grid_size**2
    return {
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "tokens": tokens,
        "bits_per_token": bits,
        "group_size": vision.quantizer_cfg.group_size,
        "token_bytes": (tokens * bits + 7) // 8,
        "compression": round(24 / bits * vision.patch_size**2, 1),
        "encoder": f"{vision.num_hidden_layers} layers x {vision.hidden_size}, {vision.num_attention_heads} heads",
        "decoder": f"{decoder.num_hidden_layers} layers x {decoder.hidden_size}, {decoder.num_attention_heads} heads",
        "text_tower": f"{text.num_hidden_layers} layers x {text.hidden_size}, {text.num_attention_heads} heads",
        "embedding_width": config.projection_dim,
    }


def _parameters(model: Any) -> dict[str, Any]:
    """Numbers of parameters of the model and of its parts."""
    from qlip.modeling.parts import count_parameters

    parts = count_parameters(model.named_parameters())
    return {"parameters": sum(parts.values()), **{f"{part}_parameters": count for part, count in parts.items()}}


def _format(value: Any) -> str:
    if value is None:
        return "unknown"
    if isinstance(value, list):
        return " x ".join(str(part) for part in value)
    if isinstance(value, int):
        return f"{value:,}"
    return str(value)
