"""Stochastic rounding to bf16, for state that changes by less than bf16 can show."""

from __future__ import annotations

import torch
from dit_moe_kernels import availability
from torch import Tensor


def has_kernels(device: torch.device) -> bool:
    """Whether kernels update bf16 state in one pass on a device; elsewhere PyTorch has to."""
    return device.type == "cuda" and availability("triton", device.type) is None


def round_stochastically_(out: Tensor, x: Tensor, generator: torch.Generator | None = None) -> None:
    """Write fp32 numbers to a bf16 tensor, up or down by chance, so that the expectation is the fp32 number.

    An average that moves by a thousandth a step stands still in bf16, whose numbers are up to 1/128 apart, if each
    step rounds to the nearest; here it moves in every hundredth step or so by a whole distance.

    Args:
        out: any shape, bf16.
        x: out's shape and device, fp32; NaN and infinities stay.
        generator: source of the draws, on the device.
    """
    # The upper half of an fp32 number's bits is the bf16 number towards zero; a uniform 16-bit number added to the
    # lower half carries into it as often as it should. Where it would carry a NaN or infinity, nothing is added.
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(0, 1 << 16, x.shape, generator=generator, device=x.device, dtype=torch.int32)
    noise.masked_fill_(~x.isfinite(), 0)
    out.copy_(noise.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32))
