"""router_logits and topk_softmax: which experts a token goes to, and with which weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, reference
from .library import define_op
from .permute import run_unpermute


def router_logits(x: Tensor, gate: Tensor, *, backend: str = "auto") -> Tensor:
    """Score every expert for every token in fp32, whatever the inputs' dtypes and autocast: logits = x @ gate^T.

    Args:
        x: (T, D) float, tokens.
        gate: (E, D) float, the router's weight; its dtype may differ from x's.
        backend: "auto", "cuda" (at most 64 experts, widths in whole 16 bytes), "triton" or "reference".

    Returns:
        (T, E) fp32, or fp64 if x or gate is.
    """
    checks.check_float("x", x, 2)
    checks.check_float("gate", gate, 2)
    checks.check_same_device("gate", gate, "x", x)
    checks.check_shape("gate", gate, (gate.shape[0], x.shape[1]))
    name = resolve(backend, x, gate)
    return _router_logits(x, gate, name)


def topk_softmax(logits: Tensor, top_k: int, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over all experts, then each token's top_k experts without renormalisation (paper section 2.2).

    Args:
        logits: (T, E) fp32 or fp64.
        top_k: K, at most E.
        backend: "auto", "cuda" (at most 64 experts), "triton" or "reference".

    Returns:
        topk_weights (T, K) in logits' dtype in descending order, topk_ids (T, K) int32, probs (T, E). Ties go to the
        lower id. A row with a NaN or +inf has NaN weights and K distinct valid ids: the NaN shows, nothing crashes.
    """
    checks.check_float("logits", logits, 2)
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits: got dtype {logits.dtype}, expected fp32 or fp64")
    checks.check_top_k(top_k, logits.shape[1])
    name = backends.resolve(backend, "router", logits.device.type, logits.dtype, num_experts=logits.shape[1])
    return _topk_softmax(logits, top_k, name)


def resolve(backend: str, x: Tensor, gate: Tensor) -> str:
    """The backend that scores these tokens, see `backends.resolve`."""
    fits = backends.whole_chunks(x.dtype, x.shape[1]) and backends.whole_chunks(gate.dtype, x.shape[1])
    dtype = torch.promote_types(x.dtype, gate.dtype)
    return backends.resolve(backend, "router", x.device.type, dtype, whole_chunks=fits, num_experts=gate.shape[0])


def _implementation(backend: str) -> Any:
    """The module with router_logits, router_gradients, topk_softmax and its gradient of "triton" or "cuda"."""
    if backend == "triton":
        from .triton_impl import router

        return router
    from .cuda_impl import routing

    return routing


# ---- router_logits


def _logits_impl(x: Tensor, gate: Tensor, backend: str) -> Tensor:
    if backend == "reference":
        return reference.router_logits(x, gate)
    return _implementation(backend).router_logits(x.contiguous(), gate.contiguous())


def _logits_fake(x: Tensor, gate: Tensor, backend: str) -> Tensor:
    wide = reference.accumulation_dtype(torch.promote_types(x.dtype, gate.dtype))
    return x.new_empty(x.shape[0], gate.shape[0], dtype=wide)


def _logits_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, gate, ctx.backend = inputs
    ctx.save_for_backward(x, gate)


def _logits_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, gate = ctx.saved_tensors
    return *logits_gradients(grad, x, gate, ctx.needs_input_grad, ctx.backend), None


def logits_gradients(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    wanted: Sequence[bool],
    backend: str,
    rows: Tensor | None = None,
    slot_to_row: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the logits x @ gate^T for x and for gate, each where it is wanted; products in grad's dtype.

    rows (N, D) in x's dtype are added to x's gradient before its one rounding, each to its token: slot_to_row (N,)
    int32 says which rows a token's N / T slots have.
    """
    wants_dx, wants_dgate = wanted[:2]
    if not (wants_dx or wants_dgate):
        return None, None
    dx, dgate = _router_gradients(grad, x, gate, rows, slot_to_row, wants_dx, wants_dgate, backend)
    return dx if wants_dx else None, dgate if wants_dgate else None


def _gradients_impl(
    grad: Tensor,
    x: Tensor,
    gate: Tensor,
    rows: Tensor | None,
    slot_to_row: Tensor | None,
    wants_dx: bool,
    wants_dgate: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        addend = None
        if wants_dx and rows is not None and slot_to_row is not None and x.shape[0]:
            addend = run_unpermute(rows, None, slot_to_row, slot_to_row.shape[0] // x.shape[0], backend)
        dx, dgate = reference.router_gradients(grad, x, gate, addend, wants_dx, wants_dgate)
    else:
        grad, x, gate = grad.contiguous(), x.contiguous(), gate.contiguous()
        rows = None if rows is None else rows.contiguous()
        dx, dgate = _implementation(backend).router_gradients(grad, x, gate, rows, slot_to_row, wants_dx, wants_dgate)
    return or_empty(dx, dgate, x, gate)


def or_empty(dx: Tensor | None, dgate: Tensor | None, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """An op gives tensors only: without elements where they are not wanted."""
    return x.new_empty(0) if dx is None else dx, gate.new_empty(0) if dgate is None else dgate


def gradients_fake(x: Tensor, gate: Tensor, wants_dx: bool, wants_dgate: bool) -> tuple[Tensor, Tensor]:
    """What `or_empty` gives, for torch.compile."""
    return x.new_empty(x.shape if wants_dx else (0,)), gate.new_empty(gate.shape if wants_dgate else (0,))


def _gradients_fake(_grad: Tensor, x: Tensor, gate: Tensor, _rows: Any, _map: Any, *rest: Any) -> tuple[Tensor, Tensor]:
    wants_dx, wants_dgate, _backend = rest
    return gradients_fake(x, gate, wants_dx, wants_dgate)


_router_gradients = define_op(
    "router_gradients(Tensor grad, Tensor x, Tensor gate, Tensor? rows, Tensor? slot_to_row, bool wants_dx,"
    " bool wants_dgate, str backend) -> (Tensor, Tensor)",
    _gradients_impl,
    _gradients_fake,
)

_router_logits = define_op(
    "router_logits(Tensor x, Tensor gate, str backend) -> Tensor",
    _logits_impl,
    _logits_fake,
    setup_context=_logits_setup,
    backward=_logits_backward,
)

# ---- topk_softmax


def _topk_impl(logits: Tensor, top_k: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "reference":
        return reference.topk_softmax(logits, top_k)
    return _implementation(backend).topk_softmax(logits.contiguous(), top_k)


def _topk_fake(logits: Tensor, top_k: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    size = (logits.shape[0], top_k)
    return logits.new_empty(size), logits.new_empty(size, dtype=torch.int32), logits.new_empty(logits.shape)


def _topk_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    _, topk_ids, probs = output
    ctx.mark_non_differentiable(topk_ids)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(topk_ids, probs)
    ctx.backend = inputs[2]


def _topk_backward(ctx: Any, dweights: Tensor | None, _dids: None, dprobs: Tensor | None) -> tuple[Tensor | None, ...]:
    topk_ids, probs = ctx.saved_tensors
    return topk_softmax_gradient(dweights, dprobs, topk_ids, probs, ctx.backend), None, None


_topk_softmax = define_op(
    "topk_softmax(Tensor logits, int top_k, str backend) -> (Tensor, Tensor, Tensor)",
    _topk_impl,
    _topk_fake,
    setup_context=_topk_setup,
    backward=_topk_backward,
)


def _topk_backward_impl(
    dweights: Tensor | None, dprobs: Tensor | None, topk_ids: Tensor, probs: Tensor, backend: str
) -> Tensor:
    if backend == "reference":
        return reference.topk_softmax_backward(dweights, dprobs, topk_ids, probs)
    return _implementation(backend).topk_softmax_backward(dweights, dprobs, topk_ids, probs)


def _topk_backward_fake(
    dweights: Tensor | None, dprobs: Tensor | None, topk_ids: Tensor, probs: Tensor, backend: str
) -> Tensor:
    return probs.new_empty(probs.shape)


topk_softmax_gradient = define_op(
    "topk_softmax_backward(Tensor? dweights, Tensor? dprobs, Tensor topk_ids, Tensor probs, str backend) -> Tensor",
    _topk_backward_impl,
    _topk_backward_fake,
)
