"""ShardedExperts: the routed experts of a layer, spread over ranks (expert parallelism)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from dit_moe_kernels import RoutingPlan, expert_ffn, make_routing_plan, permute, unpermute
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement

from ..layers import GroupedExperts
from .exchange import Exchange


class ShardedExperts(GroupedExperts):
    """`GroupedExperts` of which this rank holds E / P; every row travels to the rank of its expert and back.

    Exact and dropless: each rank receives as many rows as its experts were chosen for, whatever the load. The rows'
    number must be known on the host, which waits for the device once in each forward; the backward knows it already.
    Shape suffixes beside the usual: P ranks that share the experts, M rows that this rank's experts were sent.

    Args:
        experts: all experts, of which this rank keeps its own; the same on every rank.
        mesh: one dimension, the P ranks.
        grad_scale: what each rank's gradient of the experts is multiplied by. The rows of P ranks meet in one expert,
            so its gradient is a sum over P ranks, where other parameters' gradients are averages: 1 / P makes up.
        grad_group: ranks with the same experts, over which to average their gradient too; None leaves this to FSDP.

    Raises:
        ValueError: E is no multiple of P.
    """

    def __init__(
        self,
        experts: GroupedExperts,
        mesh: DeviceMesh,
        *,
        grad_scale: float,
        grad_group: dist.ProcessGroup | None = None,
    ) -> None:
        nn.Module.__init__(self)
        num_experts = experts.w13.shape[0]
        if num_experts % mesh.size():
            raise ValueError(f"num_experts: got {num_experts}, expected a multiple of the {mesh.size()} ranks")
        self.backend, self._group, self._ranks = experts.backend, mesh.get_group(), mesh.size()
        self._grad_scale, self._grad_group = grad_scale, grad_group
        self._owners_E: Tensor | None = None
        self.w13 = _own_part(experts.w13, mesh)
        self.w2 = _own_part(experts.w2, mesh)

    def forward(
        self,
        x_TD: Tensor,
        topk_weights_TK: Tensor,
        plan: RoutingPlan,
        beside: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """As `GroupedExperts.forward`, with the plan over all E experts; `beside` runs while the rows travel."""
        dtype = _product_dtype(x_TD)
        received_PE = self._exchange_counts(plan.tokens_per_expert)
        counts = _start_reading(torch.cat([plan.tokens_per_expert, received_PE.flatten()]))
        rows_ND = permute(x_TD.to(dtype), plan, backend=self.backend)  # for the GPU while the host learns the counts
        send, receive = self._rows_by_rank(counts())
        there, back = (Exchange(*sizes, self._group) for sizes in ((send, receive), (receive, send)))
        token = there.depart(rows_ND)
        other_TD = None if beside is None else beside()
        own_plan = self._plan_of(received_PE, sum(receive))
        y_MD = self._ffn(there.arrive(token), own_plan, dtype)
        y_ND = back.arrive(back.depart(y_MD))
        return unpermute(y_ND, plan, topk_weights_TK, addend=other_TD, backend=self.backend)

    def _exchange_counts(self, tokens_per_expert_E: Tensor) -> Tensor:
        """How many rows each rank (P) sends to each of this rank's experts (E / P): (P, E / P) int32."""
        received_E = torch.empty_like(tokens_per_expert_E)
        dist.all_to_all_single(received_E, tokens_per_expert_E, group=self._group)
        return received_E.view(self._ranks, -1)

    def _rows_by_rank(self, counts: list[int]) -> tuple[list[int], list[int]]:
        """Rows that go to each rank and rows that come from each, from the counts by expert, sent and received."""
        own_experts = len(counts) // (2 * self._ranks)
        rows = [sum(counts[first : first + own_experts]) for first in range(0, len(counts), own_experts)]
        return rows[: self._ranks], rows[self._ranks :]

    def _plan_of(self, received_PE: Tensor, num_rows: int) -> RoutingPlan:
        """The order by this rank's experts of rows that are sorted by origin, then by expert."""
        own_experts, device = received_PE.shape[1], received_PE.device
        if self._owners_E is None or self._owners_E.device != device:
            self._owners_E = torch.arange(own_experts, dtype=torch.int32, device=device).repeat(self._ranks)
        ids_M1 = self._owners_E.repeat_interleave(received_PE.flatten(), output_size=num_rows)[:, None]
        return make_routing_plan(ids_M1, own_experts, validate=False, backend=self.backend)

    def _ffn(self, rows_MD: Tensor, plan: RoutingPlan, dtype: torch.dtype) -> Tensor:
        """This rank's experts on the received rows: (M, D) -> (M, D) in the same order."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        ones_M1 = rows_MD.new_ones((rows_MD.shape[0], 1), dtype=exact)
        w13, w2 = _OwnExperts.apply(self.w13, self.w2, dtype, self._grad_scale, self._grad_group)
        return expert_ffn(rows_MD, w13, w2, ones_M1, plan, backend=self.backend)


def _own_part(weight: nn.Parameter, mesh: DeviceMesh) -> nn.Parameter:
    """This rank's experts of a stacked weight, as the part of a DTensor of the whole shape."""
    own = weight.detach().chunk(mesh.size())[mesh.get_local_rank()].clone()
    return nn.Parameter(DTensor.from_local(own, mesh, [Shard(0)], run_check=False), weight.requires_grad)


def _product_dtype(x: Tensor) -> torch.dtype:
    """The dtype that `expert_ffn` computes in: rows are cast before they travel, not after."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return x.dtype


def _start_reading(counts: Tensor) -> Callable[[], list[int]]:
    """Numbers on their way to the host; the call waits for these alone, not for work that a GPU was given since."""
    if not counts.is_cuda:
        return counts.tolist
    host = torch.empty_like(counts, device="cpu", pin_memory=True).copy_(counts, non_blocking=True)
    arrived = torch.cuda.current_stream(counts.device).record_event()

    def read() -> list[int]:
        arrived.synchronize()
        return host.tolist()

    return read


class _OwnExperts(torch.autograd.Function):
    """This rank's parts of both weights in the product's dtype; gradients in their own, scaled, averaged over a group.

    One node for both, which looks into the DTensors itself: `to_local` and casts are four nodes in Python for each.
    """

    @staticmethod
    def forward(
        ctx: Any, w13: DTensor, w2: DTensor, dtype: torch.dtype, scale: float, group: dist.ProcessGroup | None
    ) -> tuple[Tensor, Tensor]:
        ctx.like, ctx.group = [_Layout.of(w) for w in (w13, w2)], group
        ctx.scale = scale if group is None else scale / group.size()
        own13, own2 = w13.to_local(), w2.to_local()
        return own13.to(dtype).view_as(own13), own2.to(dtype).view_as(own2)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[DTensor | None, ...]:
        pairs = zip(grads, ctx.like, strict=True)
        return *(like.spread(_scaled(grad, ctx.scale, like.dtype, ctx.group)) for grad, like in pairs), None, None, None


class _Layout(NamedTuple):
    """Of a DTensor, all but its elements."""

    mesh: DeviceMesh
    placements: tuple[Placement, ...]
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(tensor: DTensor) -> _Layout:
        return _Layout(tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride(), tensor.dtype)

    def spread(self, own: Tensor) -> DTensor:
        return DTensor.from_local(
            own, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )


def _scaled(grad: Tensor, scale: float, dtype: torch.dtype, group: dist.ProcessGroup | None) -> Tensor:
    if grad.dtype != dtype:  # a one-element factor in the weight's dtype makes cast and product one kernel
        grad = grad * torch.full((1, 1, 1), scale, dtype=dtype, device=grad.device)
    elif scale != 1:
        grad = grad * scale
    if group is not None:
        dist.all_reduce(grad, group=group)
    return grad
