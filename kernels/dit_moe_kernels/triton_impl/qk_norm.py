"""LayerNorm of every head's query and key, and its gradients: one launch for both, each head's row in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common

_TILE_ELEMENTS = 2048  # of four warps, so that 16-bit numbers move in 16-byte accesses
_BLOCKS_PER_SM = 4  # of the backward kernel, whose blocks take many tiles each


@triton.jit
def _normalise(
    x,  # (BLOCK_R, BLOCK_W) float, zero beyond W columns
    eps,
    W: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """Each row less its mean, over its standard deviation; and the inverse of the latter, as a column."""
    x = x.to(tl.float32)
    in_width = (tl.arange(0, BLOCK_W) < W)[None, :]
    centred = tl.where(in_width, x - (tl.sum(x, axis=1) / W)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / W + eps)[:, None]
    return centred * rstd, rstd


@triton.jit
def _forward_tile(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, num_rows, stride, eps,
    H: tl.constexpr, W: tl.constexpr, HEAD_STRIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_W)[None, :]
    mask = (rows < num_rows)[:, None] & (cols < W)
    x = tl.load(x_ptr + ((rows // H) * stride + (rows % H) * HEAD_STRIDE)[:, None] + cols, mask=mask, other=0.0)
    normed, _ = _normalise(x, eps, W, BLOCK_W)
    # Once for each row, so that a warp loads them as it loads its rows.
    weight = tl.load(tl.broadcast_to(weight_ptr + cols, (BLOCK_R, BLOCK_W)), mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(tl.broadcast_to(bias_ptr + cols, (BLOCK_R, BLOCK_W)), mask=mask, other=0.0).to(tl.float32)
    out = (normed * weight + bias).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows[:, None] * W + cols, out, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _qk_norm_kernel(
    q_ptr,  # (T, H, W) float, tokens q_stride apart and heads Q_HEAD_STRIDE
    k_ptr,  # (T, H, W) float, likewise
    q_weight_ptr,  # (W,) float
    q_bias_ptr,  # (W,) float
    k_weight_ptr,  # (W,) float
    k_bias_ptr,  # (W,) float
    q_out_ptr,  # (T, H, W) float
    k_out_ptr,  # (T, H, W) float
    num_rows,  # T * H
    q_stride,
    k_stride,
    eps,
    H: tl.constexpr,
    W: tl.constexpr,
    Q_HEAD_STRIDE: tl.constexpr,
    K_HEAD_STRIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(1) == 0:
        _forward_tile(
            q_ptr, q_weight_ptr, q_bias_ptr, q_out_ptr, rows, num_rows, q_stride, eps,
            H, W, Q_HEAD_STRIDE, BLOCK_R, BLOCK_W,
        )  # fmt: skip
    else:
        _forward_tile(
            k_ptr, k_weight_ptr, k_bias_ptr, k_out_ptr, rows, num_rows, k_stride, eps,
            H, W, K_HEAD_STRIDE, BLOCK_R, BLOCK_W,
        )  # fmt: skip


@triton.jit
def _backward_tiles(
    dout_ptr, x_ptr, weight_ptr, dx_ptr, partials_ptr, num_rows, stride, eps,
    H: tl.constexpr, W: tl.constexpr, HEAD_STRIDE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    cols = tl.arange(0, BLOCK_W)[None, :]
    in_width = tl.broadcast_to(cols < W, (BLOCK_R, BLOCK_W))
    weight = tl.load(tl.broadcast_to(weight_ptr + cols, (BLOCK_R, BLOCK_W)), mask=in_width, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_R, BLOCK_W), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_R, BLOCK_W), dtype=tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(num_rows, BLOCK_R), tl.num_programs(0)):
        rows = tile * BLOCK_R + tl.arange(0, BLOCK_R).to(tl.int64)
        mask = (rows < num_rows)[:, None] & in_width
        x = tl.load(x_ptr + ((rows // H) * stride + (rows % H) * HEAD_STRIDE)[:, None] + cols, mask=mask, other=0.0)
        dout = tl.load(dout_ptr + rows[:, None] * W + cols, mask=mask, other=0.0).to(tl.float32)
        normed, rstd = _normalise(x, eps, W, BLOCK_W)
        dweight += dout * normed
        dbias += dout
        grad = dout * weight
        mean_grad = (tl.sum(grad, axis=1) / W)[:, None]
        mean_dot = (tl.sum(grad * normed, axis=1) / W)[:, None]
        dx = (grad - mean_grad - normed * mean_dot) * rstd
        tl.store(dx_ptr + rows[:, None] * W + cols, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    columns = tl.arange(0, BLOCK_W)
    tl.store(partials_ptr + columns, tl.sum(dweight, axis=0), mask=columns < W)
    tl.store(partials_ptr + W + columns, tl.sum(dbias, axis=0), mask=columns < W)


@triton.jit(do_not_specialize=["num_rows"])
def _qk_norm_backward_kernel(
    dq_out_ptr,  # (T, H, W) float
    dk_out_ptr,  # (T, H, W) float
    q_ptr,  # (T, H, W) float, tokens q_stride apart and heads Q_HEAD_STRIDE
    k_ptr,  # (T, H, W) float, likewise
    q_weight_ptr,  # (W,) float
    k_weight_ptr,  # (W,) float
    dq_ptr,  # (T, H, W) float
    dk_ptr,  # (T, H, W) float
    partials_ptr,  # (P, 2, 2, W) fp32 from P blocks: of q's weight and bias, then of k's
    num_rows,  # T * H
    q_stride,
    k_stride,
    eps,
    H: tl.constexpr,
    W: tl.constexpr,
    Q_HEAD_STRIDE: tl.constexpr,
    K_HEAD_STRIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    partials_ptr += tl.program_id(0) * 4 * W
    if tl.program_id(1) == 0:
        _backward_tiles(
            dq_out_ptr, q_ptr, q_weight_ptr, dq_ptr, partials_ptr, num_rows, q_stride, eps,
            H, W, Q_HEAD_STRIDE, BLOCK_R, BLOCK_W,
        )  # fmt: skip
    else:
        _backward_tiles(
            dk_out_ptr, k_ptr, k_weight_ptr, dk_ptr, partials_ptr + 2 * W, num_rows, k_stride, eps,
            H, W, K_HEAD_STRIDE, BLOCK_R, BLOCK_W,
        )  # fmt: skip


def qk_norm(q: Tensor, k: Tensor, weights: list[Tensor], eps: float, q_out: Tensor, k_out: Tensor) -> None:
    """q, k (T, H, W) with neighbouring columns, two weights and biases (W,) -> q_out, k_out (T, H, W) contiguous."""
    num_tokens, heads, width = q.shape
    if not q.numel():
        return
    num_rows, tile = num_tokens * heads, _tile(width)
    _qk_norm_kernel[(common.cdiv(num_rows, tile["BLOCK_R"]), 2)](
        q,
        k,
        *weights,
        q_out,
        k_out,
        num_rows,
        q.stride(0),
        k.stride(0),
        eps,
        H=heads,
        W=width,
        Q_HEAD_STRIDE=q.stride(1),
        K_HEAD_STRIDE=k.stride(1),
        **tile,
    )


def qk_norm_backward(
    dq_out: Tensor,
    dk_out: Tensor,
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    dq: Tensor,
    dk: Tensor,
) -> Tensor:
    """Write dq and dk (T, H, W), all gradients contiguous.

    Returns:
        (2, 2, W) fp32: gradients of q's weight and bias, then of k's.
    """
    num_tokens, heads, width = q.shape
    num_rows, tile = num_tokens * heads, _tile(width)
    blocks = min(common.cdiv(num_rows, tile["BLOCK_R"]), _BLOCKS_PER_SM * common.num_sms(common.device_index(q)))
    partials = q.new_empty(blocks, 2, 2, width, dtype=torch.float32)
    if q.numel():
        _qk_norm_backward_kernel[(blocks, 2)](
            dq_out,
            dk_out,
            q,
            k,
            q_weight,
            k_weight,
            dq,
            dk,
            partials,
            num_rows,
            q.stride(0),
            k.stride(0),
            eps,
            H=heads,
            W=width,
            Q_HEAD_STRIDE=q.stride(1),
            K_HEAD_STRIDE=k.stride(1),
            **tile,
        )
    return partials.sum(0)


def _tile(width: int) -> dict[str, int]:
    block_w = common.next_power_of_2(width)
    return {"BLOCK_R": max(1, _TILE_ELEMENTS // block_w), "BLOCK_W": block_w, "num_warps": 4}
