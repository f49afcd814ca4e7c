"""README.md of exported folders."""

from __future__ import annotations

CARD = """# QLIP for transformers

A visual tokenizer aligned with text, exported by `qlip export --format transformers`. The code beside the weights,
`modeling_qlip.py`, needs torch and transformers alone:

```python
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder)
inputs = processor(images=image, text=["a cat", "a ship"], padding=True, return_tensors="pt")
print(model(**inputs).logits_per_image.softmax(-1))
indices = model.encode(inputs["pixel_values"])   # tokens, (B, N, K) int64
```

With the package qlip, `import qlip.hf` replaces `trust_remote_code=True`, and `qlip.QLIPModel` reads the folder.
"""

_LLAVA = """# LLaVA with QLIP's encoder

Exported by `qlip export --format transformers --llava`. {projector}

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder)
{prompt}
answer = model.generate(**inputs, max_new_tokens=64)
print(processor.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```

`modeling_qlip.py` needs torch and transformers alone. The stock class `LlavaForConditionalGeneration` loads the folder
after `AutoConfig.from_pretrained(folder, trust_remote_code=True)` in the same process, or after `import qlip.hf`,
which replaces `trust_remote_code=True` everywhere.
"""
_CHAT = """\
turn = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}]}
inputs = processor.apply_chat_template(
    [turn], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)"""
_PLAIN = """\
inputs = processor(images=image, text="<image>\\nA photo of", return_tensors="pt")"""
UNTRAINED = "**Its projector is new (random, seed {seed}): until it is trained, answers do not depend on the image.**"


def llava_card(chat: bool, new_projector: bool, seed: int) -> str:
    """README.md of a LLaVA.

    Args:
        chat: there is a template of turns.
        new_projector: the projector is random, and the text says so.
        seed: of a new projector.
    """
    said = UNTRAINED.format(seed=seed) if new_projector else "Tower, projector and decoder are trained together."
    return _LLAVA.format(projector=said, prompt=_CHAT if chat else _PLAIN)


UM3_CARD = """# UM3: one model over text and images

Exported by `qlip export --format transformers`. The folder is a stock decoder: plain transformers and servers load it.

**A stock class does not know which ids may follow which: without a mask it mixes text and image tokens, and images
fall apart. Use the code beside the weights, or give `generate` the mask of `draw_with_stock_transformers.py`.**

With the code beside the weights, which needs torch, transformers and Pillow alone:

```python
from transformers import AutoModelForCausalLM, AutoProcessor

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor(text="a red circle", return_tensors="pt")
ids = model.generate(**inputs, generation_mode="image", guidance_scale=2.0)
[image] = model.decode_image_tokens(ids)
inputs = processor(images=image, return_tensors="pt")
ids = model.generate(**inputs, generation_mode="text", max_new_tokens=64)
print(processor.tokenizer.decode(ids[0], skip_special_tokens=True))
```

`output_modalities`, `generation_mode` and `decode_image_tokens` are the calls of the pipeline `any-to-any` of
transformers 5. The pipeline itself demands torchvision, and was not tested.

Without it: `python draw_with_stock_transformers.py FOLDER PROMPT` prints the ids of an image that the stock class
drew behind the mask. With the package qlip, `qlip um3 chat -m FOLDER` reads the folder.
"""

UM3_EXAMPLE = '''"""Draw with the stock class: python draw_with_stock_transformers.py FOLDER PROMPT prints the ids."""

import json
import pathlib
import sys

from transformers import AutoModelForCausalLM, AutoTokenizer


def prefix_allowed_tokens_fn(folder, end):
    """Ids that may follow: text, or an image's values, or its end; no image is begun that would pass `end` ids."""
    um3 = json.loads((pathlib.Path(folder) / "um3.json").read_text())
    begin, close, text, bits = um3["begin_image"], um3["end_image"], um3["text_vocab_size"], um3["group_size"]
    groups, length = um3["num_groups"], um3["grid"][0] * um3["grid"][1] * um3["num_groups"]
    words = [one for one in range(text) if one not in (begin, close)]
    firsts = [text + ((group << bits) if um3["rows"] == "per_group" else 0) for group in range(groups)]
    values = [list(range(first, first + (1 << bits))) for first in firsts]  # lists are made once, not at each step
    words_or_image, end_of_image = [*words, begin], [close]

    def allowed(row, ids):
        behind = (ids == begin).nonzero()
        read = len(ids) - int(behind[-1, 0]) - 1 if len(behind) else length + 1  # ids of the image so far
        if read > length:
            return words_or_image if end - len(ids) >= length + 2 else words
        return end_of_image if read == length else values[read % groups]

    return allowed, begin, length


def main(folder, prompt):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt + tokenizer.decode([prefix_allowed_tokens_fn(folder, 0)[1]]), return_tensors="pt")
    end = inputs["input_ids"].shape[1]
    allowed, _, length = prefix_allowed_tokens_fn(folder, end)
    found = model.generate(**inputs, max_new_tokens=length, prefix_allowed_tokens_fn=allowed)
    print(found[0, end:].tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
'''
