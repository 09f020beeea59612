"""Triton kernels that update bf16 state in one pass: AdamW and the moving average, rounded stochastically.

A tensor's random bits are Philox numbers of a seed, a counter, the tensor's number and the element's place, so they do
not depend on how the work is split. Plain PyTorch twins are in optimizer.py and averages.py.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # eight elements a thread: 16-byte accesses for bf16
_ADAMW, _AVERAGE = 0, 1  # apart, since both may follow from the same seed and counter


class RandomBits(NamedTuple):
    """Where random bits come from: a seed (64 bits) and a counter (31 bits) that no other update has with it."""

    seed: int
    counter: int


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
def _random(block, seed, counter, tensor, PURPOSE: tl.constexpr, COUNT: tl.constexpr):
    """Four times 32 random bits for each of COUNT groups of elements of a block."""
    groups = (block * COUNT + tl.arange(0, COUNT)).to(tl.uint32)
    zero = groups * 0
    # Seven rounds are the fewest that pass all statistical tests (Salmon et al. 2011, table 2).
    return tl.philox(seed, groups, zero + tensor, zero + counter, zero + PURPOSE, n_rounds=7)


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
        bits0, bits1, bits2, bits3 = _random(tl.program_id(0), seed, counter, tensor, PURPOSE, BLOCK // 2)
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
    BLOCK: tl.constexpr,
):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < N
    average = tl.load(average_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    average += share * (weight - average)
    # Four neighbours share a Philox number.
    bits0, bits1, bits2, bits3 = _random(first_block + tl.program_id(0), seed, counter, tensor, PURPOSE, BLOCK // 4)
    noise = tl.interleave(tl.interleave(bits0, bits2), tl.interleave(bits1, bits3))
    _store(average_ptr + offsets, average, noise, mask)


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    random: RandomBits,
    tensor: int,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
) -> None:
    """One step of AdamW in fp32, in place; what is kept in bf16 is rounded stochastically.

    Args:
        weight, exp_avg, exp_avg_sq: of one shape, contiguous, fp32 or bf16.
        gradient: that shape, fp32 or bf16.
        scalars: (4,) fp32: 1 - beta1^t, sqrt(1 - beta2^t), what to divide the gradient by, and 1 to change nothing.
        random, tensor: seed and counter, and the tensor's number among those of the update.
        learning_rate, betas, weight_decay, eps: as in Loshchilov and Hutter 2019, algorithm 2.
    """
    count = weight.numel()
    _adamw_kernel[(triton.cdiv(count, _BLOCK),)](
        weight, gradient.contiguous(), exp_avg, exp_avg_sq, scalars,
        learning_rate, weight_decay, 1 - betas[0], betas[1], 1 - betas[1], eps,
        random.seed, random.counter, tensor, count, PURPOSE=_ADAMW, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def average_(average: Tensor, weight: Tensor, share: float, random: RandomBits, tensor: int, start: int = 0) -> None:
    """average += share * (weight - average) in fp32, in place, rounded stochastically where the average is bf16.

    Args:
        average: contiguous, fp32 or bf16.
        weight: average's shape, fp32 or bf16.
        share: 0 to 1.
        random, tensor: seed and counter, and the tensor's number among those of the update.
        start: place of the first element in that tensor, where average is a piece of it; a multiple of 1024.

    Raises:
        ValueError: another start: its elements would not get the bits that are theirs in the whole tensor.
    """
    if start % _BLOCK:
        raise ValueError(f"start: got {start}, expected a multiple of {_BLOCK}")
    count = average.numel()
    _average_kernel[(triton.cdiv(count, _BLOCK),)](
        average, weight.contiguous(), share, random.seed, random.counter, tensor, start // _BLOCK, count,
        PURPOSE=_AVERAGE, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip


def next_bits(generator: torch.Generator | None, device: torch.device) -> RandomBits:
    """Seed and counter of a CUDA generator, or of the device's own, which moves on; nothing waits for the device."""
    if generator is None:
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return RandomBits(generator.initial_seed() & (2**63 - 1), (offset // 4) & (2**31 - 1))
