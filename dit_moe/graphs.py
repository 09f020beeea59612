"""Capturing a step as a CUDA graph, with a reason where that cannot be done."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class NotCapturable(RuntimeError):
    """A step cannot become a CUDA graph; the message says why."""


class GraphCapture:
    """Captures steps of one device into graphs that share their memory.

    The graphs are replayed one after the other and leave nothing behind but what they write into buffers of the
    caller, so they can share one pool: the memory is that of the largest, not the sum. After a failed capture the
    process goes on as if there had been none.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], object], reset: Callable[[], object] | None = None) -> torch.cuda.CUDAGraph:
        """Run `step` twice and capture it, each time after `reset`.

        Raises:
            NotCapturable: a step fails, waits for the device, or does what a graph cannot hold.
        """
        reset = reset or _nothing
        try:
            self._rehearse(step, reset)
            reset()
        except Exception as error:
            raise NotCapturable(_reason(error)) from error
        graph = torch.cuda.CUDAGraph()
        try:
            # The outer context gives the caller's stream back, which torch forgets where a capture's end fails. Other
            # threads may go on using the device: only what this one does belongs to the graph.
            with (
                torch.cuda.stream(torch.cuda.current_stream(self.device)),
                torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"),
            ):
                step()
        except Exception as error:
            self._recover()
            # The end of a broken capture fails as well and hides what broke it.
            first = error.__context__ if isinstance(error.__context__, Exception) else error
            raise NotCapturable(_reason(first)) from error
        return graph

    def _rehearse(self, step: Callable[[], object], reset: Callable[[], object]) -> None:
        """Let kernels compile and libraries choose, then look for waits: they are clearer errors than broken graphs."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                reset()
                step()
                reset()
                with _waiting_forbidden():
                    step()
        finally:
            current.wait_stream(self._stream)

    def _recover(self) -> None:
        """After a failed capture: a new memory pool, and a capture that succeeds.

        Without the latter torch's random generator believes for good that it is being captured.
        """
        torch.cuda.synchronize(self.device)
        self._pool = torch.cuda.graph_pool_handle()
        with torch.cuda.device(self.device):
            with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=self._pool, stream=self._stream):
                torch.zeros(1, device=self.device)
            with torch.random.fork_rng([torch.cuda.current_device()]):
                torch.rand(1, device=self.device)  # raises if that did not help


def has_hooks(model: nn.Module) -> bool:
    """Whether something listens to a module's calls, which a graph's replay would not tell it of."""
    parts = list(model.modules())
    return any(
        getattr(torch_module, f"_global{name}", None) or any(getattr(part, name) for part in parts) for name in _HOOKS
    )


def _nothing() -> None:
    pass


def _reason(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"capturing a step failed ({type(error).__name__}: {text})"


@contextmanager
def _waiting_forbidden() -> Iterator[None]:
    """Make a wait for the device an error."""
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that this mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(mode)
