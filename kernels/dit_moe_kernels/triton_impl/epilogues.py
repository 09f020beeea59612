"""Epilogues of the grouped GEMM: what becomes of an fp32 accumulator tile."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _store_plain(
    acc,  # (BLOCK_M, BLOCK_N) fp32
    out_ptr,  # (rows, N)
    rows,
    cols,
    N,
    mask,
):
    """out = acc."""
    tl.store(out_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_swiglu(
    gate,  # (BLOCK_M, BLOCK_N) fp32
    up,  # (BLOCK_M, BLOCK_N) fp32
    out_ptr,  # (rows, F)
    h_ptr,  # (rows, 2F) or None
    rows,
    cols,
    F,
    mask,
    SAVE_H: tl.constexpr,
):
    """out = silu(gate) * up; h = [gate | up] if a backward will come.

    The activation is computed from the rounded pre-activations: a backward that reads h recomputes the same value.
    """
    dtype = out_ptr.dtype.element_ty
    gate, up = gate.to(dtype), up.to(dtype)
    row_start = rows.to(tl.int64)[:, None]
    if SAVE_H:
        h_ptrs = h_ptr + row_start * (2 * F) + cols[None, :]
        tl.store(h_ptrs, gate, mask=mask)
        tl.store(h_ptrs + F, up, mask=mask)
    gate, up = gate.to(tl.float32), up.to(tl.float32)
    activation = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row_start * F + cols[None, :], activation.to(dtype), mask=mask)


@triton.jit
def _store_dswiglu(
    g,  # (BLOCK_M, BLOCK_N) fp32: w2^T dout, without the router weight
    weights,  # (BLOCK_M,) fp32 router weight of each row
    h_ptr,  # (rows, 2F), read
    dh_ptr,  # (rows, 2F)
    aw_ptr,  # (rows, F)
    dots_ptrs,  # (BLOCK_M,) pointers to fp32
    rows,
    cols,
    F,
    mask,
    row_mask,
):
    """dh = dswiglu(h, w * g), aw = w * swiglu(h), and this tile's part of the router weight's gradient <g, a>."""
    dtype = dh_ptr.dtype.element_ty
    row_start = rows.to(tl.int64)[:, None]
    h_ptrs = h_ptr + row_start * (2 * F) + cols[None, :]
    gate = tl.load(h_ptrs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptrs + F, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    a = silu * up
    tl.store(dots_ptrs, tl.sum(g * a, axis=1), mask=row_mask)
    tl.store(aw_ptr + row_start * F + cols[None, :], (a * weights[:, None]).to(dtype), mask=mask)
    da = g * weights[:, None]
    dh_ptrs = dh_ptr + row_start * (2 * F) + cols[None, :]
    tl.store(dh_ptrs, (da * up * s * (1.0 + gate - silu)).to(dtype), mask=mask)
    tl.store(dh_ptrs + F, (da * silu).to(dtype), mask=mask)
