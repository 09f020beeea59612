"""Standard normal noise from one generator or one per sample."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(
    shape: Sequence[int],
    generator: Generators = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise on `device`, drawn where the generator lives.

    A CPU generator gives the same values whatever the device; one generator per sample makes each sample's values
    independent of the batch.

    Args:
        shape: (B, ...).
        generator: one, a sequence of B, or None for the device's default.
    Returns:
        shape, dtype.
    Raises:
        ValueError: a sequence whose length is not B.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = device if generator is None else generator.device
        return torch.randn(tuple(shape), generator=generator, device=source, dtype=dtype).to(device, non_blocking=True)
    if len(generator) != shape[0]:
        raise ValueError(f"generator: got {len(generator)} generators, expected one per sample, {shape[0]}")
    rows = [torch.randn(tuple(shape[1:]), generator=one, device=one.device, dtype=dtype) for one in generator]
    if not rows:
        return torch.empty(tuple(shape), device=device, dtype=dtype)
    return torch.stack(rows).to(device, non_blocking=True)


def noise_source(generator: Generators, device: torch.device) -> torch.device:
    """The device on which `draw_noise` draws for a tensor on `device`."""
    if generator is None:
        return device
    if isinstance(generator, torch.Generator):
        return generator.device
    return generator[0].device if generator else device
