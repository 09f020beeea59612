"""Launch of csrc/sm90/grouped_gemm_dw.cu: weight gradients for Hopper GPUs, alone or added to those that are there."""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import ALIGNMENT, aligned, launch


def grouped_gemm_dw(grad_NO: Tensor, x_NI: Tensor, offsets: Tensor) -> Tensor:
    """grad_NO, x_NI -> (E, O, I), zero for an expert without rows; rows past offsets[-1] are not read."""
    dw_EOI = x_NI.new_empty(offsets.shape[0] - 1, grad_NO.shape[1], x_NI.shape[1])
    _launch(dw_EOI, grad_NO, x_NI, offsets, accumulate=False)
    return dw_EOI


def add_grouped_gemm_dw(dw_EOI: Tensor, grad_NO: Tensor, x_NI: Tensor, offsets: Tensor) -> None:
    """Add the weight gradients to `dw_EOI` in place, in fp32, with one rounding to its dtype.

    Args:
        dw_EOI: (E, O, I) fp32 or the dtype of x_NI, contiguous, from an address that is a multiple of 16 bytes.
        grad_NO, x_NI, offsets: as in `grouped_gemm_dw`.

    Raises:
        ValueError: dw_EOI is none of that.
    """
    shape = (offsets.shape[0] - 1, grad_NO.shape[1], x_NI.shape[1])
    if dw_EOI.shape != shape or not dw_EOI.is_contiguous() or dw_EOI.data_ptr() % ALIGNMENT:
        raise ValueError(
            f"dw_EOI: got shape {tuple(dw_EOI.shape)}, strides {dw_EOI.stride()}, address {dw_EOI.data_ptr():#x}, "
            f"expected shape {shape}, contiguous, a multiple of {ALIGNMENT} bytes"
        )
    if dw_EOI.dtype not in (torch.float32, x_NI.dtype):
        raise ValueError(f"dw_EOI: got {dw_EOI.dtype}, expected torch.float32 or {x_NI.dtype}")
    _launch(dw_EOI, grad_NO, x_NI, offsets, accumulate=True)


def _launch(dw_EOI: Tensor, grad_NO: Tensor, x_NI: Tensor, offsets: Tensor, accumulate: bool) -> None:
    num_experts, height, width = dw_EOI.shape
    sizes = (x_NI.shape[0], height, width, num_experts, int(accumulate))
    launch(
        "grouped_gemm_dw", (aligned(grad_NO), aligned(x_NI), offsets, dw_EOI), sizes, x_NI, (dw_EOI.dtype, x_NI.dtype)
    )
