"""Classifier-free guidance: its strength at each step, and how the two predictions are mixed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Schedule = Callable[[float], float]

SCHEDULES: dict[str, Schedule] = {
    "constant": lambda share: 1.0,
    "linear": lambda share: 2 * (1 - share),
    "cosine": lambda share: 1 + math.cos(math.pi * share),
}
"""Factors of (scale - 1) by the share of the process that is left, from 1 (noise) to 0; each averages to 1 over it."""


@dataclass(frozen=True)
class Guidance:
    """How strongly each step is guided.

    Where a step's share t of the process (1 is pure noise) lies in the interval, lo < t <= hi, its prediction is
    null + w * (class - null) with w = 1 + (scale - 1) * schedule(t); elsewhere, and where w is 1, it is the class's
    alone, at half the cost. Rectified flow's t is its time, that is a noise level sigma = t / (1 - t) relative to the
    data; step i of a Gaussian process of N steps has t = (i + 1) / N.

    Args:
        scale: w of the constant schedule; 1 is no guidance.
        channels: guide this many leading channels only; None guides all.
        interval: (lo, hi) with 0 <= lo < hi <= 1.
        schedule: "constant", "linear" (2 (1 - t)), "cosine" (1 + cos(pi t)), or a function of t in (0, 1].
    Raises:
        ValueError: a value out of range.

    Source: Ho and Salimans 2022 (classifier-free guidance); Kynkaanniemi et al. 2024 (arXiv 2404.07724) for the
    interval; Wang et al. 2024 (arXiv 2404.13040) for schedules that rise towards the data.
    """

    scale: float = 4.0
    channels: int | None = None
    interval: tuple[float, float] = (0.0, 1.0)
    schedule: str | Schedule = "constant"

    def __post_init__(self) -> None:
        if not math.isfinite(self.scale):
            raise ValueError(f"cfg_scale: got {self.scale}, expected a finite number")
        if self.channels is not None and not 1 <= self.channels:
            raise ValueError(f"guidance_channels: got {self.channels}, expected at least 1, or None for all")
        if len(self.interval) != 2 or not 0 <= self.interval[0] < self.interval[1] <= 1:
            raise ValueError(f"guidance_interval: got {self.interval}, expected (lo, hi) with 0 <= lo < hi <= 1")
        if not callable(self.schedule) and self.schedule not in SCHEDULES:
            raise ValueError(f"cfg_schedule: got {self.schedule!r}, expected one of {sorted(SCHEDULES)} or a function")

    def scales(self, shares: Sequence[float]) -> list[float]:
        """The scale w of each step, from the steps' shares of the process.

        Raises:
            ValueError: the schedule's function gives a number that is not finite.
        """
        schedule = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        low, high = self.interval
        return [self._scale(float(schedule(share))) if low < share <= high else 1.0 for share in shares]

    def _scale(self, factor: float) -> float:
        if not math.isfinite(factor):
            raise ValueError(f"cfg_schedule: got {factor}, expected finite factors")
        return self.scale if factor == 1 else 1 + (self.scale - 1) * factor


def mix(output: Tensor, scale: Tensor, channels: int) -> Tensor:
    """Guide the first channels of a batch whose first half saw the classes and whose second half the null class.

    Args:
        output: (2B, C', H, W) float.
        scale: () in output's dtype.
        channels: how many leading channels to guide.
    Returns:
        (B, C', H, W): null + scale * (class - null) in the first channels, class in the rest.
    """
    conditional, null = output.chunk(2)
    mixed = null[:, :channels] + scale * (conditional[:, :channels] - null[:, :channels])
    return torch.cat([mixed, conditional[:, channels:]], 1)
