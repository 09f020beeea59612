"""Specification of the update ops, in plain PyTorch: what is rounded, by which random bits."""

from __future__ import annotations

import torch
from torch import Tensor

ADAMW, AVERAGE = 0, 1  # the counter's last word: both may follow from the same seed and counter
ROUNDS = 7  # the fewest that pass all statistical tests (Salmon et al. 2011, table 2)
AVERAGE_PIECE = 1024  # elements: where a piece of a tensor may start, and what a program of the kernels updates
_MASK = 0xFFFFFFFF


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
    """Loshchilov and Hutter 2019, algorithm 2; two neighbours share a Philox number, 48 bits each."""
    correction1, root2, divisor, skip = scalars.unbind()
    scaled = gradient.float().reshape(-1) / divisor
    first = exp_avg.float().view(-1).lerp(scaled, 1 - beta1)
    second = beta2 * exp_avg_sq.float().view(-1) + (1 - beta2) * scaled * scaled
    new = weight.float().view(-1) * (1 - learning_rate * weight_decay)
    new = new - learning_rate / correction1 * first / (second.sqrt() / root2 + eps)
    words = philox(_groups(new, 2), tensor, counter, ADAMW, seed)
    low, high = (torch.stack(pair, 1).view(-1)[: new.numel()] for pair in (words[:2], words[2:]))
    for kept, exact, noise in ((weight, new, low), (exp_avg, first, low >> 16), (exp_avg_sq, second, high)):
        kept.copy_(torch.where(skip == 0, _stored(exact, noise, kept.dtype), kept.view(-1)).view_as(kept))


def average_(average: Tensor, weight: Tensor, share: float, seed: int, counter: int, tensor: int, start: int) -> None:
    """average + share * (weight - average); four neighbours share a Philox number."""
    old = average.float().view(-1)
    exact = old + share * (weight.float().reshape(-1) - old)
    words = philox(_groups(exact, 4) + start // 4, tensor, counter, AVERAGE, seed)
    noise = torch.stack(words, 1).view(-1)[: exact.numel()]
    average.copy_(_stored(exact, noise, average.dtype).view_as(average))


def philox(word0: Tensor, word1: int, word2: int, word3: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 (Salmon et al. 2011, section 3.3) of counters that differ in their first word.

    Args:
        word0: (n,) int64, below 2^32; word1 to word3 likewise.
        seed: 64 bits, the key.

    Returns:
        Four (n,) int64, below 2^32.
    """
    words = [word0, *(torch.full_like(word0, word) for word in (word1, word2, word3))]
    keys = [seed & _MASK, seed >> 32 & _MASK]
    for _ in range(ROUNDS):
        high0, low0 = _product(0xD2511F53, words[0])
        high2, low2 = _product(0xCD9E8D57, words[2])
        words = [high2 ^ words[1] ^ keys[0], low2, high0 ^ words[3] ^ keys[1], low0]
        keys = [(keys[0] + 0x9E3779B9) & _MASK, (keys[1] + 0xBB67AE85) & _MASK]
    return words[0], words[1], words[2], words[3]


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Upper and lower 32 bits of a product of unsigned 32-bit numbers, by halves that 64 signed bits hold."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def _groups(x: Tensor, neighbours: int) -> Tensor:
    return torch.arange(-(-x.numel() // neighbours), device=x.device)


def _stored(x: Tensor, noise: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 as it is; bf16 up or down as the lower 16 bits of noise say, NaN and infinities as they are."""
    if dtype != torch.bfloat16:
        return x
    bits = x.view(torch.int32) + torch.where(x.isfinite(), (noise & 0xFFFF).to(torch.int32), 0)
    return (bits & -(1 << 16)).view(torch.float32).to(dtype)
