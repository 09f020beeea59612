"""The trainer: one step after the other, repeatable, resumable exactly, and without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..data import BatchOrder, ImageDataset, to_model_range
from ..model import DiT, MoEAux
from .averages import AveragedWeights
from .objectives import OBJECTIVES
from .optimizer import AdamW
from .recompute import recompute
from .reports import RunningTotals, TrainingReport
from .settings import TrainingSettings
from .shards import squared_norms, whole

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _Draws(NamedTuple):
    """What chance decides in a step, for each image of the whole batch."""

    times: Tensor
    noise: Tensor
    dropped: Tensor
    mirrored: Tensor


class Trainer:
    """Diffusion loss and balance loss by AdamW, with averaged weights.

    Order, times, noise, dropped classes and flips of a step follow from the seed, the step's number and an image's
    place in the batch, so a run that was saved and resumed gives the same weights as one that was not, on the same
    device and software. A step never waits for the device; `report` does.

    Args:
        model: moved to the device, with dtype "bf16-weights" cast to bf16, and trained in place; must take the data's
            channels and size. A step drops classes itself, with the model's class_dropout_prob.
        data: images and class ids, moved to the device as 8-bit pixels.
        settings: how to train.
        device: where to train.

    Raises:
        ValueError: data that do not fit the model, or a batch that is larger than the data or that the micro-batches
            do not divide.
    """

    def __init__(
        self, model: DiT, data: ImageDataset, settings: TrainingSettings, device: torch.device | str = "cpu"
    ) -> None:
        _check_fit(model, data, settings)
        self.device = torch.device(device)
        self.settings, self.data = settings, data.to(self.device)
        recompute(model.blocks, settings.recompute_blocks)
        weights = torch.bfloat16 if settings.dtype == "bf16-weights" else torch.float32
        # Master weights start from the fp32 weights, not from what bf16 leaves of them.
        exact = {name: param.detach().to(self.device) for name, param in model.named_parameters()}
        self.model = model.to(self.device, weights)
        self.objective = OBJECTIVES[settings.objective]()
        self.step = 0
        self.order = BatchOrder(len(data), settings.batch_size, settings.seed, self.device)
        self.parameters = {name: param for name, param in self.model.named_parameters() if param.requires_grad}
        self.optimizer = AdamW(
            self.parameters,
            (settings.beta1, settings.beta2),
            settings.weight_decay,
            _DTYPES[settings.moments],
            masters=exact,
        )
        del exact
        self.averages = AveragedWeights(
            self.optimizer.weights, _DTYPES[settings.ema_dtype], settings.ema_device, settings.ema_every
        )
        self._generator = torch.Generator(self.device)
        self._cpu_generator = torch.Generator()
        config = model.config
        shape = (config.depth, config.num_experts) if config.is_moe else (0, 0)
        self._totals = RunningTotals(list(self.parameters), *shape, self.device)

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
            TrainingDivergedError: a loss or a gradient of the reported steps is not finite.
            ValueError: report_every < 1.
        """
        if report_every < 1:
            raise ValueError(f"report_every: got {report_every}, expected at least 1")
        last = self.settings.steps if until is None else min(until, self.settings.steps)
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
        """One optimiser step; nothing in it waits for the device."""
        settings = self.settings
        self._totals.begin_step()
        self.model.train()
        self.model.y_embedder.eval()  # the draws below drop classes, whatever rank an image is on
        seed = _seed_of(settings.seed, self.step)
        self._generator.manual_seed(seed)
        self._cpu_generator.manual_seed(seed)
        indices, draws = self.order.indices(self.step), self._draw()
        parts = [self._backward(part, indices, draws) for part in self._parts()]
        losses, balances, loads = (torch.stack(column).sum(0) for column in zip(*parts, strict=True))
        norm, squares = self._update()
        scale = 1 / settings.micro_batches
        self.step += 1
        self._totals.add(self.step, losses * scale, balances * scale, squares, norm, loads)

    def report(self) -> TrainingReport:
        """Means since the last report; waits for the device.

        Raises:
            TrainingDivergedError: a loss or a gradient is not finite.
        """
        rate = self.settings.learning_rate_at(max(0, self.step - 1))
        return self._totals.read(self.step, rate, self.settings.batch_size)

    def averaged_model(self) -> DiT:
        """The model with the averaged weights in fp32, for sampling; it shares their memory where they are fp32."""
        with torch.device("meta"):
            model = DiT(self.model.config)
        averages = self.averages.tensors
        device = next(iter(averages.values())).device
        state = {name: whole(tensor.detach()).to(device) for name, tensor in self.model.state_dict().items()
                 if name not in averages}  # fmt: skip
        state |= {name: whole(tensor) for name, tensor in averages.items()}
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
        return model.eval().requires_grad_(False)

    def state(self) -> dict[str, Tensor]:
        """All that a run must keep, as live tensors: "model.NAME" in fp32, "ema.NAME" and "optimizer.NAME.MOMENT"."""
        weights = {**self.model.state_dict(), **self.optimizer.weights}
        state = {f"model.{name}": tensor.detach() for name, tensor in weights.items()}
        state |= {f"ema.{name}": tensor for name, tensor in self.averages.tensors.items()}
        return state | {f"optimizer.{name}": tensor for name, tensor in self.optimizer.state().items()}

    @torch.no_grad()
    def load_state(self, state: dict[str, Tensor], step: int) -> None:
        """Take over what `state` gave after `step` steps.

        Raises:
            ValueError: keys or shapes that do not fit the model.
        """
        live = self.state()
        if live.keys() != state.keys():
            odd = sorted(live.keys() ^ state.keys())
            raise ValueError(f"the training state does not fit the model: {len(odd)} keys differ, such as {odd[0]}")
        for name, tensor in live.items():
            if tensor.shape != state[name].shape:
                got, expected = tuple(state[name].shape), tuple(tensor.shape)
                raise ValueError(f"the training state does not fit the model: {name} has shape {got}, not {expected}")
            tensor.copy_(state[name])
        self.restored(step)

    def restored(self, step: int) -> None:
        """To be called once the tensors of `state` hold what they held after `step` steps."""
        self.optimizer.copy_weights()
        self.step = step
        self._totals.reset()

    def _parts(self) -> list[slice]:
        """The places in the batch of each micro-batch."""
        size = self.settings.batch_size // self.settings.micro_batches
        return [slice(start, start + size) for start in range(0, self.settings.batch_size, size)]

    def _draw(self) -> _Draws:
        """Draw for the whole batch, whatever part of it runs here, so that no image's fate depends on the ranks."""
        batch, generator, config = self.settings.batch_size, self._generator, self.model.config
        shape = (batch, config.in_channels, config.input_size, config.input_size)
        dropped, mirrored = torch.rand(2, batch, generator=generator, device=self.device)
        return _Draws(
            self.objective.draw_times(batch, generator),
            torch.randn(shape, generator=generator, device=self.device),
            dropped < config.class_dropout_prob,
            mirrored < (0.5 if self.settings.flip else 0.0),
        )

    def _backward(self, part: slice, indices: Tensor, draws: _Draws) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward of a micro-batch: its mean loss, balance loss and the experts' load."""
        x, class_ids = self._images(indices[part], draws.mirrored[part])
        class_ids = class_ids.masked_fill(draws.dropped[part], self.model.config.num_classes)
        times, noise = draws.times[part], draws.noise[part]
        x_t, model_times = self.objective.noised(x, times, noise)
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bf16")
        with autocast:
            output, aux = self.model(x_t.to(self._input_dtype), model_times, class_ids, return_aux=True)
        loss = self.objective.losses(output, x, x_t, times, noise).mean()
        balance, loads = self._balance(aux)
        ((loss + balance) / self.settings.micro_batches).backward()
        if self.settings.micro_batches > 1:
            self.optimizer.sum_gradients()
        return loss.detach(), balance.detach(), loads

    def _balance(self, aux: MoEAux) -> tuple[Tensor, Tensor]:
        """The balance loss and the experts' load of a micro-batch."""
        return aux.balance_loss, aux.tokens_per_expert

    def _update(self) -> tuple[Tensor, Tensor]:
        """Clip, update weights and averages: the gradient's norm, and the squared norm of each parameter's."""
        settings, gradients = self.settings, self.optimizer.gradients()
        squares = squared_norms([gradients[name] for name in self.parameters])
        norm = squares.sum().sqrt()
        self.optimizer.step(
            settings.learning_rate_at(self.step),
            divisor=((norm + 1e-6) / settings.grad_clip).clamp(min=1.0),
            skip=(~norm.isfinite()).float(),
            generator=self._generator,
        )
        self.optimizer.zero_gradients()
        done = self.step + 1
        decays = [settings.ema_decay_at(step) for step in range(max(0, done - settings.ema_every), done)]
        on_cpu = settings.ema_device == "cpu"
        self.averages.update(done, decays, self._cpu_generator if on_cpu else self._generator)
        return norm, squares

    def _images(self, indices: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor]:
        images = to_model_range(self.data.images[indices])
        if self.settings.flip:
            images = torch.where(mirrored[:, None, None, None], images.flip(3), images)
        return images, self.data.class_ids[indices]

    @property
    def _input_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.settings.dtype == "bf16-weights" else torch.float32


def _seed_of(seed: int, step: int) -> int:
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return int(state) >> 1  # one bit less, since torch takes signed seeds


def _check_fit(model: DiT, data: ImageDataset, settings: TrainingSettings) -> None:
    config = model.config
    if (config.in_channels, config.input_size) != (data.channels, data.image_size):
        raise ValueError(
            f"{data.name}: got {data.channels} x {data.image_size} x {data.image_size} pixels, expected "
            f"{config.in_channels} x {config.input_size} x {config.input_size} as the model takes"
        )
    if data.num_classes > config.num_classes:
        raise ValueError(f"{data.name}: got {data.num_classes} classes, expected at most {config.num_classes}")
    if settings.batch_size % settings.micro_batches:
        raise ValueError(f"batch_size: got {settings.batch_size}, expected a multiple of {settings.micro_batches}")
