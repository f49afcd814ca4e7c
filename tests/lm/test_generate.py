"""Drawing: equal to LlamaGen's greedy tokens, to an uncached twin, and whatever the batch."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from qlip.errors import QLIPError
from qlip.lm.cache import KVCache
from qlip.lm.conditions import Condition
from qlip.lm.generate import generate, generate_jacobi
from qlip.lm.guidance import Constant, Guidance, Interval, Linear
from qlip.lm.model import DecoderModel
from qlip.lm.sampling import Sampling, uniforms
from tests.lm.llamagen import CACHED, Fixture
from tests.lm.test_model import HEADS, conditions, randomized, tiny

GREEDY = Sampling(temperature=0.0)


class Recording(Sampling):
    """Keeps the logits of each draw, after guidance."""

    seen: list[Tensor] = []

    def draw(self, logits: Tensor, uniforms: Tensor, allowed: Tensor | None = None) -> Tensor:
        self.seen.append(logits)
        return super().draw(logits, uniforms, allowed)


@pytest.mark.parametrize("name", CACHED)
@pytest.mark.parametrize(
    ("tag", "guidance"), [("cfg1", Constant(1.0)), ("cfg4", Constant(4.0)), ("cfg4_interval5", Interval(4.0, 5))]
)
def test_greedy__equals_llamagens(name: str, tag: str, guidance: Guidance) -> None:
    fixture = Fixture(name)
    sampling = Recording(temperature=0.0)
    sampling.seen.clear()
    drawn = generate(fixture.model, fixture.condition, sampling=sampling, guidance=guidance)
    assert torch.equal(drawn[..., 0], fixture.outputs[f"greedy.{tag}.tokens"])
    torch.testing.assert_close(
        torch.stack(sampling.seen, 1), fixture.outputs[f"greedy.{tag}.logits"], atol=2e-5 * 9, rtol=0
    )


@pytest.mark.parametrize("name", CACHED)
def test_cached_logits__equal_llamagens(name: str) -> None:
    fixture = Fixture(name)
    model, steps = fixture.model, fixture.model.steps(fixture.indices)
    with torch.no_grad():
        prefix = model.condition(fixture.condition)
        cache = KVCache(model.config, len(steps))
        cache.start = prefix.start
        states = [model.run(prefix.embeddings, cache=cache)[:, -1]]
        for step in range(steps.shape[1] - 1):
            states.append(model.run(model.embed_steps(steps[:, step : step + 1], step), cache=cache)[:, -1])
        logits = model.head.output(torch.stack(states, 1))
    torch.testing.assert_close(logits, fixture.outputs["logits.cached"], atol=2e-5, rtol=0)


def uncached(model: DecoderModel, condition: Condition, scale: float, seed: int, numbers: list[int]) -> Tensor:
    """Each step from a whole pass over a whole sequence, for each branch by itself."""
    config = model.config
    indices = torch.zeros(len(numbers), config.num_tokens, config.num_groups, dtype=torch.int64)
    flat = indices.view(len(numbers), config.num_steps, -1)
    per_token = config.num_steps // config.num_tokens
    noise = uniforms(seed, numbers, config.num_tokens, model.head.num_draws * per_token)
    noise = noise.reshape(len(numbers), config.num_steps, -1)
    branches = [model.condition(condition), model.condition(model.condition.null(condition))]
    for step in range(config.num_steps):
        hidden = torch.cat([model.hidden(indices, one)[:, step] for one in branches])

        def pick(logits: Tensor, first: int, step: int = step) -> Tensor:
            given, null = logits.chunk(2)
            mixed = null + scale * (given - null)
            drawn = [Sampling().draw(mixed[:, m], noise[:, step, first + m]) for m in range(mixed.shape[1])]
            return torch.stack(drawn, 1)

        flat[:, step] = model.head.draw(hidden, pick, step)
    return indices


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("condition", ["class", "features", "tokens"])
@torch.no_grad()
def test_cached__equals_uncached(kind: str, condition: str) -> None:
    length = 1 if condition == "class" else 4
    config = tiny(head=kind, condition=condition, prefix_length=length, num_key_value_heads=1, qk_norm=True)
    model, given = randomized(config), conditions(config)
    drawn = generate(model, given, guidance=Constant(2.5), seed=3, numbers=[5, 0, 9])
    assert torch.equal(drawn, uncached(model, given, 2.5, 3, [5, 0, 9]))


@pytest.mark.parametrize("kind", HEADS)
def test_image__depends_on_seed_and_number_alone(kind: str) -> None:
    config = tiny(head=kind, condition="tokens", prefix_length=4)
    model, given = randomized(config), conditions(config)
    assert given.mask is not None
    together = generate(model, given, guidance=Constant(2.0), seed=1, images_per_condition=4)
    for number in range(12):
        row = number // 4
        one = Condition(given.values[row : row + 1], given.mask[row : row + 1])
        alone = generate(model, one, guidance=Constant(2.0), seed=1, numbers=[number])
        assert torch.equal(alone[0], together[number])
    assert not torch.equal(together, generate(model, given, guidance=Constant(2.0), seed=2, images_per_condition=4))
    assert len({tuple(one.flatten().tolist()) for one in together[:4]}) > 1


@pytest.mark.parametrize("kind", HEADS)
def test_draws__have_the_models_distribution(kind: str) -> None:
    config = tiny(head=kind, grid=(1, 2), codebook_size=2, num_groups=2)
    model, count = randomized(config).requires_grad_(False), 4000
    drawn = generate(model, Condition(torch.tensor([1])), images_per_condition=count)
    images = torch.cartesian_prod(*[torch.arange(2)] * 4).reshape(16, 2, 2)
    expected = model(images, Condition(torch.ones(16, dtype=torch.int64))).sum((1, 2)).neg().exp() * count
    seen = Counter(tuple(one.flatten().tolist()) for one in drawn)
    chi = sum(
        (seen[tuple(one.flatten().tolist())] - n) ** 2 / n for one, n in zip(images, expected.tolist(), strict=True)
    )
    assert chi < 37.7  # 99.9% of 15 degrees of freedom


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("condition", ["class", "features", "tokens"])
def test_guidance__changes_every_draw_of_every_head(kind: str, condition: str) -> None:
    length = 1 if condition == "class" else 4
    config = tiny(head=kind, condition=condition, prefix_length=length)
    model, given = randomized(config), conditions(config)
    seen = dict[float, list[Tensor]]()
    for scale in (1.0, 4.0):
        sampling = Recording(temperature=0.0)
        sampling.seen.clear()
        generate(model, given, sampling=sampling, guidance=Constant(scale))
        seen[scale] = list(sampling.seen)
    first, other = (torch.cat([one.flatten() for one in seen[scale]]) for scale in (1.0, 4.0))
    assert first.shape == other.shape
    same = sum(torch.allclose(a, b) for a, b in zip(seen[1.0], seen[4.0], strict=True))
    assert same == 0


def test_null_branch__runs_only_as_far_as_guidance_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(head="parallel")
    model, rows = randomized(config), list[int]()
    run = model.run

    def counted(x: Tensor, *args: Any, **options: Any) -> Tensor:
        rows.append(len(x))
        return run(x, *args, **options)

    monkeypatch.setattr(model, "run", counted)
    given = Condition(torch.tensor([0, 1]))
    for guidance, expected in (
        (Constant(1.0), [2, 2, 2, 2, 2, 2]),
        (Constant(3.0), [3, 4, 4, 4, 4, 4]),
        (Interval(3.0, 1), [3, 4, 4, 2, 2, 2]),
        (Linear(0.5, 3.0), [3, 4, 4, 4, 4, 4]),
    ):
        rows.clear()
        generate(model, given, guidance=guidance)
        assert rows == expected, guidance


def test_allowed_values__are_kept_to() -> None:
    for kind in ("flat", "parallel", "chain", "depth"):
        config = tiny(head=kind)
        model = randomized(config)

        def even(step: int, drawn: Tensor) -> Tensor:
            return torch.arange(4) % 2 == step % 2

        drawn = generate(model, conditions(config), allowed=even, guidance=Constant(2.0))
        steps = drawn.reshape(3, config.num_steps, -1)
        assert torch.equal(steps % 2, (torch.arange(config.num_steps) % 2)[None, :, None].expand_as(steps)), kind
    with pytest.raises(QLIPError, match="allowed values need a softmax"):
        generate(randomized(tiny(head="bits")), conditions(tiny()), allowed=even)


@pytest.mark.parametrize("kind", HEADS)
def test_kept_tokens__leave_the_others_as_they_would_be_drawn(kind: str) -> None:
    """Fix some tokens of images to what is drawn there: nothing changes. Fix others: they stay."""
    config = tiny(head=kind, condition="tokens", prefix_length=4)
    model, given = randomized(config), conditions(config)
    torch.manual_seed(0)
    keep = torch.rand(3, 6) < 0.5
    for guidance in (Constant(1.0), Interval(2.5, 1)):
        drawn = generate(model, given, guidance=guidance)
        for kept in (keep, keep[:1].expand(3, -1), torch.arange(6).expand(3, -1) < 3, torch.ones(3, 6).bool()):
            again = generate(model, given, guidance=guidance, indices=drawn.clone(), keep=kept)
            assert torch.equal(again, drawn)
        other = (drawn + 1) % config.codebook_size
        mixed = generate(model, given, guidance=guidance, indices=other, keep=keep)
        assert torch.equal(mixed[keep], other[keep])
        assert not torch.equal(mixed[~keep], drawn[~keep])


def test_kept_tokens__take_no_steps_at_the_beginning_and_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(head="chain")
    model, seen, shapes = randomized(config), list[int](), list[tuple[int, ...]]()
    drawn = generate(model, conditions(config))
    run = model.run
    monkeypatch.setattr(model, "run", lambda x, **options: (shapes.append(tuple(x.shape[:2])), run(x, **options))[1])
    keep = torch.tensor([True, True, False, True, False, True]).expand(3, -1)
    generate(model, conditions(config), indices=drawn, keep=keep, on_step=lambda step, groups: seen.append(step))
    assert seen == [3, 4, 5]
    assert shapes == [(3, 1), (3, 2), (3, 1), (3, 1)]  # the class, the kept beginning, two steps


def test_steps__are_reported() -> None:
    config = tiny(head="chain")
    seen = list[tuple[int, tuple[int, ...]]]()
    generate(randomized(config), conditions(config), on_step=lambda step, drawn: seen.append((step, drawn.shape)))
    assert seen == [(step, (3, step, 3)) for step in range(1, 7)]


def test_faults__are_one_line() -> None:
    model, given = randomized(tiny()), conditions(tiny())
    with pytest.raises(QLIPError, match="call model.eval"):
        generate(model.train(), given)
    model.eval()
    with pytest.raises(QLIPError, match="2 image numbers for 3 images"):
        generate(model, given, numbers=[1, 2])
    with pytest.raises(QLIPError, match="images_per_condition"):
        generate(model, given, images_per_condition=0)
    indices = torch.zeros(3, 6, 3, dtype=torch.int64)
    with pytest.raises(QLIPError, match="indices and keep together"):
        generate(model, given, indices=indices)
    with pytest.raises(QLIPError, match=r"give bool \(3, 6\)"):
        generate(model, given, indices=indices, keep=torch.ones(6).bool())
    with torch.no_grad():
        model.norm.weight[0] = math.nan
    with pytest.raises(QLIPError, match="finite|NaN"):
        generate(model, given)


def test_cache__that_is_too_short_is_refused() -> None:
    model = randomized(tiny())
    cache = KVCache(model.config, 1, capacity=2)
    with pytest.raises(QLIPError, match="3 positions do not fit a cache of 2"):
        model.run(torch.zeros(1, 3, 16), cache=cache)


def test_model_with_target_positions__draws_in_raster_order() -> None:
    config = tiny(head="chain", target_positions=True)
    model, given = randomized(config), conditions(config)
    with torch.no_grad():
        assert torch.equal(generate(model, given, guidance=Constant(2.0)), uncached(model, given, 2.0, 0, [0, 1, 2]))


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_jacobi__has_the_distribution_of_plain_sampling(scale: float) -> None:
    config = tiny(head="flat", grid=(1, 2), codebook_size=2, num_groups=2, condition="tokens", prefix_length=2)
    model, count = randomized(config), 1500
    given = Condition(torch.tensor([[1, 2]]).expand(count, -1))
    plain = generate(model, given, guidance=Constant(scale), seed=1)
    fast, passes = generate_jacobi(model, given, window=3, guidance=Constant(scale), seed=2)
    seen = [torch.zeros(16).index_add_(0, places_of(one), torch.ones(count)) for one in (plain, fast)]
    both = seen[0] + seen[1]
    chi = ((seen[0] - seen[1]) ** 2 / both.clamp(min=1)).sum()
    assert chi < 37.7  # 99.9% of 15 degrees of freedom
    assert float(passes.float().mean()) < 4


def places_of(indices: Tensor) -> Tensor:
    return (indices.flatten(1) * torch.tensor([8, 4, 2, 1])).sum(1)


@pytest.mark.parametrize("name", CACHED)
def test_jacobi__draws_llamagens_greedy_tokens_in_fewer_passes(name: str) -> None:
    fixture = Fixture(name)
    drawn, passes = generate_jacobi(fixture.model, fixture.condition, window=5, sampling=GREEDY, guidance=Constant(4.0))
    assert torch.equal(drawn[..., 0], fixture.outputs["greedy.cfg4.tokens"])
    assert passes.max() <= fixture.model.config.num_steps


def test_jacobi__is_for_a_softmax_per_step() -> None:
    for kind in HEADS[1:]:
        with pytest.raises(QLIPError, match="one softmax per step"):
            generate_jacobi(randomized(tiny(head=kind)), conditions(tiny()))


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_steps__draw_the_same_images(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(head="chain", condition="tokens", prefix_length=4, num_key_value_heads=1)
    model, given = randomized(config), conditions(config)
    compiled, graphs = torch.compile, list[int]()

    def counted(graph: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(1)
        return torch._dynamo.lookup_backend(backend)(graph, inputs, **options)

    monkeypatch.setattr(torch, "compile", lambda step, mode, **options: compiled(step, backend=counted, **options))
    for guidance in (Constant(1.0), Constant(2.5)):
        expected = generate(model, given, guidance=guidance, images_per_condition=2)
        assert torch.equal(generate(model, given, guidance=guidance, images_per_condition=2, compile=True), expected)
    assert len(graphs) == 2  # one per number of rows, none per step
