"""Launches of csrc/sm90/: the grouped products for Hopper GPUs; same meaning as reference.py's functions.

Rows are sorted by expert, weights and rows are fp16 or bf16. Sizes of the tiles are chosen behind the C interface, by
the shapes alone.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import extension
from .launch import ALIGNMENT, aligned, launch

DTYPES = (torch.float16, torch.bfloat16)


@functools.cache
def unsupported(device: torch.device, dtype: torch.dtype, whole_chunks: bool) -> str | None:
    """Why these kernels cannot run, None if they can.

    Args:
        device: a CUDA device on which the compiled module can be used.
        dtype: of rows and weights.
        whole_chunks: whether the rows of every matrix are whole multiples of 16 bytes.
    """
    if "sm_90a" not in extension().build_info()["archs"].split():
        return f"the extension was built for {extension().build_info()['archs']}, expected sm_90a among them"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"got compute capability {capability}, expected (9, 0)"
    if dtype not in DTYPES:
        return f"got {dtype}, expected one of {DTYPES}"
    if not whole_chunks:
        return f"got a width that is no multiple of {ALIGNMENT // dtype.itemsize}"
    return None


def grouped_gemm(x_NI: Tensor, w_EOI: Tensor, offsets: Tensor) -> Tensor:
    """x_NI, w_EOI -> (N, O); rows past offsets[-1] are not written."""
    num_experts, width, depth = w_EOI.shape
    out_NO = x_NI.new_empty(x_NI.shape[0], width)
    tensors = (aligned(x_NI), aligned(w_EOI), offsets, out_NO)
    launch("grouped_gemm", tensors, (x_NI.shape[0], depth, width, num_experts), x_NI)
    return out_NO


def grouped_gemm_dx(grad_NO: Tensor, w_EOI: Tensor, offsets: Tensor) -> Tensor:
    """grad_NO, w_EOI -> (N, I); rows past offsets[-1] are not written."""
    num_experts, depth, width = w_EOI.shape
    dx_NI = grad_NO.new_empty(grad_NO.shape[0], width)
    tensors = (aligned(grad_NO), aligned(w_EOI), offsets, dx_NI)
    launch("grouped_gemm_dx", tensors, (grad_NO.shape[0], depth, width, num_experts), grad_NO)
    return dx_NI


def grouped_swiglu(x_ND: Tensor, w13_E2FD: Tensor, offsets: Tensor | None, *, keep_h: bool) -> tuple[Tensor, Tensor]:
    """swiglu(h) (N, F) and h = x w13 (N, 2F), no rows of it unless keep_h; rows past offsets[-1] are not written.

    Without offsets the only expert has all rows.
    """
    num_experts, double_width, depth = w13_E2FD.shape
    out_NF = x_ND.new_empty(x_ND.shape[0], double_width // 2)
    h = x_ND.new_empty(x_ND.shape[0] if keep_h else 0, double_width)
    tensors = (aligned(x_ND), aligned(w13_E2FD), offsets, out_NF, h if keep_h else None)
    launch("grouped_swiglu", tensors, (x_ND.shape[0], depth, double_width // 2, num_experts), x_ND)
    return out_NF, h


def grouped_dswiglu(
    grad_ND: Tensor,
    w2_EDF: Tensor,
    h_N2F: Tensor,
    topk_weights_TK: Tensor,
    row_to_slot_N: Tensor,
    offsets: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the gradients of the layer's rows before their router weights w, through w2 and SwiGLU.

    Returns:
        dh (N, 2F), w * swiglu(h) (N, F), and the gradients for w by row, (N,) fp32. Rows past offsets[-1] are not
        written, in the last: unspecified.
    """
    num_experts, depth, width = w2_EDF.shape
    num_rows = grad_ND.shape[0]
    dh_N2F, weighted_a_NF = torch.empty_like(h_N2F), grad_ND.new_empty(num_rows, width)
    columns = extension().DSWIGLU_COLUMNS
    dots_PN = grad_ND.new_empty(-(-width // columns), num_rows, dtype=torch.float32)
    inputs = (aligned(grad_ND), aligned(w2_EDF), offsets, aligned(h_N2F), topk_weights_TK, row_to_slot_N)
    outputs = (dh_N2F, weighted_a_NF, dots_PN)
    launch("grouped_dswiglu", (*inputs, *outputs), (num_rows, depth, width, num_experts), grad_ND)
    return dh_N2F, weighted_a_NF, dots_PN.sum(0)
