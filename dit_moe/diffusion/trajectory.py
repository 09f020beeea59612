"""Samplers as data: what differs from step to step stands in tables, what does not is one function of tensors.

So the same update runs step by step and inside a CUDA graph that reads its coefficients from the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from .gaussian import GaussianDiffusion
from .rectified_flow import euler_step, euler_times

_PREDICTION = ("sqrt_recip_alpha_bar", "sqrt_recip_alpha_bar_minus_1")
_POSTERIOR = ("posterior_mean_x0", "posterior_mean_x_t", "log_posterior_variance", "log_beta", "log_fixed_variance")


class Trajectory(ABC):
    """The steps of a sampler, in the order in which they are taken.

    Args:
        times: the times as the model takes them.
        shares: the same on the scale of the whole process, in (0, 1], 1 being pure noise.
        tables: coefficients of each step, (S,) each.
        random: whether steps draw fresh noise; the last never does.
    """

    def __init__(
        self, times: Sequence[float], shares: Sequence[float], tables: Mapping[str, Tensor], *, random: bool
    ) -> None:
        self.times, self.shares, self.random = tuple(times), tuple(shares), random
        self.tables = dict(tables)

    def __len__(self) -> int:
        return len(self.times)

    def draws(self, step: int) -> bool:
        """Whether a step takes fresh noise."""
        return self.random and step < len(self) - 1

    @property
    @abstractmethod
    def kind(self) -> Hashable:
        """What fixes `update` beside the tables: trajectories of one kind can share a graph."""

    @abstractmethod
    def update(self, row: Mapping[str, Tensor], output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        """The next state.

        Args:
            row: one step's coefficients by the tables' names, () tensors in x's dtype and on its device.
            output: (B, C', H, W) the model's guided prediction, C' >= C.
            x: (B, C, H, W) float, the state.
            noise: (B, C, H, W) standard normal for a random trajectory; the last step takes none or ignores it.
        Returns:
            (B, C, H, W), dtype of x.
        """


class RectifiedFlowTrajectory(Trajectory):
    """Uniform Euler steps of rectified flow from t = 1 to 0 (Liu et al. 2022, algorithm 1).

    Args:
        steps: at least 1.
    Raises:
        ValueError: steps < 1.
    """

    def __init__(self, steps: int) -> None:
        times = euler_times(steps)
        super().__init__(times, times, {"dt": torch.full((steps,), 1 / steps, dtype=torch.float64)}, random=False)

    @property
    def kind(self) -> Hashable:
        return "rf"

    def update(self, row: Mapping[str, Tensor], output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        return euler_step(x, output[:, : x.shape[1]], row["dt"])


class DDPMTrajectory(Trajectory):
    """Ancestral steps with the learned variance (Ho et al. 2020, algorithm 2; Nichol and Dhariwal 2021).

    Args:
        diffusion: the kept steps.
        clip: limit predicted clean samples to [-1, 1].
    """

    def __init__(self, diffusion: GaussianDiffusion, clip: bool) -> None:
        self.diffusion, self.clip = diffusion, clip
        tables = {name: diffusion.table(name).double().flip(0) for name in _PREDICTION + _POSTERIOR}
        tables["is_random"] = torch.arange(len(diffusion.timesteps)).flip(0).clamp(max=1).double()
        super().__init__(*_gaussian_times(diffusion), tables, random=True)

    @property
    def kind(self) -> Hashable:
        return "ddpm", self.clip

    def update(self, row: Mapping[str, Tensor], output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        moments = self.diffusion.p_mean_variance(output, x, row, clip=self.clip)
        if noise is None:
            return moments.mean
        # Chosen, not multiplied by 0: a learned variance may be infinite in the last step, where nobody trained it.
        return torch.where(row["is_random"] > 0, moments.draw(noise), moments.mean)


class DDIMTrajectory(Trajectory):
    """DDIM steps (Song et al. 2020, equation 12).

    Args:
        diffusion: the kept steps.
        eta: share of fresh noise; 0 is deterministic.
        clip: limit predicted clean samples to [-1, 1].
    Raises:
        ValueError: eta negative, or larger than a step has room for.
    """

    def __init__(self, diffusion: GaussianDiffusion, eta: float, clip: bool) -> None:
        self.diffusion, self.clip = diffusion, clip
        steps = range(diffusion.num_steps)
        spread = torch.tensor([diffusion.ddim_spread(step, eta) for step in steps], dtype=torch.float64)
        spread[0, 0] = 0.0  # the last step taken is the mean, whatever its rounded variance says
        tables = {name: diffusion.table(name).double() for name in (*_PREDICTION, "sqrt_alpha_bar_previous")}
        tables |= {"sigma": spread[:, 0], "direction": spread[:, 1]}
        tables = {name: table.flip(0) for name, table in tables.items()}
        super().__init__(*_gaussian_times(diffusion), tables, random=eta != 0)

    @property
    def kind(self) -> Hashable:
        return "ddim", self.clip, self.random

    def update(self, row: Mapping[str, Tensor], output: Tensor, x: Tensor, noise: Tensor | None) -> Tensor:
        mean = self.diffusion.ddim_mean(output, x, row, row["direction"], clip=self.clip)
        return mean if noise is None else mean + row["sigma"] * noise


def _gaussian_times(diffusion: GaussianDiffusion) -> tuple[list[float], list[float]]:
    times = [float(step) for step in reversed(diffusion.timesteps)]
    return times, [(time + 1) / diffusion.full_steps for time in times]
