"""The trainer: one step after the other, repeatable, resumable exactly, and without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..data import BatchOrder, TrainingData
from ..model import DiT
from ..parallel import ParallelConfig, full_state_dict, parallelize, unwrap
from .averages import AveragedWeights
from .graphed import GraphedBackward
from .objectives import OBJECTIVES
from .optimizer import AdamW
from .recompute import recompute
from .reports import RunningTotals, TrainingReport
from .settings import TrainingSettings
from .shards import local_part, reshard, squared_norms

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class _Draws(NamedTuple):
    """What chance decides in a step, for each image of the whole batch; `mirrored` is on the CPU."""

    times: Tensor
    noise: Tensor
    dropped: Tensor
    mirrored: Tensor
    posterior: Tensor | None


class Trainer:
    """Diffusion loss and balance loss by AdamW, with averaged weights.

    Order, times, noise, dropped classes and flips of a step follow from the seed, the step's number and an image's
    place in the batch, so a run that was saved and resumed gives the same weights as one that was not, on the same
    device and software, and ranks see together what one process would. A step never waits for the device (but where
    experts are spread over ranks, or averages lie in the host's memory); `report` does.

    Args:
        model: moved to the device and trained in place; must take the data's channels and size. A model on the meta
            device gets fresh weights. A step drops classes itself, with the model's class_dropout_prob.
        data: images or latents with class ids.
        settings: how to train.
        device: where to train; this rank's own.
        parallel: how the model is spread over ranks; None is one process.

    Raises:
        ValueError: data that do not fit the model, or a batch that is larger than the data or that ranks times
            micro-batches do not divide, or a model that cannot be spread so.
    """

    def __init__(
        self,
        model: DiT,
        data: TrainingData,
        settings: TrainingSettings,
        device: torch.device | str = "cpu",
        parallel: ParallelConfig | None = None,
    ) -> None:
        self.device, self.settings, self.config = torch.device(device), settings, model.config
        self.data, self.parallel = data, parallel or ParallelConfig()
        self.num_ranks = dist.get_world_size() if self.parallel.data_parallel != "none" else 1
        self.rank = dist.get_rank() if self.num_ranks > 1 else 0
        self._check_fit()
        self.feed = data.feed(self.device)
        self.order = BatchOrder(len(data), settings.batch_size, settings.seed, self.feed.index_device)
        self.objective = OBJECTIVES[settings.objective]()
        self.step = 0
        self._place(model)
        self.averages = AveragedWeights(
            self.optimizer.weights, _DTYPES[settings.ema_dtype], settings.ema_device, settings.ema_every
        )
        self._graphed = self._graph_for() if settings.cuda_graph else None
        self._generator = torch.Generator(self.device)
        self._cpu_generator = torch.Generator()
        config = self.config
        shape = (config.depth, config.num_experts) if config.is_moe else (0, 0)
        self._totals = RunningTotals(list(self.parameters), *shape, self.device, distributed=self.num_ranks > 1)

    def _place(self, model: DiT) -> None:
        """Spread the model, and make the optimiser of what lies here."""
        settings, sharded = self.settings, self.parallel.data_parallel == "fsdp"
        recompute(model.blocks, settings.recompute_blocks)
        # With masters, FSDP keeps fp32 parts and gathers in bf16: its parts are the master weights.
        keep_masters = settings.dtype != "bf16-stochastic"
        narrow = not keep_masters or (settings.dtype == "bf16-weights" and not sharded)
        self._autocast = settings.dtype == "bf16" or (settings.dtype != "fp32" and sharded)
        self._input_dtype = torch.bfloat16 if narrow and not sharded else torch.float32
        masters = None
        if narrow and keep_masters and self.num_ranks == 1 and not any(param.is_meta for param in model.parameters()):
            # Master weights start from the fp32 weights, not from what bf16 leaves of them.
            masters = {name: param.detach().to(self.device) for name, param in model.named_parameters()}
        if narrow:
            model = model.to(torch.bfloat16)
        gathered = torch.bfloat16 if self._autocast else torch.float32
        self._replica = parallelize(model, self.parallel, self.device, dtype=gathered)
        self.model = unwrap(self._replica)
        self.parameters = {name: param for name, param in self.model.named_parameters() if param.requires_grad}
        self.optimizer = AdamW(
            self.parameters,
            (settings.beta1, settings.beta2),
            settings.weight_decay,
            _DTYPES[settings.moments],
            keep_masters=keep_masters,
            masters=masters,
        )

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
        indices, draws = self.order.indices(self.step), self._draw()
        places = self._parts()
        parts = [self._backward(place, indices, draws, place is places[-1]) for place in places]
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

    def averaged_model(self) -> DiT | None:
        """The model with the averaged weights in fp32: the trainer's own memory where they are fp32 and on one rank.

        With several ranks a collective call, which gives the first rank a model on the CPU and the others None.
        """
        averages = self.averages.tensors
        state = {name: averages.get(name, tensor) for name, tensor in self.model.state_dict().items()}
        device = next(iter(averages.values())).device
        if self.parallel.data_parallel != "none":  # also a single rank's weights may be spread, over itself
            state, device = full_state_dict(state), torch.device("cpu")
            if self.rank:
                return None
        with torch.device("meta"):
            model = DiT(self.config)
        model.load_state_dict({name: tensor.detach().to(device).float() for name, tensor in state.items()}, assign=True)
        return model.eval().requires_grad_(False)

    @contextmanager
    def averaged_weights(self) -> Iterator[DiT]:
        """The model in place, with the averaged weights inside the block; with several ranks, all enter it together."""
        kept = {name: local_part(weight).to("cpu", copy=True) for name, weight in self.optimizer.weights.items()}
        with torch.no_grad():
            for name, param in self.parameters.items():
                local_part(param).copy_(local_part(self.averages.tensors[name]))
        reshard(self.model)
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
                yield self.model
        finally:
            reshard(self.model)
            with torch.no_grad():
                for name, param in self.parameters.items():
                    local_part(param).copy_(kept[name])

    def state(self) -> dict[str, Tensor]:
        """All that a run must keep, as live tensors: "model.NAME" (masters), "ema.NAME", "optimizer.NAME.MOMENT"."""
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
        """This rank's places in the batch, micro-batch by micro-batch."""
        whole = self.settings.batch_size // self.settings.micro_batches
        size = whole // self.num_ranks
        starts = range(self.rank * size, self.settings.batch_size, whole)
        return [slice(start, start + size) for start in starts]

    def _draw(self) -> _Draws:
        """Draw for the whole batch, whatever part of it runs here, so that no image's fate depends on the ranks."""
        seed = _seed_of(self.settings.seed, self.step)
        self._generator.manual_seed(seed)
        self._cpu_generator.manual_seed(seed)
        batch, generator, config = self.settings.batch_size, self._generator, self.config
        shape = (batch, config.in_channels, config.input_size, config.input_size)
        return _Draws(
            self.objective.draw_times(batch, generator),
            torch.randn(shape, generator=generator, device=self.device),
            torch.rand(batch, generator=generator, device=self.device) < config.class_dropout_prob,
            torch.rand(batch, generator=self._cpu_generator) < (0.5 if self.settings.flip else 0.0),
            torch.randn(shape, generator=generator, device=self.device) if self.feed.draws else None,
        )

    def _backward(self, part: slice, indices: Tensor, draws: _Draws, last: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Forward and backward of a micro-batch: its mean loss, balance loss and the experts' load."""
        posterior = None if draws.posterior is None else draws.posterior[part]
        x, class_ids = self.feed.batch(indices[part], draws.mirrored[part], posterior)
        class_ids = class_ids.masked_fill(draws.dropped[part], self.config.num_classes)
        run = self._differentiate if self._graphed is None else partial(self._graphed, self._differentiate)
        narrow = self._input_dtype == torch.bfloat16
        # DDP averages gradients once a step; sums of bf16 gradients are taken after each micro-batch's average instead.
        lonely = isinstance(self._replica, DistributedDataParallel) and not last and not narrow
        with self._replica.no_sync() if lonely else nullcontext():  # type: ignore[operator]
            loss, balance, loads = run(x, class_ids, draws.times[part], draws.noise[part])
        if self.settings.micro_batches > 1:
            self.optimizer.sum_gradients()
        return loss, balance, loads

    def _differentiate(self, x: Tensor, class_ids: Tensor, times: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        """Forward and backward of these images, without anything random: what a CUDA graph may hold."""
        x_t, model_times = self.objective.noised(x, times, noise)
        # The cache of cast weights would carry tensors of a graph's memory, or of none, from one pass to another.
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self._autocast, cache_enabled=self._graphed is None
        ):
            output, aux = self._replica(x_t.to(self._input_dtype), model_times, class_ids, return_aux=True)
        loss = self.objective.losses(output, x, x_t, times, noise).mean()
        ((loss + aux.balance_loss) / self.settings.micro_batches).backward()
        return loss.detach(), aux.balance_loss.detach(), aux.tokens_per_expert

    def _graph_for(self) -> GraphedBackward | None:
        """Passes as CUDA graphs, where one process trains on a GPU: collective calls stay out of graphs."""
        if self.device.type != "cuda" or self.parallel.data_parallel != "none":
            return None
        # Gradients in fp32 add up in place over the micro-batches; narrower ones go to the optimiser's sums.
        adds_up = self.settings.micro_batches > 1 and self._input_dtype == torch.float32
        return GraphedBackward(self.model, list(self.parameters.values()), accumulate=adds_up)

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
        self.averages.update(done, decays, self._generator)
        return norm, squares

    def _check_fit(self) -> None:
        config, data, settings = self.config, self.data, self.settings
        if (config.in_channels, config.input_size) != (data.channels, data.image_size):
            raise ValueError(
                f"{data.name}: got {data.channels} x {data.image_size} x {data.image_size} pixels, expected "
                f"{config.in_channels} x {config.input_size} x {config.input_size} as the model takes"
            )
        if data.num_classes > config.num_classes:
            raise ValueError(f"{data.name}: got {data.num_classes} classes, expected at most {config.num_classes}")
        if settings.batch_size % (settings.micro_batches * self.num_ranks):
            raise ValueError(
                f"batch_size: got {settings.batch_size}, expected a multiple of {settings.micro_batches} micro-batches "
                f"times {self.num_ranks} ranks"
            )


def _seed_of(seed: int, step: int) -> int:
    state = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return int(state) >> 1  # one bit less, since torch takes signed seeds
