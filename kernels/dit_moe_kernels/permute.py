"""permute and unpermute: dispatch tokens to their experts' rows, and combine the rows back into tokens."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from . import backends, checks, reference
from .library import define_op
from .routing import RoutingPlan

_kernels = functools.partial(backends.kernels, module="permute")


def permute(x: Tensor, plan: RoutingPlan, *, backend: str = "auto") -> Tensor:
    """Copy every routed slot's token to its row (dispatch): out[row] = x[row_to_token[row]].

    Args:
        x: (T, D) float, tokens.
        plan: routing of these T tokens.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        (N, D) in x's dtype, rows sorted by expert; unused rows are zero. The gradient sums each token's rows in fp32.
    """
    checks.check_float("x", x, 2)
    checks.check_same_device("plan", plan.row_to_slot, "x", x)
    if x.shape[0] * plan.top_k != plan.num_rows:
        raise ValueError(f"x: got {x.shape[0]} tokens, expected the plan's {plan.num_rows // plan.top_k}")
    name = backends.resolve(backend, "permute", x.device.type, x.dtype)
    return _permute(x, plan.row_to_slot, plan.slot_to_row, plan.top_k, name)


def unpermute(
    y: Tensor,
    plan: RoutingPlan,
    topk_weights: Tensor | None = None,
    *,
    addend: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sum each token's K rows (combine): out[t] = sum_k topk_weights[t, k] * y[slot_to_row[t * K + k]] + addend[t].

    Args:
        y: (N, D) float, rows sorted by expert.
        plan: the routing that ordered the rows.
        topk_weights: (T, K) fp32 (fp64 where y is), or None for weights of one.
        addend: (T, D) in y's dtype, added to the sum in fp32 before its one rounding; None adds nothing.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        (T, D) in y's dtype, summed over k in fp32 in a fixed order. Unrouted slots add nothing.
    """
    checks.check_float("y", y, 2)
    checks.check_same_device("plan", plan.row_to_slot, "y", y)
    checks.check_shape("y", y, (plan.num_rows, y.shape[1]))
    if addend is not None:
        checks.check_float("addend", addend, 2)
        checks.check_shape("addend", addend, (plan.num_rows // plan.top_k, y.shape[1]))
        checks.check_like("addend", addend, "y", y)
    name = backends.resolve(backend, "permute", y.device.type, y.dtype)
    if topk_weights is None:
        return _unpermute(y, addend, plan.row_to_slot, plan.slot_to_row, plan.top_k, name)
    check_topk_weights(topk_weights, y, plan)
    return _unpermute_weighted(y, topk_weights, addend, plan.row_to_slot, plan.slot_to_row, name)


def check_topk_weights(topk_weights: Tensor, like: Tensor, plan: RoutingPlan) -> None:
    """Shape (T, K), on the device of `like`, in fp32 (fp64 where `like` is fp64)."""
    checks.check_float("topk_weights", topk_weights, 2)
    checks.check_same_device("topk_weights", topk_weights, "the input", like)
    checks.check_shape("topk_weights", topk_weights, (plan.num_rows // plan.top_k, plan.top_k))
    if topk_weights.dtype != reference.accumulation_dtype(like.dtype):
        expected = reference.accumulation_dtype(like.dtype)
        raise TypeError(f"topk_weights: got dtype {topk_weights.dtype}, expected {expected} beside {like.dtype} inputs")


def combine(y: Tensor, topk_weights: Tensor, slot_to_row: Tensor, addend: Tensor | None) -> Tensor:
    """`unpermute` without a plan and without gradients, on the best backend."""
    name = backends.resolve("auto", "permute", y.device.type, y.dtype)
    return _unpermute_weighted(y, topk_weights, addend, slot_to_row, slot_to_row, name)  # rows' slots: for gradients


def unpermute_rows(y: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, top_k: int, backend: str) -> Tensor:
    """`unpermute` by a plan's maps, on a backend that is known to run."""
    return _unpermute(y, None, row_to_slot, slot_to_row, top_k, backend)


# ---- permute


def _permute_impl(x: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, top_k: int, backend: str) -> Tensor:
    if backend == "reference":
        return reference.permute(x, row_to_slot, top_k)
    # Triton's goes by rows, CUDA's by tokens.
    maps = (row_to_slot,) if backend == "triton" else (row_to_slot, slot_to_row)
    return _kernels(backend).permute(x.contiguous(), *maps, top_k)


def _permute_fake(x: Tensor, row_to_slot: Tensor, slot_to_row: Tensor, top_k: int, backend: str) -> Tensor:
    return x.new_empty(row_to_slot.shape[0], x.shape[1])


def _save_maps(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, row_to_slot, slot_to_row, ctx.top_k, ctx.backend = inputs
    ctx.save_for_backward(row_to_slot, slot_to_row)


def _permute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _unpermute(grad, None, *ctx.saved_tensors, ctx.top_k, ctx.backend), None, None, None, None


_permute = define_op(
    "permute(Tensor x, Tensor row_to_slot, Tensor slot_to_row, int top_k, str backend) -> Tensor",
    _permute_impl,
    _permute_fake,
    setup_context=_save_maps,
    backward=_permute_backward,
)

# ---- unpermute


def run_unpermute(
    y: Tensor,
    topk_weights: Tensor | None,
    slot_to_row: Tensor,
    top_k: int,
    backend: str,
    addend: Tensor | None = None,
) -> Tensor:
    """The implementation of both ops below."""
    if backend == "reference":
        return reference.unpermute(y, topk_weights, slot_to_row, top_k, addend)
    kernels = _kernels(backend)
    return kernels.unpermute(y.contiguous(), _contiguous(topk_weights), slot_to_row, top_k, _contiguous(addend))


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# ---- without weights


def _unpermute_impl(
    y: Tensor, addend: Tensor | None, _row_to_slot: Tensor, slot_to_row: Tensor, top_k: int, backend: str
) -> Tensor:
    return run_unpermute(y, None, slot_to_row, top_k, backend, addend)


def _unpermute_fake(y: Tensor, addend: Any, row_to_slot: Tensor, slot_to_row: Tensor, top_k: int, _: str) -> Tensor:
    return y.new_empty(slot_to_row.shape[0] // top_k, y.shape[1])


def _unpermute_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    y, _addend, *rest = inputs
    _save_maps(ctx, (y, *rest), output)


def _unpermute_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    dy = _permute(grad, *ctx.saved_tensors, ctx.top_k, ctx.backend) if ctx.needs_input_grad[0] else None
    return dy, grad if ctx.needs_input_grad[1] else None, None, None, None, None


_unpermute = define_op(
    "unpermute(Tensor y, Tensor? addend, Tensor row_to_slot, Tensor slot_to_row, int top_k, str backend) -> Tensor",
    _unpermute_impl,
    _unpermute_fake,
    setup_context=_unpermute_setup,
    backward=_unpermute_backward,
)

# ---- with weights


def _weighted_impl(
    y: Tensor, topk_weights: Tensor, addend: Tensor | None, _row_to_slot: Tensor, slot_to_row: Tensor, backend: str
) -> Tensor:
    return run_unpermute(y, topk_weights, slot_to_row, topk_weights.shape[1], backend, addend)


def _weighted_fake(y: Tensor, topk_weights: Tensor, *_: Any) -> Tensor:
    return y.new_empty(topk_weights.shape[0], y.shape[1])


def _weighted_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    y, topk_weights, _addend, row_to_slot, _slot_to_row, ctx.backend = inputs
    ctx.save_for_backward(y, topk_weights, row_to_slot)


def _weighted_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...] = (None, None)
    if any(ctx.needs_input_grad[:2]):
        grads = _unpermute_weighted_backward(grad, *ctx.saved_tensors, ctx.backend)
    return *grads, grad if ctx.needs_input_grad[2] else None, None, None, None


_unpermute_weighted = define_op(
    "unpermute_weighted(Tensor y, Tensor topk_weights, Tensor? addend, Tensor row_to_slot, Tensor slot_to_row, "
    "str backend) -> Tensor",
    _weighted_impl,
    _weighted_fake,
    setup_context=_weighted_setup,
    backward=_weighted_backward,
)


def _weighted_backward_impl(
    grad: Tensor, y: Tensor, topk_weights: Tensor, row_to_slot: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return reference.unpermute_backward(grad, y, topk_weights, row_to_slot)
    return _kernels(backend).unpermute_backward(
        grad.contiguous(), y.contiguous(), topk_weights.contiguous(), row_to_slot
    )


def _weighted_backward_fake(
    grad: Tensor, y: Tensor, topk_weights: Tensor, row_to_slot: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    return y.new_empty(y.shape), topk_weights.new_empty(topk_weights.shape)


_unpermute_weighted_backward = define_op(
    "unpermute_weighted_backward(Tensor grad, Tensor y, Tensor topk_weights, Tensor row_to_slot, str backend)"
    " -> (Tensor, Tensor)",
    _weighted_backward_impl,
    _weighted_backward_fake,
)
