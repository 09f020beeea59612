"""Weight gradient of the grouped GEMM: a product over each expert's rows, zero for an expert without rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from . import common


@triton.jit
def _load_rows(
    ptr,  # (rows, WIDTH), or (T, WIDTH) if GATHER
    rows,  # (BLOCK_K,)
    row_end,
    cols,  # (BLOCK,)
    WIDTH,
    row_to_slot_ptr,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
):
    """(BLOCK_K, BLOCK) elements; rows of the next expert are zero, so that not even their NaNs leak into the sum."""
    row_mask = rows < row_end
    if GATHER:
        rows = tl.load(row_to_slot_ptr + rows, mask=row_mask, other=0) // TOP_K
    mask = row_mask[:, None] & (cols < WIDTH)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * WIDTH + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _grouped_gemm_dw_kernel(
    grad_ptr,  # (rows, O) io dtype; (T, O) if GATHER_GRAD
    x_ptr,  # (rows, I) io dtype; (T, I) if GATHER_X
    dw_ptr,  # (E, O, I) io dtype
    row_to_slot_ptr,  # (rows,) int32
    offsets_ptr,  # (E + 1,) int32
    O,  # noqa: E741 - the width's name in every shape comment
    I,  # noqa: E741
    TOP_K: tl.constexpr,
    GATHER_GRAD: tl.constexpr,
    GATHER_X: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(O, BLOCK_M), tl.cdiv(I, BLOCK_N)
    expert = tl.program_id(0) // (tiles_m * tiles_n)
    tile = tl.program_id(0) % (tiles_m * tiles_n)
    width = GROUP_M * tiles_n
    first_m = tile // width * GROUP_M
    size_m = tl.minimum(tiles_m - first_m, GROUP_M)
    offs_m = (first_m + tile % width % size_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = (tile % width // size_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_start = tl.load(offsets_ptr + expert)
    row_end = tl.load(offsets_ptr + expert + 1)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for row in range(row_start, row_end, BLOCK_K):
        rows = row + tl.arange(0, BLOCK_K)
        grad = _load_rows(grad_ptr, rows, row_end, offs_m, O, row_to_slot_ptr, TOP_K, GATHER_GRAD)
        x = _load_rows(x_ptr, rows, row_end, offs_n, I, row_to_slot_ptr, TOP_K, GATHER_X)
        acc = tl.dot(grad.T, x, acc, input_precision=PRECISION)

    dw_ptrs = dw_ptr + (expert.to(tl.int64) * O + offs_m[:, None]) * I + offs_n[None, :]
    mask = (offs_m < O)[:, None] & (offs_n < I)[None, :]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=mask)


def launch(
    grad: Tensor,
    x: Tensor,
    offsets: Tensor,
    *,
    row_to_slot: Tensor | None = None,
    top_k: int = 1,
    gather_grad: bool = False,
    gather_x: bool = False,
    config: configs.GemmConfig | None = None,
) -> Tensor:
    """dw (E, O, I) from grad (rows or T, O) and x (rows or T, I), contiguous; gathered through row_to_slot // top_k."""
    num_experts, width_o, width_i = offsets.shape[0] - 1, grad.shape[1], x.shape[1]
    dw = torch.empty(num_experts, width_o, width_i, dtype=grad.dtype, device=grad.device)
    if dw.numel() == 0:
        return dw
    config = config or configs.dw_config(grad.dtype, common.capability(common.device_index(grad)))
    tiles = triton.cdiv(width_o, config.block_m) * triton.cdiv(width_i, config.block_n)
    _grouped_gemm_dw_kernel[(num_experts * tiles,)](
        grad,
        x,
        dw,
        row_to_slot,
        offsets,
        width_o,
        width_i,
        TOP_K=top_k,
        GATHER_GRAD=gather_grad,
        GATHER_X=gather_x,
        PRECISION=common.input_precision(grad.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dw


def grouped_gemm_dw(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """grad (N, O), x (N, I) -> (E, O, I)."""
    return launch(grad, x, offsets)
