"""expert_ffn: the routed experts as one op, from tokens to tokens, with the fusions that the unfused ops cannot have.

Forward: gather + w13 product + SwiGLU in one kernel, w2 product, weighted combine. Saved for backward: x, the
pre-activations h (only when a backward will come), the weights and the plan; everything else is recomputed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, checks, reference
from .library import define_op
from .permute import check_topk_weights, unpermute_rows
from .routing import RoutingPlan


def expert_ffn(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    plan: RoutingPlan,
    *,
    addend: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Send each token through its experts' SwiGLU networks and sum the weighted results (paper section 2.2).

    out[t] = sum_k topk_weights[t, k] * w2[e] @ swiglu(w13[e] @ x[t]) + addend[t] with e = topk_ids[t, k].

    Args:
        x: (T, D) float, tokens.
        w13: (E, 2F, D) float, gate rows first, then up rows.
        w2: (E, D, F) float.
        topk_weights: (T, K) fp32 (fp64 where x is).
        plan: routing of these T tokens to these E experts.
        addend: (T, D) float in x's dtype, added to the sum in fp32 before its one rounding, such as the output of a
            shared expert; None adds nothing.
        backend: "auto", "cuda" (Hopper), "triton" or "reference".

    Returns:
        (T, D), in autocast's dtype under autocast, else in x's dtype, which w13 and w2 must share.
    """
    checks.check_float("x", x, 2)
    check_expert_weights(w13, w2, x)
    checks.check_same_device("plan", plan.row_to_slot, "x", x)
    checks.check_shape("w13", w13, (plan.num_experts, *w13.shape[1:]))
    if x.shape[0] * plan.top_k != plan.num_rows:
        raise ValueError(f"x: got {x.shape[0]} tokens, expected the plan's {plan.num_rows // plan.top_k}")
    dtype = checks.autocast_dtype(x)
    check_topk_weights(topk_weights, x, plan)
    if addend is not None:
        check_addend(addend, x)
        addend = addend.to(dtype)
    save_h = torch.is_grad_enabled() and any(t.requires_grad for t in (x, w13, w2, topk_weights))
    fits = backends.whole_chunks(dtype, x.shape[1], w2.shape[2])
    name = backends.resolve(backend, "expert_ffn", x.device, dtype, whole_chunks=fits)
    weights = w13.to(dtype), w2.to(dtype), topk_weights
    return _expert_ffn(x.to(dtype), *weights, addend, *plan[1:7], save_h, name)[0]


def check_expert_weights(w13: Tensor, w2: Tensor, x: Tensor) -> None:
    """Shapes (E, 2F, D) and (E, D, F); x's device and, after autocast, x's dtype."""
    for name, w in (("w13", w13), ("w2", w2)):
        checks.check_float(name, w, 3)
        checks.check_same_product_dtype(name, w, "x", x)
    num_experts, double_width, hidden_size = w13.shape
    if double_width % 2:
        raise ValueError(f"w13: got shape {tuple(w13.shape)}, expected (E, 2F, D) with an even second size")
    checks.check_shape("x", x, (x.shape[0], hidden_size))
    checks.check_shape("w2", w2, (num_experts, hidden_size, double_width // 2))


def check_addend(addend: Tensor, x: Tensor) -> None:
    """x's shape and device and, after autocast, its dtype."""
    checks.check_float("addend", addend, 2)
    checks.check_shape("addend", addend, tuple(x.shape))
    checks.check_same_product_dtype("addend", addend, "x", x)


# The plan's tensors as the ops take them, in RoutingPlan's order from expert_offsets to tile_rows.
PLAN_SCHEMA = (
    "Tensor expert_offsets, Tensor row_to_slot, Tensor slot_to_row, Tensor tile_expert, Tensor tile_row, int tile_rows"
)


def run_forward(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    addend: Tensor | None,
    expert_offsets: Tensor,
    row_to_slot: Tensor,
    slot_to_row: Tensor,
    tile_expert: Tensor,
    tile_row: Tensor,
    tile_rows: int,
    save_h: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The op's implementation: out, and h, which has no rows unless save_h."""
    x, w13, w2, topk_weights = (t.contiguous() for t in (x, w13, w2, topk_weights))
    addend = None if addend is None else addend.contiguous()
    maps = expert_offsets, row_to_slot, slot_to_row
    if backend == "cuda":
        from .cuda_impl import expert_ffn as cuda_kernels

        return cuda_kernels.expert_ffn(x, w13, w2, topk_weights, *maps, save_h, addend)
    if backend == "triton":
        from .triton_impl import expert_ffn as kernels

        tiles = tile_expert, tile_row, tile_rows
        return kernels.expert_ffn(x, w13, w2, topk_weights, *maps, *tiles, save_h, addend)
    y, h = reference.expert_ffn(x, w13, w2, topk_weights, *maps, addend)
    return y, h if save_h else h.new_empty(0, h.shape[1])


def _forward_fake(x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, save_h, _backend = rest
    num_rows = topk_weights.shape[0] * topk_weights.shape[1]
    return x.new_empty(x.shape), x.new_empty(num_rows if save_h else 0, w13.shape[1])


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, w13, w2, topk_weights, _addend, *plan, ctx.tile_rows, _save_h, ctx.backend = inputs
    h = output[1]
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w13, w2, topk_weights, *plan, h)


def _backward(ctx: Any, grad: Tensor | None, _dh: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 13
    grads: tuple[Tensor | None, ...] = (None,) * 4
    if any(ctx.needs_input_grad[:4]):  # else only the addend has a gradient, and h was not kept
        *inputs, h = ctx.saved_tensors
        dx_rows, *rest = expert_ffn_gradients(grad, h, *inputs, ctx.tile_rows, ctx.backend)
        dx = None
        if ctx.needs_input_grad[0]:
            _x, _w13, _w2, weights, _offsets, row_to_slot, slot_to_row, *_ = inputs
            dx = unpermute_rows(dx_rows, row_to_slot, slot_to_row, weights.shape[1], ctx.backend)
        grads = dx, *rest
    return (*grads, grad if ctx.needs_input_grad[4] else None, *(None,) * 8)


_expert_ffn = define_op(
    f"expert_ffn(Tensor x, Tensor w13, Tensor w2, Tensor topk_weights, Tensor? addend, {PLAN_SCHEMA}, bool save_h,"
    " str backend) -> (Tensor, Tensor)",
    run_forward,
    _forward_fake,
    setup_context=_setup,
    backward=_backward,
)


def _backward_impl(grad: Tensor, h: Tensor, x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, *rest: Any):
    *plan, backend = rest
    tensors: list[Any] = [t.contiguous() for t in (grad, h, x, w13, w2, topk_weights)]
    if backend == "reference":
        return reference.expert_ffn_backward(*tensors, *plan[:3])
    if backend == "cuda":
        from .cuda_impl import expert_ffn as cuda_kernels

        return cuda_kernels.expert_ffn_backward(*tensors, *plan[:3])
    from .triton_impl import expert_ffn as kernels

    return kernels.expert_ffn_backward(*tensors, *plan)


def _backward_fake(grad: Tensor, h: Tensor, x: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, *_: Any):
    rows = x.new_empty(h.shape[0], x.shape[1])
    return rows, *(t.new_empty(t.shape) for t in (w13, w2, topk_weights))


# For w13, w2, the weights and the rows of x, which are still to be combined into tokens.
expert_ffn_gradients = define_op(
    "expert_ffn_backward(Tensor grad, Tensor h, Tensor x, Tensor w13, Tensor w2, Tensor topk_weights, "
    f"{PLAN_SCHEMA}, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
