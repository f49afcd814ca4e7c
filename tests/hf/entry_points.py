"""Nine ways by which people load a folder with transformers; run without this package when started as a script.

    python entry_points.py QLIP_FOLDER LLAVA_FOLDER WORK_FOLDER IMAGE...

writes what each way gave to WORK_FOLDER: results.safetensors, and errors.json with the traceback of those that failed.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

TEXTS = ["a photo of a cat", "two trucks at night"]
TURN = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is this"}]}
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
Found = dict[str, Tensor]


@dataclass
class Ways:
    """The ways, by name; ``trust`` is what they give as ``trust_remote_code``. The LLaVA sees the first image alone."""

    qlip: str
    llava: str
    work: Path
    images: list[Image.Image]
    trust: bool | None

    @property
    def options(self) -> dict[str, Any]:
        return {} if self.trust is None else {"trust_remote_code": self.trust}

    def inputs(self) -> dict[str, Tensor]:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(self.qlip, **self.options)
        return dict(processor(images=self.images, text=TEXTS, padding="max_length", return_tensors="pt"))

    def llava_inputs(self) -> dict[str, Tensor]:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(self.llava, **self.options)
        prompt = processor.apply_chat_template([TURN], add_generation_prompt=True)
        return dict(processor(images=self.images[0], text=prompt, return_tensors="pt"))

    def auto_model(self) -> Found:
        from transformers import AutoModel

        found = AutoModel.from_pretrained(self.qlip, **self.options)(**self.inputs(), reconstruct=True)
        names = "logits_per_image logits_per_text image_embeds text_embeds reconstructions indices".split()
        return {name: found[name] for name in names}

    def auto_image_processor(self) -> Found:
        from transformers import AutoImageProcessor

        found = [AutoImageProcessor.from_pretrained(one, **self.options) for one in (self.qlip, self.llava)]
        pixels, llava = (one(self.images, return_tensors="pt")["pixel_values"] for one in found)
        return {"pixel_values": pixels, "llava": llava}

    def auto_processor(self) -> Found:
        llava = self.llava_inputs()
        assert sorted(llava) == ["attention_mask", "input_ids", "pixel_values"]
        return self.inputs() | {"llava": llava["input_ids"]}

    def zero_shot_pipeline(self) -> Found:
        from transformers import pipeline

        classify = pipeline("zero-shot-image-classification", model=self.qlip, **self.options)
        rows = classify(self.images[0], candidate_labels=TEXTS, hypothesis_template="{}")
        scores = {row["label"]: row["score"] for row in rows}
        return {"scores": torch.tensor([scores[text] for text in TEXTS])}

    def feature_pipeline(self) -> Found:
        from transformers import pipeline

        extract = pipeline("image-feature-extraction", model=self.qlip, **self.options)
        return {"embedding": torch.tensor(extract(self.images[0]))}

    def llava_class(self) -> Found:
        from transformers import AutoConfig, LlavaForConditionalGeneration

        AutoConfig.from_pretrained(self.llava, **self.options)  # makes the tower known
        model = LlavaForConditionalGeneration.from_pretrained(self.llava)
        return {"logits": model(**self.llava_inputs()).logits}

    def auto_image_text_to_text(self) -> Found:
        from transformers import AutoModelForImageTextToText

        model, given = AutoModelForImageTextToText.from_pretrained(self.llava, **self.options), self.llava_inputs()
        return {"logits": model(**given).logits, "answer": model.generate(**given, **GREEDY)}

    def image_text_to_text_pipeline(self) -> Found:
        from transformers import pipeline

        turn = TURN | {"content": [{"type": "image", "image": self.images[0]}, *TURN["content"][1:]]}
        answer = pipeline("image-text-to-text", model=self.llava, **self.options)
        [found] = answer(text=[turn], return_full_text=False, generate_kwargs=GREEDY)
        return {"answer": torch.tensor([*map(ord, found["generated_text"])])}

    def save_and_reload(self) -> Found:
        from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

        found: Found = {}
        for name, kind, folder in (
            ("logits_per_image", AutoModel, self.qlip),
            ("logits", AutoModelForImageTextToText, self.llava),
        ):
            again = str(self.work / name)
            kind.from_pretrained(folder, **self.options).save_pretrained(again)
            given = self.llava_inputs() if folder == self.llava else self.inputs()
            found[name] = kind.from_pretrained(again, **self.options)(**given)[name]
        AutoProcessor.from_pretrained(self.llava, **self.options).save_pretrained(self.work / "logits")
        copy = replace(self, llava=str(self.work / "logits"))
        return found | {"llava": copy.llava_inputs()["input_ids"]}


WAYS: dict[str, Callable[[Ways], Found]] = {
    "AutoModel": Ways.auto_model,
    "AutoImageProcessor": Ways.auto_image_processor,
    "AutoProcessor": Ways.auto_processor,
    "zero-shot pipeline": Ways.zero_shot_pipeline,
    "feature pipeline": Ways.feature_pipeline,
    "LlavaForConditionalGeneration": Ways.llava_class,
    "AutoModelForImageTextToText": Ways.auto_image_text_to_text,
    "image-text-to-text pipeline": Ways.image_text_to_text_pipeline,
    "save and reload": Ways.save_and_reload,
}


class _Absent:
    """Makes this package unimportable."""

    def find_spec(self, name: str, *_: Any) -> None:
        if name.split(".")[0] == "qlip":
            raise ModuleNotFoundError(name, name=name)


@torch.no_grad()
def main(qlip: str, llava: str, work: str, *images: str) -> None:
    sys.meta_path.insert(0, _Absent())
    torch.set_num_threads(1)
    ways = Ways(qlip, llava, Path(work), [Image.open(image).convert("RGB") for image in images], trust=True)
    found, errors = {}, {}
    for name, way in WAYS.items():
        try:
            found |= {
                f"{name}: {key}": value.clone(memory_format=torch.contiguous_format) for key, value in way(ways).items()
            }
        except Exception:  # noqa: BLE001  (any failure is a result)
            errors[name] = traceback.format_exc()
    save_file(found, Path(work) / "results.safetensors")
    (Path(work) / "errors.json").write_text(json.dumps(errors))


def results(work: Path, name: str) -> Found:
    """What one way gave. Raises AssertionError with its traceback if it failed."""
    error = json.loads((work / "errors.json").read_text()).get(name)
    assert error is None, error
    stored = load_file(work / "results.safetensors")
    return {key.split(": ")[1]: value for key, value in stored.items() if key.startswith(f"{name}: ")}


if __name__ == "__main__":
    main(*sys.argv[1:])
