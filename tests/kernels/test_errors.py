"""Wrong input: a ValueError or TypeError that names the argument, what it got and what was expected."""

from collections.abc import Callable

import pytest
import torch
from dit_moe_kernels import (
    expert_ffn,
    grouped_gemm,
    linear_swiglu,
    make_routing_plan,
    permute,
    router_logits,
    swiglu,
    topk_softmax,
    unpermute,
)

from tests.kernels.util import BF16, FP16, FP32, FP64, INTERPRETED

T, K, E, D, F = 6, 2, 4, 8, 10
IDS = torch.arange(T * K, dtype=torch.int32).view(T, K) % E


def plan(ids: torch.Tensor = IDS):
    return make_routing_plan(ids, E, backend="reference")


def x(*shape: int, dtype: torch.dtype = FP32, device: str = "cpu") -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def ffn(**changed) -> torch.Tensor:
    args = {"x": x(T, D), "w13": x(E, 2 * F, D), "w2": x(E, D, F), "topk_weights": x(T, K), "plan": plan()}
    return expert_ffn(**{**args, **changed})


# name of the case -> (call, exception, what the message must hold)
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    # routing
    "plan: float ids": (lambda: make_routing_plan(x(T, K), E), TypeError, "topk_ids.*float32.*int32"),
    "plan: int16 ids": (lambda: make_routing_plan(IDS.short(), E), TypeError, "topk_ids.*int16.*int32"),
    "plan: a list": (lambda: make_routing_plan([[0, 1]], E), TypeError, "topk_ids.*list"),
    "plan: 1-d ids": (lambda: make_routing_plan(IDS[:, 0], E), ValueError, r"topk_ids.*\(6,\).*\(T, K\)"),
    "plan: K > E": (lambda: make_routing_plan(IDS, 1), ValueError, "top_k.*got 2.*num_experts = 1"),
    "plan: K = 0": (lambda: make_routing_plan(IDS[:, :0], E), ValueError, "top_k.*got 0"),
    "plan: no experts": (lambda: make_routing_plan(IDS, 0), ValueError, "num_experts = 0"),
    "plan: id too large": (lambda: make_routing_plan(IDS + 1, E), ValueError, "topk_ids.*1 to 4.*-1 to 3"),
    "plan: id too small": (lambda: make_routing_plan(IDS - 2, E), ValueError, "topk_ids.*-2 to 1.*-1 to 3"),
    "plan: id too large, asked to check": (
        lambda: make_routing_plan(IDS + 1, E, validate=True), ValueError, "topk_ids.*1 to 4.*-1 to 3"),
    "plan: tile height": (lambda: make_routing_plan(IDS, E, tile_rows=24), ValueError, "tile_rows.*24.*16"),
    # router
    "router: widths differ": (lambda: router_logits(x(T, D), x(E, D + 1)), ValueError, r"gate.*\(4, 9\).*\(4, 8\)"),
    "router: integer tokens": (lambda: router_logits(x(T, D, dtype=torch.int64), x(E, D)), TypeError, "x.*int64"),
    "router: 3-d tokens": (lambda: router_logits(x(1, T, D), x(E, D)), ValueError, r"x.*\(1, 6, 8\).*2 dim"),
    "router: devices": (lambda: router_logits(x(T, D), x(E, D, device="meta")), ValueError, "gate.*meta.*cpu"),
    "top-k: K > E": (lambda: topk_softmax(x(T, E), E + 1), ValueError, "top_k.*got 5.*num_experts = 4"),
    "top-k: K = 0": (lambda: topk_softmax(x(T, E), 0), ValueError, "top_k.*got 0"),
    "top-k: 16-bit logits": (lambda: topk_softmax(x(T, E, dtype=BF16), 2), TypeError, "logits.*bfloat16.*fp32"),
    "top-k: 1-d logits": (lambda: topk_softmax(x(E), 2), ValueError, r"logits.*\(4,\).*2 dim"),
    # permute
    "permute: number of tokens": (lambda: permute(x(T + 1, D), plan()), ValueError, "x.*got 7.*6"),
    "permute: integers": (lambda: permute(x(T, D, dtype=torch.int32), plan()), TypeError, "x.*int32"),
    "permute: 1-d": (lambda: permute(x(T), plan()), ValueError, r"x.*\(6,\).*2 dim"),
    "permute: devices": (lambda: permute(x(T, D, device="meta"), plan()), ValueError, "plan.*cpu.*meta"),
    "unpermute: number of rows": (lambda: unpermute(x(T, D), plan()), ValueError, r"y.*\(6, 8\).*\(12, 8\)"),
    "unpermute: weights' shape": (
        lambda: unpermute(x(T * K, D), plan(), x(K, T)), ValueError, r"topk_weights.*\(2, 6\).*\(6, 2\)"),
    "unpermute: weights' dtype": (
        lambda: unpermute(x(T * K, D), plan(), x(T, K, dtype=FP16)), TypeError, "topk_weights.*float16.*float32"),
    "unpermute: weights' device": (
        lambda: unpermute(x(T * K, D), plan(), x(T, K, device="meta")), ValueError, "topk_weights.*meta.*cpu"),
    "unpermute: addend's shape": (
        lambda: unpermute(x(T * K, D), plan(), addend=x(T * K, D)), ValueError, r"addend.*\(12, 8\).*\(6, 8\)"),
    "unpermute: addend's dtype": (
        lambda: unpermute(x(T * K, D), plan(), addend=x(T, D, dtype=FP16)), TypeError, "addend.*float16.*float32"),
    "unpermute: addend's device": (
        lambda: unpermute(x(T * K, D), plan(), addend=x(T, D, device="meta")), ValueError, "addend.*meta.*cpu"),
    # grouped GEMM
    "gemm: widths differ": (
        lambda: grouped_gemm(x(T * K, D + 1), x(E, F, D), plan()), ValueError, r"x.*\(12, 9\).*\(12, 8\)"),
    "gemm: number of rows": (lambda: grouped_gemm(x(T, D), x(E, F, D), plan()), ValueError, r"x.*\(6, 8\).*\(12, 8\)"),
    "gemm: number of experts": (
        lambda: grouped_gemm(x(T * K, D), x(E + 1, F, D), plan()), ValueError, r"w.*\(5, 10, 8\).*\(4, 10, 8\)"),
    "gemm: 2-d weight": (lambda: grouped_gemm(x(T * K, D), x(F, D), plan()), ValueError, r"w.*\(10, 8\).*3 dim"),
    "gemm: dtypes": (
        lambda: grouped_gemm(x(T * K, D), x(E, F, D, dtype=FP16), plan()), TypeError, "w.*float16.*float32"),
    "gemm: devices": (
        lambda: grouped_gemm(x(T * K, D), x(E, F, D, device="meta"), plan()), ValueError, "w.*meta.*cpu"),
    "gemm: integers": (
        lambda: grouped_gemm(x(T * K, D, dtype=torch.int64), x(E, F, D), plan()), TypeError, "x.*int64"),
    # SwiGLU
    "swiglu: odd width": (lambda: swiglu(x(T, 7)), ValueError, "h.*got 7.*even"),
    "swiglu: integers": (lambda: swiglu(x(T, 8, dtype=torch.int32)), TypeError, "h.*int32"),
    "swiglu: 3-d": (lambda: swiglu(x(1, T, 8)), ValueError, r"h.*\(1, 6, 8\).*2 dim"),
    "linear swiglu: odd w13": (lambda: linear_swiglu(x(T, D), x(7, D)), ValueError, r"w13.*\(7, 8\).*even"),
    "linear swiglu: widths differ": (
        lambda: linear_swiglu(x(T, D + 1), x(2 * F, D)), ValueError, r"x.*\(6, 9\).*\(6, 8\)"),
    "linear swiglu: 3-d": (lambda: linear_swiglu(x(1, T, D), x(2 * F, D)), ValueError, r"x.*\(1, 6, 8\).*2 dim"),
    "linear swiglu: dtypes": (
        lambda: linear_swiglu(x(T, D), x(2 * F, D, dtype=FP16)), TypeError, "w13.*float16.*float32"),
    "linear swiglu: devices": (
        lambda: linear_swiglu(x(T, D), x(2 * F, D, device="meta")), ValueError, "w13.*meta.*cpu"),
    # expert FFN
    "ffn: width of x": (lambda: ffn(x=x(T, D + 1)), ValueError, r"x.*\(6, 9\).*\(6, 8\)"),
    "ffn: number of tokens": (lambda: ffn(x=x(T - 1, D)), ValueError, "x.*got 5.*6"),
    "ffn: integers": (lambda: ffn(x=x(T, D, dtype=torch.int32)), TypeError, "x.*int32"),
    "ffn: odd w13": (lambda: ffn(w13=x(E, 2 * F - 1, D)), ValueError, r"w13.*\(4, 19, 8\).*even"),
    "ffn: w2 transposed": (lambda: ffn(w2=x(E, F, D)), ValueError, r"w2.*\(4, 10, 8\).*\(4, 8, 10\)"),
    "ffn: number of experts": (
        lambda: ffn(w13=x(E + 1, 2 * F, D), w2=x(E + 1, D, F)), ValueError, r"w13.*\(5, 20, 8\).*\(4, 20, 8\)"),
    "ffn: experts of w2": (lambda: ffn(w2=x(E - 1, D, F)), ValueError, r"w2.*\(3, 8, 10\).*\(4, 8, 10\)"),
    "ffn: dtype of w2": (lambda: ffn(w2=x(E, D, F, dtype=BF16)), TypeError, "w2.*bfloat16.*float32"),
    "ffn: weights' shape": (lambda: ffn(topk_weights=x(T, K + 1)), ValueError, r"topk_weights.*\(6, 3\).*\(6, 2\)"),
    "ffn: weights' dtype": (
        lambda: ffn(topk_weights=x(T, K, dtype=FP64)), TypeError, "topk_weights.*float64.*float32"),
    "ffn: device of w13": (lambda: ffn(w13=x(E, 2 * F, D, device="meta")), ValueError, "w13.*meta.*cpu"),
    "ffn: addend's shape": (lambda: ffn(addend=x(T, D + 1)), ValueError, r"addend.*\(6, 9\).*\(6, 8\)"),
    "ffn: addend's dtype": (lambda: ffn(addend=x(T, D, dtype=BF16)), TypeError, "addend.*bfloat16.*float32"),
    "ffn: device of x": (lambda: ffn(x=x(T, D, device="meta")), ValueError, "meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name):
    call, exception, message = WRONG[name]
    with pytest.raises(exception, match=f"(?s){message}"):
        call()


def test_the_valid_call_of_the_table_is_valid():
    assert ffn().shape == (T, D)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["x", "w13", "w2", "topk_weights"])
def test_one_tensor_on_the_cpu_and_the_rest_on_the_gpu(name):
    args = {"x": x(T, D), "w13": x(E, 2 * F, D), "w2": x(E, D, F), "topk_weights": x(T, K)}
    moved = {key: tensor if key == name else tensor.cuda() for key, tensor in args.items()}
    with pytest.raises(ValueError, match="cpu.*cuda|cuda.*cpu"):
        expert_ffn(**moved, plan=plan(IDS.cuda()))


@pytest.mark.gpu
def test_ids_on_a_gpu_are_checked_on_request_only():
    ids = IDS.cuda() + 1
    with pytest.raises(ValueError, match="topk_ids.*1 to 4.*-1 to 3"):
        make_routing_plan(ids, E, validate=True)
    assert int(make_routing_plan(ids, E).expert_offsets[-1]) == int((ids < E).sum())


@pytest.mark.parametrize("backend", ["reference", *(["triton"] if INTERPRETED else [])])
def test_a_nan_router_poisons_its_token_alone(backend):
    """A token whose scores are NaN gets a NaN output; the others are what they would have been without it."""
    tokens, gate = torch.randn(T, D), torch.randn(E, D)
    w13, w2 = torch.randn(E, 2 * F, D), torch.randn(E, D, F)
    expected = _layer(tokens, gate, w13, w2, backend)
    tokens[2, 0] = torch.nan
    got = _layer(tokens, gate, w13, w2, backend)
    others = torch.arange(T) != 2
    assert got[2].isnan().all()
    torch.testing.assert_close(got[others], expected[others], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", *(["triton"] if INTERPRETED else [])])
def test_no_tokens(backend):
    """T = 0 is not an error: empty outputs, and gradients of zero for the weights."""
    leaves = [tensor.requires_grad_() for tensor in (x(0, D), x(E, D), torch.ones(E, 2 * F, D), torch.ones(E, D, F))]
    out = _layer(*leaves, backend)
    assert out.shape == (0, D)
    out.sum().backward()
    assert [tuple(leaf.grad.shape) for leaf in leaves] == [tuple(leaf.shape) for leaf in leaves]
    assert all((leaf.grad == 0).all() for leaf in leaves)


def _layer(tokens, gate, w13, w2, backend: str) -> torch.Tensor:
    weights, ids, _ = topk_softmax(router_logits(tokens, gate, backend=backend), K, backend=backend)
    routing = make_routing_plan(ids, E, backend=backend)
    return expert_ffn(tokens, w13, w2, weights, routing, backend=backend)
