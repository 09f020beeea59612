"""The step of a product's main loop."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dot_accumulate(
    a,  # (M, BLOCK_K)
    b,  # (BLOCK_K, N)
    acc,  # (M, N) fp32
    PRECISION: tl.constexpr,
):
    """acc + a @ b; fp32 operands are summed in two levels.

    One chain of K additions loses about sqrt(K) roundings, several times what cuBLAS loses. The fma keeps the compiler
    from folding the addition back into the product's accumulator.
    """
    if a.dtype == tl.float32:
        acc = tl.fma(tl.dot(a, b, input_precision=PRECISION), tl.full(acc.shape, 1.0, tl.float32), acc)
    else:
        acc = tl.dot(a, b, acc)
    return acc
