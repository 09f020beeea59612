"""Launches of csrc/permute.cu and csrc/unpermute.cu; same meaning as the functions of these names in reference.py.

Matrices are fp32, fp16 or bf16; the rest is said in launch.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import launch


def permute(x_TD: Tensor, row_to_slot_N: Tensor, slot_to_row_N: Tensor, top_k: int, *, beside: bool = False) -> Tensor:
    """Copy each token to the rows of its routed slots: x_TD -> x_ND; rows without a slot are zero.

    beside: see launch.py.
    """
    num_tokens, width = x_TD.shape
    out_ND = x_TD.new_empty(row_to_slot_N.shape[0], width)
    launch("permute", (x_TD, row_to_slot_N, slot_to_row_N, out_ND), (num_tokens, width, top_k, int(beside)), x_TD)
    return out_ND


def unpermute(
    y_ND: Tensor, topk_weights_TK: Tensor | None, slot_to_row_N: Tensor, top_k: int, addend_TD: Tensor | None = None
) -> Tensor:
    """Sum each token's rows over its K slots, weighted if weights are given, and addend: y_ND -> y_TD."""
    num_tokens, width = slot_to_row_N.shape[0] // top_k, y_ND.shape[1]
    out_TD = y_ND.new_empty(num_tokens, width)
    tensors = (y_ND, topk_weights_TK, addend_TD, slot_to_row_N, out_TD)
    launch("unpermute", tensors, (num_tokens, width, top_k), y_ND)
    return out_TD


def unpermute_backward(
    dout_TD: Tensor, y_ND: Tensor, topk_weights_TK: Tensor, row_to_slot_N: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the weighted `unpermute`: dy[row] = w * dout[token], dw[slot] = <dout[token], y[row]>."""
    dy_ND = torch.empty_like(y_ND)
    dweights_TK = torch.zeros_like(topk_weights_TK)  # the kernel goes by rows, and unrouted slots have none
    launch(
        "unpermute_backward",
        (dout_TD, y_ND, topk_weights_TK, row_to_slot_N, dy_ND, dweights_TK),
        (*y_ND.shape, topk_weights_TK.shape[1]),
        y_ND,
    )
    return dy_ND, dweights_TK
