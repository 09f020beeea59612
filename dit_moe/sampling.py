"""Samplers: rectified flow, DDPM and DDIM, with classifier-free guidance in one batched forward per step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .diffusion import (
    DDIMTrajectory,
    DDPMTrajectory,
    Generators,
    RectifiedFlowTrajectory,
    Trajectory,
    draw_noise,
    make_diffusion,
)
from .engine import SamplingEngine, StepHook, make_plan, run_stepwise
from .guidance import Guidance, Schedule

__all__ = ["Generators", "StepHook", "draw_noise", "sample_ddim", "sample_ddpm", "sample_rectified_flow"]


def sample_rectified_flow(
    model: Any,
    noise: Tensor,
    class_ids: Tensor,
    steps: int = 50,
    cfg_scale: float = 4.0,
    *,
    guidance_channels: int | None = None,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    cfg_schedule: str | Schedule = "constant",
    on_step: StepHook | None = None,
) -> Tensor:
    """Images or latents by Euler steps of rectified flow from t = 1 (noise) to t = 0; no randomness beyond `noise`.

    Args:
        model: a DiT, called as model(x, t, class_ids) with t (batch,) in (0, 1] and put into eval mode meanwhile; or a
            SamplingEngine around one.
        noise: (B, C, H, W) float, standard normal, on the model's device.
        class_ids: (B,) int64 in 0..num_classes; num_classes is the null class.
        steps: uniform Euler steps, at least 1.
        cfg_scale: guidance v = v_null + cfg_scale * (v_class - v_null); 1 runs the class alone at half the cost.
        guidance_channels: guide this many leading channels only; None guides all C, as the official RF sampler.
        guidance_interval: guide where lo < t <= hi only.
        cfg_schedule: how (cfg_scale - 1) changes with t, see guidance.Guidance.
        on_step: called after each step with (steps done, steps in all, state), for progress or trajectories.
    Returns:
        (B, C, H, W) float32, or float64 where noise or model is float64.
    Raises:
        ValueError, TypeError: an argument out of range or of the wrong shape, dtype or device.

    Source: Liu et al. 2022 (rectified flow), algorithm 1.
    """
    guidance = Guidance(cfg_scale, guidance_channels, guidance_interval, cfg_schedule)
    return _sample(model, noise, class_ids, RectifiedFlowTrajectory(steps), guidance, None, on_step)


def sample_ddpm(
    model: Any,
    noise: Tensor,
    class_ids: Tensor,
    steps: int | str = 250,
    cfg_scale: float = 4.0,
    *,
    guidance_channels: int | None = 3,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    cfg_schedule: str | Schedule = "constant",
    clip: bool = False,
    generator: Generators = None,
    on_step: StepHook | None = None,
) -> Tensor:
    """Images or latents by ancestral DDPM steps on the linear 1000-step schedule, respaced.

    Args:
        model: a DiT, called as model(x, t, class_ids) with t (batch,) in 0..999 and put into eval mode meanwhile; or a
            SamplingEngine around one.
        noise: (B, C, H, W) float, standard normal, on the model's device.
        class_ids: (B,) int64 in 0..num_classes; num_classes is the null class.
        steps: number of steps, or a respacing text such as "10,20" (see diffusion.respaced_timesteps).
        cfg_scale: guidance on the predicted noise; 1 runs the class alone at half the cost.
        guidance_channels: guide this many leading channels only. The official code guides 3, of latents' 4 too, and so
            does this default; None guides all C.
        guidance_interval: guide steps i with lo < (i + 1) / 1000 <= hi only.
        cfg_schedule: how (cfg_scale - 1) changes with (i + 1) / 1000, see guidance.Guidance.
        clip: limit predicted clean samples to [-1, 1]; for pixels, never for latents.
        generator: source of the steps' noise: one for the batch, or one per sample, which makes a sample independent of
            its batch; None takes the device's default.
        on_step: called after each step with (steps done, steps in all, state).
    Returns:
        (B, C, H, W) float32, or float64 where noise or model is float64.
    Raises:
        ValueError, TypeError: an argument out of range or of the wrong shape, dtype or device.

    Source: Ho et al. 2020 (DDPM), algorithm 2, with the learned variance of improved DDPM.
    """
    _check_steps(steps)
    guidance = Guidance(cfg_scale, guidance_channels, guidance_interval, cfg_schedule)
    trajectory = DDPMTrajectory(make_diffusion(steps), clip)
    return _sample(model, noise, class_ids, trajectory, guidance, generator, on_step)


def sample_ddim(
    model: Any,
    noise: Tensor,
    class_ids: Tensor,
    steps: int | str = 50,
    cfg_scale: float = 4.0,
    *,
    eta: float = 0.0,
    guidance_channels: int | None = 3,
    guidance_interval: tuple[float, float] = (0.0, 1.0),
    cfg_schedule: str | Schedule = "constant",
    clip: bool = False,
    generator: Generators = None,
    on_step: StepHook | None = None,
) -> Tensor:
    """Images or latents by DDIM steps on the linear 1000-step schedule.

    Args:
        steps: number of steps k, which takes the respacing "ddimk" (a whole stride from step 0), or a respacing text.
        eta: share of fresh noise; 0 is deterministic.
        model, noise, class_ids, cfg_scale, guidance_channels, guidance_interval, cfg_schedule, clip, generator,
            on_step: as in sample_ddpm.
    Returns:
        (B, C, H, W) float32, or float64 where noise or model is float64.
    Raises:
        ValueError, TypeError: an argument out of range or of the wrong shape, dtype or device.

    Source: Song et al. 2020 (DDIM), equation 12.
    """
    _check_steps(steps)
    guidance = Guidance(cfg_scale, guidance_channels, guidance_interval, cfg_schedule)
    trajectory = DDIMTrajectory(make_diffusion(ddim_respacing(steps)), eta, clip)
    return _sample(model, noise, class_ids, trajectory, guidance, generator, on_step)


def ddim_respacing(steps: int | str) -> str:
    """The respacing text that `sample_ddim` takes for its steps."""
    return f"ddim{steps}" if isinstance(steps, int) else steps


def _sample(
    model: Any,
    noise: Tensor,
    class_ids: Tensor,
    trajectory: Trajectory,
    guidance: Guidance,
    generator: Generators,
    on_step: StepHook | None,
) -> Tensor:
    plan = make_plan(model, noise, class_ids, trajectory, guidance, generator, on_step)
    if isinstance(model, SamplingEngine):
        return model.run(noise, class_ids, plan)
    return run_stepwise(model, noise, class_ids, plan)


def _check_steps(steps: int | str) -> None:
    if not isinstance(steps, (int, str)) or isinstance(steps, bool):
        raise TypeError(f"steps: got {type(steps).__name__}, expected an int or a respacing text")
    if isinstance(steps, int) and steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    if isinstance(steps, str) and not steps.strip():
        raise ValueError("steps: got an empty text, expected a number or a respacing such as '250'")
