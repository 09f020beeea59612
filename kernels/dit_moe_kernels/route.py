"""route: the whole router as one op, from tokens to the routing plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, configs, reference, router, routing
from .library import define_op
from .routing import RoutingPlan


class Routing(NamedTuple):
    """Which experts each token visits, and how much of each it takes.

    topk_weights: (T, K) fp32, probabilities of the chosen experts, not renormalised; carries the router's gradient.
    topk_ids: (T, K) int32, the chosen experts.
    probs: (T, E) fp32, probabilities of all experts.
    plan: order in which the kernels visit the T * K choices, with tokens_per_expert.
    balance_loss: () fp32, the balance loss of these tokens, or None if it was not asked for.
    """

    topk_weights: Tensor
    topk_ids: Tensor
    probs: Tensor
    plan: RoutingPlan
    balance_loss: Tensor | None = None


def route(
    x: Tensor,
    gate: Tensor,
    top_k: int,
    *,
    balance_alpha: float | None = None,
    tile_rows: int | None = None,
    backend: str = "auto",
) -> Routing:
    """Choose every token's experts: router_logits, topk_softmax and make_routing_plan in one op (paper section 2.2).

    Args:
        x: (T, D) float, tokens.
        gate: (E, D) float, the router's weight; its dtype may differ from x's.
        top_k: K, at most E.
        balance_alpha: factor of the balance loss alpha * E / (T * K) * sum_i count_i * mean_t p_i(t), whose gradient
            goes through the probabilities alone (Switch Transformer, equation 4); None means that it is not wanted.
        tile_rows: of the plan, see `make_routing_plan`.
        backend: "auto", "cuda" (at most 64 experts, widths in whole 16 bytes), "triton" or "reference".

    Returns:
        Routing; fp64 instead of fp32 if x or gate is.
    """
    checks.check_float("x", x, 2)
    checks.check_float("gate", gate, 2)
    checks.check_same_device("gate", gate, "x", x)
    (num_tokens, width), num_experts = x.shape, gate.shape[0]
    checks.check_shape("gate", gate, (num_experts, width))
    checks.check_top_k(top_k, num_experts)
    if tile_rows is None:
        tile_rows = configs.choose_tile_rows(num_tokens * top_k, num_experts)
    routing.check_tile_rows(tile_rows)
    name = router.resolve(backend, x, gate)
    weights, ids, probs, balance, *plan = _route(x, gate, top_k, tile_rows, balance_alpha or 0.0, name)
    counts, offsets, row_to_slot, slot_to_row, *tiles = plan
    plan = RoutingPlan(counts, offsets, row_to_slot, slot_to_row, tiles[0], tiles[1], tile_rows, top_k)
    return Routing(weights, ids, probs, plan, None if balance_alpha is None else balance)


def balance_scale(num_tokens: int, num_experts: int, top_k: int, alpha: float) -> float:
    """What the sum over experts of count times sum of probabilities is multiplied by."""
    return alpha * num_experts / (max(num_tokens, 1) ** 2 * top_k)


def run_route(
    x: Tensor, gate: Tensor, top_k: int, tile_rows: int, balance_alpha: float, backend: str
) -> tuple[Tensor, ...]:
    """The op's implementation: topk_weights, topk_ids, probs, balance loss, and the plan's six tensors."""
    num_experts = gate.shape[0]
    scale = balance_scale(x.shape[0], num_experts, top_k, balance_alpha)
    if backend == "reference":
        return reference.route(x, gate, top_k, tile_rows, scale)
    if backend == "cuda":
        from .cuda_impl import routing as cuda_kernels

        return cuda_kernels.route(x.contiguous(), gate.contiguous(), top_k, tile_rows, scale)
    from .triton_impl import router as kernels
    from .triton_impl import routing as plan_kernels

    weights, ids, probs = kernels.topk_softmax(kernels.router_logits(x.contiguous(), gate.contiguous()), top_k)
    plan = plan_kernels.routing_plan(ids, num_experts, tile_rows)
    return weights, ids, probs, reference.balance(probs, plan[0], scale), *plan


def route_fake(x: Tensor, gate: Tensor, top_k: int, tile_rows: int, *_: Any) -> tuple[Tensor, ...]:
    """What `run_route` returns, for torch.compile."""
    num_tokens, num_experts = x.shape[0], gate.shape[0]
    wide = reference.accumulation_dtype(torch.promote_types(x.dtype, gate.dtype))
    ids = x.new_empty(num_tokens, top_k, dtype=torch.int32)
    return (
        x.new_empty(num_tokens, top_k, dtype=wide),
        ids,
        x.new_empty(num_tokens, num_experts, dtype=wide),
        x.new_empty((), dtype=wide),
        *routing.plan_fake(ids, num_experts, tile_rows),
    )


def _setup(ctx: Any, inputs: tuple, output: Sequence[Tensor]) -> None:
    x, gate, top_k, _tile_rows, alpha, ctx.backend = inputs
    _weights, ids, probs, _balance, *plan = output
    ctx.mark_non_differentiable(ids, *plan)
    ctx.set_materialize_grads(False)
    ctx.scale = balance_scale(x.shape[0], gate.shape[0], top_k, alpha)
    ctx.save_for_backward(x, gate, ids, probs, plan[0])


def _backward(
    ctx: Any, dweights: Tensor | None, _dids: None, dprobs: Tensor | None, dbalance: Tensor | None, *_: None
) -> tuple[Tensor | None, ...]:
    x, gate, ids, probs, counts = ctx.saved_tensors
    routing = x, gate, ids, probs, counts, ctx.scale, ctx.needs_input_grad, ctx.backend
    return *route_gradients((dweights, dprobs, dbalance), *routing), *(None,) * 4


def route_gradients(
    grads: tuple[Tensor | None, Tensor | None, Tensor | None],
    x: Tensor,
    gate: Tensor,
    ids: Tensor,
    probs: Tensor,
    tokens_per_expert: Tensor,
    scale: float,
    wanted: Sequence[bool],
    backend: str,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients for x and gate from those of the weights, of probs and of the balance.

    scale: what `balance_scale` says. wanted: of x and gate.
    """
    dweights, dprobs, dbalance = grads
    dprobs = probs_gradient(dprobs, dbalance, probs, tokens_per_expert, scale)
    if not any(wanted[:2]) or (dweights is None and dprobs is None):
        return None, None
    dlogits = router.topk_softmax_gradient(dweights, dprobs, ids, probs, backend)
    return router.logits_gradients(dlogits, x, gate, wanted, backend)


def probs_gradient(
    dprobs: Tensor | None, dbalance: Tensor | None, probs: Tensor, tokens_per_expert: Tensor, scale: float
) -> Tensor | None:
    """dprobs and what the balance's gradient adds to it; scale: what `balance_scale` says."""
    if dbalance is None or scale == 0:
        return dprobs
    load = (dbalance * scale * tokens_per_expert.to(probs.dtype)).expand(probs.shape)
    return load if dprobs is None else dprobs + load


_route = define_op(
    "route(Tensor x, Tensor gate, int top_k, int tile_rows, float balance_alpha, str backend)"
    f" -> ({', '.join(['Tensor'] * 10)})",
    run_route,
    route_fake,
    setup_context=_setup,
    backward=_backward,
)
