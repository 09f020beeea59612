"""Ranks: joining those that torchrun started, and stopping all of them after the same step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


def launched_by_torchrun() -> bool:
    """Whether torchrun, or another launcher that sets the same variables, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


@contextmanager
def joined_ranks(device: torch.device) -> Iterator[None]:
    """Join the ranks of torchrun inside the block, over NCCL for GPUs and gloo for the host; alone, do nothing.

    Args:
        device: this rank's own.
    """
    if not launched_by_torchrun() or dist.is_initialized():
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


class AgreedStop:
    """A wish to stop that all ranks learn of after the same step; to be called by all after each step.

    A call starts to ask and gives the answer to the call before, which has arrived meanwhile: no rank waits for another
    rank's device.

    Args:
        wish: whether this rank wants to stop.
    """

    def __init__(self, wish: Callable[[], bool]) -> None:
        self._wish = wish
        self._group = dist.new_group(backend="gloo") if dist.is_initialized() and dist.get_world_size() > 1 else None
        self._asked: tuple[Any, torch.Tensor] | None = None

    def __call__(self) -> bool:
        if self._group is None:
            return self._wish()
        answer = False
        if self._asked is not None:
            work, wishes = self._asked
            work.wait()
            answer = bool(wishes.item())
        wishes = torch.tensor([self._wish()], dtype=torch.int32)
        self._asked = (dist.all_reduce(wishes, dist.ReduceOp.MAX, group=self._group, async_op=True), wishes)
        return answer
