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
