"""TrainingSettings: everything beside model and data that fixes a training run."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

_CHOICES = {
    "schedule": ("constant", "cosine"),
    "objective": ("rf", "ddpm"),
    "dtype": ("fp32", "bf16", "bf16-weights", "bf16-stochastic"),
    "moments": ("fp32", "bf16"),
    "ema_dtype": ("fp32", "bf16"),
    "ema_device": ("model", "cpu"),
}


@dataclass(frozen=True)
class TrainingSettings:
    """Everything beside model and data that fixes a training run.

    Args:
        steps: optimiser steps in all.
        objective: "rf", the velocity of rectified flow, or "ddpm", the noise, and with learn_sigma the variance.
        batch_size: images per step, over all ranks and micro-batches.
        micro_batches: parts of the batch that go through the model one after the other; their gradients are summed.
        learning_rate: of AdamW; the paper trains at 1e-4, constant.
        warmup_steps: steps of linear growth from 0 to learning_rate.
        schedule: after the warm-up, "constant", or "cosine" down to a twentieth at the last step.
        beta1, beta2, weight_decay: of AdamW.
        ema_decay: of the averaged weights; during the first steps (1 + step) / (10 + step) where that is less.
        grad_clip: largest norm of the gradient of all parameters.
        dtype: "fp32"; "bf16" for autocast with fp32 weights; "bf16-weights" for a model in bf16 whose fp32 master
            weights the optimiser keeps; or "bf16-stochastic" for one without, whose updates are rounded stochastically.
        moments: dtype of AdamW's two moments; "bf16" rounds them stochastically.
        ema_dtype: of the averaged weights; "bf16" rounds them stochastically.
        ema_device: "model", or "cpu" to keep them in the host's memory; each update then waits for the device.
        ema_every: steps between updates of the averaged weights, whose decay is then that of all these steps.
        recompute_blocks: blocks, spread evenly, that keep only their input for the backward pass and run again there.
        cuda_graph: run a micro-batch's forward and backward pass as one CUDA graph, where one process trains on a GPU;
            same results, its activations' memory stays allocated.
        flip: mirror every other image at random; wrong for digits and letters.
        seed: of the order of images, times, noise, dropped classes and flips; at least 0.

    Raises:
        ValueError: a value out of range.
    """

    steps: int
    objective: str = "rf"
    batch_size: int = 64
    micro_batches: int = 1
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: str = "constant"
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    ema_decay: float = 0.9999
    grad_clip: float = 1.0
    dtype: str = "fp32"
    moments: str = "fp32"
    ema_dtype: str = "fp32"
    ema_device: str = "model"
    ema_every: int = 1
    recompute_blocks: int = 0
    cuda_graph: bool = True
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "micro_batches": 1, "ema_every": 1}
        for name in (*least, "warmup_steps", "seed", "weight_decay", "recompute_blocks"):
            if getattr(self, name) < least.get(name, 0):
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least.get(name, 0)}")
        for name in ("learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more than 0")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 or more and less than 1")
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {choices}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rate = self.learning_rate
        if step < self.warmup_steps:
            return rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return rate
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return rate * (0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, progress))) / 2)

    def ema_decay_at(self, step: int) -> float:
        """The decay of the averaged weights in a step, counted from 0."""
        return min(self.ema_decay, (1 + step) / (10 + step))

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict that JSON can hold."""
        return asdict(self)
