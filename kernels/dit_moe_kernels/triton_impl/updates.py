"""Triton kernels that update bf16 state in one pass: AdamW and the moving average, rounded stochastically."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..reference_updates import ADAMW, AVERAGE, AVERAGE_PIECE, ROUNDS
from .common import cdiv

_BLOCK = AVERAGE_PIECE  # eight elements a thread: 16-byte accesses for bf16


@triton.jit
def _rounded(x, noise):
    """fp32 -> bf16, up or down as 16 random bits say; NaN and infinities stay."""
    bits = x.to(tl.int32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    bits += tl.where(finite, (noise & 0xFFFF).to(tl.int32), 0)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _store(ptr, x, noise, mask):
    if ptr.dtype.element_ty == tl.bfloat16:
        tl.store(ptr, _rounded(x, noise), mask=mask)
    else:
        tl.store(ptr, x, mask=mask)


@triton.jit
def _random(block, seed, counter, tensor, PURPOSE: tl.constexpr, ROUNDS: tl.constexpr, COUNT: tl.constexpr):
    """Four times 32 random bits for each of COUNT groups of elements of a block."""
    groups = (block * COUNT + tl.arange(0, COUNT)).to(tl.uint32)
    zero = groups * 0
    return tl.philox(seed, groups, zero + tensor, zero + counter, zero + PURPOSE, n_rounds=ROUNDS)


@triton.jit(do_not_specialize=["seed", "counter", "tensor"])
def _adamw_kernel(
    weight_ptr,  # (N,) fp32 or bf16
    gradient_ptr,  # (N,) fp32 or bf16
    exp_avg_ptr,  # (N,) fp32 or bf16
    exp_avg_sq_ptr,  # (N,) fp32 or bf16
    scalars_ptr,  # (4,) fp32: 1 - beta1^t, sqrt(1 - beta2^t), divisor of the gradient, whether to skip
    learning_rate,
    weight_decay,
    one_minus_beta1,
    beta2,
    one_minus_beta2,
    eps,
    seed,
    counter,
    tensor,
    N,
    PURPOSE: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if tl.load(scalars_ptr + 3) == 0:
        offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = offsets < N
        correction1, root2 = tl.load(scalars_ptr), tl.load(scalars_ptr + 1)
        gradient = tl.load(gradient_ptr + offsets, mask=mask, other=0.0).to(tl.float32) / tl.load(scalars_ptr + 2)
        weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        exp_avg = tl.load(exp_avg_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        exp_avg += one_minus_beta1 * (gradient - exp_avg)
        exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * gradient * gradient
        weight -= learning_rate * weight_decay * weight
        weight -= learning_rate / correction1 * exp_avg / (tl.sqrt(exp_avg_sq) / root2 + eps)
        # Two neighbours share a Philox number: each takes 16 bits for its weight, 16 and 16 for its moments.
        bits0, bits1, bits2, bits3 = _random(tl.program_id(0), seed, counter, tensor, PURPOSE, ROUNDS, BLOCK // 2)
        first, second = tl.interleave(bits0, bits1), tl.interleave(bits2, bits3)
        _store(weight_ptr + offsets, weight, first, mask)
        _store(exp_avg_ptr + offsets, exp_avg, first >> 16, mask)
        _store(exp_avg_sq_ptr + offsets, exp_avg_sq, second, mask)


@triton.jit(do_not_specialize=["seed", "counter", "tensor", "first_block"])
def _average_kernel(
    average_ptr,  # (N,) fp32 or bf16
    weight_ptr,  # (N,) fp32 or bf16
    share,
    seed,
    counter,
    tensor,
    first_block,
    N,
    PURPOSE: tl.constexpr,
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < N
    average = tl.load(average_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    average += share * (weight - average)
    # Four neighbours share a Philox number.
    bits0, bits1, bits2, bits3 = _random(
        first_block + tl.program_id(0), seed, counter, tensor, PURPOSE, ROUNDS, BLOCK // 4
    )
    noise = tl.interleave(tl.interleave(bits0, bits2), tl.interleave(bits1, bits3))
    _store(average_ptr + offsets, average, noise, mask)


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    seed: int,
    counter: int,
    tensor: int,
    learning_rate: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
) -> None:
    """One step of AdamW on contiguous tensors."""
    count = weight.numel()
    if not count:
        return
    _adamw_kernel[(cdiv(count, _BLOCK),)](
        weight, gradient, exp_avg, exp_avg_sq, scalars, learning_rate, weight_decay, 1 - beta1, beta2, 1 - beta2, eps,
        seed, counter, tensor, count, PURPOSE=ADAMW, ROUNDS=ROUNDS, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def average_(average: Tensor, weight: Tensor, share: float, seed: int, counter: int, tensor: int, start: int) -> None:
    """One step of the average, on contiguous tensors; start is a multiple of the block."""
    count = average.numel()
    if not count:
        return
    _average_kernel[(cdiv(count, _BLOCK),)](
        average, weight, share, seed, counter, tensor, start // _BLOCK, count,
        PURPOSE=AVERAGE, ROUNDS=ROUNDS, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
