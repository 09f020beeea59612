"""A micro-batch's forward and backward pass as one CUDA graph: a thousand launches for the host become one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from dit_moe_kernels import current_backend
from torch import Tensor, nn

from ..graphs import GraphCapture, NotCapturable, has_hooks

logger = logging.getLogger("dit_moe")

Pass = Callable[..., tuple[Tensor, ...]]


class GraphedBackward:
    """Calls a forward and backward pass, by replaying its graph where it has one.

    The first call captures. Activations and gradients lie in the graph's own memory, which stays allocated; a replay
    writes the gradients to the same memory again and makes them the parameters' `.grad`, so that dropping `.grad`
    between steps drops a name only. Where the pass cannot be captured the calls run plainly, and the reason is logged
    once.

    Args:
        model: whose passes these are; changed weights count at once, if they keep their place in memory.
        parameters: that get gradients; their `.grad` must be None, or with `accumulate` what the last call left.
        accumulate: whether a pass adds to a `.grad` that is not None, rather than to overwrite it.
        capture: makes a graph of a step; None takes a new `GraphCapture` of the parameters' device.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[Tensor],
        *,
        accumulate: bool = False,
        capture: Callable[..., torch.cuda.CUDAGraph] | None = None,
    ) -> None:
        self._model, self._parameters = model, list(parameters)
        self._accumulate, self._make = accumulate, capture
        self._graph: torch.cuda.CUDAGraph | None = None
        self._backend = ""  # of the graph's kernels
        self._failed: dict[str, str] = {}  # reasons, by the kernels' backend
        self._logged: set[str] = set()
        self._inputs: list[Tensor] = []
        self._outputs: tuple[Tensor, ...] = ()
        self._gradients: list[Tensor | None] = []
        self.mode = "not run yet"
        """How the last call ran: "CUDA graph", or "eager" with the reason."""

    def __call__(self, run: Pass, *inputs: Tensor) -> tuple[Tensor, ...]:
        """What `run` returns for these inputs, the gradients being in the parameters' `.grad`.

        Args:
            run: always the same; takes tensors, runs backward and returns detached tensors.
            inputs: of always the same shapes and dtypes.
        """
        reason = self._reason_against() or self._prepare(run, inputs)
        if reason is not None:
            self.mode = f"eager ({reason})"
            if reason not in self._logged:
                self._logged.add(reason)
                logger.warning("training steps run without a CUDA graph: %s", reason)
            return run(*inputs)
        assert self._graph is not None
        self.mode = "CUDA graph"
        for buffer, tensor in zip(self._inputs, inputs, strict=True):
            buffer.copy_(tensor)
        if self._accumulate and all(param.grad is None for param in self._parameters):
            self._zero()
        for param, gradient in zip(self._parameters, self._gradients, strict=True):
            param.grad = gradient
        self._graph.replay()
        return tuple(output.clone() for output in self._outputs)  # the next replay overwrites them

    def _reason_against(self) -> str | None:
        if self._parameters[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return "the caller is capturing a graph itself"
        hooked = any(param._backward_hooks or param._post_accumulate_grad_hooks for param in self._parameters)
        if hooked or has_hooks(self._model):
            return "the model has hooks, which a replay would not run"
        if any(getattr(part, "observer", None) is not None for part in self._model.modules()):
            return "the model's routers have an observer, which a replay would not tell"
        return None

    def _prepare(self, run: Pass, inputs: Sequence[Tensor]) -> str | None:
        """Have a graph for the kernels' backend, or say why there is none."""
        backend = current_backend()
        if self._graph is not None and backend == self._backend:
            return None
        if backend in self._failed:
            return self._failed[backend]
        self._drop()
        kept = [param.grad for param in self._parameters]
        try:
            self._capture(run, inputs)
        except NotCapturable as error:
            self._failed[backend] = str(error)
            self._drop()
            return self._failed[backend]
        finally:
            for param, gradient in zip(self._parameters, kept, strict=True):
                param.grad = gradient
        self._backend = backend
        return None

    def _capture(self, run: Pass, inputs: Sequence[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        if self._accumulate:
            self._gradients = [torch.zeros_like(param, requires_grad=False) for param in self._parameters]

        def reset() -> None:
            if self._accumulate:
                self._zero()
            for index, param in enumerate(self._parameters):
                param.grad = self._gradients[index] if self._accumulate else None

        def step() -> None:
            self._outputs = run(*self._inputs)

        make = self._make or GraphCapture(self._parameters[0].device)
        self._graph = make(step, reset)
        self._gradients = [param.grad for param in self._parameters]

    @torch.no_grad()
    def _zero(self) -> None:
        torch._foreach_zero_([gradient for gradient in self._gradients if gradient is not None])

    def _drop(self) -> None:
        """Give back a graph's memory, after the work that was given to the device is done."""
        if self._graph is not None:
            torch.cuda.synchronize(self._parameters[0].device)
            self._graph.reset()
        self._graph = None
        self._inputs, self._outputs, self._gradients = [], (), []
