"""The routed layer's kernels: in one call (csrc/sm90/routed_ffn.cu), all but its combine, and its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension
from .expert_ffn import swiglu_backward
from .grouped_gemm import grouped_gemm_dx
from .grouped_gemm_dw import grouped_gemm_dw
from .launch import aligned, launch
from .permute import permute, unpermute
from .routing import operands, router_gradients, topk_softmax_backward

ONE_CALL_BYTES = 64 << 20  # of the activation: from here on, its memory matters more than a microsecond of the host's


def routed_ffn(
    x_TD: Tensor, gate_ED: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, addend_TD: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out_TD, probs_TE fp32, tokens_per_expert_E int32; x and weights are fp16 or bf16."""
    (num_tokens, width), (num_experts, _, hidden) = x_TD.shape, w2_EDF.shape
    if num_tokens * top_k * hidden * x_TD.element_size() >= ONE_CALL_BYTES:
        rows_ND, weights_TK, slot_to_row_N, probs_TE, counts_E = routed_rows(x_TD, gate_ED, w13_E2FD, w2_EDF, top_k)
        return unpermute(rows_ND, weights_TK, slot_to_row_N, top_k, addend_TD), probs_TE, counts_E
    x_TD, gate_ED = operands(x_TD, gate_ED)
    probs_TE, counts_E = _statistics(x_TD, num_experts)
    sizes = (num_tokens, width, hidden, num_experts, top_k)
    out_TD = torch.empty_like(x_TD)
    inputs = (x_TD, gate_ED, aligned(w13_E2FD), aligned(w2_EDF), addend_TD)
    outputs = (out_TD, probs_TE, counts_E, _workspace(x_TD, sizes))
    launch("routed_ffn", (*inputs, *outputs), sizes, x_TD, (x_TD.dtype, gate_ED.dtype))
    return out_TD, probs_TE, counts_E


def routed_rows(
    x_TD: Tensor, gate_ED: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, top_k: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All but the combine -> rows_ND, topk_weights_TK fp32, slot_to_row_N int32, probs_TE, tokens_per_expert_E.

    The activation's memory is free again when this returns: what takes its place runs on the same stream, hence after.
    """
    x_TD, gate_ED = operands(x_TD, gate_ED)
    (num_tokens, width), (num_experts, _, hidden) = x_TD.shape, w2_EDF.shape
    probs_TE, counts_E = _statistics(x_TD, num_experts)
    rows_ND = x_TD.new_empty(num_tokens * top_k, width)
    weights_TK = x_TD.new_empty(num_tokens, top_k, dtype=torch.float32)
    slot_to_row_N = x_TD.new_empty(num_tokens * top_k, dtype=torch.int32)
    activation_NF = x_TD.new_empty(num_tokens * top_k, hidden)
    workspace = _workspace(x_TD, (num_tokens, 0, 0, num_experts, top_k))
    inputs = (x_TD, gate_ED, aligned(w13_E2FD), aligned(w2_EDF))
    outputs = (probs_TE, counts_E, rows_ND, weights_TK, slot_to_row_N, activation_NF, workspace)
    sizes = (num_tokens, width, hidden, num_experts, top_k)
    launch("routed_ffn_products", (*inputs, *outputs), sizes, x_TD, (x_TD.dtype, gate_ED.dtype))
    return rows_ND, weights_TK, slot_to_row_N, probs_TE, counts_E


def routed_ffn_backward(
    grad_TD: Tensor,
    dprobs_TE: Tensor | None,
    h_N2F: Tensor,
    x_TD: Tensor,
    gate_ED: Tensor,
    w13_E2FD: Tensor,
    w2_EDF: Tensor,
    topk_weights_TK: Tensor,
    topk_ids_TK: Tensor,
    probs_TE: Tensor,
    offsets: Tensor,
    row_to_slot_N: Tensor,
    slot_to_row_N: Tensor,
    wants_dx: bool,
    wants_dgate: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """Gradients for x_TD and gate_ED, where they are wanted, w13_E2FD and w2_EDF; h_N2F is what the forward kept.

    What is bound by memory runs beside the products, each of which ends in a round of tiles for a part of the GPU.
    """
    gate_dtype = gate_ED.dtype
    x_TD, gate_ED = operands(x_TD, gate_ED)
    maps = row_to_slot_N, slot_to_row_N
    grad_ND, dh_N2F, weighted_a_NF, dweights_TK = swiglu_backward(
        grad_TD, h_N2F, w2_EDF, topk_weights_TK, offsets, *maps
    )
    routing = topk_softmax_backward(dweights_TK, dprobs_TE, topk_ids_TK, probs_TE), x_TD, gate_ED
    dw2_EDF = grouped_gemm_dw(grad_ND, weighted_a_NF, offsets)
    dgate_ED = router_gradients(*routing, None, None, False, wants_dgate, beside=True)[1]
    del grad_ND, weighted_a_NF
    dx_ND = grouped_gemm_dx(dh_N2F, w13_E2FD, offsets)
    x_ND = permute(x_TD, *maps, topk_weights_TK.shape[1], beside=True)
    dw13_E2FD = grouped_gemm_dw(dh_N2F, x_ND, offsets)
    dx_TD = router_gradients(*routing, dx_ND, slot_to_row_N, wants_dx, False, beside=True)[0]
    return dx_TD, None if dgate_ED is None else dgate_ED.to(gate_dtype), dw13_E2FD, dw2_EDF


def _statistics(x_TD: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Room for probs_TE and tokens_per_expert_E."""
    probs_TE = x_TD.new_empty(x_TD.shape[0], num_experts, dtype=torch.float32)
    return probs_TE, x_TD.new_empty(num_experts, dtype=torch.int32)


def _workspace(x_TD: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return x_TD.new_empty(extension().routed_ffn_workspace(*sizes), dtype=torch.uint8)
