"""MoEFeedForward: the drop-in layer against a loop over tokens, in every dtype and shape it promises."""

from __future__ import annotations

import pytest
import torch
from dit_moe_kernels import BackendUnavailableError, use_backend
from torch import Tensor

from dit_moe import MoEFeedForward, MoEOutput
from tests.model.util import naive_moe, randomize

FP64 = torch.float64


def build(dtype: torch.dtype = FP64, **options: object) -> MoEFeedForward:
    sizes = {"hidden_size": 16, "expert_hidden_size": 24, "num_experts": 4, **options}
    return MoEFeedForward(**sizes, dtype=dtype)


def gradients(loss: Tensor, moe: MoEFeedForward, *inputs: Tensor) -> dict[str, Tensor]:
    names = [f"input {i}" for i in range(len(inputs))] + [name for name, _ in moe.named_parameters()]
    found = torch.autograd.grad(loss, [*inputs, *moe.parameters()], allow_unused=True)
    return {name: grad for name, grad in zip(names, found, strict=True) if grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 1},
        {"top_k": 4},
        {"num_experts": 1, "top_k": 1},
        {"num_experts": 8, "num_shared_experts": 0},
        {"shared_hidden_size": 5},
        {"shared_expert": "gelu"},
        {"shared_expert": "gelu", "shared_hidden_size": 5, "num_shared_experts": 0},
        {"expert_hidden_size": 7, "hidden_size": 13, "balance_alpha": 0.0},
    ],
    ids=str,
)
def test_output_loss_and_gradients_match_a_loop_over_tokens(options: dict) -> None:
    moe = randomize(build(**options), scale=0.4)
    x = torch.randn(11, moe.hidden_size, dtype=FP64, requires_grad=True)
    grad = torch.randn(11, moe.hidden_size, dtype=FP64)
    out = moe(x)
    hidden, loss, counts = naive_moe(moe, x)
    torch.testing.assert_close(out.hidden, hidden, rtol=0, atol=1e-12)
    torch.testing.assert_close(out.balance_loss, loss, rtol=0, atol=1e-14)
    assert out.tokens_per_expert.dtype == torch.int32 and out.tokens_per_expert.tolist() == counts.tolist()

    got = gradients((out.hidden * grad).sum() + out.balance_loss, moe, x)
    expected = gradients((hidden * grad).sum() + loss, moe, x)
    assert got.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            got[name], expected[name], rtol=0, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("shape", [(16,), (1, 16), (3, 5, 16), (2, 3, 4, 16)], ids=str)
def test_any_leading_shape(shape: tuple[int, ...]) -> None:
    moe, x = build(), torch.randn(shape, dtype=FP64)
    out = moe(x)
    assert isinstance(out, MoEOutput) and out.hidden.shape == shape and out.balance_loss.shape == ()
    torch.testing.assert_close(out.hidden.reshape(-1, 16), naive_moe(moe, x.reshape(-1, 16))[0], rtol=0, atol=1e-12)


def test_strided_input() -> None:
    moe = build()
    x = torch.randn(16, 6, 5, dtype=FP64).permute(2, 1, 0)
    assert torch.equal(moe(x).hidden, moe(x.contiguous()).hidden)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0, 16)], ids=str)
def test_no_tokens(shape: tuple[int, ...]) -> None:
    moe, x = build(), torch.zeros(shape, dtype=FP64, requires_grad=True)
    out = moe(x)
    assert out.hidden.shape == shape and out.balance_loss.item() == 0 and out.tokens_per_expert.tolist() == [0] * 4
    grads = gradients(out.hidden.sum() + out.balance_loss, moe, x)
    assert len(grads) == 6 and not any(grad.any() for grad in grads.values())


def test_nan_stays_in_its_token() -> None:
    moe, x = build(), torch.randn(9, 16, dtype=FP64)
    expected = moe(x).hidden
    x[4, 2] = float("nan")
    out = moe(x)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert out.hidden[4].isnan().all() and out.balance_loss.isnan()
    torch.testing.assert_close(out.hidden[others], expected[others], rtol=0, atol=1e-12)


def test_router_may_see_other_features_than_the_experts() -> None:
    moe = build()
    x, router_x = (torch.randn(9, 16, dtype=FP64, requires_grad=True) for _ in range(2))
    out = moe(x, router_x)
    hidden, loss, _ = naive_moe(moe, x, router_x)
    torch.testing.assert_close(out.hidden, hidden, rtol=0, atol=1e-12)
    got = gradients(out.hidden.square().sum() + out.balance_loss, moe, x, router_x)
    expected = gradients(hidden.square().sum() + loss, moe, x, router_x)
    for name in expected:
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=1e-10)
    assert not torch.equal(out.hidden, moe(x).hidden)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pure_16_bit_layers_keep_the_2x_rule(dtype: torch.dtype) -> None:
    moe = build(dtype=dtype, hidden_size=32, expert_hidden_size=64)
    x = torch.randn(40, 32, dtype=dtype)
    out = moe(x)
    assert out.hidden.dtype == dtype and out.balance_loss.dtype == torch.float32
    plain = naive_moe(moe, x)[0]
    exact = naive_moe(moe.double(), x.double())[0]
    assert (out.hidden - exact).abs().max() <= 2 * (plain - exact).abs().max()


def test_autocast() -> None:
    moe = build(dtype=torch.float32, hidden_size=32, expert_hidden_size=64)
    x = torch.randn(40, 32, requires_grad=True)
    expected = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = moe(x)
    assert out.hidden.dtype == torch.bfloat16 and out.balance_loss.dtype == torch.float32
    assert torch.equal(out.balance_loss, expected.balance_loss)  # the router does not round
    error = (out.hidden.float() - expected.hidden).abs().max()
    assert 0 < error < 0.02 * expected.hidden.abs().max()
    grads = gradients(out.hidden.float().square().sum() + out.balance_loss, moe, x)
    exact = gradients(expected.hidden.square().sum() + expected.balance_loss, moe, x)
    for name, grad in grads.items():
        assert grad.dtype == torch.float32
        assert (grad - exact[name]).abs().max() < 0.03 * exact[name].abs().max(), name


def test_balance_loss_survives_loss_scaling() -> None:
    """Its gradient scales with the loss, as a gradient injected into the backward pass would not."""
    moe, x = build(), torch.randn(12, 16, dtype=FP64)
    plain = gradients(moe(x).balance_loss, moe)["gate.weight"]
    scaled = gradients(moe(x).balance_loss * 65536, moe)["gate.weight"]
    assert plain.abs().max() > 0
    torch.testing.assert_close(scaled, plain * 65536)


def test_balance_loss_is_alpha_times_the_rest() -> None:
    x = torch.randn(12, 16, dtype=FP64)
    moe = build(balance_alpha=0.01)
    loss = moe(x).balance_loss
    moe.balance_alpha = 0.005
    torch.testing.assert_close(moe(x).balance_loss * 2, loss)


def test_backend_argument_reaches_every_op(monkeypatch: pytest.MonkeyPatch) -> None:
    moe, x = build(dtype=torch.float32, backend="reference"), torch.randn(4, 16)
    with use_backend("triton"):
        moe(x)  # the argument wins over the context
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for part in ("gate", "experts", "shared_experts"):
        moe = build(dtype=FP64, backend="reference")
        getattr(moe, part).backend = "triton"
        with pytest.raises(BackendUnavailableError, match="float64"):
            moe(x.double())
    with pytest.raises(ValueError, match="nonsense"):
        build(backend="nonsense")(x.double())


def test_names_in_the_state_dict() -> None:
    shapes = {name: tuple(value.shape) for name, value in build().state_dict().items()}
    assert shapes == {
        "gate.weight": (4, 16),
        "experts.w13": (4, 48, 16),
        "experts.w2": (4, 16, 24),
        "shared_experts.w13": (64, 16),
        "shared_experts.w2": (16, 32),
    }
    assert set(build(num_shared_experts=0).state_dict()) == {"gate.weight", "experts.w13", "experts.w2"}
    gelu = {name: tuple(value.shape) for name, value in build(shared_expert="gelu").shared_experts.state_dict().items()}
    assert gelu == {"fc1.weight": (24, 16), "fc1.bias": (24,), "fc2.weight": (16, 24), "fc2.bias": (16,)}


def test_repr_names_the_sizes() -> None:
    text = repr(build())
    for part in ("hidden_size=16", "expert_hidden_size=24", "num_experts=4", "top_k=2", "balance_alpha=0.01"):
        assert part in text


def test_wrong_input() -> None:
    moe = build()
    with pytest.raises(ValueError, match=r"x: got shape \(3, 15\), expected \(\.\.\., 16\)"):
        moe(torch.zeros(3, 15, dtype=FP64))
    with pytest.raises(ValueError, match=r"x: got shape \(\)"):
        moe(torch.tensor(1.0))
    with pytest.raises(TypeError, match="x: got dtype torch.int64"):
        moe(torch.zeros(3, 16, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"router_x: got shape \(2, 16\), expected \(3, 16\)"):
        moe(torch.zeros(3, 16, dtype=FP64), torch.zeros(2, 16, dtype=FP64))
    with pytest.raises(TypeError, match="float32"):
        moe(torch.zeros(3, 16))
    with pytest.raises(ValueError, match="meta"):
        moe(torch.zeros(3, 16, dtype=FP64, device="meta"))
    with torch.no_grad(), pytest.raises(TypeError, match="x: got dtype torch.float32, expected torch.float64"):
        moe(torch.zeros(3, 16))
    with torch.no_grad(), pytest.raises(ValueError, match="x: got device meta, expected cpu"):
        moe(torch.zeros(3, 16, dtype=FP64, device="meta"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size: got 0"),
        ({"expert_hidden_size": 0}, "expert_hidden_size: got 0"),
        ({"num_experts": 0}, "top_k: got 2"),
        ({"top_k": 5}, "top_k: got 5"),
        ({"num_shared_experts": -1}, "width: got -16"),
        ({"balance_alpha": -0.1}, "balance_alpha: got -0.1"),
        ({"shared_expert": "relu"}, "shared_expert: got 'relu'"),
    ],
)
def test_wrong_sizes(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_into_one_graph(compiler: str) -> None:
    moe = build()
    x = torch.randn(3, 5, 16, dtype=FP64, requires_grad=True)
    compiled = torch.compile(moe, backend=compiler, fullgraph=True)
    got, expected = compiled(x), moe(x)
    torch.testing.assert_close(got.hidden, expected.hidden, rtol=0, atol=1e-13)
    assert torch.equal(got.tokens_per_expert, expected.tokens_per_expert)
    got_grads = gradients(got.hidden.square().sum() + got.balance_loss, moe, x)
    expected_grads = gradients(expected.hidden.square().sum() + expected.balance_loss, moe, x)
    assert len(got_grads) == 6
    for name in expected_grads:
        torch.testing.assert_close(got_grads[name], expected_grads[name], rtol=0, atol=1e-11)
