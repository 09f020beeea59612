"""routed_ffn: the whole routed layer as one op, since small layers wait for the host.

With gradients the experts' part of x's goes from its rows into the router's, before their one rounding, where autograd
would combine the rows and then add in a pass of its own.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, checks, configs, reference, router
from .expert_ffn import (
    PLAN_SCHEMA,
    check_addend,
    check_expert_weights,
    expert_ffn,
    expert_ffn_gradients,
    run_forward,
)
from .library import define_op
from .route import balance_scale, probs_gradient, route, route_fake, route_gradients, run_route


class RoutedFFN(NamedTuple):
    """What `routed_ffn` returns.

    out: (T, D) as `expert_ffn` gives it.
    probs, tokens_per_expert: (T, E) and (E,), as `route` gives them.
    balance_loss: () as `route` gives it, or None if it was not asked for.
    """

    out: Tensor
    probs: Tensor
    tokens_per_expert: Tensor
    balance_loss: Tensor | None = None


def routed_ffn(
    x: Tensor,
    gate: Tensor,
    w13: Tensor,
    w2: Tensor,
    top_k: int,
    *,
    addend: Tensor | None = None,
    balance_alpha: float | None = None,
    backend: str = "auto",
) -> RoutedFFN:
    """Route every token, send it through its experts and sum the weighted results: `route`, then `expert_ffn`.

    Args:
        x: (T, D) float, tokens.
        gate: (E, D) float, the router's weight; its dtype may differ from x's.
        w13: (E, 2F, D) float, gate rows first, then up rows.
        w2: (E, D, F) float.
        top_k: K, at most E.
        addend: (T, D) float in x's dtype, added before the sum's rounding as in `expert_ffn`; None adds nothing.
        balance_alpha: factor of the balance loss, see `route`; None means that it is not wanted.
        backend: "auto", "cuda" (Hopper; see `route` and `expert_ffn`), "triton" or "reference".

    Returns:
        RoutedFFN.
    """
    tensors = (x, gate, w13, w2, addend)
    wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    dtype = checks.autocast_dtype(x)
    if x.dtype == dtype:
        check_routed_ffn(*tensors, top_k)
        if (name := common_backend(backend, x, gate, w2)) is not None:
            w13, w2, addend = w13.to(dtype), w2.to(dtype), None if addend is None else addend.to(dtype)
            if wants_gradient or balance_alpha is not None:
                options = top_k, balance_alpha or 0.0, wants_gradient, name
                out, probs, counts, balance, *_ = _routed_ffn_train(x, gate, w13, w2, addend, *options)
                return RoutedFFN(out, probs, counts, None if balance_alpha is None else balance)
            out, probs, counts = _routed_ffn(x, gate, w13, w2, addend, top_k, name)
            return RoutedFFN(out, probs, counts)
    routed = route(x, gate, top_k, balance_alpha=balance_alpha, backend=backend)
    out = expert_ffn(x, w13, w2, routed.topk_weights, routed.plan, addend=addend, backend=backend)
    return RoutedFFN(out, routed.probs, routed.plan.tokens_per_expert, routed.balance_loss)


def check_routed_ffn(x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, addend: Tensor | None, top_k: int) -> None:
    """What `routed_ffn` asks of its tensors."""
    checks.check_float("x", x, 2)
    checks.check_float("gate", gate, 2)
    checks.check_same_device("gate", gate, "x", x)
    check_expert_weights(w13, w2, x)
    checks.check_shape("gate", gate, (w13.shape[0], x.shape[1]))
    checks.check_top_k(top_k, gate.shape[0])
    if addend is not None:
        check_addend(addend, x)


def common_backend(backend: str, x: Tensor, gate: Tensor, w2: Tensor) -> str | None:
    """The backend of both the router and the experts, so that one op may do all, or None where they differ."""
    fits = backends.whole_chunks(x.dtype, x.shape[1], w2.shape[2])
    name = backends.resolve(backend, "expert_ffn", x.device, x.dtype, whole_chunks=fits)
    return name if name == router.resolve(backend, x, gate) else None


def _run_parts(
    x: Tensor,
    gate: Tensor,
    w13: Tensor,
    w2: Tensor,
    addend: Tensor | None,
    top_k: int,
    balance_alpha: float,
    save_h: bool,
    backend: str,
) -> tuple[Tensor, ...]:
    """out, probs, counts, balance loss, then what the gradients need: weights, ids, the plan's maps, h."""
    tile_rows = configs.choose_tile_rows(x.shape[0] * top_k, gate.shape[0])
    weights, ids, probs, balance, counts, *maps = run_route(x, gate, top_k, tile_rows, balance_alpha, backend)
    offsets, row_to_slot, slot_to_row, *tiles = maps
    plan = offsets, row_to_slot, slot_to_row, tiles[0], tiles[1], tile_rows
    out, h = run_forward(x, w13, w2, weights, addend, *plan, save_h, backend)
    return out, probs, counts, balance, weights, ids, *maps, h


def _impl(
    x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, addend: Tensor | None, top_k: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "cuda":
        from .cuda_impl import routed_ffn as kernels

        x, gate, w13, w2 = (t.contiguous() for t in (x, gate, w13, w2))
        return kernels.routed_ffn(x, gate, w13, w2, None if addend is None else addend.contiguous(), top_k)
    out, probs, counts, *_ = _run_parts(x, gate, w13, w2, addend, top_k, 0.0, False, backend)
    return out, probs, counts


def _fake(x: Tensor, gate: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = reference.accumulation_dtype(torch.promote_types(x.dtype, gate.dtype))
    probs = x.new_empty(x.shape[0], gate.shape[0], dtype=wide)
    return x.new_empty(x.shape), probs, x.new_empty(gate.shape[0], dtype=torch.int32)


_routed_ffn = define_op(
    "routed_ffn(Tensor x, Tensor gate, Tensor w13, Tensor w2, Tensor? addend, int top_k, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _impl,
    _fake,
)


# ---- with gradients


def _train_fake(x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, addend: Tensor | None, top_k: int, *rest: Any):
    _alpha, save_h, _backend = rest
    tile_rows = configs.choose_tile_rows(x.shape[0] * top_k, gate.shape[0])
    weights, ids, probs, balance, counts, *maps = route_fake(x, gate, top_k, tile_rows)
    h = x.new_empty(x.shape[0] * top_k if save_h else 0, w13.shape[1])
    return x.new_empty(x.shape), probs, counts, balance, weights, ids, *maps, h


def _train_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, gate, w13, w2, _addend, top_k, alpha, _save_h, ctx.backend = inputs
    _out, probs, counts, _balance, weights, ids, *maps, h = output
    ctx.mark_non_differentiable(counts, weights, ids, *maps, h)
    ctx.set_materialize_grads(False)
    ctx.scale = balance_scale(x.shape[0], gate.shape[0], top_k, alpha)
    ctx.tile_rows = configs.choose_tile_rows(x.shape[0] * top_k, gate.shape[0])
    ctx.save_for_backward(x, gate, w13, w2, probs, counts, weights, ids, *maps, h)


def _train_backward(ctx: Any, dout: Tensor | None, dprobs: Tensor | None, _: None, dbalance: Tensor | None, *__: None):
    x, gate, w13, w2, probs, counts, weights, ids, *maps, h = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    dw13 = dw2 = None
    if dout is not None and any(wanted[:4]):
        dprobs = probs_gradient(dprobs, dbalance, probs, counts, ctx.scale)
        layer = x, gate, w13, w2, weights, ids, probs, *maps, ctx.tile_rows
        dx, dgate, dw13, dw2 = _routed_ffn_gradients(dout, dprobs, h, *layer, *wanted[:2], ctx.backend)
    else:
        routing = x, gate, ids, probs, counts, ctx.scale, wanted, ctx.backend
        dx, dgate = route_gradients((None, dprobs, dbalance), *routing)
    grads = dx, dgate, dw13, dw2, dout
    return *(grad if want else None for grad, want in zip(grads, wanted, strict=False)), *(None,) * 4


_routed_ffn_train = define_op(
    "routed_ffn_train(Tensor x, Tensor gate, Tensor w13, Tensor w2, Tensor? addend, int top_k, float balance_alpha,"
    f" bool save_h, str backend) -> ({', '.join(['Tensor'] * 12)})",
    _run_parts,
    _train_fake,
    setup_context=_train_setup,
    backward=_train_backward,
)


def _backward_impl(
    grad: Tensor,
    dprobs: Tensor | None,
    h: Tensor,
    x: Tensor,
    gate: Tensor,
    w13: Tensor,
    w2: Tensor,
    weights: Tensor,
    ids: Tensor,
    probs: Tensor,
    *rest: Any,
) -> tuple[Tensor, ...]:
    *plan, wants_dx, wants_dgate, backend = rest
    if backend == "cuda":
        from .cuda_impl import routed_ffn as kernels

        tensors: list[Any] = [t.contiguous() for t in (h, x, gate, w13, w2, weights, ids, probs)]
        arguments = *tensors, *plan[:3], wants_dx, wants_dgate
        dx, dgate, dw13, dw2 = kernels.routed_ffn_backward(grad.contiguous(), dprobs, *arguments)
    else:
        dx_rows, dw13, dw2, dweights = expert_ffn_gradients(grad, h, x, w13, w2, weights, *plan, backend)
        dlogits = router.topk_softmax_gradient(dweights, dprobs, ids, probs, backend)
        dx, dgate = router.logits_gradients(dlogits, x, gate, (wants_dx, wants_dgate), backend, dx_rows, plan[2])
    return *router.or_empty(dx, dgate, x, gate), dw13, dw2


def _backward_fake(
    grad: Tensor, dprobs: Any, h: Any, x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *_, wants_dx, wants_dgate, _backend = rest
    return *router.gradients_fake(x, gate, wants_dx, wants_dgate), w13.new_empty(w13.shape), w2.new_empty(w2.shape)


# dx and dgate have no elements where they are not wanted.
_routed_ffn_gradients = define_op(
    "routed_ffn_backward(Tensor grad, Tensor? dprobs, Tensor h, Tensor x, Tensor gate, Tensor w13, Tensor w2,"
    f" Tensor topk_weights, Tensor topk_ids, Tensor probs, {PLAN_SCHEMA}, bool wants_dx, bool wants_dgate,"
    " str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
