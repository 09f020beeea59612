"""What to sample, checked, and the plain loop over its steps, which is what the graphs are compared with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diffusion import Generators, Trajectory, draw_noise
from ..guidance import Guidance, mix

StepHook = Callable[[int, int, Tensor], object]


@dataclass(frozen=True)
class SamplingPlan:
    """One call of a sampler.

    Args:
        trajectory: the steps.
        scales: guidance of each step; 1 runs the class alone.
        channels: leading channels that are guided.
        null_class: id of the null class; None where no step is guided.
        generator: source of the steps' noise.
        on_step: called after each step with (steps done, steps in all, state).
    """

    trajectory: Trajectory
    scales: tuple[float, ...]
    channels: int
    null_class: int | None
    generator: Generators = None
    on_step: StepHook | None = None

    def guided(self, step: int) -> bool:
        """Whether a step needs the null class."""
        return self.scales[step] != 1

    def names(self) -> list[str]:
        """The columns of `table`."""
        return ["time", "scale", *self.trajectory.tables]

    def table(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """What changes from step to step, (S, K): moved to the device once, so that no step waits for a copy."""
        columns = [torch.tensor(values, dtype=torch.float64) for values in (self.trajectory.times, self.scales)]
        table = torch.stack([*columns, *self.trajectory.tables.values()], dim=1).to(dtype)
        return table.to(device, non_blocking=True)


def make_plan(
    model: Any,
    noise: Tensor,
    class_ids: Tensor,
    trajectory: Trajectory,
    guidance: Guidance,
    generator: Generators = None,
    on_step: StepHook | None = None,
) -> SamplingPlan:
    """Check a call of a sampler.

    Args:
        model: with the attribute `config`.
        noise: (B, C, H, W) float.
        class_ids: (B,) int64 or int32 in 0..num_classes.
        trajectory, guidance, generator, on_step: how to sample.
    Raises:
        ValueError, TypeError: an argument out of range or of the wrong shape, dtype or device.
    """
    _check_inputs(model.config, noise, class_ids)
    scales = tuple(guidance.scales(trajectory.shares))
    channels = noise.shape[1] if guidance.channels is None else min(guidance.channels, noise.shape[1])
    null_class = _null_class(model.config) if any(scale != 1 for scale in scales) else None
    return SamplingPlan(trajectory, scales, channels, null_class, generator, on_step)


def dtypes_for(model: Any, noise: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """The dtype of the model's input, and that of the state: float32, or float64 where either is."""
    parameter = next(model.parameters(), None)
    inputs = noise.dtype if parameter is None else parameter.dtype
    return inputs, torch.float64 if torch.float64 in (noise.dtype, inputs) else torch.float32


def run_stepwise(model: Any, noise: Tensor, class_ids: Tensor, plan: SamplingPlan) -> Tensor:
    """Sample step by step: (B, C, H, W) float32 or float64. Nothing in the loop waits for the device."""
    input_dtype, state_dtype = dtypes_for(model, noise)
    trajectory, steps = plan.trajectory, len(plan.trajectory)
    both = class_ids
    if plan.null_class is not None:
        both = torch.cat([class_ids, torch.full_like(class_ids, plan.null_class)])
    with evaluating(model), torch.no_grad():
        table, names = plan.table(noise.device, state_dtype), plan.names()
        x = noise.to(state_dtype)
        for step in range(steps):
            guided = plan.guided(step)
            inputs = (torch.cat([x, x]) if guided else x).to(input_dtype)
            # Times stay in full precision whatever the model's dtype: bf16 holds neither 999 nor 1/50.
            t = torch.full((len(inputs),), trajectory.times[step], dtype=state_dtype, device=x.device)
            output = model(inputs, t, both if guided else class_ids).to(state_dtype)
            row = dict(zip(names, table[step].unbind(), strict=True))
            if guided:
                output = mix(output, row["scale"], plan.channels)
            fresh = None
            if trajectory.draws(step):
                fresh = draw_noise(x.shape, plan.generator, device=x.device, dtype=x.dtype)
            x = trajectory.update(row, output, x, fresh)
            if plan.on_step is not None:
                plan.on_step(step + 1, steps, x)
    return x


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Eval mode for the time of sampling: in training mode the model drops classes at random."""
    was_training = bool(model.training)
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _null_class(config: Any) -> int:
    if config.class_dropout_prob <= 0:
        raise ValueError(
            "cfg_scale: expected 1, since config.class_dropout_prob is 0: this model never learned a null class"
        )
    return int(config.num_classes)


def _check_inputs(config: Any, noise: Tensor, class_ids: Tensor) -> None:
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
