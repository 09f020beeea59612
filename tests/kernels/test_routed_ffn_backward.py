"""The routed layer's backward on Hopper, where kernels run beside the products in front of them."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from dit_moe_kernels import route
from dit_moe_kernels.cuda_impl import (
    expert_ffn,
    grouped_gemm,
    grouped_gemm_dw,
    permute,
    routed_ffn,
    routing,
)

from tests.kernels.util import BF16, FP16, FP32, gpu_targets, randn

# Tokens, experts, choices, widths: the last tiles of the products leave much of the GPU idle, or little, or there are
# fewer tiles than multiprocessors; the last has a gate of another dtype.
SIZES = [(8192, 8, 2, 1152, 1536), (3001, 4, 2, 384, 1536), (200, 16, 3, 1408, 704), (1, 2, 1, 64, 64)]


def backward_inputs(target, size: tuple[int, ...], gate_dtype: torch.dtype) -> list[torch.Tensor]:
    """What `routed_ffn_backward` takes, but for its two switches."""
    tokens, experts, top_k, width, hidden = size
    x, gate = randn(tokens, width, target=target), randn(experts, width, target=target).to(gate_dtype)
    w13 = randn(experts, 2 * hidden, width, target=target, scale=width**-0.5)
    w2 = randn(experts, width, hidden, target=target, scale=hidden**-0.5)
    routed = route(x, gate, top_k, backend="cuda")
    dprobs = torch.rand_like(routed.probs)
    h = randn(tokens * top_k, 2 * hidden, target=target)
    chosen = routed.topk_weights, routed.topk_ids, routed.probs
    return [randn(tokens, width, target=target), dprobs, h, x, gate, w13, w2, *chosen, *routed.plan[1:4]]


def one_after_the_other(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """The same gradients, each kernel when the one before it is done."""
    grad, dprobs, h, x, gate, w13, w2, weights, ids, probs, offsets, *maps = inputs

    def done(result):
        torch.cuda.synchronize()
        return result

    top_k = weights.shape[1]
    grad_rows, dh, weighted_a, dweights = done(expert_ffn.swiglu_backward(grad, h, w2, weights, offsets, *maps))
    dlogits = done(routing.topk_softmax_backward(dweights, dprobs, ids, probs))
    dw2 = done(grouped_gemm_dw.grouped_gemm_dw(grad_rows, weighted_a, offsets))
    dw13 = done(grouped_gemm_dw.grouped_gemm_dw(dh, done(permute.permute(x, *maps, top_k)), offsets))
    dx_rows = done(grouped_gemm.grouped_gemm_dx(dh, w13, offsets))
    dx, dgate = done(routing.router_gradients(dlogits, x, gate, dx_rows, maps[1], True, True))
    return dx, dgate, dw13, dw2


@pytest.mark.parametrize("gate_dtype", [None, FP32], ids=["gate", "fp32 gate"])
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("target", gpu_targets("cuda", dtypes=[BF16, FP16]))
@pytest.mark.usefixtures("cuda_targets_on_hopper")
def test_kernels_beside_products_change_no_bit(target, size, gate_dtype):
    """Again and again, since a kernel that starts too early or writes where another still reads need not show."""
    inputs = backward_inputs(target, size, gate_dtype or target.dtype)
    expected = one_after_the_other(inputs)
    for _ in range(20):
        got = routed_ffn.routed_ffn_backward(*inputs, True, True)
        assert all(torch.equal(*pair) for pair in zip(got, expected, strict=True))
    only_x = routed_ffn.routed_ffn_backward(*inputs, True, False)
    assert only_x[1] is None and torch.equal(only_x[0], expected[0])
    only_gate = routed_ffn.routed_ffn_backward(*inputs, False, True)
    assert only_gate[0] is None and torch.equal(only_gate[1], expected[1])


def test_what_a_product_reads_is_kept_while_others_run_beside_it(monkeypatch):
    """What is launched behind what, by stand-ins for the compiled module; its memory would be given to the others."""
    read: list[weakref.ref] = []
    order = []

    def launch(op, tensors, sizes, *_):
        beside = op in {"permute", "router_gradients"} and sizes[-1] == 1
        order.append(op + (" beside" if beside else ""))
        if beside:
            assert order[-2] in {"grouped_gemm_dx", "grouped_gemm_dw"}
            assert all(tensor() is not None for tensor in read)
        else:
            read[:] = [weakref.ref(tensor) for tensor in tensors if tensor is not None]

    compiled = SimpleNamespace(DSWIGLU_COLUMNS=192, ROUTER_PARTS=4)
    for module in (grouped_gemm, grouped_gemm_dw, permute, routing):
        monkeypatch.setattr(module, "launch", launch)
    for module in (grouped_gemm, routing):
        monkeypatch.setattr(module, "extension", lambda: compiled)

    def zeros(*size: int, dtype: torch.dtype = BF16) -> torch.Tensor:
        return torch.zeros(size, dtype=dtype)

    maps = zeros(5, dtype=torch.int32), zeros(12, dtype=torch.int32), zeros(12, dtype=torch.int32)
    layer = zeros(12, 48), zeros(6, 16), zeros(4, 16, dtype=FP32), zeros(4, 48, 16), zeros(4, 16, 24)
    chosen = zeros(6, 2, dtype=FP32), zeros(6, 2, dtype=torch.int32), zeros(6, 4, dtype=FP32)
    dx, dgate, dw13, dw2 = routed_ffn.routed_ffn_backward(zeros(6, 16), None, *layer, *chosen, *maps, True, True)
    assert dx.shape == (6, 16) and dgate.shape == (4, 16) and dgate.dtype == FP32
    assert dw13.shape == (4, 48, 16) and dw2.shape == (4, 16, 24)
    assert order == [
        "permute", "grouped_dswiglu", "unpermute", "topk_softmax_backward",
        "grouped_gemm_dw", "router_gradients beside",
        "grouped_gemm_dx", "permute beside",
        "grouped_gemm_dw", "router_gradients beside",
    ]  # fmt: skip
