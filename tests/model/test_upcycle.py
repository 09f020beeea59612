"""Upcycling: equality at step 0 where it is promised, and what is copied, scaled and drawn elsewhere."""

from __future__ import annotations

import math

import pytest
import torch
from dit_moe_kernels import use_backend
from torch import Tensor

from dit_moe import DiT
from dit_moe.upcycle import GELU_FACTOR, GELU_SLOPE, upcycle
from tests.model.util import naive_moe, naive_swiglu, tiny_inputs, tiny_model


def outputs(*models: DiT) -> list[Tensor]:
    x, t, y = tiny_inputs(dtype=torch.float64)
    with torch.no_grad(), use_backend("reference"):
        return [model(x, t, y) for model in models]


def relative_error(got: Tensor, expected: Tensor) -> float:
    return ((got - expected).abs().max() / expected.abs().max()).item()


EXACT = [  # source (E, K, shared), target (E', K' or default, shared or the source's), K' that must come out
    ((1, 1, 2), (8, None, None), 2),
    ((1, 1, 2), (16, 2, None), 2),
    ((1, 1, 2), (8, 1, None), 1),
    ((1, 1, 2), (6, 6, None), 6),
    ((1, 1, 0), (8, None, 2), 2),
    ((1, 1, 0), (8, None, None), 2),
    ((4, 1, 2), (16, None, None), 2),
    ((4, 1, 2), (16, 3, None), 3),
    ((4, 2, 2), (8, None, None), 4),
    ((4, 2, 2), (12, 6, None), 6),
    ((4, 3, 0), (8, None, 1), 6),
    ((4, 4, 1), (8, None, None), 8),
    ((4, 2, 0), (4, None, 2), 2),
]


@pytest.mark.parametrize(("source", "target", "top_k"), EXACT)
def test_exact_equals_the_source(
    source: tuple[int, int, int], target: tuple[int, int | None, int | None], top_k: int
) -> None:
    model = tiny_model(num_experts=source[0], top_k=source[1], num_shared_experts=source[2]).double()
    bigger = upcycle(model, target[0], top_k=target[1], num_shared_experts=target[2], exact=True)
    assert (bigger.config.num_experts, bigger.config.top_k) == (target[0], top_k)
    got, expected = outputs(bigger, model)
    assert relative_error(got, expected) < 1e-12
    # The comparison can fail: without the routed experts the output is another one.
    for block in model.blocks:
        torch.nn.init.zeros_(block.moe.experts.w2)
    assert relative_error(outputs(model)[0], expected) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_exact_scale_of_a_power_of_two_rounds_nothing(dtype: torch.dtype) -> None:
    model = tiny_model(num_experts=1, top_k=1).to(dtype)
    bigger = upcycle(model, 8, exact=True)
    experts = bigger.blocks[0].moe.experts
    for j in range(8):
        assert torch.equal(experts.w2[j], 4 * model.blocks[0].moe.experts.w2[0])
        assert torch.equal(experts.w13[j], model.blocks[0].moe.experts.w13[0])


CANCELLING = [((1, 1), 8, 2), ((1, 1), 8, 8), ((1, 1), 7, 3), ((4, 2), 8, 4), ((4, 2), 12, 6), ((2, 1), 8, 4)]


@pytest.mark.parametrize(("source", "num_experts", "top_k"), CANCELLING)
def test_noise_cancels_in_the_exact_option(source: tuple[int, int], num_experts: int, top_k: int) -> None:
    model = tiny_model(num_experts=source[0], top_k=source[1]).double()
    bigger = upcycle(model, num_experts, top_k=top_k, exact=True, noise_std=0.5)
    got, expected = outputs(bigger, model)
    assert relative_error(got, expected) < 1e-12
    copies = bigger.blocks[0].moe.experts.w2[:: source[0]][:top_k]
    assert not torch.equal(copies[0], copies[1])
    scale = num_experts * source[1] / (source[0] * top_k)
    if top_k == num_experts // source[0] * source[1]:  # one set holds all copies
        w2 = scale * model.blocks[0].moe.experts.w2
        noise = bigger.blocks[0].moe.experts.w2 - w2.tile(num_experts // source[0], 1, 1)
        asked = 0.5 * w2.std() * (1 - source[0] / num_experts) ** 0.5  # less the mean that was taken off
        assert noise.std().item() == pytest.approx(asked.item(), rel=0.05)


@pytest.mark.parametrize(("source", "num_experts"), [((1, 1), 8), ((4, 2), 8)])
@pytest.mark.parametrize("noise_std", [0.0, 0.1])
def test_noise_parts_the_copies_in_training(source: tuple[int, int], num_experts: int, noise_std: float) -> None:
    """The documented trap: without noise, copies that are chosen together stay equal; with it, all part."""
    model = upcycle(
        tiny_model(num_experts=source[0], top_k=source[1]), num_experts, exact=True, noise_std=noise_std
    ).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x, t, y = tiny_inputs(batch=8)
    for _ in range(30):
        optimizer.zero_grad()
        out, aux = model(x, t, y, return_aux=True)
        (out.square().mean() + aux.balance_loss).backward()
        optimizer.step()
    first, second = 0, source[0]  # two copies of expert 0
    for block in model.blocks:
        w13 = block.moe.experts.w13
        assert torch.equal(w13[first], w13[second]) == (noise_std == 0)


def test_one_expert_exactly_or_with_a_spread_router() -> None:
    """The documented choice: a zero router visits the first K' experts only, a tiny one more, nearly equal."""
    model = tiny_model(num_experts=1, top_k=1).double()
    x, t, y = tiny_inputs(batch=8, dtype=torch.float64)
    exact, near = upcycle(model, 8, exact=True), upcycle(model, 8, router_init_std=1e-4)
    with torch.no_grad():
        expected = model(x, t, y)
        out, aux = exact(x, t, y, return_aux=True)
        assert relative_error(out, expected) < 1e-12
        assert aux.tokens_per_expert.tolist() == [[128, 128, 0, 0, 0, 0, 0, 0]] * 2
        out, aux = near(x, t, y, return_aux=True)
        assert 1e-12 < relative_error(out, expected) < 1e-2
        assert (aux.tokens_per_expert > 0).sum(1).min() > 2


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ({"num_experts": 0}, {"num_experts": 8, "noise_std": 0.1}, "expected noise_std 0 and num_shared_experts None"),
        ({"num_experts": 0}, {"num_experts": 8, "num_shared_experts": 2}, "num_shared_experts None, got 0.0 and 2"),
        ({}, {"num_experts": 6}, "got num_experts 6, expected a multiple of 4"),
        ({}, {"num_experts": 8, "top_k": 2}, "got top_k 2, expected 4 for 2 copies"),
        ({"top_k": 1}, {"num_experts": 8, "top_k": 3}, "got top_k 3, expected 1 to 2 for 2 copies"),
        ({"top_k": 1}, {"num_experts": 16, "top_k": 2, "noise_std": 0.1}, "2 of 4 copies visited"),
        ({}, {"num_experts": 8, "router_init_std": 0.1}, "exact: expected router_init_std 0"),
        ({}, {"num_experts": 8, "rescale": False}, "exact: expected router_init_std 0 or None, and rescale"),
    ],
)
def test_impossible_exactness_is_an_error(source: dict, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(tiny_model(**source), **options, exact=True)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ({}, {"num_experts": 3}, "num_experts: got 3, expected at least 4"),
        ({"num_experts": 0}, {"num_experts": 0}, "num_experts: got 0, expected at least 1"),
        ({}, {"num_experts": 8, "num_shared_experts": 3}, "num_shared_experts: got 3, expected 2"),
        ({"shared_expert": "gelu"}, {"num_experts": 8, "num_shared_experts": 0}, "num_shared_experts: got 0, expected"),
        ({}, {"num_experts": 8, "top_k": 9}, "top_k: got 9"),
        ({}, {"num_experts": 8, "noise_std": -1.0}, "noise_std: got -1.0"),
        ({}, {"num_experts": 8, "router_init_std": math.nan}, "router_init_std: got nan"),
    ],
)
def test_wrong_options(source: dict, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        upcycle(tiny_model(**source), **options)


def test_same_top_k_with_tied_copies_is_not_exact() -> None:
    """Why `exact` asks for more choices per token: with K' = K the best expert's copies push out the second expert."""
    model = tiny_model(num_experts=4, top_k=2).double()
    got, expected = outputs(upcycle(model, 8, top_k=2, router_init_std=0.0), model)
    assert relative_error(got, expected) > 1e-3


def test_official_recipe() -> None:
    """Copies of one expert, router N(0, 0.02), w2 as it is."""
    model = tiny_model(num_experts=1, top_k=1, hidden_size=64)
    bigger = upcycle(model, 64, rescale=False)
    for old, new in zip(model.blocks, bigger.blocks, strict=True):
        assert torch.equal(new.moe.experts.w13, old.moe.experts.w13.expand(64, -1, -1))
        assert torch.equal(new.moe.experts.w2, old.moe.experts.w2.expand(64, -1, -1))
        assert new.moe.gate.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert bigger.config.top_k == 2


def test_more_experts_keep_the_old_ones_and_their_router_rows() -> None:
    model = tiny_model(num_experts=4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bigger = upcycle(model, 6, router_init_std=0.0, noise_std=0.5)
    moe, old = bigger.blocks[1].moe, model.blocks[1].moe
    order = [0, 1, 2, 3, 0, 1]
    assert torch.equal(moe.gate.weight, old.gate.weight[order])
    assert torch.equal(moe.experts.w13[:4], old.experts.w13) and torch.equal(moe.experts.w2[:4], old.experts.w2 * 1.5)
    for got, expected in ((moe.experts.w13, old.experts.w13), (moe.experts.w2, old.experts.w2 * 1.5)):
        noise = (got - expected[order])[4:]
        assert noise.std().item() == pytest.approx(0.5 * expected.std().item(), rel=0.05)
    assert torch.equal(bigger.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    with torch.no_grad():
        for parameter in bigger.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_seed_decides_everything() -> None:
    model = tiny_model(num_experts=2)
    torch.manual_seed(1)
    first = upcycle(model, 4, noise_std=0.1, seed=5).state_dict()
    torch.manual_seed(2)
    again, other = (upcycle(model, 4, noise_std=0.1, seed=seed).state_dict() for seed in (5, 6))
    assert all(torch.equal(first[name], again[name]) for name in first)
    changed = {name for name in first if not torch.equal(first[name], other[name])}
    stems = ("gate.weight", "experts.w13", "experts.w2")
    assert changed == {f"blocks.{i}.moe.{stem}" for i in range(2) for stem in stems}


def test_mode_and_requires_grad() -> None:
    model = tiny_model()
    assert not upcycle(model, 8).training and upcycle(model.train(), 8).training
    bigger = upcycle(model, 8)
    assert not bigger.pos_embed.requires_grad and bigger.blocks[0].moe.experts.w2.requires_grad


def test_from_dense_gelu() -> None:
    """Everything but the MLP is copied; the experts are the documented approximation, checked by its formula."""
    model = tiny_model(num_experts=0).double()
    bigger = upcycle(model, 8, router_init_std=0.0)
    mlp, moe = model.blocks[0].mlp, bigger.blocks[0].moe
    x_TD = torch.randn(5, 32, dtype=torch.float64)
    with torch.no_grad():
        got, _, _ = naive_moe(moe, x_TD)
        z_TF = x_TD @ mlp.fc1.weight.T
        hidden_TF = GELU_FACTOR * z_TF * torch.nn.functional.silu(GELU_SLOPE * z_TF)
    torch.testing.assert_close(got, hidden_TF @ mlp.fc2.weight.T, rtol=1e-10, atol=1e-12)
    assert bigger.config.num_shared_experts == 2 and not moe.shared_experts.w2.any()
    assert moe.shared_experts.w13.std().item() == pytest.approx(math.sqrt(2 / (64 + 32)), rel=0.05)
    torch.testing.assert_close(bigger.pos_embed, model.pos_embed, rtol=0, atol=0)
    torch.testing.assert_close(bigger.blocks[1].attn.qkv.weight, model.blocks[1].attn.qkv.weight, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("num_experts", "options"),
    [
        (8, {}),
        (1, {}),
        (7, {"top_k": 3, "router_init_std": 1.0}),
        (4, {"top_k": 4, "router_init_std": 0.0, "rescale": False}),
    ],
    ids=str,
)
@pytest.mark.parametrize("mlp_ratio", [4.0, 2.5])
def test_exact_from_dense_gelu(num_experts: int, options: dict, mlp_ratio: float) -> None:
    model = tiny_model(num_experts=0, mlp_ratio=mlp_ratio).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    bigger = upcycle(model, num_experts, **options, exact=True)
    got, expected = outputs(bigger, model)
    assert (got - expected).abs().max() <= 1e-12
    assert (bigger.config.num_experts, bigger.config.top_k) == (num_experts, options.get("top_k", min(2, num_experts)))
    # The comparison can fail: the MLP's biases and the routed experts both matter.
    for block in bigger.blocks:
        torch.nn.init.normal_(block.moe.experts.w2)
    assert relative_error(outputs(bigger)[0], expected) > 1e-3
    for block in model.blocks:
        torch.nn.init.zeros_(block.mlp.fc1.bias)
    assert relative_error(outputs(model)[0], expected) > 1e-3
    kept = {name.replace(".mlp.fc", ".moe.shared_experts.fc"): value for name, value in before.items()}
    assert all(torch.equal(value, kept[name]) for name, value in bigger.state_dict().items() if name in kept)
    assert kept.keys() <= bigger.state_dict().keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exact_from_dense_gelu_in_other_dtypes(dtype: torch.dtype) -> None:
    model = tiny_model(num_experts=0).to(dtype)
    x, t, y = tiny_inputs(dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(upcycle(model, 8, exact=True)(x, t, y), model(x, t, y))


@pytest.mark.parametrize("top_k", [2, 8])
def test_exact_from_dense_gelu_learns_at_once(top_k: int) -> None:
    """One step moves w2 of every visited expert, and no two alike; the next one moves w13 and the router too."""
    model = upcycle(tiny_model(num_experts=0), 8, top_k=top_k, exact=True).train()
    start = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, t, y = tiny_inputs(batch=8)

    def step() -> Tensor:
        optimizer.zero_grad()
        out, aux = model(x, t, y, return_aux=True)
        out.square().mean().backward()  # without the balance loss, which would move the router at once
        optimizer.step()
        return aux.tokens_per_expert

    visited_LE = step() > 0
    assert (visited_LE.sum(1) >= top_k).all()
    for i, block in enumerate(model.blocks):
        experts = block.moe.experts
        assert not start[f"blocks.{i}.moe.experts.w2"].any()
        assert experts.w2.flatten(1).any(1).equal(visited_LE[i])
        assert torch.equal(experts.w13, start[f"blocks.{i}.moe.experts.w13"])
        assert len(torch.unique(experts.w13, dim=0)) == 8
        moved = experts.w2[visited_LE[i]]
        assert len(torch.unique(moved, dim=0)) == len(moved)
    step()
    for i, block in enumerate(model.blocks):
        for name in ("experts.w13", "gate.weight", "shared_experts.fc1.weight"):
            assert not torch.equal(block.moe.get_parameter(name), start[f"blocks.{i}.moe.{name}"]), name


def test_exact_from_dense_gelu_draws_w13_as_a_new_model_does() -> None:
    bigger = upcycle(tiny_model(num_experts=0, hidden_size=64), 8, exact=True)
    for w13 in bigger.blocks[0].moe.experts.w13:
        assert w13.std().item() == pytest.approx(math.sqrt(2 / (256 + 64)), rel=0.05)
        assert w13.abs().max() <= math.sqrt(6 / (256 + 64))


def test_gelu_shared_expert_is_kept_by_further_upcycling() -> None:
    model = tiny_model(num_experts=4, top_k=2, shared_expert="gelu").double()
    bigger = upcycle(model, 8, exact=True, noise_std=0.5)
    got, expected = outputs(bigger, model)
    assert bigger.config.shared_expert == "gelu" and relative_error(got, expected) < 1e-12


def test_gelu_constants_are_the_best_fit_and_their_error_is_as_told() -> None:
    z = torch.linspace(-8, 8, 100_001, dtype=torch.float64)
    weight = torch.exp(-z.square() / 2)
    gelu = torch.nn.functional.gelu(z, approximate="tanh")
    fit = z * torch.nn.functional.silu(GELU_SLOPE * z)
    assert ((weight * gelu * fit).sum() / (weight * fit.square()).sum()).item() == pytest.approx(GELU_FACTOR, rel=1e-3)
    error = ((weight * (gelu - GELU_FACTOR * fit).square()).sum() / (weight * gelu.square()).sum()).sqrt()
    assert error.item() == pytest.approx(0.40, abs=0.01)


def test_why_a_gelu_mlp_is_out_of_reach() -> None:
    """A bias-free SwiGLU is quadratic at the origin: halving a tiny input quarters the output; a GELU MLP is linear."""
    w13, w2 = torch.randn(64, 8, dtype=torch.float64), torch.randn(8, 32, dtype=torch.float64)
    x = 1e-6 * torch.randn(8, dtype=torch.float64)
    torch.testing.assert_close(naive_swiglu(x / 2, w13, w2), naive_swiglu(x, w13, w2) / 4, rtol=1e-4, atol=0)
