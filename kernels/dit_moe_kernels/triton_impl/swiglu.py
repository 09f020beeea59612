"""SwiGLU and its gradient as elementwise kernels on packed pre-activations [gate | up]."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import common

_BLOCK_F = 1024  # columns of a program


@triton.jit
def _swiglu_kernel(
    h_ptr,  # (N, 2F) io dtype
    out_ptr,  # (N, F) io dtype
    F,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = cols < F
    gate = tl.load(h_ptr + row * 2 * F + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + row * 2 * F + F + cols, mask=mask, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * F + cols, out.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    grad_ptr,  # (N, F) io dtype
    h_ptr,  # (N, 2F) io dtype
    dh_ptr,  # (N, 2F) io dtype
    F,
    BLOCK_F: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = cols < F
    grad = tl.load(grad_ptr + row * F + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(h_ptr + row * 2 * F + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(h_ptr + row * 2 * F + F + cols, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    dtype = dh_ptr.dtype.element_ty
    tl.store(dh_ptr + row * 2 * F + cols, (grad * up * s * (1.0 + gate - silu)).to(dtype), mask=mask)
    tl.store(dh_ptr + row * 2 * F + F + cols, (grad * silu).to(dtype), mask=mask)


def swiglu(h: Tensor) -> Tensor:
    """h (N, 2F) -> (N, F)."""
    num_rows, width = h.shape[0], h.shape[1] // 2
    out = h.new_empty(num_rows, width)
    if out.numel():
        _swiglu_kernel[(num_rows, common.cdiv(width, _BLOCK_F))](h, out, width, BLOCK_F=_BLOCK_F)
    return out


def swiglu_backward(grad: Tensor, h: Tensor) -> Tensor:
    """grad (N, F), h (N, 2F) -> dh (N, 2F)."""
    num_rows, width = grad.shape
    dh = torch.empty_like(h)
    if dh.numel():
        _swiglu_backward_kernel[(num_rows, common.cdiv(width, _BLOCK_F))](grad, h, dh, width, BLOCK_F=_BLOCK_F)
    return dh
