"""permute: what surrounds the products: the routing plan, dispatch (permute) and combine (unpermute).

A case named XL/2-8E2A#permute times one of them; XL/2-8E2A alone times the three in a row. The ids are fed, so
"one" sends every row to a single expert. The provider "copy" moves as many bytes as the op must, which is the bound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import dit_moe_kernels as ops
import torch
from torch import Tensor

from ..cases import TINY_CASE, LayerShape, layer_shape
from ..engine import Builder, Candidate, Context, Unavailable, compare
from ..problems import Expected, expected_from, make_topk_ids, with_gradients
from ..results import Row
from .base import Choice, Suite, Task, choose, choose_providers
from .parts import Part, candidate, rotation

PROVIDERS = ("ours-triton", "ours-cuda", "torch-grouped-mm", "copy")
STAGES = ("plan", "permute", "unpermute")


@dataclass(frozen=True)
class _Inputs:
    """x (T, D), ids (T, K), y (N, D) rows sorted by expert, weights (T, K) fp32, and the gradients' sources."""

    shape: LayerShape
    ids: Tensor
    x: Tensor
    y: Tensor
    weights: Tensor
    drows: Tensor
    dout: Tensor
    plan: ops.RoutingPlan


@dataclass(frozen=True)
class _Ops:
    """A provider's three ops."""

    plan: Callable[[], Tensor]
    permute: Callable[[Tensor], Tensor]
    unpermute: Callable[[Tensor, Tensor], Tensor]


def plan(choice: Choice) -> list[Task]:
    """Every case with its stages, token count, routing and mode."""
    cases = choose(choice.cases, ("S/2-8E2A", "XL/2-8E2A", "G/2-16E2A"), (TINY_CASE,), choice)
    named = [case for base in cases for case in ([base] if "#" in base else [base, *(f"{base}#{s}" for s in STAGES)])]
    names = choose_providers(choice, PROVIDERS)
    return [
        Task("permute", case, mode, routing, choice.dtype, choice.device, names, tuple(choice.timers), tokens=tokens)
        for case, tokens, routing, mode in product(
            named,
            choose(choice.tokens, (1024, 4096, 32768), (64,), choice),
            choose(choice.routings, ("balanced", "skewed", "one"), ("balanced", "skewed", "one"), choice),
            choose(choice.modes, ("fwd", "fwd_bwd"), ("fwd", "fwd_bwd"), choice),
        )
        if not (case.endswith("#plan") and mode == "fwd_bwd")  # a plan has no gradient
    ]


def run(task: Task, context: Context) -> list[Row]:
    """Check and time every provider's stages on the same tokens and ids."""
    base, _, stage = task.case.partition("#")
    stages = (stage,) if stage else STAGES
    if not set(stages) <= set(STAGES):
        raise ValueError(f"case: got {task.case!r}, expected a stage among {STAGES}")
    shape = layer_shape(base)
    first = _inputs(shape, task, seed=0)
    traffic = sum(_traffic(first, name, task.mode) for name in stages)
    inputs = [first] + [_inputs(shape, task, seed) for seed in range(1, rotation(traffic, task.device))]
    expected = [_expected(first, name, task.mode) for name in stages]

    def build(name: str) -> Candidate:
        if name == "copy":
            return Candidate([_copy(traffic, task.device)], None, traffic)
        copies = [_parts(_PROVIDED[name](one, task.device), one, stages) for one in inputs]
        return candidate(copies, expected, task.mode, flops=None, traffic=traffic, keep_failed=context.keep_failed)

    builders: dict[str, Builder] = {name: partial(build, name) for name in task.providers}
    return compare(context, task.template, task.timers, builders)


def _inputs(shape: LayerShape, task: Task, seed: int) -> _Inputs:
    ids = make_topk_ids(shape, task.token_count, task.routing, task.device, seed)
    generator = torch.Generator(task.device).manual_seed(seed)

    def normal(rows: int) -> Tensor:
        values = torch.empty(rows, shape.hidden_size, device=task.device, dtype=task.torch_dtype)
        return values.normal_(generator=generator)

    weights = torch.rand(ids.shape, device=task.device, generator=generator)
    x, y = normal(task.token_count).requires_grad_(), normal(ids.numel()).requires_grad_()
    made = ops.make_routing_plan(ids, shape.num_experts)
    return _Inputs(shape, ids, x, y, weights.requires_grad_(), normal(ids.numel()), normal(task.token_count), made)


def _parts(provided: _Ops, inputs: _Inputs, stages: tuple[str, ...]) -> list[Part]:
    parts = {
        "plan": Part(provided.plan, {}, None),
        "permute": Part(lambda: provided.permute(inputs.x), {"x": inputs.x}, inputs.drows),
        "unpermute": Part(
            lambda: provided.unpermute(inputs.y, inputs.weights),
            {"y": inputs.y, "weights": inputs.weights},
            inputs.dout,
        ),
    }
    return [parts[stage] for stage in stages]


def _expected(inputs: _Inputs, stage: str, mode: str) -> Expected | None:
    """Plans differ in form between providers; a wrong one shows in permute and unpermute."""
    plain, slot_to_row = _torch(inputs, ""), inputs.plan.slot_to_row.long()
    if stage == "plan":
        return None
    if stage == "permute":
        return expected_from(
            lambda x: with_gradients(plain.permute(x), {"x": x}, inputs.drows, mode), (inputs.x,), mode
        )

    def results(y: Tensor, weights: Tensor) -> dict[str, Tensor]:
        rows = y[slot_to_row].view(*inputs.ids.shape, -1)
        out = (rows * weights.to(y.dtype)[..., None]).sum(1)
        return with_gradients(out, {"y": y, "weights": weights}, inputs.dout, mode)

    return expected_from(results, (inputs.y, inputs.weights), mode)


def _ours(backend: str) -> Callable[[_Inputs, str], _Ops]:
    def provide(inputs: _Inputs, device: str) -> _Ops:
        reason = ops.availability(backend, device)
        if reason is not None:
            raise Unavailable(reason)
        experts = inputs.shape.num_experts
        return _Ops(
            lambda: ops.make_routing_plan(inputs.ids, experts, validate=False, backend=backend).row_to_slot,
            lambda x: ops.permute(x, inputs.plan, backend=backend),
            lambda y, weights: ops.unpermute(y, inputs.plan, weights, backend=backend),
        )

    return provide


def _torch(inputs: _Inputs, device: str) -> _Ops:
    """The steps around torch's grouped product: a sort, index_select, and a weighted sum."""
    top_k = inputs.ids.shape[1]
    row_to_slot, slot_to_row = inputs.plan.row_to_slot.long(), inputs.plan.slot_to_row.long()

    def make_plan() -> Tensor:
        sorted_ids, rows = inputs.ids.flatten().sort(stable=True)
        inverse = torch.empty_like(rows)
        inverse[rows] = torch.arange(rows.shape[0], device=rows.device)
        experts = torch.arange(inputs.shape.num_experts, device=rows.device, dtype=sorted_ids.dtype)
        return torch.searchsorted(sorted_ids, experts, right=True).int()

    def combine(y: Tensor, weights: Tensor) -> Tensor:
        rows = y.index_select(0, slot_to_row).view(*weights.shape, -1)
        return (rows * weights[..., None]).sum(dim=1).to(y.dtype)

    return _Ops(make_plan, lambda x: x.index_select(0, row_to_slot // top_k), combine)


_PROVIDED: dict[str, Callable[[_Inputs, str], _Ops]] = {
    "ours-triton": _ours("triton"),
    "ours-cuda": _ours("cuda"),
    "torch-grouped-mm": _torch,
}


def _traffic(inputs: _Inputs, stage: str, mode: str) -> int:
    """Compulsory bytes: permute reads tokens, writes rows; unpermute the reverse; backward likewise, plus y again."""
    if stage == "plan":
        return 3 * inputs.ids.numel() * inputs.ids.element_size()
    tokens, rows = (tensor.numel() * tensor.element_size() for tensor in (inputs.x, inputs.y))
    forward = tokens + rows
    if mode == "fwd":
        return forward
    return 2 * forward if stage == "permute" else 2 * forward + rows


def _copy(traffic: int, device: str) -> Callable[[], object]:
    source = torch.randint(-100, 100, (max(traffic // 2, 1),), dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


SUITE = Suite("permute", PROVIDERS, plan, run)
