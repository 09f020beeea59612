"""ShardedExperts: the routed experts of a layer, spread over ranks (expert parallelism)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from dit_moe_kernels import RoutingPlan, expert_ffn, make_routing_plan, permute, unpermute
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

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
        rows_ND = permute(x_TD.to(dtype), plan, backend=self.backend)
        send, receive = torch.stack([plan.tokens_per_expert.view_as(received_PE).sum(1), received_PE.sum(1)]).tolist()
        there, back = (Exchange(*sizes, self._group) for sizes in ((send, receive), (receive, send)))
        token = there.depart(rows_ND)
        other_TD = None if beside is None else beside()
        y_MD = self._ffn(there.arrive(token), received_PE, dtype)
        y_ND = back.arrive(back.depart(y_MD))
        return unpermute(y_ND, plan, topk_weights_TK, addend=other_TD, backend=self.backend)

    def _exchange_counts(self, tokens_per_expert_E: Tensor) -> Tensor:
        """How many rows each rank (P) sends to each of this rank's experts (E / P): (P, E / P) int32."""
        received_E = torch.empty_like(tokens_per_expert_E)
        dist.all_to_all_single(received_E, tokens_per_expert_E, group=self._group)
        return received_E.view(self._ranks, -1)

    def _ffn(self, rows_MD: Tensor, received_PE: Tensor, dtype: torch.dtype) -> Tensor:
        """This rank's experts on rows sorted by origin, then by expert: (M, D) -> (M, D) in the same order."""
        num_rows, own_experts = rows_MD.shape[0], received_PE.shape[1]
        owners = torch.arange(own_experts, dtype=torch.int32, device=rows_MD.device).repeat(self._ranks)
        ids_M1 = owners.repeat_interleave(received_PE.flatten(), output_size=num_rows)[:, None]
        plan = make_routing_plan(ids_M1, own_experts, validate=False, backend=self.backend)
        ones_M1 = rows_MD.new_ones((num_rows, 1), dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        w13, w2 = (_ExpertWeight.apply(w, dtype, self._grad_scale, self._grad_group) for w in self._own_weights())
        return expert_ffn(rows_MD, w13, w2, ones_M1, plan, backend=self.backend)

    def _own_weights(self) -> list[Tensor]:
        return [w.to_local() for w in (self.w13, self.w2) if isinstance(w, DTensor)]


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


class _ExpertWeight(torch.autograd.Function):
    """A weight in the product's dtype; its gradient in the weight's own, scaled, and averaged over a group."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype, scale: float, group: dist.ProcessGroup | None) -> Tensor:
        ctx.dtype, ctx.group = weight.dtype, group
        ctx.scale = scale if group is None else scale / group.size()
        return weight.to(dtype, copy=False).view_as(weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        # A one-element factor in the weight's dtype makes cast and product one kernel.
        grad = grad * torch.full((1, 1, 1), ctx.scale, dtype=ctx.dtype, device=grad.device)
        if ctx.group is not None:
            dist.all_reduce(grad, group=ctx.group)
        return grad, None, None, None
