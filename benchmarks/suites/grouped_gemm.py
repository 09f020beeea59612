"""grouped_gemm: the experts' products alone, up (D -> 2F) and then down (F -> D), on rows already sorted by expert.

Both products take random inputs, so no activation stands between them. fwd_bwd adds the gradients of inputs and
weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import dit_moe_kernels as ops
import torch
from torch import Tensor

from ..cases import TINY_CASE, LayerShape, expert_flops, layer_shape
from ..engine import Builder, Candidate, Context, Unavailable, compare
from ..problems import expected_from, make_problem, make_topk_ids, with_gradients
from ..providers.base import missing_package
from ..providers.gemm import Gemm
from ..providers.torch_grouped import grouped_mm
from ..results import Row
from .base import Choice, Suite, Task, choose, choose_providers
from .parts import Part, candidate, rotation

PROVIDERS = ("ours-triton", "torch-grouped-mm", "loop", "moe-ops", "gemm")

Product = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class _Inputs:
    """Rows and weights of both products: x (N, I), w (E, O, I), dout (N, O)."""

    plan: ops.RoutingPlan
    operands: Sequence[tuple[Tensor, Tensor, Tensor]]


def plan(choice: Choice) -> list[Task]:
    """Every case, token count, routing and mode."""
    return [
        Task("grouped_gemm", case, mode, routing, choice.dtype, choice.device, names, tuple(choice.timers), tokens)
        for names in [choose_providers(choice, PROVIDERS)]
        for case, tokens, routing, mode in product(
            choose(choice.cases, ("S/2-8E2A", "XL/2-8E2A", "G/2-16E2A"), (TINY_CASE,), choice),
            choose(choice.tokens, (1024, 4096, 8192, 32768), (64,), choice),
            choose(choice.routings, ("balanced", "skewed", "one"), ("balanced", "skewed", "one"), choice),
            choose(choice.modes, ("fwd", "fwd_bwd"), ("fwd", "fwd_bwd"), choice),
        )
    ]


def run(task: Task, context: Context) -> list[Row]:
    """Check and time every provider on the same rows and weights."""
    shape = layer_shape(task.case)
    first = _inputs(shape, task, seed=0)
    traffic = _traffic(first, task.mode)
    inputs = [first] + [_inputs(shape, task, seed) for seed in range(1, rotation(traffic, task.device))]
    expected = [_expected(first.plan, *operands, task.mode) for operands in first.operands]
    flops = expert_flops(shape, task.token_count, task.mode)

    def build(name: str) -> Candidate:
        if name == "gemm":
            problem = make_problem(shape, task.token_count, "balanced", task.torch_dtype, task.device)
            return Candidate([Gemm().build(problem, task.mode, context.clock)], flops, None)
        copies = [_parts(name, one, task.device) for one in inputs]
        return candidate(copies, expected, task.mode, flops=flops, traffic=traffic, keep_failed=context.keep_failed)

    builders: dict[str, Builder] = {name: partial(build, name) for name in task.providers}
    return compare(context, task.template, task.timers, builders)


def _inputs(shape: LayerShape, task: Task, seed: int) -> _Inputs:
    ids = make_topk_ids(shape, task.token_count, task.routing, task.device, seed)
    routing_plan = ops.make_routing_plan(ids, shape.num_experts)
    width, hidden = shape.hidden_size, shape.expert_hidden_size
    generator = torch.Generator(task.device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.empty(size, device=task.device, dtype=task.torch_dtype)
        return values.normal_(generator=generator).mul_(scale)

    operands = [
        (
            normal(ids.numel(), in_width).requires_grad_(),
            normal(shape.num_experts, out_width, in_width, scale=in_width**-0.5).requires_grad_(),
            normal(ids.numel(), out_width),
        )
        for in_width, out_width in ((width, 2 * hidden), (hidden, width))
    ]
    return _Inputs(routing_plan, operands)


def _expected(routing_plan: ops.RoutingPlan, x: Tensor, w: Tensor, dout: Tensor, mode: str):
    multiply = _loop(routing_plan)
    return expected_from(lambda x, w: with_gradients(multiply(x, w), {"x": x, "w": w}, dout, mode), (x, w), mode)


def _parts(name: str, inputs: _Inputs, device: str) -> list[Part]:
    multiply = _PRODUCTS[name](inputs.plan, device)
    return [Part(partial(multiply, x, w), {"x": x, "w": w}, dout) for x, w, dout in inputs.operands]


def _loop(routing_plan: ops.RoutingPlan, device: str = "") -> Product:
    bounds = routing_plan.expert_offsets.tolist()

    def multiply(x: Tensor, w: Tensor) -> Tensor:
        return torch.cat([x[a:b] @ w[e].t() for e, (a, b) in enumerate(zip(bounds[:-1], bounds[1:], strict=True))])

    return multiply


def _ours(routing_plan: ops.RoutingPlan, device: str) -> Product:
    reason = ops.availability("triton", device)
    if reason is not None:
        raise Unavailable(reason)
    return lambda x, w: ops.grouped_gemm(x, w, routing_plan, backend="triton")


def _torch(routing_plan: ops.RoutingPlan, device: str) -> Product:
    ends, multiply = routing_plan.expert_offsets[1:].contiguous(), grouped_mm()
    return lambda x, w: multiply(x, w.transpose(-2, -1), offs=ends)


def _moe_ops(routing_plan: ops.RoutingPlan, device: str) -> Product:
    reason = missing_package("moe_ops", "moe-ops", device)
    if reason is not None:
        raise Unavailable(reason)
    import moe_ops

    return lambda x, w: moe_ops.grouped_gemm(x, w, routing_plan.expert_offsets, trans_b=True)


_PRODUCTS: dict[str, Callable[[ops.RoutingPlan, str], Product]] = {
    "ours-triton": _ours,
    "torch-grouped-mm": _torch,
    "loop": _loop,
    "moe-ops": _moe_ops,
}


def _traffic(inputs: _Inputs, mode: str) -> int:
    """Forward reads x and w and writes the output; backward reads x, w and dout and writes dx and dw."""
    size = inputs.operands[0][0].element_size()
    held = sum(x.numel() + w.numel() for x, w, _ in inputs.operands) * size
    outputs = sum(dout.numel() for _, _, dout in inputs.operands) * size
    return held + outputs if mode == "fwd" else 3 * held + 2 * outputs


SUITE = Suite("grouped_gemm", PROVIDERS, plan, run)
