"""README.md of an exported decoder: its ids, and code that draws images with transformers alone."""

from __future__ import annotations

from qlip.lm.config import DecoderConfig


def readme(config: DecoderConfig, name: str, num_prompts: int) -> str:
    """Markdown with one block of Python that runs in the folder itself.

    Args:
        config: of the decoder.
        name: class of transformers.
        num_prompts: number of ids of prompts, the null condition's last.
    """
    csm = name.startswith("Csm")
    rows, columns = config.grid
    tokenizer = f" (`code_fingerprint` {config.code_fingerprint})" if config.code_fingerprint else ""
    lines = [
        f"# A decoder of image tokens, as transformers' `{name}`",
        "",
        f"It draws images as {rows} x {columns} = {config.num_tokens} tokens of {config.num_groups}"
        f" group{'s' * (config.num_groups > 1)} of {config.codebook_size:,} values{tokenizer},"
        f" from {_condition(config)}.",
        "",
        _ids(config, num_prompts, csm),
        "",
        "`generation_config.json` asks for plain sampling; `temperature=0.9` or `top_k=100` are options of `generate`.",
        "",
        "```python",
        *_imports(config, name),
        "",
        f'model = {name}.from_pretrained(".")',
        *_prompt(config),
        *_generate(config, num_prompts, csm),
        "```",
        "",
        f"`indices` are (images, {config.num_tokens}, {config.num_groups}) int64; `decode` of the QLIP tokenizer whose"
        " tokens they are turns them into pixels.",
    ]
    if csm:
        lines += [
            "",
            "`generate` of this class would guide the first group alone: leave `guidance_scale` out, and use"
            " `qlip.lm.generate` for guidance. The audio codec is a placeholder that nothing uses.",
        ]
    return "\n".join(lines) + "\n"


def _condition(config: DecoderConfig) -> str:
    if config.condition == "class":
        return f"one of {config.condition_size:,} classes"
    if config.condition == "tokens":
        return f"ids of text, {config.prefix_length} at most"
    return (
        f"features of text of width {config.condition_size:,}, {config.prefix_length} at most, of which the matrices"
        " in `condition.safetensors` make the prompt"
    )


def _ids(config: DecoderConfig, num_prompts: int, csm: bool) -> str:
    if config.condition == "features":
        prompts = f"Ids 0 to {num_prompts - 1} are the {num_prompts} positions of the null condition"
    else:
        noun = "classes" if config.condition == "class" else "text"
        prompts = f"Ids 0 to {num_prompts - 2} are the {noun}, {num_prompts - 1} is the null condition"
    if csm:
        return f"{prompts}; each group has ids 0 to {config.codebook_size - 1} of its own."
    if config.num_groups == 1:
        return (
            f"{prompts}, and {num_prompts} + v is value v. `suppress_tokens` in `generation_config.json` keeps the"
            " ids of prompts from being drawn."
        )
    return (
        f"{prompts}, and {num_prompts} + k * {config.codebook_size} + v is value v of group k. Groups take turns, so"
        f" step s may draw ids of group s mod {config.num_groups} alone, which `allowed` says below."
    )


def _imports(config: DecoderConfig, name: str) -> list[str]:
    features = config.condition == "features"
    return [
        "import torch",
        *(["from safetensors.torch import load_file"] if features else []),
        f"from transformers import {name}",
    ]


def _prompt(config: DecoderConfig) -> list[str]:
    if config.condition == "class":
        return ["prompt = torch.tensor([[0], [1]])  # two images, of classes 0 and 1"]
    if config.condition == "tokens":
        length = min(2, config.prefix_length)
        return [
            f"prompt = torch.zeros(2, {length}, dtype=torch.int64)  # ids of two texts, padded on the left ...",
            "mask = torch.ones_like(prompt)  # ... where the mask is 0",
        ]
    return [
        f"features = torch.zeros(2, {config.prefix_length}, {config.condition_size})  # padded on the left ...",
        "mask = torch.ones(features.shape[:2], dtype=torch.int64)  # ... where the mask is 0",
        'w = load_file("condition.safetensors")',
        'hidden = torch.nn.functional.gelu(features @ w["fc1.weight"].T, approximate="tanh")',
        'prompt = hidden @ w["fc2.weight"].T',
    ]


def _generate(config: DecoderConfig, num_prompts: int, csm: bool) -> list[str]:
    given = "inputs_embeds=prompt" if config.condition == "features" else "prompt"
    mask = "" if config.condition == "class" else ", attention_mask=mask"
    if csm:
        return [f"indices = model.generate({given}{mask})"]
    if config.condition == "features":
        null = [f"null = torch.arange({num_prompts}).expand(2, -1)"]
        options, start = ["negative_prompt_ids=null", "negative_prompt_attention_mask=mask"], ""
    else:
        null = [f"null = torch.full((2, 1), {num_prompts - 1})"]
        options, start = ["negative_prompt_ids=null"], " - prompt.shape[1]"
    lines = null
    if config.num_groups > 1:
        options.append("prefix_allowed_tokens_fn=allowed")
        values, groups = config.codebook_size, config.num_groups
        lines = [
            *null,
            f"groups = torch.arange({num_prompts}, {num_prompts + groups * values}).view({groups}, {values}).tolist()",
            f"allowed = lambda row, ids: groups[(len(ids){start}) % {groups}]",
        ]
    cut = "" if config.condition == "features" else "[:, prompt.shape[1] :]"
    return [
        *lines,
        "ids = model.generate(",
        f"    {given}{mask},",
        f"    guidance_scale=2.0, {', '.join(options)},",
        f"){cut}",
        f"indices = (ids - {num_prompts}).view(2, {config.num_tokens}, {config.num_groups}) % {config.codebook_size}",
    ]
