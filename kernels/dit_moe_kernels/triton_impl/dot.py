"""The step of a product's main loop."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot_two_levels(
    a,  # (M, BLOCK_K)
    b,  # (BLOCK_K, N)
    acc,  # (M, N) fp32
    PRECISION: tl.constexpr,
):
    """acc + a @ b, the product summed by itself before it is added.

    One chain of K additions loses about sqrt(K) roundings, several times what cuBLAS loses. The fma keeps the compiler
    from folding the addition back into the product's accumulator.
    """
    return tl.fma(tl.dot(a, b, input_precision=PRECISION), tl.full(acc.shape, 1.0, tl.float32), acc)


@triton.jit
def _dot_accumulate(
    a,  # (M, BLOCK_K)
    b,  # (BLOCK_K, N)
    acc,  # (M, N) fp32
    PRECISION: tl.constexpr,
):
    """acc + a @ b; fp32 operands are summed in two levels."""
    if a.dtype == tl.float32:
        acc = _dot_two_levels(a, b, acc, PRECISION)
    else:
        acc = tl.dot(a, b, acc)
    return acc
