"""This project's layers: the module users import, and the same layer from the unfused ops."""

from __future__ import annotations

import dit_moe_kernels as ops
import torch
from torch import Tensor

from dit_moe import MoEFeedForward

from ..problems import MoEProblem
from .base import Layer, problem_weights, same_layout


class Fused:
    """`dit_moe.MoEFeedForward` without shared expert: what users call. Its balance loss is computed, but not used.

    Args:
        name: of the provider.
        backend: what must be available.
        asked: the backend that the layer is given, where it is another one; a layer takes several ops, and `auto` takes
            each where it runs best.
    """

    def __init__(self, name: str, backend: str, asked: str | None = None) -> None:
        self.name, self._backend, self._asked = name, backend, asked or backend

    def availability(self, device: str) -> str | None:
        """The backend's own reason."""
        return ops.availability(self._backend, device)

    def build(self, problem: MoEProblem) -> Layer:
        """The module, with the problem's tensors as its parameters."""
        shape = problem.shape
        module = MoEFeedForward(
            shape.hidden_size,
            shape.expert_hidden_size,
            shape.num_experts,
            shape.top_k,
            num_shared_experts=0,
            backend=self._asked,
            device="meta",
        )
        weights = {
            "gate": torch.nn.Parameter(problem.gate.detach()),
            "w13": torch.nn.Parameter(problem.w13.detach()),
            "w2": torch.nn.Parameter(problem.w2.detach()),
        }
        module.gate.weight, module.experts.w13, module.experts.w2 = weights.values()
        return Layer(lambda x: module(x).hidden, weights, same_layout)


class Unfused:
    """The public ops one after the other: permute, grouped_gemm, swiglu, grouped_gemm, unpermute."""

    def __init__(self, name: str, permute_backend: str, backend: str) -> None:
        self.name, self._permute_backend, self._backend = name, permute_backend, backend

    def availability(self, device: str) -> str | None:
        """The first reason of its two backends."""
        return ops.availability(self._permute_backend, device) or ops.availability(self._backend, device)

    def build(self, problem: MoEProblem) -> Layer:
        """A function over the problem's tensors."""
        shape, move, compute = problem.shape, self._permute_backend, self._backend

        def forward(x: Tensor) -> Tensor:
            logits = ops.router_logits(x, problem.gate, backend=compute)
            topk_weights, topk_ids, _ = ops.topk_softmax(logits, shape.top_k, backend=compute)
            plan = ops.make_routing_plan(topk_ids, shape.num_experts, validate=False, backend=compute)
            h = ops.grouped_gemm(ops.permute(x, plan, backend=move), problem.w13, plan, backend=compute)
            y = ops.grouped_gemm(ops.swiglu(h, backend=compute), problem.w2, plan, backend=compute)
            return ops.unpermute(y, plan, topk_weights, backend=move)

        return Layer(forward, problem_weights(problem), same_layout)
