"""router_logits and topk_softmax: which experts a token goes to, and with which weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, checks, reference
from .library import define_op


def router_logits(x: Tensor, gate: Tensor, *, backend: str = "auto") -> Tensor:
    """Score every expert for every token in fp32, whatever the inputs' dtypes and autocast: logits = x @ gate^T.

    Args:
        x: (T, D) float, tokens.
        gate: (E, D) float, the router's weight; its dtype may differ from x's.
        backend: "auto", "triton" or "reference".

    Returns:
        (T, E) fp32, or fp64 if x or gate is.
    """
    checks.check_float("x", x, 2)
    checks.check_float("gate", gate, 2)
    checks.check_same_device("gate", gate, "x", x)
    checks.check_shape("gate", gate, (gate.shape[0], x.shape[1]))
    name = backends.resolve(backend, "router", x.device.type, torch.promote_types(x.dtype, gate.dtype))
    return _router_logits(x, gate, name)


def topk_softmax(logits: Tensor, top_k: int, *, backend: str = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Softmax over all experts, then each token's top_k experts without renormalisation (paper section 2.2).

    Args:
        logits: (T, E) fp32 or fp64.
        top_k: K, at most E.
        backend: "auto", "triton" or "reference".

    Returns:
        topk_weights (T, K) in logits' dtype in descending order, topk_ids (T, K) int32, probs (T, E). Ties go to the
        lower id. A row with a NaN or +inf has NaN weights and K distinct valid ids: the NaN shows, nothing crashes.
    """
    checks.check_float("logits", logits, 2)
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits: got dtype {logits.dtype}, expected fp32 or fp64")
    checks.check_top_k(top_k, logits.shape[1])
    name = backends.resolve(backend, "router", logits.device.type, logits.dtype)
    return _topk_softmax(logits, top_k, name)


# ---- router_logits


def _logits_impl(x: Tensor, gate: Tensor, backend: str) -> Tensor:
    if backend == "triton":
        from .triton_impl import router

        return router.router_logits(x.contiguous(), gate.contiguous())
    return reference.router_logits(x, gate)


def _logits_fake(x: Tensor, gate: Tensor, backend: str) -> Tensor:
    wide = reference.accumulation_dtype(torch.promote_types(x.dtype, gate.dtype))
    return x.new_empty(x.shape[0], gate.shape[0], dtype=wide)


def _logits_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])


def _logits_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, gate = ctx.saved_tensors
    with torch.autocast(x.device.type, enabled=False):
        dx = (grad @ gate.to(grad.dtype)).to(x.dtype) if ctx.needs_input_grad[0] else None
        dgate = (grad.T @ x.to(grad.dtype)).to(gate.dtype) if ctx.needs_input_grad[1] else None
    return dx, dgate, None


_router_logits = define_op(
    "router_logits(Tensor x, Tensor gate, str backend) -> Tensor",
    _logits_impl,
    _logits_fake,
    setup_context=_logits_setup,
    backward=_logits_backward,
)

# ---- topk_softmax


def _topk_impl(logits: Tensor, top_k: int, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "triton":
        from .triton_impl import router

        return router.topk_softmax(logits.contiguous(), top_k)
    return reference.topk_softmax(logits, top_k)


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
    return _topk_softmax_backward(dweights, dprobs, topk_ids, probs, ctx.backend), None, None


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
    if backend == "triton":
        from .triton_impl import router

        return router.topk_softmax_backward(dweights, dprobs, topk_ids, probs)
    return reference.topk_softmax_backward(dweights, dprobs, topk_ids, probs)


def _topk_backward_fake(
    dweights: Tensor | None, dprobs: Tensor | None, topk_ids: Tensor, probs: Tensor, backend: str
) -> Tensor:
    return probs.new_empty(probs.shape)


_topk_softmax_backward = define_op(
    "topk_softmax_backward(Tensor? dweights, Tensor? dprobs, Tensor topk_ids, Tensor probs, str backend) -> Tensor",
    _topk_backward_impl,
    _topk_backward_fake,
)
