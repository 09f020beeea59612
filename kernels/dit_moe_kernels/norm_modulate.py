"""norm_modulate and residual_norm_modulate: what stands between the sub-layers of an adaLN block, in one pass each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import backends, checks, reference_norm
from .cuda_impl.norm_modulate import unsupported
from .library import define_op

_kernels = functools.partial(backends.kernels, module="norm_modulate")


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """Normalise each token and modulate it by its image's vectors: LayerNorm(x) * (1 + scale) + shift.

    The LayerNorm has no weights; its statistics are in fp32 (DiT, arXiv 2212.09748, section 3.2).

    Args:
        x: (B, N, D) float, N tokens of each of B images.
        shift, scale: (B, D) float; rows may be any distance apart.
        eps: added to the variance.
        backend: "auto", "cuda", "triton" or "reference"; "cuda" wants one dtype, or an fp32 x and 16 bits else.

    Returns:
        (B, N, D) in autocast's dtype under autocast, since products take it; else in what x, shift and scale promote
        to.
    """
    _check(x, {"shift": shift, "scale": scale})
    dtype, name = settle(backend, x, shift, scale)
    if name == "reference":  # as plain operations, which torch.compile may fuse
        return reference_norm.norm_modulate(x, shift, scale, eps, dtype)
    return _norm_modulate(x, shift, scale, eps, dtype, name)


def residual_norm_modulate(
    x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Add a gated branch to the residual stream and give the next branch its input: total = x + gate * y, and its norm.

    Args:
        x: (B, N, D) float, the residual stream.
        gate: (B, D) float, of each image; rows may be any distance apart, as in shift and scale.
        y: (B, N, D) float, the branch.
        shift, scale, eps, backend: as in `norm_modulate`.

    Returns:
        total (B, N, D), computed in fp32 and rounded to what x, gate and y promote to, autocast or not: an fp32
        stream stays one; and norm_modulate(total, shift, scale, eps) with the dtype that this has.
    """
    checks.check_float("y", y, 3)
    check_residual(x, {"gate": gate, "shift": shift, "scale": scale}, "y", y)
    checks.check_shape("y", y, tuple(x.shape))
    dtype, name = settle(backend, x, gate, y, shift, scale)
    if name == "reference":
        return reference_norm.residual_norm_modulate(x, gate, y, shift, scale, eps, dtype)
    return _residual_norm_modulate(x, gate, y, shift, scale, eps, dtype, name)


def _check(x: Tensor, vectors: dict[str, Tensor]) -> None:
    checks.check_float("x", x, 3)
    for name, vector in vectors.items():
        checks.check_float(name, vector, 2)
        checks.check_same_device(name, vector, "x", x)
        checks.check_shape(name, vector, (x.shape[0], x.shape[2]))


def check_residual(x: Tensor, vectors: dict[str, Tensor], name: str, branch: Tensor) -> None:
    """What `residual_norm_modulate` asks of its tensors, but for the branch's shape."""
    _check(x, vectors)
    checks.check_same_device(name, branch, "x", x)


def _promoted(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])


def settle(backend: str, x: Tensor, *others: Tensor) -> tuple[torch.dtype, str]:
    """The dtype of the modulated output, and the backend."""
    common = _promoted(x, *others)
    dtype = checks.product_dtype(x.device.type, common)
    refusal = unsupported(x.dtype, (*[other.dtype for other in others], dtype))
    return dtype, backends.resolve(backend, "norm", x.device.type, common, refusal=refusal)


def _rows(vectors: Tensor) -> Tensor:
    """Vectors whose elements are neighbours, as the kernels want them."""
    return vectors if vectors.stride(1) == 1 else vectors.contiguous()


# ---- norm_modulate


def _norm_impl(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, backend: str) -> Tensor:
    if backend != "reference":
        return _kernels(backend).norm_modulate(x.contiguous(), _rows(shift), _rows(scale), eps, dtype)
    return reference_norm.norm_modulate(x, shift, scale, eps, dtype)


def _norm_fake(x: Tensor, shift: Tensor, scale: Tensor, eps: float, dtype: torch.dtype, backend: str) -> Tensor:
    return x.new_empty(x.shape, dtype=dtype)


def _norm_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, shift, scale, ctx.eps, _, ctx.backend = inputs
    ctx.shift_dtype = shift.dtype
    ctx.save_for_backward(x, scale)


def _norm_backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    grads = _norm_modulate_backward(dout, *ctx.saved_tensors, ctx.eps, ctx.shift_dtype, ctx.backend)
    return (*grads, None, None, None)


_norm_modulate = define_op(
    "norm_modulate(Tensor x, Tensor shift, Tensor scale, float eps, ScalarType dtype, str backend) -> Tensor",
    _norm_impl,
    _norm_fake,
    setup_context=_norm_setup,
    backward=_norm_backward,
)


def _norm_backward_impl(
    dout: Tensor, x: Tensor, scale: Tensor, eps: float, shift_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    grads = _norm_backward_fake(dout, x, scale, eps, shift_dtype, backend)
    if backend != "reference":
        _kernels(backend).norm_modulate_backward(dout.contiguous(), x.contiguous(), _rows(scale), eps, *grads)
    else:
        _write(grads, reference_norm.norm_modulate_backward(dout, x, scale, eps))
    return grads


def _norm_backward_fake(
    dout: Tensor, x: Tensor, scale: Tensor, eps: float, shift_dtype: torch.dtype, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), scale.new_empty(scale.shape, dtype=shift_dtype), scale.new_empty(scale.shape)


_norm_modulate_backward = define_op(
    "norm_modulate_backward(Tensor dout, Tensor x, Tensor scale, float eps, ScalarType shift_dtype, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _norm_backward_impl,
    _norm_backward_fake,
)

# ---- residual_norm_modulate


def _residual_impl(
    x: Tensor,
    gate: Tensor,
    y: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend != "reference":
        return run_residual(x, gate, y, shift, scale, eps, dtype, backend)
    return reference_norm.residual_norm_modulate(x, gate, y, shift, scale, eps, dtype)


def run_residual(
    x: Tensor,
    gate: Tensor,
    y: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
    **routed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """total and the modulated output, by kernels. routed: what makes tokens of y, if it is an expert layer's rows."""
    total = x.new_empty(x.shape, dtype=_promoted(x, gate, y))
    residual = {"gate": _rows(gate), "y": y.contiguous(), "total": total, **routed}
    modulate = _kernels(backend).norm_modulate
    return total, modulate(x.contiguous(), _rows(shift), _rows(scale), eps, dtype, **residual)


def residual_fake(x: Tensor, gate: Tensor, y: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """What `run_residual` returns, for torch.compile."""
    *_, dtype, _backend = rest
    return x.new_empty(x.shape, dtype=_promoted(x, gate, y)), x.new_empty(x.shape, dtype=dtype)


def _residual_setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, gate, y, shift, scale, ctx.eps, _, ctx.backend = inputs
    ctx.dtypes = x.dtype, shift.dtype
    ctx.save_for_backward(output[0], gate, y, scale)


def _residual_backward(ctx: Any, dsum: Tensor, dout: Tensor) -> tuple[Tensor | None, ...]:
    grads = _residual_norm_modulate_backward(dsum, dout, *ctx.saved_tensors, ctx.eps, *ctx.dtypes, ctx.backend)
    return (*grads, None, None, None)


_residual_norm_modulate = define_op(
    "residual_norm_modulate(Tensor x, Tensor gate, Tensor y, Tensor shift, Tensor scale, float eps, ScalarType dtype, "
    "str backend) -> (Tensor, Tensor)",
    _residual_impl,
    residual_fake,
    setup_context=_residual_setup,
    backward=_residual_backward,
)


def _residual_backward_impl(
    dsum: Tensor,
    dout: Tensor,
    total: Tensor,
    gate: Tensor,
    y: Tensor,
    scale: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    shift_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, ...]:
    grads = _residual_backward_fake(dsum, dout, total, gate, y, scale, eps, x_dtype, shift_dtype, backend)
    if backend != "reference":
        dx, dgate, dy, dshift, dscale = grads
        dout, total, dsum, y = (tensor.contiguous() for tensor in (dout, total, dsum, y))
        residual = {"dsum": dsum, "gate": _rows(gate), "y": y, "dy": dy, "dgate": dgate}
        _kernels(backend).norm_modulate_backward(dout, total, _rows(scale), eps, dx, dshift, dscale, **residual)
    else:
        _write(grads, reference_norm.residual_norm_modulate_backward(dsum, dout, total, gate, y, scale, eps))
    return grads


def _residual_backward_fake(
    dsum: Tensor,
    dout: Tensor,
    total: Tensor,
    gate: Tensor,
    y: Tensor,
    scale: Tensor,
    eps: float,
    x_dtype: torch.dtype,
    shift_dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, ...]:
    return (
        total.new_empty(total.shape, dtype=x_dtype),
        gate.new_empty(gate.shape),
        y.new_empty(y.shape),
        scale.new_empty(scale.shape, dtype=shift_dtype),
        scale.new_empty(scale.shape),
    )


_residual_norm_modulate_backward = define_op(
    "residual_norm_modulate_backward(Tensor dsum, Tensor dout, Tensor total, Tensor gate, Tensor y, Tensor scale, "
    "float eps, ScalarType x_dtype, ScalarType shift_dtype, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _residual_backward_impl,
    _residual_backward_fake,
)


def _write(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    """Copy the reference's results, which are in fp32, into memory of the right dtypes."""
    for target, value in zip(into, values, strict=True):
        target.copy_(value)
