"""Each public path keeps to the model's device: run on the meta device, where an operation over two devices fails."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qlip.lm.conditions import Condition
from qlip.lm.generate import generate
from qlip.lm.guidance import Constant
from qlip.lm.model import DecoderModel
from qlip.lm.sampling import Sampling
from tests.lm.test_model import HEADS, tiny


class OneDevice(TorchDispatchMode):
    """Fails on an operation whose tensors, besides scalars and copies, lie on several devices."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor) and one.ndim]
        devices = {one.device.type for one in tensors}
        if len(devices) > 1 and func is not torch.ops.aten._to_copy.default:
            raise AssertionError(f"{func} mixes {sorted(devices)}")
        return func(*args, **kwargs)


def test_mode__sees_a_mixed_operation() -> None:
    with pytest.raises(AssertionError, match="mixes"), OneDevice():
        torch.zeros(2, device="meta") + torch.zeros(2)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("condition", ["class", "features", "tokens"])
def test_paths__stay_on_the_models_device(kind: str, condition: str) -> None:
    length = 1 if condition == "class" else 4
    config = tiny(head=kind, condition=condition, prefix_length=length, target_positions=kind == "chain")
    with torch.device("meta"):
        model = DecoderModel(config)
        indices = torch.zeros(2, 6, 3, dtype=torch.int64)
        values = {
            "class": torch.zeros(2, dtype=torch.int64),
            "tokens": torch.zeros(2, 3, dtype=torch.int64),
            "features": torch.zeros(2, 3, config.condition_size),
        }[condition]
        mask = None if condition == "class" else torch.ones(2, 3)
        dropped, order = torch.zeros(2, dtype=torch.bool), torch.zeros(2, 6, dtype=torch.int64)
    given = Condition(values, mask)
    with OneDevice():
        assert model(indices, given, inputs=indices, dropped=dropped).mean().backward() is None
        if config.target_positions:
            assert model(indices, given, order=order).is_meta
        assert model.eval().bits_per_image(indices, given).is_meta
        sampling = Sampling(temperature=0.9, top_k=3, top_p=0.9, min_p=0.01)
        drawn = generate(model, given, sampling=sampling, guidance=Constant(3.0), images_per_condition=2)
        generate(model, given, guidance=Constant(3.0), indices=indices, keep=torch.arange(6).expand(2, -1) % 3 == 0)
        assert drawn.is_meta and drawn.shape == (4, 6, 3)
