"""Capturing a step as a CUDA graph, with a reason where that cannot be done."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch


class NotCapturable(RuntimeError):
    """A step cannot become a CUDA graph; the message says why."""


class GraphCapture:
    """Captures steps of one device into graphs that share their memory.

    The graphs are replayed one after the other and leave nothing behind but what they write into buffers of the
    caller, so they can share one pool: the memory is that of the largest, not the sum.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream(device)
            self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], object], reset: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """Run `step` twice, each time after `reset`, and capture it.

        Raises:
            NotCapturable: a step fails, waits for the device, or does what a graph cannot hold.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            self._rehearse(step, reset)
            # Other threads may go on using the device: only what this one does belongs to the graph.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                step()
        except Exception as error:
            self._pool = torch.cuda.graph_pool_handle()  # a failed capture may leave the old pool unusable
            text = str(error).strip().partition("\n")[0]
            raise NotCapturable(f"capturing a step failed ({type(error).__name__}: {text})") from error
        return graph

    def _rehearse(self, step: Callable[[], object], reset: Callable[[], object]) -> None:
        """Let kernels compile and libraries choose, then look for waits: they are clearer errors than broken graphs."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            reset()
            step()
            reset()
            with _waiting_forbidden():
                step()
        current.wait_stream(self._stream)


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
