"""The fused expert FFN as a sequence of launches: two products and a combine forward, four products backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import configs
from . import common, grouped_gemm, grouped_gemm_dw, permute


def expert_ffn(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    offsets: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    tile_expert: Tensor,
    tile_row: Tensor,
    tile_rows: int,
    save_h: bool,
    addend: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Forward; returns y (T, D) and h (N, 2F), which has no rows unless save_h."""
    top_k, num_rows, width = topk_weights.shape[1], row_to_slot.shape[0], w2.shape[2]
    plan: dict[str, Any] = {
        "offsets": offsets,
        "tile_expert": tile_expert,
        "tile_row": tile_row,
        "tile_rows": tile_rows,
    }
    config = configs.gemm_config("swiglu", tile_rows, x.dtype, common.capability(common.device_index(x)))
    a = x.new_empty(num_rows, width)
    h = x.new_empty(num_rows if save_h else 0, 2 * width)
    grouped_gemm.launch(
        x if config.gather else permute.permute(x, row_to_slot, top_k),
        w13,
        a,
        width=width,
        epilogue="swiglu",
        w_is_kn=False,
        row_to_slot=row_to_slot,
        top_k=top_k,
        gather=config.gather,
        h=h if save_h else None,
        config=config,
        **plan,
    )
    y = grouped_gemm.grouped_gemm(a, w2, **plan)
    return permute.unpermute(y, topk_weights, slot_to_row, top_k, addend), h


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
    tile_expert: Tensor,
    tile_row: Tensor,
    tile_rows: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for the rows of x, for w13, w2 and topk_weights."""
    top_k, num_rows, width = topk_weights.shape[1], row_to_slot.shape[0], w2.shape[2]
    plan: dict[str, Any] = {
        "offsets": offsets,
        "tile_expert": tile_expert,
        "tile_row": tile_row,
        "tile_rows": tile_rows,
    }
    config = configs.gemm_config("dswiglu", tile_rows, x.dtype, common.capability(common.device_index(x)))
    # Rows are gathered by copies here: a gather inside the weight gradient's main loop was measured slower.
    grad_rows = permute.permute(grad, row_to_slot, top_k)
    dh = torch.empty_like(h)
    weighted_a = x.new_empty(num_rows, width)
    dots = x.new_empty(num_rows, common.cdiv(width, config.block_n), dtype=torch.float32)
    grouped_gemm.launch(
        grad_rows,
        w2,
        dh,
        width=width,
        epilogue="dswiglu",
        w_is_kn=True,
        row_to_slot=row_to_slot,
        top_k=top_k,
        h=h,
        aw=weighted_a,
        dots=dots,
        topk_weights=topk_weights,
        config=config,
        **plan,
    )
    dtopk_weights = permute.sum_row_partials(dots, slot_to_row).view_as(topk_weights)
    dw2 = grouped_gemm_dw.grouped_gemm_dw(grad_rows, weighted_a, offsets)
    del grad_rows, weighted_a
    dw13 = grouped_gemm_dw.grouped_gemm_dw(dh, permute.permute(x, row_to_slot, top_k), offsets)
    return grouped_gemm.grouped_gemm_dx(dh, w13, **plan), dw13, dw2, dtopk_weights
