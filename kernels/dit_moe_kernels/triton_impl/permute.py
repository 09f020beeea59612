"""permute and unpermute: row gathers bound by memory bandwidth, sums over K in fp32 in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common

# Tile of the copies: 16-byte accesses along a row, and no idle lanes for widths that are multiples of 128.
_BLOCK_R, _BLOCK_C = 16, 128
_BLOCK_D = 1024  # columns that the reduction over a row takes at a time


@triton.jit(do_not_specialize=["num_rows"])
def _permute_kernel(
    x_ptr,  # (T, D) io dtype
    out_ptr,  # (N, D) io dtype
    row_to_slot_ptr,  # (N,) int32, -1 for an unused row
    num_rows,
    D,
    TOP_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    slots = tl.load(row_to_slot_ptr + rows, mask=rows < num_rows, other=-1)
    tokens = (slots // TOP_K).to(tl.int64)
    in_width = (cols < D)[None, :]
    x = tl.load(x_ptr + tokens[:, None] * D + cols[None, :], mask=(slots >= 0)[:, None] & in_width, other=0.0)
    tl.store(out_ptr + rows[:, None] * D + cols[None, :], x, mask=(rows < num_rows)[:, None] & in_width)


@triton.jit
def _sum_rows(
    y_ptr,  # (N, D) io dtype
    topk_weights_ptr,  # (T, K) fp32, if WEIGHTED
    slot_to_row_ptr,  # (N,) int32, -1 for an unrouted slot
    tokens,
    in_range,
    cols,
    in_width,
    D,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """(tokens, cols) fp32: the sum of each token's rows, in the order of k."""
    total = tl.zeros((tokens.shape[0], cols.shape[0]), dtype=tl.float32)
    for k in tl.static_range(TOP_K):
        slots = tokens * TOP_K + k
        rows = tl.load(slot_to_row_ptr + slots, mask=in_range, other=-1).to(tl.int64)
        routed = (rows >= 0)[:, None]
        mask = routed & in_width[None, :]
        y = tl.load(y_ptr + rows[:, None] * D + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            # select, since an unrouted slot's weight may be anything, NaN included
            weights = tl.load(topk_weights_ptr + slots, mask=in_range, other=0.0)
            y = tl.where(routed, y * weights[:, None], 0.0)
        total += y
    return total


@triton.jit(do_not_specialize=["num_tokens"])
def _unpermute_kernel(
    y_ptr,  # (N, D) io dtype
    topk_weights_ptr,  # (T, K) fp32, or None
    addend_ptr,  # (T, D) io dtype, or None
    out_ptr,  # (T, D) io dtype
    slot_to_row_ptr,  # (N,) int32, -1 for an unrouted slot
    num_tokens,
    D,
    TOP_K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    HAS_ADDEND: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    in_range = tokens < num_tokens
    in_width = cols < D
    total = _sum_rows(y_ptr, topk_weights_ptr, slot_to_row_ptr, tokens, in_range, cols, in_width, D, TOP_K, WEIGHTED)
    places = tokens[:, None] * D + cols[None, :]
    mask = in_range[:, None] & in_width[None, :]
    if HAS_ADDEND:
        total += tl.load(addend_ptr + places, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _unpermute_backward_kernel(
    grad_ptr,  # (T, D) io dtype
    y_ptr,  # (N, D) io dtype
    topk_weights_ptr,  # (T, K) fp32
    dy_ptr,  # (N, D) io dtype
    dweights_ptr,  # (T, K) fp32, zero beforehand
    row_to_slot_ptr,  # (N,) int32
    D,
    TOP_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(row_to_slot_ptr + row)
    used = slot >= 0
    weight = tl.load(topk_weights_ptr + slot, mask=used, other=0.0)
    token = (slot // TOP_K).to(tl.int64)
    dot = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        cols = start + tl.arange(0, BLOCK_D)
        mask = (cols < D) & used
        grad = tl.load(grad_ptr + token * D + cols, mask=mask, other=0.0).to(tl.float32)
        dot += grad * tl.load(y_ptr + row * D + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(dy_ptr + row * D + cols, (grad * weight).to(dy_ptr.dtype.element_ty), mask=cols < D)
    tl.store(dweights_ptr + slot, tl.sum(dot), mask=used)


@triton.jit(do_not_specialize=["num_slots"])
def _sum_row_partials_kernel(
    partials_ptr,  # (N, P) fp32
    out_ptr,  # (N,) fp32, by slot
    slot_to_row_ptr,  # (N,) int32
    num_slots,
    P,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    slots = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    parts = tl.arange(0, BLOCK_P)
    rows = tl.load(slot_to_row_ptr + slots, mask=slots < num_slots, other=-1).to(tl.int64)
    mask = (rows >= 0)[:, None] & (parts < P)[None, :]
    values = tl.load(partials_ptr + rows[:, None] * P + parts[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + slots, tl.sum(values, axis=1), mask=slots < num_slots)


def permute(x: Tensor, row_to_slot: Tensor, top_k: int) -> Tensor:
    """x (T, D) -> (N, D); rows without a slot are zero."""
    num_rows, width = row_to_slot.shape[0], x.shape[1]
    out = x.new_empty(num_rows, width)
    if out.numel():
        grid = (common.cdiv(num_rows, _BLOCK_R), common.cdiv(width, _BLOCK_C))
        _permute_kernel[grid](x, out, row_to_slot, num_rows, width, TOP_K=top_k, BLOCK_R=_BLOCK_R, BLOCK_C=_BLOCK_C)
    return out


def unpermute(
    y: Tensor, topk_weights: Tensor | None, slot_to_row: Tensor, top_k: int, addend: Tensor | None = None
) -> Tensor:
    """y (N, D) -> (T, D): each token's K rows, by topk_weights (T, K) fp32 if given, and addend (T, D) are summed."""
    num_tokens, width = slot_to_row.shape[0] // top_k, y.shape[1]
    out = y.new_empty(num_tokens, width)
    if out.numel():
        grid = (common.cdiv(num_tokens, _BLOCK_R), common.cdiv(width, _BLOCK_C))
        _unpermute_kernel[grid](
            y,
            topk_weights,
            addend,
            out,
            slot_to_row,
            num_tokens,
            width,
            TOP_K=top_k,
            WEIGHTED=topk_weights is not None,
            HAS_ADDEND=addend is not None,
            BLOCK_R=_BLOCK_R,
            BLOCK_C=_BLOCK_C,
        )
    return out


def unpermute_backward(grad: Tensor, y: Tensor, topk_weights: Tensor, row_to_slot: Tensor) -> tuple[Tensor, Tensor]:
    """grad (T, D), y (N, D), topk_weights (T, K) -> dy (N, D), dweights (T, K) fp32."""
    dy = torch.empty_like(y)
    dweights = torch.zeros_like(topk_weights)
    if row_to_slot.shape[0]:
        _unpermute_backward_kernel[(row_to_slot.shape[0],)](
            grad,
            y,
            topk_weights,
            dy,
            dweights,
            row_to_slot,
            y.shape[1],
            TOP_K=topk_weights.shape[1],
            BLOCK_D=_BLOCK_D,
        )
    return dy, dweights


def sum_row_partials(partials: Tensor, slot_to_row: Tensor) -> Tensor:
    """Sum partials (N, P) over P and return them by slot, (N,) fp32; zero for unrouted slots."""
    num_slots, width = partials.shape
    out = partials.new_empty(num_slots)
    if num_slots:
        block = 32
        _sum_row_partials_kernel[(common.cdiv(num_slots, block),)](
            partials, out, slot_to_row, num_slots, width, BLOCK_N=block, BLOCK_P=common.next_power_of_2(max(width, 1))
        )
    return out
