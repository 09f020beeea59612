"""Rectified flow: z_t = (1 - t) x + t noise, velocity noise - x, time t in (0, 1] given to the model unscaled."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class FlowPair(NamedTuple):
    """One training example of rectified flow: model input, its time, and the velocity to predict."""

    z_t: Tensor
    t: Tensor
    target: Tensor


def logit_normal_times(
    batch: int,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Training times t = sigmoid(n), n ~ Normal(mean, std): most of them near the middle of (0, 1).

    Args:
        batch: number of times, at least 0.
        mean, std: of the normal distribution before the sigmoid; std > 0.
        generator: source of randomness, on `device`.
    Returns:
        (batch,) dtype.
    Raises:
        ValueError: negative batch or std not positive.

    Source: Esser et al. 2024 (Stable Diffusion 3), section 3.1, with the official DiT-MoE setting mean 0, std 1.
    """
    if batch < 0:
        raise ValueError(f"batch: got {batch}, expected at least 0")
    if not std > 0:
        raise ValueError(f"std: got {std}, expected more than 0")
    normal = torch.randn(batch, device=device, dtype=dtype, generator=generator)
    return torch.sigmoid(normal * std + mean)


def make_flow_pair(
    x: Tensor, *, t: Tensor | None = None, noise: Tensor | None = None, generator: torch.Generator | None = None
) -> FlowPair:
    """Mix clean latents with noise at logit-normal times and give the velocity the model shall predict there.

    Args:
        x: (B, C, H, W) float, clean latents or pixels.
        t: (B,) float in [0, 1]; None draws logit-normal times.
        noise: same shape as x; None draws standard normal noise.
        generator: source of both draws, on x's device.
    Returns:
        FlowPair(z_t (B, C, H, W), t (B,), target (B, C, H, W)).
    Raises:
        ValueError: t or noise of the wrong shape.

    Source: Liu et al. 2022 (rectified flow), equation 1, with time running from data (0) to noise (1).
    """
    if t is None:
        t = logit_normal_times(x.shape[0], device=x.device, dtype=x.dtype, generator=generator)
    if t.shape != x.shape[:1]:
        raise ValueError(f"t: got shape {tuple(t.shape)}, expected {tuple(x.shape[:1])}")
    if noise is None:
        noise = torch.randn(x.shape, device=x.device, dtype=x.dtype, generator=generator)
    if noise.shape != x.shape:
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, expected {tuple(x.shape)} as x has")
    weight = t.to(x.dtype).view(-1, *[1] * (x.ndim - 1))
    return FlowPair(torch.lerp(x, noise, weight), t, noise - x)


def rectified_flow_loss(model_output: Tensor, target: Tensor) -> Tensor:
    """Mean squared velocity error of each sample, in at least float32.

    Args:
        model_output: (B, C', H, W) float with C' >= C; channels after the first C (a learned variance) are ignored.
        target: (B, C, H, W) float, from make_flow_pair.
    Returns:
        (B,) float32, or float64 where an argument is float64.
    Raises:
        ValueError: shapes that do not fit.
    """
    channels = target.shape[1]
    expected = (target.shape[0], channels, *target.shape[2:])
    if model_output.shape[:1] + model_output.shape[2:] != target.shape[:1] + target.shape[2:] or (
        model_output.shape[1] < channels
    ):
        raise ValueError(
            f"model_output: got shape {tuple(model_output.shape)}, expected {expected} or more channels, as target has"
        )
    dtype = torch.promote_types(torch.promote_types(model_output.dtype, target.dtype), torch.float32)
    error = model_output[:, :channels].to(dtype) - target.to(dtype)
    return error.square().flatten(1).mean(1)


def euler_times(steps: int) -> list[float]:
    """The times steps/steps, (steps-1)/steps, ..., 1/steps at which the Euler sampler asks the model.

    Raises:
        ValueError: steps < 1.
    """
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    return [i / steps for i in range(steps, 0, -1)]


def euler_step(z: Tensor, velocity: Tensor, dt: float | Tensor) -> Tensor:
    """One explicit Euler step from noise towards data: z - dt * velocity.

    Args:
        z: (B, C, H, W) float.
        velocity: (B, C, H, W) float, the model's prediction at z.
        dt: step length, 1 / steps on a uniform grid; float, or a () tensor in z's dtype for the same result.
    Returns:
        (B, C, H, W), dtype of z.
    """
    return z - dt * velocity.to(z.dtype)
