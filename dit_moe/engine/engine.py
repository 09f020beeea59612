"""SamplingEngine: whole trajectories as replays of captured steps."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from dit_moe_kernels import current_backend
from torch import Tensor, nn

from ..graphs import GraphCapture, NotCapturable, has_hooks
from ..model import DiT
from .plan import SamplingPlan, evaluating, run_stepwise
from .program import StepProgram

logger = logging.getLogger("dit_moe")


class SamplingEngine:
    """Runs samplers on a model as replays of one captured step; give it to a sampler in place of the model:

        engine = SamplingEngine(model)
        latents = sample_rectified_flow(engine, noise, class_ids, steps=50, cfg_scale=4.0)

    A step is captured once for each kind of call (sampler, batch, shape, dtypes, guided or not, backend) and reused by
    later calls whatever their steps, guidance scale, interval and schedule. Weights changed in place count at once;
    parameters put elsewhere in memory or exchanged lead to a new capture. Where a step cannot be captured (on the CPU,
    under autocast, with hooks on the model, ...) the call runs step by step, and the reason is logged once.

    Only global switches of arithmetic (TF32 and the like) are those of the capture: after changing them call `clear`.
    One call runs at a time; others of other threads wait.

    Args:
        model: on its device, in its dtype.
        enabled: False runs every call step by step.
        capture: False runs the same step on the same buffers without a graph, also on the CPU, to look for faults.
        precompute: modulations of many steps at once, equal to the step-by-step result up to rounding; False computes
            them in each step, with the same products as the model's own forward.
        compile: run the model through torch.compile(fullgraph=True).
        max_programs: kinds of call whose graphs are kept, the latest used.
        window_bytes: most memory for the modulations and noise of the next steps, for each kind of call.

    Raises:
        ValueError: max_programs or window_bytes < 1.
    """

    def __init__(
        self,
        model: DiT,
        *,
        enabled: bool = True,
        capture: bool = True,
        precompute: bool = True,
        compile: bool = False,
        max_programs: int = 4,
        window_bytes: int = 256 * 2**20,
    ) -> None:
        for name, value in (("max_programs", max_programs), ("window_bytes", window_bytes)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected at least 1")
        self.model, self.config = model, model.config
        self.enabled, self.capture, self.precompute = enabled, capture, precompute
        self.max_programs, self.window_bytes = max_programs, window_bytes
        self._network: Callable = model.denoise if precompute else model
        if compile:
            self._network = torch.compile(self._network, fullgraph=True, dynamic=False)
        self._programs: OrderedDict[Hashable, StepProgram] = OrderedDict()
        self._failures: dict[Hashable, str] = {}
        self._captures: dict[torch.device, GraphCapture] = {}
        self._weights: tuple = ()
        self._finished: torch.cuda.Event | None = None
        self._lock = threading.RLock()
        self._logged: set[str] = set()
        self.mode = "not run yet"
        """How the last call ran: "CUDA graphs", "static buffers", or "step by step" with the reason."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The model's parameters."""
        return self.model.parameters()

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device

    def clear(self) -> None:
        """Forget all graphs and failures; the next call captures anew."""
        with self._lock:
            for program in self._programs.values():
                program.close()
            self._programs.clear()
            self._failures.clear()
            self._captures.clear()

    @torch.inference_mode(False)  # buffers made in inference mode could not be written to outside it
    @torch.no_grad()
    def run(self, noise: Tensor, class_ids: Tensor, plan: SamplingPlan) -> Tensor:
        """Sample as `run_stepwise` does.

        Args:
            noise: (B, C, H, W) float, on the model's device.
            class_ids: (B,) int64 or int32.
            plan: of `make_plan`, for this noise and these classes.
        Returns:
            (B, C, H, W) float32, or float64 where noise or model is float64.
        """
        reason = self._reason_against(noise)
        if reason is None:
            with self._lock, evaluating(self.model):
                result = self._run_program(noise, class_ids, plan)
            if isinstance(result, Tensor):
                return result
            reason = result
        unexpected = self.enabled and noise.device.type == "cuda"
        self._log_once(reason, logging.WARNING if unexpected else logging.INFO)
        self.mode = f"step by step ({reason})"
        return run_stepwise(self.model, noise, class_ids, plan)

    def _run_program(self, noise: Tensor, class_ids: Tensor, plan: SamplingPlan) -> Tensor | str:
        """The sample, or why there is no program for it."""
        self._forget_if_moved()
        key = (
            plan.trajectory.kind, plan.channels, plan.null_class, tuple(noise.shape), noise.dtype, noise.device,
            current_backend(),
        )  # fmt: skip
        if key in self._failures:
            return self._failures[key]
        device = noise.device
        if self._finished is not None:
            torch.cuda.current_stream(device).wait_event(self._finished)
        # Taken out while it runs: a call from within on_step gets another one, and one that failed is not used again.
        program = self._programs.pop(key, None)
        capture = self._capture_for(device) if self.capture else None
        try:
            if program is None:
                program = StepProgram(
                    self.model, noise, plan,
                    precompute=self.precompute, window_bytes=self.window_bytes, network=self._network,
                )  # fmt: skip
            with ExitStack() as pauses:
                for observer in self._observers():
                    pauses.enter_context(observer.paused())  # a capture rehearses the step
                program.prepare(plan, capture)
        except (NotCapturable, torch.OutOfMemoryError) as error:
            self._failures[key] = str(error).partition("\n")[0]
            if program is not None:
                program.close()
            return self._failures[key]
        try:
            result = program.run(noise, class_ids, plan)
        except BaseException:
            program.close()
            raise
        self.mode = "static buffers" if capture is None else "CUDA graphs"
        if device.type == "cuda":
            self._finished = torch.cuda.current_stream(device).record_event()
        self._programs[key] = program
        while len(self._programs) > self.max_programs:
            self._programs.popitem(last=False)[1].close()
        return result

    def _capture_for(self, device: torch.device) -> GraphCapture:
        if device not in self._captures:
            self._captures[device] = GraphCapture(device)
        return self._captures[device]

    def _forget_if_moved(self) -> None:
        """Drop the graphs if the model is not made of the same memory, settings and observers as at their capture."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        backends = [getattr(module, "backend", None) for module in self.model.modules()]
        addresses = [(tensor.data_ptr(), tensor.dtype, tensor.shape) for tensor in tensors]
        weights = (*addresses, *backends, *self._observers())
        if weights != self._weights:
            self.clear()
            self._weights = weights

    def _observers(self) -> list[Any]:
        observers = [getattr(module, "observer", None) for module in self.model.modules()]
        return [observer for observer in observers if observer is not None]

    def _reason_against(self, noise: Tensor) -> str | None:
        if not self.enabled:
            return "as asked"
        if noise.shape[0] == 0:
            return "the batch is empty"
        if torch.is_autocast_enabled(noise.device.type):
            return "autocast is on"
        if has_hooks(self.model):
            return "the model has hooks, which a replay would not run"
        if any(not hasattr(observer, "paused") for observer in self._observers()):
            return "the model's routers have an observer that cannot be paused, and a capture would be counted"
        if any(getattr(part, "count_group", None) is not None for part in self.model.modules()):
            return "the model is spread over several ranks"
        if not self.capture:
            return None
        if noise.device.type != "cuda":
            return f"CUDA graphs need a GPU, the model is on {noise.device.type}"
        if torch.cuda.is_current_stream_capturing():
            return "the caller is capturing a graph itself"
        return None

    def _log_once(self, reason: str, level: int) -> None:
        if reason not in self._logged:
            self._logged.add(reason)
            logger.log(level, "sampling step by step, without CUDA graphs: %s", reason)
