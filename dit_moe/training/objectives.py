"""What the model learns: rectified flow's velocity, or DDPM's noise and variance, from the same draws."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ..diffusion.gaussian import make_diffusion
from ..diffusion.rectified_flow import logit_normal_times, make_flow_pair, rectified_flow_loss


class Objective(Protocol):
    """A training loss, in the parts that the trainer needs."""

    def draw_times(self, batch: int, generator: torch.Generator) -> Tensor:
        """A time for each image, (batch,) on the generator's device."""

    def noised(self, x: Tensor, times: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """The model's input (B, C, H, W) and its times (B,) fp32."""

    def losses(self, output: Tensor, x: Tensor, x_t: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """The loss of each image, (B,) fp32, from the model's output at `noised`'s x_t."""


class RectifiedFlow:
    """Mean squared error of the velocity noise - x at logit-normal times (Liu et al. 2022, Esser et al. 2024)."""

    def draw_times(self, batch: int, generator: torch.Generator) -> Tensor:
        return logit_normal_times(batch, device=generator.device, generator=generator)

    def noised(self, x: Tensor, times: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return make_flow_pair(x, t=times, noise=noise).z_t, times

    def losses(self, output: Tensor, x: Tensor, x_t: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        return rectified_flow_loss(output, noise - x)


class Ddpm:
    """Error of the noise at uniform steps, with variance channels also the bound (improved DDPM, section 3.1)."""

    def __init__(self) -> None:
        self.diffusion = make_diffusion()

    def draw_times(self, batch: int, generator: torch.Generator) -> Tensor:
        return torch.randint(0, self.diffusion.num_steps, (batch,), generator=generator, device=generator.device)

    def noised(self, x: Tensor, times: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        return self.diffusion.q_sample(x, times, noise), self.diffusion.model_times(times, len(times))

    def losses(self, output: Tensor, x: Tensor, x_t: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        return self.diffusion.losses(output, x, x_t, times, noise).loss


OBJECTIVES: dict[str, type[RectifiedFlow] | type[Ddpm]] = {"rf": RectifiedFlow, "ddpm": Ddpm}
