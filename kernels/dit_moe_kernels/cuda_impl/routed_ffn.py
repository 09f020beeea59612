"""Launches of csrc/sm90/routed_ffn.cu: the routed layer's six kernels in one call, or, where memory counts, in two."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension
from .launch import aligned, launch
from .routing import operands

ONE_CALL_BYTES = 64 << 20  # of the activation: from here on, its memory matters more than a microsecond of the host's


def routed_ffn(
    x_TD: Tensor, gate_ED: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, addend_TD: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out_TD, probs_TE fp32, tokens_per_expert_E int32; x and weights are fp16 or bf16."""
    x_TD, gate_ED = operands(x_TD, gate_ED)
    (num_tokens, width), (num_experts, _, hidden) = x_TD.shape, w2_EDF.shape
    inputs = (x_TD, gate_ED, aligned(w13_E2FD), aligned(w2_EDF))
    probs_TE = x_TD.new_empty(num_tokens, num_experts, dtype=torch.float32)
    counts_E = x_TD.new_empty(num_experts, dtype=torch.int32)
    sizes, dtypes = (num_tokens, width, hidden, num_experts, top_k), (x_TD.dtype, gate_ED.dtype)
    if num_tokens * top_k * hidden * x_TD.element_size() < ONE_CALL_BYTES:
        out_TD = torch.empty_like(x_TD)
        workspace = _workspace(x_TD, sizes)
        launch("routed_ffn", (*inputs, addend_TD, out_TD, probs_TE, counts_E, workspace), sizes, x_TD, dtypes)
        return out_TD, probs_TE, counts_E
    workspace = _workspace(x_TD, (num_tokens, width, 0, num_experts, top_k))
    activation_NF = x_TD.new_empty(num_tokens * top_k, hidden)
    launch("routed_ffn_products", (*inputs, probs_TE, counts_E, activation_NF, workspace), sizes, x_TD, dtypes)
    del activation_NF  # what takes its place runs on the same stream, hence after the products
    out_TD = torch.empty_like(x_TD)
    launch("routed_ffn_combine", (addend_TD, out_TD, workspace), (num_tokens, width, num_experts, top_k), x_TD)
    return out_TD, probs_TE, counts_E


def _workspace(x_TD: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return x_TD.new_empty(extension().routed_ffn_workspace(*sizes), dtype=torch.uint8)
