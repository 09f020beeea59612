"""route: the router as one op, against the same in float64 from plain PyTorch, and its plan against the reference's."""

import pytest
import torch
from dit_moe_kernels import BackendUnavailableError, Routing, backends, make_routing_plan, route
from torch import Tensor

from tests.kernels.util import (
    BF16,
    FP16,
    FP32,
    FP64,
    assert_2x,
    gpu_targets,
    naive_topk_softmax,
    randn,
    strided,
    targets,
)

SHAPES = [
    (37, 4, 2, 72),
    (20, 8, 2, 40),
    (5, 1, 1, 32),
    (9, 3, 3, 72),
    (1, 16, 8, 40),
    (130, 6, 5, 64),
    (33, 33, 2, 16),
]
MODEL_SHAPES = [
    (256, 8, 2, 1152), (4096, 8, 2, 384), (32768, 8, 2, 1152), (16385, 16, 2, 1408), (70001, 16, 2, 64),
    (5000, 12, 3, 768), (3001, 64, 8, 1024), (40000, 20, 4, 1000), (300000, 7, 2, 16),
]  # fmt: skip
TARGETS = targets("triton", "cuda")
ALPHA = 0.3
OUTPUTS = ("topk_weights", "probs", "balance_loss")


def naive_route(x: Tensor, gate: Tensor, top_k: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, ids, and the differentiable outputs by name; in fp32, or fp64 for fp64."""
    wide = FP64 if x.dtype == FP64 else FP32
    logits = x.to(wide) @ gate.to(wide).T
    weights, ids, probs = naive_topk_softmax(logits, top_k)
    counts = torch.stack([(ids == expert).sum() for expert in range(gate.shape[0])]).to(wide)
    balance = ALPHA * gate.shape[0] * (counts / ids.numel() * probs.mean(0)).sum()
    return logits, ids, {"topk_weights": weights, "probs": probs, "balance_loss": balance}


def make_inputs(target, tokens: int, experts: int, width: int, gate_dtype: torch.dtype | None = None):
    gate = torch.randn(experts, width, device=target.device) * 2 * width**-0.5
    return randn(tokens, width, target=target), gate.to(target.dtype if gate_dtype is None else gate_dtype)


def assert_plan_of(routing: Routing, num_experts: int) -> None:
    """The plan is what the reference makes of the ids."""
    ids, plan = routing.topk_ids, routing.plan
    expected = make_routing_plan(ids, num_experts, tile_rows=plan.tile_rows, validate=False, backend="reference")
    for name, got, wanted in zip(plan._fields, plan, expected, strict=True):
        if isinstance(wanted, Tensor):
            assert got.dtype == torch.int32 and got.is_contiguous() and got.device == ids.device
            assert torch.equal(got, wanted), name
        else:
            assert got == wanted, name


def assert_same_bits(got: Routing, expected: Routing) -> None:
    for name in (*OUTPUTS, "topk_ids"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name
    for name, a, b in zip(got.plan._fields[:6], got.plan[:6], expected.plan[:6], strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    "shape, used",
    [*((shape, OUTPUTS) for shape in SHAPES), *((SHAPES[0], (name,)) for name in OUTPUTS)],
    ids=lambda value: "+".join(value) if isinstance(value[0], str) else "T{}_E{}_K{}_D{}".format(*value),
)
@pytest.mark.parametrize("target", TARGETS)
def test_outputs_and_gradients(target, shape, used):
    """With a gradient for all outputs, and for each alone."""
    tokens, experts, top_k, width = shape
    inputs = make_inputs(target, tokens, experts, width)
    grads = {
        "topk_weights": torch.randn(tokens, top_k, device=target.device),
        "probs": torch.randn(tokens, experts, device=target.device),
        "balance_loss": torch.tensor(1.7, device=target.device),
    }

    def backward(outputs: dict[str, Tensor], leaves: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad([outputs[name] for name in used], leaves, [grads[n].to(outputs[n]) for n in used])

    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    got = route(*leaves, top_k, balance_alpha=ALPHA, tile_rows=16, backend=target.backend)
    results = {}
    for name, dtype in (("exact", FP64), ("plain", target.dtype)):
        naive_leaves = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
        _, ids, outputs = naive_route(*naive_leaves, top_k)
        results[name] = (outputs, backward(outputs, naive_leaves))
        if name == "exact":
            assert torch.equal(got.topk_ids, ids)
    for name in OUTPUTS:
        both = [results[kind][0][name].detach() for kind in ("exact", "plain")]
        assert_2x(name, getattr(got, name).detach(), *both)
    # The softmax's gradient is a difference of numbers as large as the balance loss's gradient for a probability, so
    # these numbers' roundings stay however small the difference is; plain PyTorch may be exact by luck.
    rounding = 2.0**-22 * 1.7 * ALPHA * experts / tokens
    floors = (rounding * inputs[1].abs().max(), rounding * inputs[0].abs().max() * tokens**0.5)
    for i, gradient in enumerate(backward(got._asdict(), leaves)):
        exact, plain = (results[kind][1][i] for kind in ("exact", "plain"))
        if (gradient.double() - exact).abs().max() > floors[i]:
            assert_2x(("dx", "dgate")[i], gradient, exact, plain)
    assert_plan_of(got, experts)


@pytest.mark.parametrize("gate_dtype", [None, FP32], ids=["same_gate", "fp32_gate"])
@pytest.mark.parametrize("shape", MODEL_SHAPES, ids="T{0[0]}_E{0[1]}_K{0[2]}_D{0[3]}".format)
@pytest.mark.parametrize("target", gpu_targets("triton", "cuda", dtypes=[BF16, FP16, FP32]))
def test_models(target, shape, gate_dtype):
    """The largest error over many tokens; ids where the choice is clear in fp32; the same bits in another run."""
    tokens, experts, top_k, width = shape
    x, gate = make_inputs(target, tokens, experts, width, gate_dtype)
    got = route(x, gate, top_k, balance_alpha=ALPHA, backend=target.backend)
    logits, ids, exact = naive_route(x.double(), gate.double(), top_k)
    plain = naive_route(x, gate, top_k)[2]
    gaps = logits.sort(dim=1, descending=True).values[:, : top_k + 1].diff().abs()
    clear = (gaps > 1e-4).all(dim=1)
    assert clear.float().mean() > 0.9
    assert torch.equal(got.topk_ids[clear], ids[clear])
    for name in OUTPUTS:
        assert_2x(name, getattr(got, name), exact[name], plain[name])
    assert_plan_of(got, experts)
    again = route(x, gate, top_k, balance_alpha=ALPHA, backend=target.backend)
    assert_same_bits(again, got)


@pytest.mark.parametrize("target", gpu_targets("cuda", dtypes=[BF16, FP16, FP32]))
def test_a_token_is_routed_alike_in_any_batch(target):
    """The kernel takes more tokens a block from some number on; the order of its sums stays."""
    x, gate = make_inputs(target, 20000, 8, 384)
    many, few = (route(x[:tokens], gate, 2, backend="cuda") for tokens in (20000, 1001))
    for a, b in zip(many[:3], few[:3], strict=True):
        assert torch.equal(a[:1001], b)


@pytest.mark.parametrize("target", TARGETS)
def test_no_tokens(target):
    leaves = [tensor.requires_grad_() for tensor in make_inputs(target, 0, 4, 40)]
    got = route(*leaves, 2, balance_alpha=ALPHA, backend=target.backend)
    assert got.topk_weights.shape == (0, 2) and got.probs.shape == (0, 4) and got.balance_loss == 0
    assert_plan_of(got, 4)
    dx, dgate = torch.autograd.grad(got.topk_weights.sum() + got.balance_loss, leaves)
    assert dx.shape == (0, 40) and (dgate == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("target", TARGETS)
def test_a_bad_token_shows_and_stays_alone(target, bad):
    """NaN weights and K distinct valid ids for that token, nothing for the others; the plan is whole."""
    x, gate = make_inputs(target, 6, 5, 40)
    expected = naive_route(x.double(), gate.double(), 3)
    x[1, 0] = x[4, 39] = bad
    got = route(x, gate, 3, balance_alpha=ALPHA, backend=target.backend)
    for row in range(6):
        if row in (1, 4):
            assert got.topk_weights[row].isnan().all() and got.probs[row].isnan().all()
            chosen = got.topk_ids[row].tolist()
            assert len(set(chosen)) == 3 and set(chosen) <= set(range(5))
        else:
            assert torch.equal(got.topk_ids[row], expected[1][row])
    assert got.balance_loss.isnan()
    assert_plan_of(got, 5)


@pytest.mark.parametrize("target", TARGETS)
def test_ties_go_to_the_lower_id(target):
    x, gate = torch.ones(20, 16, device=target.device), torch.zeros(12, 16, device=target.device)
    gate[[3, 5, 9]] = 1
    got = route(x.to(target.dtype), gate.to(target.dtype), 5, backend=target.backend)
    assert got.topk_ids.tolist() == [[3, 5, 9, 0, 1]] * 20
    assert_plan_of(got, 12)


@pytest.mark.parametrize("target", TARGETS)
def test_views_and_mixed_dtypes(target):
    """Inputs with gaps or at an odd address, and a gate in another dtype."""
    x, gate = make_inputs(target, 37, 4, 72)
    expected = route(x, gate, 2, balance_alpha=ALPHA, backend=target.backend)
    storage = x.new_empty(x.numel() + 1)
    storage[1:] = x.flatten()
    for other_x, other_gate in [(strided(x), strided(gate)), (storage[1:].view(x.shape), gate), (x, gate.double())]:
        if other_gate.dtype == FP64 and target.backend != "reference":
            other_gate = other_gate.float()
        got = route(other_x, other_gate, 2, balance_alpha=ALPHA, backend=target.backend)
        assert torch.equal(got.topk_ids, expected.topk_ids)
        torch.testing.assert_close(got.probs, expected.probs, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_autocast_changes_nothing():
    x, gate = torch.randn(20, 40), torch.randn(4, 40)
    expected = route(x, gate, 2)
    with torch.autocast("cpu", dtype=BF16):
        got = route(x, gate, 2)
    assert all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3], strict=True))


def test_wrong_arguments():
    x, gate = torch.randn(6, 8), torch.randn(4, 8)
    for arguments, options, error, message in [
        ((x, gate[:, :7], 2), {}, ValueError, r"gate: got shape \(4, 7\), expected \(4, 8\)"),
        ((x, gate, 5), {}, ValueError, "top_k: got 5, expected 1 to num_experts = 4"),
        ((x, gate, 2), {"tile_rows": 20}, ValueError, "tile_rows: got 20"),
        ((x.int(), gate, 2), {}, TypeError, "x: got dtype torch.int32"),
        ((x, gate, 2), {"backend": "cuda"}, BackendUnavailableError, "cuda"),
    ]:
        with pytest.raises(error, match=message):
            route(*arguments, **options)


def test_bounds_of_the_cuda_kernels_have_a_reason(monkeypatch):
    """As if the extension were there, on an Ampere GPU."""
    monkeypatch.setattr(backends, "availability", lambda backend, device: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    backends._reason_against.cache_clear()
    try:
        assert backends.resolve("cuda", "router", "cuda", BF16, num_experts=64) == "cuda"
        with pytest.raises(BackendUnavailableError, match="cannot run router: got more than 64 experts"):
            backends.resolve("cuda", "router", "cuda", BF16, num_experts=65)
        with pytest.raises(BackendUnavailableError, match="cannot run routing: got more than 512 experts"):
            backends.resolve("cuda", "routing", "cuda", FP32, num_experts=513)
        with pytest.raises(BackendUnavailableError, match="cannot run router: got a width"):
            backends.resolve("cuda", "router", "cuda", BF16, whole_chunks=False, num_experts=8)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
        backends._reason_against.cache_clear()
        with pytest.raises(BackendUnavailableError, match=r"got compute capability \(7, 5\)"):
            backends.resolve("cuda", "router", "cuda", BF16)
    finally:
        backends._reason_against.cache_clear()


@pytest.mark.parametrize("target", gpu_targets("cuda", dtypes=[BF16]))
def test_a_graph_on_a_side_stream_follows_its_inputs(target):
    """Captured once, replayed on other tokens, which a side stream writes late."""
    torch.use_deterministic_algorithms(False)  # no filling of new memory in the way
    x, gate = make_inputs(target, 3000, 8, 384)
    other, _ = make_inputs(target, 3000, 8, 384)
    expected = route(other, gate, 2, balance_alpha=ALPHA, backend="cuda")
    route(x, gate, 2, backend="cuda")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = route(x, gate, 2, balance_alpha=ALPHA, backend="cuda")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles, about 60 ms
        x.copy_(other)
        graph.replay()
        late = route(x, gate, 2, balance_alpha=ALPHA, backend="cuda")
    side.synchronize()
    assert_same_bits(got, expected)
    assert_same_bits(late, expected)
