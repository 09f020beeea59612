"""Epilogues of the grouped GEMM: what becomes of an fp32 accumulator tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _split_columns(tile):
    """Left and right half of a tile's columns."""
    return tile.reshape(tile.shape[0], 2, tile.shape[1] // 2).permute(0, 2, 1).split()


@triton.jit
def _sigmoid(x, dtype: tl.constexpr):
    """1 / (1 + exp(-x)), as exact as results of `dtype` need it.

    For 16 bits as the square of a reciprocal root, which is one instruction where a division takes eight; off by a few
    units of fp32's last place.
    """
    if dtype == tl.float32:
        share = tl.sigmoid(x)
    else:
        root = tl.rsqrt(1.0 + tl.exp2(x * -1.4426950408889634))
        share = root * root
    return share


@triton.jit
def _store_plain(
    acc,  # (BLOCK_M, BLOCK_N) fp32
    out_ptr,  # (rows, N)
    rows,
    col,
    N,
    row_mask,
):
    """out = acc."""
    cols = col + tl.arange(0, acc.shape[1])
    mask = row_mask[:, None] & (cols < N)[None, :]
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_swiglu(
    acc,  # (BLOCK_M, 2 * width) fp32: gate columns, then up columns
    out_ptr,  # (rows, F)
    h_ptr,  # (rows, 2F) or None
    rows,
    col,
    F,
    row_mask,
    SAVE_H: tl.constexpr,
):
    """out = silu(gate) * up; h = [gate | up] if a backward will come.

    The activation is computed from the rounded pre-activations: a backward that reads h recomputes the same value.
    """
    cols = col + tl.arange(0, acc.shape[1] // 2)
    mask = row_mask[:, None] & (cols < F)[None, :]
    row_start = rows.to(tl.int64)[:, None]
    dtype = out_ptr.dtype.element_ty
    gate, up = _split_columns(acc.to(dtype))
    if SAVE_H:
        h_ptrs = h_ptr + row_start * (2 * F) + cols[None, :]
        tl.store(h_ptrs, gate, mask=mask)
        tl.store(h_ptrs + F, up, mask=mask)
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    activation = gate * _sigmoid(gate, dtype) * up
    tl.store(out_ptr + row_start * F + cols[None, :], activation.to(dtype), mask=mask)


@triton.jit
def _store_dswiglu(
    g,  # (BLOCK_M, BLOCK_N) fp32: w2^T dout, without the router weight
    weights,  # (BLOCK_M,) fp32 router weight of each row
    h_ptr,  # (rows, 2F), read
    dh_ptr,  # (rows, 2F)
    aw_ptr,  # (rows, F)
    rows,
    col,
    F,
    row_mask,
):
    """dh = dswiglu(h, w * g), aw = w * swiglu(h); returns this tile's part of the router weight's gradient <g, a>.

    Columns are halved until a slice of 32 is left: whole tiles of g, gate, up and the results do not fit in registers.
    """
    width: tl.constexpr = g.shape[1]
    if width > 32:
        left, right = _split_columns(g)
        dots = _store_dswiglu(left, weights, h_ptr, dh_ptr, aw_ptr, rows, col, F, row_mask)
        dots += _store_dswiglu(right, weights, h_ptr, dh_ptr, aw_ptr, rows, col + width // 2, F, row_mask)
    else:
        dtype = dh_ptr.dtype.element_ty
        cols = col + tl.arange(0, width)
        mask = row_mask[:, None] & (cols < F)[None, :]
        h_places = rows.to(tl.int64)[:, None] * (2 * F) + cols[None, :]
        gate = tl.load(h_ptr + h_places, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(h_ptr + h_places + F, mask=mask, other=0.0).to(tl.float32)
        share = _sigmoid(gate, dtype)
        up_share = up * share
        a = gate * up_share
        dots = tl.sum(g * a, axis=1)
        aw_places = rows.to(tl.int64)[:, None] * F + cols[None, :]
        tl.store(aw_ptr + aw_places, (a * weights[:, None]).to(dtype), mask=mask)
        da = g * weights[:, None]
        # d silu(gate) * up = s (1 + gate (1 - s)) up = s up + a (1 - s)
        tl.store(dh_ptr + h_places, (da * (up_share + a * (1.0 - share))).to(dtype), mask=mask)
        tl.store(dh_ptr + h_places + F, (da * (gate * share)).to(dtype), mask=mask)
    return dots
