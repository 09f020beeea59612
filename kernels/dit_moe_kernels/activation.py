"""swiglu: the gated activation between an expert's two products."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from . import backends, checks, reference
from .library import define_op

_kernels = functools.partial(backends.kernels, module="swiglu")


def swiglu(h: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute silu(gate) * up in fp32 from the packed pre-activations [gate | up] (Shazeer 2020, eq. 6).

    Args:
        h: (N, 2F) float, gate in the first F columns, up in the last F.
        backend: "auto", "cuda", "triton" or "reference".

    Returns:
        (N, F) in h's dtype.
    """
    checks.check_float("h", h, 2)
    if h.shape[1] % 2:
        raise ValueError(f"h: got {h.shape[1]} columns, expected an even number")
    return _swiglu(h, backends.resolve(backend, "swiglu", h.device.type, h.dtype))


def _forward_impl(h: Tensor, backend: str) -> Tensor:
    if backend != "reference":
        return _kernels(backend).swiglu(h.contiguous())
    return reference.swiglu(h)


def _forward_fake(h: Tensor, backend: str) -> Tensor:
    return h.new_empty(h.shape[0], h.shape[1] // 2)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    h, ctx.backend = inputs
    ctx.save_for_backward(h)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return swiglu_backward(grad, *ctx.saved_tensors, ctx.backend), None


_swiglu = define_op(
    "swiglu(Tensor h, str backend) -> Tensor", _forward_impl, _forward_fake, setup_context=_setup, backward=_backward
)


def _backward_impl(grad: Tensor, h: Tensor, backend: str) -> Tensor:
    if backend != "reference":
        return _kernels(backend).swiglu_backward(grad.contiguous(), h.contiguous())
    return reference.swiglu_backward(grad, h)


def _backward_fake(grad: Tensor, h: Tensor, backend: str) -> Tensor:
    return h.new_empty(h.shape)


swiglu_backward = define_op(  # by name of a backend that runs
    "swiglu_backward(Tensor grad, Tensor h, str backend) -> Tensor", _backward_impl, _backward_fake
)
