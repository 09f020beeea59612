"""Exchange: rows travel between ranks by all-to-all, forth and (their gradients) back, beside other work."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Exchange:
    """One all-to-all of rows, each rank sending some to every rank of a group.

    Sending and receiving are two steps, so that work between them runs while the rows travel. In the backward pass the
    steps swap: the gradients set off where the rows were received, and are awaited where the rows were sent; autograd
    runs the backward of the work between them in the meantime.

    Args:
        send: rows that go to each rank, in the order of ranks.
        receive: rows that come from each rank.
        group: the ranks.
    """

    def __init__(self, send: list[int], receive: list[int], group: dist.ProcessGroup) -> None:
        self._send, self._receive, self._group = send, receive, group
        self._flights: dict[str, tuple[Tensor, Any]] = {}

    def depart(self, rows_ND: Tensor) -> Tensor:
        """Send (N, D) rows, sorted by destination; the result is a token for `arrive` and not to be read."""
        return _Depart.apply(rows_ND, self)

    def arrive(self, token: Tensor) -> Tensor:
        """Wait for the rows from all ranks, sorted by origin: (M, D)."""
        return _Arrive.apply(token, self)

    def forth(self, rows: Tensor) -> Tensor:
        """Start the rows' all-to-all."""
        return self._start("rows", rows, self._send, self._receive)

    def back(self, grad: Tensor) -> None:
        """Start the all-to-all of the received rows' gradients."""
        self._start("gradients", grad, self._receive, self._send)

    def _start(self, what: str, rows: Tensor, send: list[int], receive: list[int]) -> Tensor:
        rows = rows.contiguous()
        received = rows.new_empty(sum(receive), rows.shape[1])
        work = dist.all_to_all_single(received, rows, receive, send, group=self._group, async_op=True)
        self._flights[what] = (received, work)
        return received

    def land(self, what: str) -> Tensor:
        """Wait for what was started, "rows" or "gradients"; on a GPU the stream waits, not the host."""
        received, work = self._flights.pop(what)
        work.wait()
        return received


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.forth(rows)

    @staticmethod
    def backward(ctx: Any, _grad: Tensor) -> tuple[Tensor, None]:
        return ctx.exchange.land("gradients"), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, exchange: Exchange) -> Tensor:
        ctx.exchange = exchange
        return exchange.land("rows").view_as(token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.exchange.back(grad)
        # What _Depart hands on is the landed buffer: what autograd carries to it only has to have the right shape.
        return grad, None
