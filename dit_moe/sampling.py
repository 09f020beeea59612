"""Samplers: rectified flow, DDPM and DDIM, with classifier-free guidance in one batched forward per step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .diffusion.gaussian import make_diffusion
from .diffusion.rectified_flow import euler_step, euler_times

Generators = torch.Generator | Sequence[torch.Generator] | None
StepHook = Callable[[int, int, Tensor], object]


def sample_rectified_flow(
    model: Any,
    noise: Tensor,
    class_ids: Tensor,
    steps: int = 50,
    cfg_scale: float = 4.0,
    *,
    guidance_channels: int | None = None,
    on_step: StepHook | None = None,
) -> Tensor:
    """Images or latents by Euler steps of rectified flow from t = 1 (noise) to t = 0; no randomness beyond `noise`.

    Args:
        model: a DiT, called as model(x, t, class_ids) with t (batch,) in (0, 1]; put into eval mode meanwhile.
        noise: (B, C, H, W) float, standard normal, on the model's device.
        class_ids: (B,) int64 in 0..num_classes; num_classes is the null class.
        steps: uniform Euler steps, at least 1.
        cfg_scale: guidance v = v_null + cfg_scale * (v_class - v_null); 1 runs the class alone at half the cost.
        guidance_channels: guide this many leading channels only; None guides all C, as the official RF sampler.
        on_step: called after each step with (steps done, steps in all, state), for progress or trajectories.
    Returns:
        (B, C, H, W) float32, or float64 where noise or model is float64.
    Raises:
        ValueError, TypeError: an argument out of range or of the wrong shape, dtype or device.

    Source: Liu et al. 2022 (rectified flow), algorithm 1.
    """
    times = euler_times(steps)
    with _sampling(model), torch.no_grad():
        predict = _GuidedModel(model, noise, class_ids, cfg_scale, guidance_channels)
        z = predict.initial_state(noise)
        for done, t in enumerate(times, start=1):
            velocity = predict(z, t)[:, : z.shape[1]]
            z = euler_step(z, velocity, 1 / steps)
            if on_step is not None:
                on_step(done, steps, z)
    return z


def sample_ddpm(
    model: Any,
    noise: Tensor,
    class_ids: Tensor,
    steps: int | str = 250,
    cfg_scale: float = 4.0,
    *,
    guidance_channels: int | None = 3,
    clip: bool = False,
    generator: Generators = None,
    on_step: StepHook | None = None,
) -> Tensor:
    """Images or latents by ancestral DDPM steps on the linear 1000-step schedule, respaced.

    Args:
        model: a DiT, called as model(x, t, class_ids) with t (batch,) in 0..999; put into eval mode meanwhile.
        noise: (B, C, H, W) float, standard normal, on the model's device.
        class_ids: (B,) int64 in 0..num_classes; num_classes is the null class.
        steps: number of steps, or a respacing text such as "10,20" (see diffusion.respaced_timesteps).
        cfg_scale: guidance on the predicted noise; 1 runs the class alone at half the cost.
        guidance_channels: guide this many leading channels only. The official code guides 3, of latents' 4 too, and so
            does this default; None guides all C.
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
    diffusion = make_diffusion(steps)
    with _sampling(model), torch.no_grad():
        predict = _GuidedModel(model, noise, class_ids, cfg_scale, guidance_channels)
        x = predict.initial_state(noise)
        for done, t in enumerate(reversed(range(diffusion.num_steps)), start=1):
            output = predict(x, float(diffusion.timesteps[t]))
            fresh = draw_noise(x.shape, generator, device=x.device, dtype=x.dtype) if t > 0 else None
            x = diffusion.ddpm_step(output, x, t, fresh, clip=clip)
            if on_step is not None:
                on_step(done, diffusion.num_steps, x)
    return x


def sample_ddim(
    model: Any,
    noise: Tensor,
    class_ids: Tensor,
    steps: int | str = 50,
    cfg_scale: float = 4.0,
    *,
    eta: float = 0.0,
    guidance_channels: int | None = 3,
    clip: bool = False,
    generator: Generators = None,
    on_step: StepHook | None = None,
) -> Tensor:
    """Images or latents by DDIM steps on the linear 1000-step schedule.

    Args:
        steps: number of steps k, which takes the respacing "ddimk" (a whole stride from step 0), or a respacing text.
        eta: share of fresh noise; 0 is deterministic.
        model, noise, class_ids, cfg_scale, guidance_channels, clip, generator, on_step: as in sample_ddpm.
    Returns:
        (B, C, H, W) float32, or float64 where noise or model is float64.
    Raises:
        ValueError, TypeError: an argument out of range or of the wrong shape, dtype or device.

    Source: Song et al. 2020 (DDIM), equation 12.
    """
    _check_steps(steps)
    diffusion = make_diffusion(f"ddim{steps}" if isinstance(steps, int) else steps)
    with _sampling(model), torch.no_grad():
        predict = _GuidedModel(model, noise, class_ids, cfg_scale, guidance_channels)
        x = predict.initial_state(noise)
        for done, t in enumerate(reversed(range(diffusion.num_steps)), start=1):
            output = predict(x, float(diffusion.timesteps[t]))
            random = eta != 0 and t > 0
            fresh = draw_noise(x.shape, generator, device=x.device, dtype=x.dtype) if random else None
            x = diffusion.ddim_step(output, x, t, fresh, eta=eta, clip=clip)
            if on_step is not None:
                on_step(done, diffusion.num_steps, x)
    return x


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


class _GuidedModel:
    """The model with classifier-free guidance, as a function of state and time with output in the state's dtype."""

    def __init__(
        self, model: Any, noise: Tensor, class_ids: Tensor, cfg_scale: float, guidance_channels: int | None
    ) -> None:
        _check_inputs(model, noise, class_ids)
        channels = noise.shape[1]
        if not math.isfinite(cfg_scale):
            raise ValueError(f"cfg_scale: got {cfg_scale}, expected a finite number")
        if guidance_channels is not None and not 1 <= guidance_channels:
            raise ValueError(f"guidance_channels: got {guidance_channels}, expected at least 1, or None for all")
        self.channels = channels if guidance_channels is None else min(guidance_channels, channels)
        self.model, self.cfg_scale, self.guided = model, cfg_scale, cfg_scale != 1
        parameter = next(model.parameters(), None)
        self.input_dtype = noise.dtype if parameter is None else parameter.dtype
        exact = torch.float64 in (noise.dtype, self.input_dtype)
        self.state_dtype = torch.float64 if exact else torch.float32
        self.class_ids = class_ids
        if self.guided:
            null_class = _null_class(model)
            self.class_ids = torch.cat([class_ids, torch.full_like(class_ids, null_class)])

    def initial_state(self, noise: Tensor) -> Tensor:
        return noise.to(self.state_dtype)

    def __call__(self, x: Tensor, t: float) -> Tensor:
        """(B, C, H, W) state at one time -> (B, C', H, W) guided output."""
        inputs = (torch.cat([x, x]) if self.guided else x).to(self.input_dtype)
        # Times stay in full precision whatever the model's dtype: bf16 holds neither 999 nor 1/50.
        times = torch.full((inputs.shape[0],), t, dtype=self.state_dtype, device=x.device)
        output = self.model(inputs, times, self.class_ids).to(self.state_dtype)
        if not self.guided:
            return output
        conditional, unconditional = output.chunk(2)
        k = self.channels
        mixed = unconditional[:, :k] + self.cfg_scale * (conditional[:, :k] - unconditional[:, :k])
        return torch.cat([mixed, conditional[:, k:]], 1)


@contextmanager
def _sampling(model: Any) -> Iterator[None]:
    """Eval mode for the time of sampling: in training mode the model drops classes at random."""
    was_training = bool(model.training)
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _null_class(model: Any) -> int:
    if model.config.class_dropout_prob <= 0:
        raise ValueError(
            "cfg_scale: expected 1, since config.class_dropout_prob is 0: this model never learned a null class"
        )
    return int(model.config.num_classes)


def _check_steps(steps: int | str) -> None:
    if not isinstance(steps, (int, str)) or isinstance(steps, bool):
        raise TypeError(f"steps: got {type(steps).__name__}, expected an int or a respacing text")
    if isinstance(steps, int) and steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    if isinstance(steps, str) and not steps.strip():
        raise ValueError("steps: got an empty text, expected a number or a respacing such as '250'")


def _check_inputs(model: Any, noise: Tensor, class_ids: Tensor) -> None:
    config = model.config
    expected = (config.in_channels, config.input_size, config.input_size)
    if noise.ndim != 4 or tuple(noise.shape[1:]) != expected:
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, expected (B, {', '.join(map(str, expected))})")
    if not noise.is_floating_point():
        raise TypeError(f"noise: got dtype {noise.dtype}, expected a floating-point dtype")
    if tuple(class_ids.shape) != tuple(noise.shape[:1]):
        raise ValueError(f"class_ids: got shape {tuple(class_ids.shape)}, expected ({noise.shape[0]},)")
    if class_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"class_ids: got dtype {class_ids.dtype}, expected int64 or int32")
    if class_ids.device != noise.device:
        raise ValueError(f"class_ids: got device {class_ids.device}, expected {noise.device} as noise has")
    # On a GPU this look at the values would stop the host; there the embedding's own check must do.
    if class_ids.device.type == "cpu" and class_ids.numel():
        low, high = int(class_ids.min()), int(class_ids.max())
        if low < 0 or high > config.num_classes:
            raise ValueError(f"class_ids: got values {low} to {high}, expected 0 to {config.num_classes}")
