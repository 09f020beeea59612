"""qk_norm: LayerNorm of every head's queries and keys, as DiT-MoE-XL and -G have it before their attention."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, reference_norm
from .cuda_impl.qk_norm import fitting_width, unsupported
from .library import define_op

_kernels = functools.partial(backends.kernels, module="qk_norm")


def qk_norm(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    eps: float = 1e-6,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normalise each head's query and key over the head's width, with statistics in fp32.

    Args:
        q, k: (B, N, H, d) float, also as slices of a packed (B, N, 3, H, d): they are read where they lie.
        q_weight, q_bias, k_weight, k_bias: (d,) float, as in nn.LayerNorm.
        eps: added to the variance.
        backend: "auto", "cuda", "triton" or "reference"; "cuda" takes d in multiples of 8 up to 128, and q, k and the
            result in one dtype, with weights in the same or in fp32.

    Returns:
        Two contiguous (B, N, H, d), in autocast's dtype under autocast, else in q's.
    """
    checks.check_float("q", q, 4)
    checks.check_float("k", k, 4)
    checks.check_like("k", k, "q", q)
    checks.check_shape("k", k, tuple(q.shape))
    weights = q_weight, q_bias, k_weight, k_bias
    check_weights(weights, "q", q)
    dtype = checks.autocast_dtype(q)
    refusal = unsupported(q.dtype, dtypes_of(weights), dtype, fitting_width(q.shape[3]))
    backend = backends.resolve(backend, "norm", q.device.type, q.dtype, refusal=refusal)
    if backend == "reference":  # as plain operations, which torch.compile may fuse
        return reference_norm.qk_norm(q, k, q_weight, q_bias, k_weight, k_bias, eps, dtype)
    return _qk_norm(q, k, q_weight, q_bias, k_weight, k_bias, eps, dtype, backend)


def check_weights(weights: Sequence[Tensor], name: str, heads: Tensor) -> None:
    """What `qk_norm` asks of q_weight, q_bias, k_weight and k_bias beside heads (..., d) of this name."""
    for weight_name, weight in zip(("q_weight", "q_bias", "k_weight", "k_bias"), weights, strict=True):
        checks.check_float(weight_name, weight, 1)
        checks.check_same_device(weight_name, weight, name, heads)
        checks.check_shape(weight_name, weight, (heads.shape[-1],))


def dtypes_of(weights: Sequence[Tensor]) -> tuple[torch.dtype, ...]:
    """As a tuple that Dynamo knows to be constant."""
    return tuple([weight.dtype for weight in weights])


def _tokens(x: Tensor) -> Tensor:
    """(B, N, H, d) -> (T, H, d) with neighbouring columns: a view wherever strides allow it."""
    return (x if x.stride(3) == 1 else x.contiguous()).flatten(0, 1)


def _forward_impl(
    q: Tensor,
    k: Tensor,
    q_weight: Tensor,
    q_bias: Tensor,
    k_weight: Tensor,
    k_bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return reference_norm.qk_norm(q, k, q_weight, q_bias, k_weight, k_bias, eps, dtype)
    q_out, k_out = q.new_empty(q.shape, dtype=dtype), k.new_empty(k.shape, dtype=dtype)
    weights = [weight.contiguous() for weight in (q_weight, q_bias, k_weight, k_bias)]
    _kernels(backend).qk_norm(_tokens(q), _tokens(k), weights, eps, q_out, k_out)
    return q_out, k_out


def _forward_fake(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = rest[-2]
    return q.new_empty(q.shape, dtype=dtype), k.new_empty(k.shape, dtype=dtype)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, q_weight, q_bias, k_weight, k_bias, ctx.eps, _, ctx.backend = inputs
    ctx.dtypes = [weight.dtype for weight in (q_weight, q_bias, k_weight, k_bias)]
    ctx.save_for_backward(q, k, q_weight, k_weight)


def _backward(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, of_weights = _qk_norm_backward(dq_out, dk_out, *ctx.saved_tensors, ctx.eps, ctx.backend)
    dweights = [grad.to(dtype) for grad, dtype in zip(of_weights.flatten(0, 1).unbind(), ctx.dtypes, strict=True)]
    return dq, dk, *dweights, None, None, None


_qk_norm = define_op(
    "qk_norm(Tensor q, Tensor k, Tensor q_weight, Tensor q_bias, Tensor k_weight, Tensor k_bias, float eps, "
    "ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
    setup_context=_setup,
    backward=_backward,
)


def _backward_impl(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "reference":
        dq, dk, of_weights = reference_norm.qk_norm_backward(dq_out, dk_out, q, k, q_weight, k_weight, eps)
        return dq.to(q.dtype), dk.to(k.dtype), of_weights
    dq, dk = q.new_empty(q.shape), k.new_empty(k.shape)
    grads = dq_out.contiguous(), dk_out.contiguous()
    weights = q_weight.contiguous(), k_weight.contiguous()
    normalise_backward = _kernels(backend).qk_norm_backward
    return dq, dk, normalise_backward(*grads, _tokens(q), _tokens(k), *weights, eps, dq, dk)


def _backward_fake(
    dq_out: Tensor, dk_out: Tensor, q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    wide = reference_norm.accumulation_dtype(q.dtype)
    return q.new_empty(q.shape), k.new_empty(k.shape), q.new_empty(2, 2, q.shape[3], dtype=wide)


_qk_norm_backward = define_op(
    "qk_norm_backward(Tensor dq_out, Tensor dk_out, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, float eps, "
    "str backend) -> (Tensor, Tensor, Tensor)",
    _backward_impl,
    _backward_fake,
)
