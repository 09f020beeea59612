"""One guided step on buffers that stay where they are, so that it can be captured once and replayed for every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..diffusion import draw_noise
from ..diffusion.noise import noise_source
from ..graphs import GraphCapture
from ..guidance import mix
from .plan import SamplingPlan, dtypes_for

MAX_WINDOW = 64  # steps whose tables are on the device at once
_ROWS_AT_ONCE = 256  # rows of conditions in one product: enough to read each weight seldom, few enough to stay small


class StepProgram:
    """The steps of one kind of call: same sampler, batch, shape, dtypes and guided channels.

    A step reads everything that changes (state, times, coefficients, guidance scale, fresh noise, modulations) from
    buffers by a counter on the device, and advances that counter; so no step needs anything of the host. The buffers
    hold a window of steps and are refilled after it. Guided and unguided steps are two graphs on the same buffers.

    The modulations depend on time and class only: those of a whole window are computed before it, in products of many
    rows, from the weights as they are then. That reads the modulations' weights a few times a window instead of once a
    step, and needs no second copy of them, which would cost memory and could become stale.

    Args:
        model: a DiT.
        noise: (B, C, H, W), for shape, dtype and device.
        plan: a call of the kind.
        precompute: modulations once a window; otherwise in each step, exactly as the model's own forward has them.
        window_bytes: most memory for a window's modulations and noise.
        network: what runs the model's part of a step: model, or model.denoise with precompute; maybe compiled.
    """

    def __init__(
        self, model: Any, noise: Tensor, plan: SamplingPlan, *, precompute: bool, window_bytes: int, network: Callable
    ) -> None:
        self.model, self.network, self.trajectory = model, network, plan.trajectory
        self.channels, self.null_class, self.names = plan.channels, plan.null_class, plan.names()
        self.batch, self.device = noise.shape[0], noise.device
        self.input_dtype, self.state_dtype = dtypes_for(model, noise)
        state = partial(torch.zeros, dtype=self.state_dtype, device=self.device)
        has_null = plan.null_class is not None
        self.rows_per_step = self.batch + has_null  # one row of modulations does for all null classes of a step
        vectors, width = 6 * len(model.blocks) + 2, model.config.hidden_size
        row_bytes = vectors * width * self.input_dtype.itemsize if precompute else 0
        step_bytes = self.rows_per_step * row_bytes + self.trajectory.random * noise.numel() * self.state_dtype.itemsize
        self.window = max(1, min(MAX_WINDOW, window_bytes // max(1, step_bytes)))
        self.state = state(noise.shape)
        self.table = state((self.window, len(self.names)))
        self.position = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.class_ids = torch.zeros(self.batch * (1 + has_null), dtype=torch.int64, device=self.device)
        self.noise = state((self.window, *noise.shape)) if self.trajectory.random else None
        self.modulations: Tensor | None = None
        if precompute:
            size = self.window * self.rows_per_step, vectors, width
            self.modulations = torch.zeros(size, dtype=self.input_dtype, device=self.device)
        classes = torch.arange(self.batch, device=self.device)
        null = torch.full_like(classes, self.batch)
        self.rows = {False: classes, True: torch.cat([classes, null])}
        self._replays: dict[bool, Callable[[], object]] = {}
        self._graphs: list[torch.cuda.CUDAGraph] = []

    def prepare(self, plan: SamplingPlan, capture: GraphCapture | None) -> None:
        """Make the steps that a plan needs ready to run: as graphs, or with capture None as plain calls.

        Raises:
            NotCapturable: with the reason.
        """
        for guided in {plan.guided(step) for step in range(len(plan.trajectory))} - self._replays.keys():
            step = partial(self._step, guided)
            if capture is None:
                self._replays[guided] = step
            else:
                graph = capture(step, self.position.zero_)
                self._graphs.append(graph)
                self._replays[guided] = graph.replay

    def run(self, noise: Tensor, class_ids: Tensor, plan: SamplingPlan) -> Tensor:
        """Sample; the steps must have been prepared."""
        steps = len(plan.trajectory)
        self.state.copy_(noise)
        self.class_ids[: self.batch].copy_(class_ids)
        if self.null_class is not None:
            self.class_ids[self.batch :].fill_(self.null_class)
        table = plan.table(self.device, self.state_dtype)
        for first in range(0, steps, self.window):
            count = min(self.window, steps - first)
            self._load(table[first : first + count], first, plan)
            for step in range(first, first + count):
                self._replays[plan.guided(step)]()
                if plan.on_step is not None:
                    plan.on_step(step + 1, steps, self.state.clone())  # the state itself is about to change
        return self.state.clone()

    def close(self) -> None:
        """Destroy the graphs, after the work that was given to the device is done."""
        if self._graphs:
            torch.cuda.synchronize(self.device)
        for graph in self._graphs:
            graph.reset()
        self._graphs.clear()
        self._replays.clear()

    def _load(self, table: Tensor, first: int, plan: SamplingPlan) -> None:
        """Fill the buffers for the steps from `first` on, one for each row of the table."""
        count = len(table)
        self.position.zero_()
        self.table[:count].copy_(table)
        if self.noise is not None:
            self._load_noise(first, count, plan)
        if self.modulations is not None:
            self._load_modulations(self.modulations, count)

    def _load_noise(self, first: int, count: int, plan: SamplingPlan) -> None:
        """The fresh noise of several steps, drawn in the order of the steps; from the host in one copy."""
        assert self.noise is not None
        drawing = [step for step in range(first, first + count) if plan.trajectory.draws(step)]
        source = noise_source(plan.generator, self.device)
        shape = self.state.shape
        drawn = [draw_noise(shape, plan.generator, device=source, dtype=self.state_dtype) for _ in drawing]
        if drawn:
            noise = torch.stack(drawn)
            if source.type == "cpu" and self.device.type == "cuda":
                noise = noise.pin_memory()  # else the copy would wait for the steps before it
            self.noise[: len(drawn)].copy_(noise, non_blocking=True)

    def _load_modulations(self, modulations: Tensor, count: int) -> None:
        per_step = self.rows_per_step
        group = max(1, _ROWS_AT_ONCE // per_step)
        times = self.table[:, self.names.index("time")]
        for start in range(0, count, group):
            stop = min(start + group, count)
            t = times[start:stop, None].expand(-1, per_step).reshape(-1)
            y = self.class_ids[:per_step].repeat(stop - start)
            rows = modulations[start * per_step : stop * per_step]
            rows.copy_(self.model.modulations(self.model.condition(t, y)))

    def _step(self, guided: bool) -> None:
        row = dict(zip(self.names, self.table.index_select(0, self.position)[0].unbind(), strict=True))
        inputs = (torch.cat([self.state, self.state]) if guided else self.state).to(self.input_dtype)
        output = self._predict(inputs, row["time"], guided).to(self.state_dtype)
        if guided:
            output = mix(output, row["scale"], self.channels)
        noise = None if self.noise is None else self.noise.index_select(0, self.position)[0]
        self.state.copy_(self.trajectory.update(row, output, self.state, noise))
        self.position.add_(1)

    def _predict(self, inputs: Tensor, time: Tensor, guided: bool) -> Tensor:
        if self.modulations is None:
            return self.network(inputs, time.expand(len(inputs)), self.class_ids[: len(inputs)])
        index = self.rows[guided] + self.position * self.rows_per_step
        rows = self.modulations.flatten(1).index_select(0, index)
        return self.network(inputs, rows.unflatten(1, self.modulations.shape[1:]))
