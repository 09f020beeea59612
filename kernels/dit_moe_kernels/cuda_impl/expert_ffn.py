"""The fused expert FFN as a sequence of launches: dispatch, two products, combine; and the gradient for its tokens."""

from __future__ import annotations

from torch import Tensor

from .grouped_gemm import grouped_gemm, grouped_gemm_dx, grouped_swiglu
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
    return unpermute(y, topk_weights, slot_to_row, top_k), h


def expert_ffn_dx(dh: Tensor, w13: Tensor, top_k: int, offsets: Tensor, slot_to_row: Tensor) -> Tensor:
    """Gradient for x, from that for h."""
    return unpermute(grouped_gemm_dx(dh, w13, offsets), None, slot_to_row, top_k)
