"""LayerNorm with adaLN modulation, alone or behind a gated residual, and their gradients.

Bound by memory: a row stays in one warp's registers between its statistics and its output, in chunks of a power of two
columns, so that a width such as 1152 leaves few lanes idle. Sums down an image's tokens have a kernel of their own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common

_WARPS = 4
_LANE_COLUMNS = 256  # columns that a warp covers by 16-byte accesses of 16-bit numbers
_BLOCK_N, _BLOCK_C = 32, 64  # tile of the sums down an image's tokens


@triton.jit
def _statistics(
    xs,  # CHUNKS tiles (BLOCK_R, BLOCK_C) of rows of D columns, zero beyond
    eps,
    D: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Mean and 1 / standard deviation of each row, as columns."""
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for c in tl.static_range(CHUNKS):
        total += xs[c].to(tl.float32)
    mean = (tl.sum(total, axis=1) / D)[:, None]
    squares = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for c in tl.static_range(CHUNKS):
        in_width = (c * BLOCK_C + tl.arange(0, BLOCK_C) < D)[None, :]
        centred = tl.where(in_width, xs[c].to(tl.float32) - mean, 0.0)
        squares += centred * centred
    return mean, tl.rsqrt(tl.sum(squares, axis=1) / D + eps)[:, None]


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _norm_modulate_kernel(
    x_ptr,  # (B, N, D) float
    y_ptr,  # (B, N, D) float, or None without a residual
    gate_ptr,  # (B, D) float, rows gate_stride apart, or None
    shift_ptr,  # (B, D) float, rows shift_stride apart
    scale_ptr,  # (B, D) float, rows scale_stride apart
    sum_ptr,  # (B, N, D) float, x + gate * y, or None
    out_ptr,  # (B, N, D) float
    num_tokens,  # N
    num_rows,  # B * N
    gate_stride,
    shift_stride,
    scale_stride,
    eps,
    D: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_range = (rows < num_rows)[:, None]
    image = rows // num_tokens  # of each row, so that a warp loads its vectors exactly as it loads its row
    cols = tl.arange(0, BLOCK_C)[None, :]
    row_starts = rows[:, None] * D

    # All of x and y before the first store, which the compiler could not move a load across.
    xs = tl.tuple(())
    ys = tl.tuple(())
    for c in tl.static_range(CHUNKS):
        mask = in_range & (c * BLOCK_C + cols < D)
        xs = xs + (tl.load(x_ptr + row_starts + c * BLOCK_C + cols, mask=mask, other=0.0),)
        if RESIDUAL:
            ys = ys + (tl.load(y_ptr + row_starts + c * BLOCK_C + cols, mask=mask, other=0.0),)
    if RESIDUAL:
        gate_starts = (image * gate_stride)[:, None]
        sums = tl.tuple(())
        for c in tl.static_range(CHUNKS):
            mask = in_range & (c * BLOCK_C + cols < D)
            gate = tl.load(gate_ptr + gate_starts + c * BLOCK_C + cols, mask=mask, other=0.0).to(tl.float32)
            x = (xs[c].to(tl.float32) + gate * ys[c].to(tl.float32)).to(sum_ptr.dtype.element_ty)
            tl.store(sum_ptr + row_starts + c * BLOCK_C + cols, x, mask=mask)
            sums = sums + (x,)
        xs = sums

    mean, rstd = _statistics(xs, eps, D, CHUNKS, BLOCK_R, BLOCK_C)
    shift_starts, scale_starts = (image * shift_stride)[:, None], (image * scale_stride)[:, None]
    for c in tl.static_range(CHUNKS):
        mask = in_range & (c * BLOCK_C + cols < D)
        scale = tl.load(scale_ptr + scale_starts + c * BLOCK_C + cols, mask=mask, other=0.0).to(tl.float32)
        shift = tl.load(shift_ptr + shift_starts + c * BLOCK_C + cols, mask=mask, other=0.0).to(tl.float32)
        out = (xs[c].to(tl.float32) - mean) * rstd * (1.0 + scale) + shift
        tl.store(out_ptr + row_starts + c * BLOCK_C + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _norm_modulate_backward_kernel(
    dout_ptr,  # (B, N, D) float
    dsum_ptr,  # (B, N, D) float, the residual stream's own gradient, or None
    x_ptr,  # (B, N, D) float, what was normalised
    scale_ptr,  # (B, D) float, rows scale_stride apart
    gate_ptr,  # (B, D) float, rows gate_stride apart, or None
    dx_ptr,  # (B, N, D) float
    dy_ptr,  # (B, N, D) float, or None
    stats_ptr,  # (2, B * N) fp32, mean and 1 / standard deviation, for the sums
    num_tokens,  # N
    num_rows,  # B * N
    scale_stride,
    gate_stride,
    eps,
    D: tl.constexpr,
    RESIDUAL: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    in_range = (rows < num_rows)[:, None]
    image = rows // num_tokens
    cols = tl.arange(0, BLOCK_C)[None, :]
    row_starts = rows[:, None] * D

    xs = tl.tuple(())
    douts = tl.tuple(())
    for c in tl.static_range(CHUNKS):
        mask = in_range & (c * BLOCK_C + cols < D)
        xs = xs + (tl.load(x_ptr + row_starts + c * BLOCK_C + cols, mask=mask, other=0.0),)
        douts = douts + (tl.load(dout_ptr + row_starts + c * BLOCK_C + cols, mask=mask, other=0.0),)
    mean, rstd = _statistics(xs, eps, D, CHUNKS, BLOCK_R, BLOCK_C)
    tl.store(stats_ptr + rows[:, None], mean, mask=in_range)
    tl.store(stats_ptr + num_rows + rows[:, None], rstd, mask=in_range)

    scale_starts = (image * scale_stride)[:, None]
    grads = tl.tuple(())  # for the normalised rows; 0 in columns beyond D
    total = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    dots = tl.zeros((BLOCK_R, BLOCK_C), dtype=tl.float32)
    for c in tl.static_range(CHUNKS):
        mask = in_range & (c * BLOCK_C + cols < D)
        scale = tl.load(scale_ptr + scale_starts + c * BLOCK_C + cols, mask=mask, other=0.0).to(tl.float32)
        grad = douts[c].to(tl.float32) * (1.0 + scale)
        total += grad
        dots += grad * (xs[c].to(tl.float32) - mean) * rstd
        grads = grads + (grad,)
    mean_grad = (tl.sum(total, axis=1) / D)[:, None]
    mean_dot = (tl.sum(dots, axis=1) / D)[:, None]

    for c in tl.static_range(CHUNKS):
        mask = in_range & (c * BLOCK_C + cols < D)
        dx = (grads[c] - mean_grad - (xs[c].to(tl.float32) - mean) * rstd * mean_dot) * rstd
        if RESIDUAL:
            gate_starts = (image * gate_stride)[:, None]
            dx += tl.load(dsum_ptr + row_starts + c * BLOCK_C + cols, mask=mask, other=0.0).to(tl.float32)
            gate = tl.load(gate_ptr + gate_starts + c * BLOCK_C + cols, mask=mask, other=0.0).to(tl.float32)
            dy = (dx * gate).to(dy_ptr.dtype.element_ty)
            tl.store(dy_ptr + row_starts + c * BLOCK_C + cols, dy, mask=mask)
        tl.store(dx_ptr + row_starts + c * BLOCK_C + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _modulation_sums_kernel(
    dout_ptr,  # (B, N, D) float
    x_ptr,  # (B, N, D) float, what was normalised
    stats_ptr,  # (2, B * N) fp32
    dsum_ptr,  # (B, N, D) float, the whole gradient of x + gate * y
    y_ptr,  # (B, N, D) float, or None without a residual
    dshift_ptr,  # (B, D) float
    dscale_ptr,  # (B, D) float
    dgate_ptr,  # (B, D) float, or None
    num_tokens,  # N
    num_rows,  # B * N
    D: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    blocks: tl.constexpr = (D + BLOCK_C - 1) // BLOCK_C
    image = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    dshift = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    dscale = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    dgate = tl.zeros((BLOCK_N, BLOCK_C), dtype=tl.float32)
    for start in range(0, num_tokens, BLOCK_N):
        tokens = (start + tl.arange(0, BLOCK_N))[:, None]
        rows = image * num_tokens + tokens
        mean = tl.load(stats_ptr + rows, mask=tokens < num_tokens, other=0.0)
        rstd = tl.load(stats_ptr + num_rows + rows, mask=tokens < num_tokens, other=0.0)
        mask = (tokens < num_tokens) & (cols < D)[None, :]
        places = rows * D + cols[None, :]
        dout = tl.load(dout_ptr + places, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + places, mask=mask, other=0.0).to(tl.float32)
        dshift += dout
        dscale += dout * (x - mean) * rstd
        if RESIDUAL:
            dsum = tl.load(dsum_ptr + places, mask=mask, other=0.0).to(tl.float32)
            dgate += dsum * tl.load(y_ptr + places, mask=mask, other=0.0).to(tl.float32)
    places = image * D + cols
    tl.store(dshift_ptr + places, tl.sum(dshift, axis=0).to(dshift_ptr.dtype.element_ty), mask=cols < D)
    tl.store(dscale_ptr + places, tl.sum(dscale, axis=0).to(dscale_ptr.dtype.element_ty), mask=cols < D)
    if RESIDUAL:
        tl.store(dgate_ptr + places, tl.sum(dgate, axis=0).to(dgate_ptr.dtype.element_ty), mask=cols < D)


def norm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    gate: Tensor | None = None,
    y: Tensor | None = None,
    total: Tensor | None = None,
) -> Tensor:
    """Normalise and modulate x, or x + gate * y, which is then written to `total`.

    Args:
        x, y, total: (B, N, D) float, contiguous.
        shift, scale, gate: (B, D) float, columns contiguous.
        dtype: of the result (B, N, D).
    """
    out = torch.empty_like(x, dtype=dtype)
    _, num_tokens, width = x.shape
    num_rows, tile = x.shape[0] * num_tokens, _tile(width)
    if x.numel():
        _norm_modulate_kernel[(common.cdiv(num_rows, tile["BLOCK_R"]),)](
            x,
            y,
            gate,
            shift,
            scale,
            total,
            out,
            num_tokens,
            num_rows,
            0 if gate is None else gate.stride(0),
            shift.stride(0),
            scale.stride(0),
            eps,
            D=width,
            RESIDUAL=y is not None,
            **tile,
        )
    return out


def norm_modulate_backward(
    dout: Tensor,
    x: Tensor,
    scale: Tensor,
    eps: float,
    dx: Tensor,
    dshift: Tensor,
    dscale: Tensor,
    *,
    dsum: Tensor | None = None,
    gate: Tensor | None = None,
    y: Tensor | None = None,
    dy: Tensor | None = None,
    dgate: Tensor | None = None,
) -> None:
    """Write the gradients of `norm_modulate`; with a residual, x is its `total`, and dx holds for either addend's sum.

    Args:
        dout, dsum: (B, N, D) float, contiguous like all of this shape: of the result and of `total`.
        x, scale, gate, y, eps: as in `norm_modulate`.
        dx, dy: (B, N, D) float, to be written.
        dshift, dscale, dgate: (B, D) float, contiguous, to be written.
    """
    images, num_tokens, width = x.shape
    num_rows, tile = images * num_tokens, _tile(width)
    stats = x.new_empty(2, num_rows, dtype=torch.float32)
    if x.numel():
        _norm_modulate_backward_kernel[(common.cdiv(num_rows, tile["BLOCK_R"]),)](
            dout,
            dsum,
            x,
            scale,
            gate,
            dx,
            dy,
            stats,
            num_tokens,
            num_rows,
            scale.stride(0),
            0 if gate is None else gate.stride(0),
            eps,
            D=width,
            RESIDUAL=y is not None,
            **tile,
        )
    if dshift.numel():  # without tokens, too: then the sums are zero
        _modulation_sums_kernel[(images * common.cdiv(width, _BLOCK_C),)](
            dout,
            x,
            stats,
            dx,
            y,
            dshift,
            dscale,
            dgate,
            num_tokens,
            num_rows,
            D=width,
            RESIDUAL=y is not None,
            BLOCK_N=_BLOCK_N,
            BLOCK_C=_BLOCK_C,
        )


def _tile(width: int) -> dict[str, int]:
    """Rows and columns of a block; a warp covers a row, or two narrow ones, until eight chunks are too few."""
    block_c = _LANE_COLUMNS if width > 2 * _LANE_COLUMNS else _LANE_COLUMNS // 2
    block_c = max(block_c, common.next_power_of_2(common.cdiv(width, 8)))
    block_r = max(1, _WARPS * _LANE_COLUMNS // block_c)
    return {"CHUNKS": common.cdiv(width, block_c), "BLOCK_R": block_r, "BLOCK_C": block_c, "num_warps": _WARPS}
