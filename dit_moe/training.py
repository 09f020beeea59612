"""Train a pixel-space DiT with rectified flow on one device: repeatable, resumable exactly, no wait per step."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from .data import BatchOrder, ImageDataset, to_model_range
from .diffusion.rectified_flow import make_flow_pair, rectified_flow_loss
from .model import DiT

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class TrainingDivergedError(RuntimeError):
    """The loss is no longer finite."""


@dataclass(frozen=True)
class TrainingSettings:
    """Everything beside model and data that fixes a training run.

    Args:
        steps: optimiser steps in all.
        batch_size: images per step.
        learning_rate: of AdamW; the paper trains at 1e-4, constant.
        warmup_steps: steps of linear growth from 0 to learning_rate.
        schedule: after the warm-up, "constant", or "cosine" down to a twentieth at the last step.
        beta1, beta2, weight_decay: of AdamW.
        ema_decay: of the averaged weights; during the first steps (1 + step) / (10 + step) where that is less.
        grad_clip: largest norm of the gradient of all parameters.
        dtype: "fp32", or "bf16" for autocast with fp32 weights.
        flip: mirror every other image at random; wrong for digits and letters.
        seed: of the order of images, times, noise, dropped classes and flips; at least 0.

    Raises:
        ValueError: a value out of range.
    """

    steps: int
    batch_size: int = 64
    learning_rate: float = 1e-4
    warmup_steps: int = 0
    schedule: str = "constant"
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 0.0
    ema_decay: float = 0.9999
    grad_clip: float = 1.0
    dtype: str = "fp32"
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("batch_size", 1), ("warmup_steps", 0), ("seed", 0), ("weight_decay", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        for name in ("learning_rate", "grad_clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected more than 0")
        for name in ("beta1", "beta2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 or more and less than 1")
        if self.schedule not in ("constant", "cosine"):
            raise ValueError(f"schedule: got {self.schedule!r}, expected 'constant' or 'cosine'")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: got {self.dtype!r}, expected one of {sorted(DTYPES)}")

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rate = self.learning_rate
        if step < self.warmup_steps:
            return rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return rate
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return rate * (0.05 + 0.95 * (1 + math.cos(math.pi * min(1.0, progress))) / 2)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class TrainingReport:
    """Means over the steps since the last report.

    Args:
        step: steps done in all.
        loss: rectified-flow loss, without the balance loss.
        balance_loss: summed over the layers, factor alpha included.
        grad_norm: norm of the gradient before clipping.
        learning_rate: of the last step.
        images_per_second: 0 where no step was timed.
        expert_load: for each layer, each expert's share of the choices times the number of experts: 1 is even.
    """

    step: int
    loss: float
    balance_loss: float
    grad_norm: float
    learning_rate: float
    images_per_second: float
    expert_load: tuple[tuple[float, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict that JSON can hold."""
        return asdict(self)


class Trainer:
    """Rectified-flow loss and balance loss by AdamW, with averaged weights.

    Order, times and noise of a step follow from the seed and the step's number, so a run that was saved and resumed
    gives the same weights as one that was not, on the same device and software. A step never waits for the device;
    `report` does.

    Args:
        model: moved to the device and trained in place; must take the data's channels and size.
        data: images and class ids, moved to the device as 8-bit pixels.
        settings: how to train.
        device: where to train.

    Raises:
        ValueError: data that do not fit the model, or a batch larger than the data.
    """

    def __init__(
        self, model: DiT, data: ImageDataset, settings: TrainingSettings, device: torch.device | str = "cpu"
    ) -> None:
        _check_fit(model, data)
        self.device = torch.device(device)
        self.settings, self.data = settings, data.to(self.device)
        self.model = model.to(self.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.step = 0
        self.order = BatchOrder(len(data), settings.batch_size, settings.seed, self.device)
        trained = [(name, param) for name, param in self.model.named_parameters() if param.requires_grad]
        self.parameter_names = [name for name, _ in trained]
        self.parameters = [param for _, param in trained]
        averages = dict(self.ema.named_parameters())
        self._averages: list[Tensor] = [averages[name] for name in self.parameter_names]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self._reset_totals()

    def run(
        self,
        until: int | None = None,
        *,
        report_every: int = 50,
        on_report: Callable[[TrainingReport], object] | None = None,
        should_stop: Callable[[], bool] | None = None,
        on_step: Callable[[int], object] | None = None,
    ) -> None:
        """Train to step `until`, or the settings' last.

        Args:
            until: steps done in all when this returns.
            report_every: steps between reports; each waits for the device once.
            on_report: called with each `TrainingReport`, and at the end for the steps since the last.
            should_stop: asked after each step; true ends the run early.
            on_step: called with the number of steps done, after each.

        Raises:
            TrainingDivergedError: the loss or the gradient of the reported steps is not finite.
            ValueError: report_every < 1.
        """
        if report_every < 1:
            raise ValueError(f"report_every: got {report_every}, expected at least 1")
        last = self.settings.steps if until is None else min(until, self.settings.steps)
        self.model.train()
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            while self.step < last:
                self.train_step()
                if on_step is not None:
                    on_step(self.step)
                stopping = should_stop is not None and should_stop()
                if self.step % report_every == 0 or self.step == last or stopping:
                    report = self.report()
                    if on_report is not None:
                        on_report(report)
                if stopping:
                    return

    def train_step(self) -> None:
        """One optimiser step; nothing in it waits for the device. Seeds torch's default generators."""
        settings = self.settings
        if not self._steps:
            self._start = time.perf_counter()
        torch.manual_seed(_seed_of(settings.seed, self.step))
        rate = settings.learning_rate_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images, class_ids = self._batch()
        pair = make_flow_pair(images)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=settings.dtype == "bf16"):
            velocity, aux = self.model(pair.z_t, pair.t, class_ids, return_aux=True)
        loss = rectified_flow_loss(velocity, pair.target).mean()
        (loss + aux.balance_loss).backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, settings.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        decay = min(settings.ema_decay, (1 + self.step) / (10 + self.step))
        get_ema_multi_avg_fn(decay)(self._averages, self.parameters, None)
        self._totals += torch.stack([loss.detach(), aux.balance_loss.detach(), norm.detach()])
        self._loads += aux.tokens_per_expert
        self._steps += 1
        self.step += 1

    def report(self) -> TrainingReport:
        """Means since the last report; waits for the device.

        Raises:
            TrainingDivergedError: the loss or the gradient is not finite.
        """
        steps = max(1, self._steps)
        loss, balance, norm = (total / steps for total in self._totals.tolist())
        seconds = time.perf_counter() - self._start
        loads = self._loads.float()
        loads = loads / loads.mean(1, keepdim=True).clamp(min=1e-9)
        speed = self._steps * self.settings.batch_size / seconds if self._steps else 0.0
        rate = self.settings.learning_rate_at(max(0, self.step - 1))
        report = TrainingReport(self.step, loss, balance, norm, rate, speed, tuple(map(tuple, loads.tolist())))
        self._reset_totals()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise TrainingDivergedError(
                f"the loss is no longer finite (loss {loss}, gradient norm {norm} up to step {self.step}): "
                "take a smaller learning rate or more warm-up steps"
            )
        return report

    def state(self) -> dict[str, Tensor]:
        """Weights, averages and moments by name, as views of the live tensors: "model.NAME", "ema.NAME" and so on."""
        state = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        state |= {f"ema.{name}": tensor for name, tensor in self.ema.state_dict().items()}
        for name, param in zip(self.parameter_names, self.parameters, strict=True):
            for key, value in self.optimizer.state[param].items():
                state[f"optimizer.{name}.{key}"] = value
        return state

    def load_state(self, state: dict[str, Tensor], step: int) -> None:
        """Take over what `state` gave after `step` steps.

        Raises:
            ValueError: keys or shapes that do not fit the model.
        """
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for key, tensor in state.items():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = tensor
        try:
            self.model.load_state_dict(parts["model"])
            self.ema.load_state_dict(parts["ema"])
        except RuntimeError as error:
            raise ValueError(f"the training state does not fit the model: {error}") from error
        moments: dict[int, dict[str, Tensor]] = {index: {} for index in range(len(self.parameters))}
        numbers = {name: index for index, name in enumerate(self.parameter_names)}
        for key, tensor in parts["optimizer"].items():
            name, _, moment = key.rpartition(".")
            if name not in numbers:
                raise ValueError(f"the training state does not fit the model: no parameter {name}")
            moments[numbers[name]][moment] = tensor
        layout = self.optimizer.state_dict()
        self.optimizer.load_state_dict({"state": moments if step else {}, "param_groups": layout["param_groups"]})
        self.step = step
        self._reset_totals()

    def _batch(self) -> tuple[Tensor, Tensor]:
        indices = self.order.indices(self.step)
        images = to_model_range(self.data.images[indices])
        if self.settings.flip:
            mirrored = torch.rand(len(indices), device=self.device) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images, self.data.class_ids[indices]

    def _reset_totals(self) -> None:
        config = self.model.config
        shape = (config.depth, config.num_experts) if config.is_moe else (0, 0)
        self._totals = torch.zeros(3, device=self.device)
        self._loads = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._steps = 0
        self._start = time.perf_counter()


def _seed_of(seed: int, step: int) -> int:
    state = np.random.SeedSequence(
        [
            seed,
            step,
        ]
    ).generate_state(1, np.uint64)[0]
    return int(state) >> 1  # one bit less, since torch takes signed seeds


def _check_fit(model: DiT, data: ImageDataset) -> None:
    config = model.config
    if (config.in_channels, config.input_size) != (data.channels, data.image_size):
        raise ValueError(
            f"{data.name}: got {data.channels} x {data.image_size} x {data.image_size} pixels, expected "
            f"{config.in_channels} x {config.input_size} x {config.input_size} as the model takes"
        )
    if data.num_classes > config.num_classes:
        raise ValueError(f"{data.name}: got {data.num_classes} classes, expected at most {config.num_classes}")
