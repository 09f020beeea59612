"""Weight gradient of the grouped GEMM: a product over each expert's rows, zero for an expert without rows."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from . import common
from .dot import _dot_accumulate
from .grouped_gemm import _tile_place


@triton.jit
def _load_rows(
    ptr,  # (rows, WIDTH)
    rows,  # (BLOCK_K,)
    row_end,
    cols,  # (BLOCK,)
    WIDTH,
):
    """(BLOCK_K, BLOCK) elements; rows of the next expert are zero, so that not even their NaNs leak into the sum."""
    mask = (rows < row_end)[:, None] & (cols < WIDTH)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * WIDTH + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _grouped_gemm_dw_kernel(
    grad_ptr,  # (rows, O) io dtype
    x_ptr,  # (rows, I) io dtype
    grad_tma,  # descriptor of grad with box (BLOCK_K, BLOCK_M), or None
    x_tma,  # descriptor of x with box (BLOCK_K, BLOCK_N), or None
    dw_ptr,  # (E, O, I) io dtype
    offsets_ptr,  # (E + 1,) int32
    O,  # noqa: E741 - the width's name in every shape comment
    I,  # noqa: E741
    USE_TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(O, BLOCK_M), tl.cdiv(I, BLOCK_N)
    expert = tl.program_id(0) // (tiles_m * tiles_n)
    pid_m, pid_n = _tile_place(tl.program_id(0) % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    offs_m = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_start = tl.load(offsets_ptr + expert)
    row_end = tl.load(offsets_ptr + expert + 1)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if USE_TMA:
        # A descriptor knows no expert borders: it takes the whole steps, the masked loop below the last, partial one.
        masked_start = row_start + (row_end - row_start) // BLOCK_K * BLOCK_K
        for row in range(row_start, masked_start, BLOCK_K):
            grad = grad_tma.load([row, pid_m * BLOCK_M])
            x = x_tma.load([row, pid_n * BLOCK_N])
            acc = _dot_accumulate(grad.T, x, acc, PRECISION)
    else:
        masked_start = row_start
    for row in range(masked_start, row_end, BLOCK_K):
        rows = row + tl.arange(0, BLOCK_K)
        grad = _load_rows(grad_ptr, rows, row_end, offs_m, O)
        x = _load_rows(x_ptr, rows, row_end, offs_n, I)
        acc = _dot_accumulate(grad.T, x, acc, PRECISION)

    dw_ptrs = dw_ptr + (expert.to(tl.int64) * O + offs_m[:, None]) * I + offs_n[None, :]
    mask = (offs_m < O)[:, None] & (offs_n < I)[None, :]
    tl.store(dw_ptrs, acc.to(dw_ptr.dtype.element_ty), mask=mask)


def grouped_gemm_dw(grad: Tensor, x: Tensor, offsets: Tensor, config: configs.GemmConfig | None = None) -> Tensor:
    """grad (N, O), x (N, I), both contiguous -> (E, O, I)."""
    num_experts, width_o, width_i = offsets.shape[0] - 1, grad.shape[1], x.shape[1]
    dw = torch.empty(num_experts, width_o, width_i, dtype=grad.dtype, device=grad.device)
    if dw.numel() == 0:
        return dw
    config = config or configs.dw_config(grad.dtype, common.capability(common.device_index(grad)))
    use_tma = config.use_tma and grad.shape[0] > 0 and common.supports_tma(grad, x)
    tiles = common.cdiv(width_o, config.block_m) * common.cdiv(width_i, config.block_n)
    _grouped_gemm_dw_kernel[(num_experts * tiles,)](
        grad,
        x,
        common.TensorDescriptor.from_tensor(grad, [config.block_k, config.block_m]) if use_tma else None,
        common.TensorDescriptor.from_tensor(x, [config.block_k, config.block_n]) if use_tma else None,
        dw,
        offsets,
        width_o,
        width_i,
        USE_TMA=use_tma,
        PRECISION=common.input_precision(grad.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return dw
