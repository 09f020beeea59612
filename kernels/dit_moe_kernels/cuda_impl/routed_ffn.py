"""Launch of csrc/sm90/routed_ffn.cu: the routed layer's six kernels in one call, in one piece of memory."""

from __future__ import annotations

import torch
from torch import Tensor

from . import extension
from .launch import aligned, launch
from .routing import operands


def routed_ffn(
    x_TD: Tensor, gate_ED: Tensor, w13_E2FD: Tensor, w2_EDF: Tensor, addend_TD: Tensor | None, top_k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out_TD, probs_TE fp32, tokens_per_expert_E int32; x and weights are fp16 or bf16."""
    x_TD, gate_ED = operands(x_TD, gate_ED)
    (num_tokens, width), (num_experts, _, hidden) = x_TD.shape, w2_EDF.shape
    sizes = (num_tokens, width, hidden, num_experts, top_k)
    out_TD = torch.empty_like(x_TD)
    probs_TE = x_TD.new_empty(num_tokens, num_experts, dtype=torch.float32)
    counts_E = x_TD.new_empty(num_experts, dtype=torch.int32)
    workspace = x_TD.new_empty(extension().routed_ffn_workspace(*sizes), dtype=torch.uint8)
    inputs = (x_TD, gate_ED, aligned(w13_E2FD), aligned(w2_EDF), addend_TD)
    tensors = (*inputs, out_TD, probs_TE, counts_E, workspace)
    launch("routed_ffn", tensors, sizes, x_TD, (x_TD.dtype, gate_ED.dtype))
    return out_TD, probs_TE, counts_E
