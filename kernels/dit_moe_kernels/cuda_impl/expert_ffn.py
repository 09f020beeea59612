"""The fused expert FFN as a sequence of launches: dispatch, two products, combine; and backward, four products."""

from __future__ import annotations

from torch import Tensor

from .grouped_gemm import grouped_dswiglu, grouped_gemm, grouped_gemm_dx, grouped_swiglu
from .grouped_gemm_dw import grouped_gemm_dw
from .permute import permute, unpermute


def expert_ffn(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    offsets: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    save_h: bool,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward; returns y (T, D) and h (N, 2F), which has no rows unless save_h."""
    top_k = topk_weights.shape[1]
    # Rows are copied first: a gather inside the product was measured slower than the copy (2.40 against 2.32 ms on the
    # XL layer, T = 32768), because the copy engine cannot gather on Hopper.
    rows = permute(x, row_to_slot, slot_to_row, top_k)
    a, h = grouped_swiglu(rows, w13, offsets, keep_h=save_h)
    del rows  # its memory serves the next result
    y = grouped_gemm(a, w2, offsets)
    del a
    return unpermute(y, topk_weights, slot_to_row, top_k, addend), h


def swiglu_backward(
    grad: Tensor,
    h: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    offsets: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The rows of grad, dh, the weighted activation, and the gradients for topk_weights."""
    grad_rows = permute(grad, row_to_slot, slot_to_row, topk_weights.shape[1])
    dh, weighted_a, dots = grouped_dswiglu(grad_rows, w2, h, topk_weights, row_to_slot, offsets)
    return grad_rows, dh, weighted_a, unpermute(dots[:, None], None, slot_to_row, 1).view_as(topk_weights)


def expert_ffn_backward(
    grad: Tensor,
    h: Tensor,
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    offsets: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for the rows of x, for w13, w2 and topk_weights."""
    maps = row_to_slot, slot_to_row
    grad_rows, dh, weighted_a, dtopk_weights = swiglu_backward(grad, h, w2, topk_weights, offsets, *maps)
    dw2 = grouped_gemm_dw(grad_rows, weighted_a, offsets)
    del grad_rows, weighted_a
    dx_rows = grouped_gemm_dx(dh, w13, offsets)
    x_rows = permute(x, *maps, topk_weights.shape[1], beside=True)
    return dx_rows, grouped_gemm_dw(dh, x_rows, offsets), dw2, dtopk_weights
