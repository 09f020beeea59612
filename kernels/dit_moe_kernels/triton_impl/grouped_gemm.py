"""Grouped GEMM over rows sorted by expert: one templated kernel, its epilogues fused by constexpr switches.

out[r, n] = sum_k a[r, k] * w_e[n, k] for every row r of expert e. Row tiles come from the routing plan's schedule, so
that no tile mixes experts and no host sync is needed. The variants:

    EPILOGUE     a rows    weights      result
    "store"      sorted    (N, K)       out = product                                   (w2 of the forward)
    "store"      sorted    (K, N)       out = product                                   (dX)
    "swiglu"     either    (2F, K)      out = swiglu(product), h = product if SAVE_H    (w13 of the forward)
    "dswiglu"    sorted    (K, F)       dh, weighted a, partial router-weight gradients (w2 of the backward)
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .. import configs
from . import common
from .dot import _dot_accumulate
from .epilogues import _store_dswiglu, _store_plain, _store_swiglu


@triton.jit
def _load_weight(
    w,  # tensor descriptor or pointer: (E, N, K), (E, 2, F, K) if PAIRED, (E, K, N) if W_IS_KN
    expert,
    n,
    k,
    N,
    K,
    W_IS_KN: tl.constexpr,
    PAIRED: tl.constexpr,
    USE_TMA: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One weight tile as (BLOCK_K, BLOCK_N), zero outside the matrix; PAIRED: left half gate, right half up."""
    if USE_TMA and W_IS_KN:
        tile = w.load([expert, k, n]).reshape(BLOCK_K, BLOCK_N)
    elif USE_TMA and PAIRED:
        tile = w.load([expert, 0, n, k]).reshape(BLOCK_N, BLOCK_K).T
    elif USE_TMA:
        tile = w.load([expert, n, k]).reshape(BLOCK_N, BLOCK_K).T
    else:
        lanes = tl.arange(0, BLOCK_N)
        offs_k = k + tl.arange(0, BLOCK_K)
        width: tl.constexpr = BLOCK_N // 2 if PAIRED else BLOCK_N
        offs_n = n + lanes % width
        mask = (offs_k < K)[:, None] & (offs_n < N)[None, :]
        matrix_rows = 2 * N if PAIRED else N
        stride_k, stride_n = (N, 1) if W_IS_KN else (1, K)
        w_ptrs = w + expert.to(tl.int64) * matrix_rows * K
        w_ptrs += offs_k.to(tl.int64)[:, None] * stride_k
        w_ptrs += (offs_n + lanes // width * N).to(tl.int64)[None, :] * stride_n
        tile = tl.load(w_ptrs, mask=mask, other=0.0)
    return tile


@triton.jit
def _gemm_tile(
    a,
    w,
    out_ptr,
    h_ptr,
    aw_ptr,
    dots_ptr,
    topk_weights_ptr,
    row_to_slot_ptr,
    offsets_ptr,
    row_start,
    expert,
    pid_n,
    N,
    K,
    num_tiles_n,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    W_IS_KN: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SAVE_H: tl.constexpr,
    TMA_A: tl.constexpr,
    TMA_W: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One output tile: main loop over k, then the epilogue. Arguments as in `_grouped_gemm_kernel`."""
    PAIRED: tl.constexpr = EPILOGUE == "swiglu"
    row_end = tl.load(offsets_ptr + expert + 1)
    rows = row_start + tl.arange(0, BLOCK_M)
    # Rows past the expert's last one repeat it: their products are never stored, and the loads need no mask.
    safe_rows = tl.minimum(rows, row_end - 1)
    offs_k = tl.arange(0, BLOCK_K)
    if not TMA_A:
        sources = safe_rows
        if GATHER:
            sources = tl.load(row_to_slot_ptr + safe_rows) // TOP_K
        a_ptrs = a + sources.to(tl.int64)[:, None] * K + offs_k[None, :]
    n = pid_n * (BLOCK_N // 2 if PAIRED else BLOCK_N)

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        if TMA_A:
            a_tile = a.load([row_start, k])
        elif EVEN_K:
            a_tile = tl.load(a_ptrs + k)
        else:
            a_tile = tl.load(a_ptrs + k, mask=(offs_k < K - k)[None, :], other=0.0)
        w_tile = _load_weight(w, expert, n, k, N, K, W_IS_KN, PAIRED, TMA_W, BLOCK_N, BLOCK_K)
        acc = _dot_accumulate(a_tile, w_tile, acc, PRECISION)

    row_mask = rows < row_end
    if EPILOGUE == "swiglu":
        _store_swiglu(acc, out_ptr, h_ptr, rows, n, N, row_mask, SAVE_H)
    elif EPILOGUE == "dswiglu":
        weights = tl.load(topk_weights_ptr + tl.load(row_to_slot_ptr + safe_rows))
        dots = _store_dswiglu(acc, weights, h_ptr, out_ptr, aw_ptr, rows, n, N, row_mask)
        tl.store(dots_ptr + rows.to(tl.int64) * num_tiles_n + pid_n, dots, mask=row_mask)
    else:
        _store_plain(acc, out_ptr, rows, n, N, row_mask)


@triton.jit
def _tile_place(tile, num_tiles_m, num_tiles_n, GROUP_M: tl.constexpr):
    """Row tile and column tile of a linear tile number: GROUP_M row tiles share a sweep over columns, for L2."""
    width = GROUP_M * num_tiles_n
    first_m = tile // width * GROUP_M
    size_m = tl.minimum(num_tiles_m - first_m, GROUP_M)
    return first_m + tile % width % size_m, tile % width // size_m


@triton.jit
def _count_tiles(offsets_ptr, NUM_EXPERTS: tl.constexpr, EXPERTS_POW2: tl.constexpr, BLOCK_M: tl.constexpr):
    """Row tiles in use, from the expert offsets."""
    experts = tl.arange(0, EXPERTS_POW2)
    valid = experts < NUM_EXPERTS
    start = tl.load(offsets_ptr + experts, mask=valid, other=0)
    end = tl.load(offsets_ptr + experts + 1, mask=valid, other=0)
    return tl.sum((end - start + BLOCK_M - 1) // BLOCK_M)


@triton.jit(do_not_specialize=["num_tiles_m"])
def _grouped_gemm_kernel(
    a,  # (rows, K) io dtype, (T, K) if GATHER; a descriptor if TMA_A
    w,  # (E, N, K) io dtype, (E, 2, N, K) for "swiglu", (E, K, N) if W_IS_KN; a descriptor if TMA_W
    out_ptr,  # (rows, N) io dtype; dh (rows, 2N) for "dswiglu"
    h_ptr,  # (rows, 2N) io dtype: written by "swiglu" if SAVE_H, read by "dswiglu"
    aw_ptr,  # (rows, N) io dtype: "dswiglu" writes the recomputed activation times the row's router weight
    dots_ptr,  # (rows, num_tiles_n) fp32: "dswiglu" writes each column tile's share of <dout, w2 a>
    topk_weights_ptr,  # (T * K) fp32, by slot, for "dswiglu"
    row_to_slot_ptr,  # (rows,) int32, for GATHER and "dswiglu"
    offsets_ptr,  # (E + 1,) int32
    tile_expert_ptr,  # (num_tiles_m,) int32
    tile_row_ptr,  # (num_tiles_m,) int32
    num_tiles_m,  # upper bound on row tiles
    N,
    K,
    NUM_EXPERTS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    TOP_K: tl.constexpr,
    GATHER: tl.constexpr,
    W_IS_KN: tl.constexpr,
    EPILOGUE: tl.constexpr,
    SAVE_H: tl.constexpr,
    TMA_A: tl.constexpr,
    TMA_W: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_tiles_n = tl.cdiv(N, BLOCK_N // 2 if EPILOGUE == "swiglu" else BLOCK_N)
    if PERSISTENT:
        used_tiles_m = _count_tiles(offsets_ptr, NUM_EXPERTS, EXPERTS_POW2, BLOCK_M)
        for tile in tl.range(tl.program_id(0), used_tiles_m * num_tiles_n, tl.num_programs(0), flatten=True):
            pid_m, pid_n = _tile_place(tile, used_tiles_m, num_tiles_n, GROUP_M)
            _gemm_tile(
                a, w, out_ptr, h_ptr, aw_ptr, dots_ptr, topk_weights_ptr, row_to_slot_ptr, offsets_ptr,
                tl.load(tile_row_ptr + pid_m), tl.load(tile_expert_ptr + pid_m), pid_n, N, K, num_tiles_n,
                TOP_K, GATHER, W_IS_KN, EPILOGUE, SAVE_H, TMA_A, TMA_W, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
    else:
        pid_m, pid_n = _tile_place(tl.program_id(0), num_tiles_m, num_tiles_n, GROUP_M)
        expert = tl.load(tile_expert_ptr + pid_m)
        if expert >= 0:
            _gemm_tile(
                a, w, out_ptr, h_ptr, aw_ptr, dots_ptr, topk_weights_ptr, row_to_slot_ptr, offsets_ptr,
                tl.load(tile_row_ptr + pid_m), expert, pid_n, N, K, num_tiles_n,
                TOP_K, GATHER, W_IS_KN, EPILOGUE, SAVE_H, TMA_A, TMA_W, EVEN_K, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


def launch(
    a: Tensor,
    w: Tensor,
    out: Tensor,
    *,
    width: int,
    epilogue: str,
    w_is_kn: bool,
    offsets: Tensor,
    tile_expert: Tensor,
    tile_row: Tensor,
    tile_rows: int,
    row_to_slot: Tensor | None = None,
    top_k: int = 1,
    gather: bool = False,
    h: Tensor | None = None,
    aw: Tensor | None = None,
    dots: Tensor | None = None,
    topk_weights: Tensor | None = None,
    config: configs.GemmConfig | None = None,
) -> None:
    """Launch the kernel on contiguous tensors.

    Args:
        width: N, the width of the epilogue's result for one of gate and up.
        gather: read row r of `a` at row_to_slot[r] // top_k.
        others: as in `_grouped_gemm_kernel`.
    """
    num_tiles_m, k = tile_expert.shape[0], a.shape[1]
    if num_tiles_m == 0 or width == 0:
        return
    index = common.device_index(a)
    config = config or configs.gemm_config(epilogue, tile_rows, a.dtype, common.capability(index))
    tma_w = config.use_tma and common.supports_tma(w)
    tma_a = config.use_tma and not gather and common.supports_tma(a)
    num_experts = offsets.shape[0] - 1
    total = num_tiles_m * common.cdiv(width, config.block_n // 2 if epilogue == "swiglu" else config.block_n)
    _grouped_gemm_kernel[(min(total, common.num_sms(index)) if config.persistent else total,)](
        common.TensorDescriptor.from_tensor(a, [tile_rows, config.block_k]) if tma_a else a,
        _describe_weight(w, epilogue, w_is_kn, config) if tma_w else w,
        out,
        h,
        aw,
        dots,
        topk_weights,
        row_to_slot,
        offsets,
        tile_expert,
        tile_row,
        num_tiles_m,
        width,
        k,
        NUM_EXPERTS=num_experts,
        EXPERTS_POW2=common.next_power_of_2(num_experts),
        TOP_K=top_k,
        GATHER=gather,
        W_IS_KN=w_is_kn,
        EPILOGUE=epilogue,
        SAVE_H=h is not None,
        TMA_A=tma_a,
        TMA_W=tma_w,
        EVEN_K=k % config.block_k == 0,
        PRECISION=common.input_precision(a.dtype),
        PERSISTENT=config.persistent,
        BLOCK_M=tile_rows,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP_M=config.group_m,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **({"maxnreg": config.max_registers} if config.max_registers else {}),
    )


def _describe_weight(w: Tensor, epilogue: str, w_is_kn: bool, config: configs.GemmConfig):
    """Tensor descriptor of the weights, whose box is one tile of one expert."""
    if epilogue == "swiglu":
        w = w.view(w.shape[0], 2, w.shape[1] // 2, w.shape[2])
        return common.TensorDescriptor.from_tensor(w, [1, 2, config.block_n // 2, config.block_k])
    block = [1, config.block_k, config.block_n] if w_is_kn else [1, config.block_n, config.block_k]
    return common.TensorDescriptor.from_tensor(w, block)


def grouped_gemm(
    x: Tensor, w: Tensor, offsets: Tensor, tile_expert: Tensor, tile_row: Tensor, tile_rows: int
) -> Tensor:
    """x (N, I), w (E, O, I) -> (N, O); rows past offsets[-1] are not written."""
    return _product(x, w, w.shape[1], False, offsets, tile_expert, tile_row, tile_rows)


def grouped_gemm_dx(
    grad: Tensor, w: Tensor, offsets: Tensor, tile_expert: Tensor, tile_row: Tensor, tile_rows: int
) -> Tensor:
    """grad (N, O), w (E, O, I) -> (N, I); rows past offsets[-1] are not written."""
    return _product(grad, w, w.shape[2], True, offsets, tile_expert, tile_row, tile_rows)


def _product(
    rows: Tensor,
    w: Tensor,
    width: int,
    w_is_kn: bool,
    offsets: Tensor,
    tile_expert: Tensor,
    tile_row: Tensor,
    tile_rows: int,
) -> Tensor:
    out = rows.new_empty(rows.shape[0], width)
    launch(
        rows,
        w,
        out,
        width=width,
        epilogue="store",
        w_is_kn=w_is_kn,
        offsets=offsets,
        tile_expert=tile_expert,
        tile_row=tile_row,
        tile_rows=tile_rows,
    )
    return out
