"""linear_swiglu: a product with gate and up weights and SwiGLU, as in an expert that every token visits.

On Hopper one kernel does both, so that the pre-activations reach memory only where a backward will read them. Saved for
backward: x, w13 and the pre-activations h, as the product and the activation apart would.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backends, checks, reference
from .activation import swiglu, swiglu_backward
from .library import define_op

# From so many rows on the fused kernel is the faster one without gradients (0.75 to 0.95 of the time on S, B, XL and G;
# at 2048 rows 0.93 to 1.05, at 1024 1.0 to 1.4) and about equal with them (0.98 to 1.07), on the H100:
# benchmarks/results/experiments/linear_swiglu.txt. One bound, so that results do not depend on gradients being wanted.
_FUSED_ROWS = 4096


def linear_swiglu(x: Tensor, w13: Tensor, *, backend: str = "auto") -> Tensor:
    """Compute silu(gate) * up with [gate | up] = x @ w13^T (Shazeer 2020, eq. 6, without w2).

    Args:
        x: (T, D) float, tokens.
        w13: (2F, D) float, gate rows first, then up rows.
        backend: "auto", "cuda" (Hopper: one kernel from 4096 tokens on; below, where it would be the slower way,
            PyTorch's product and a kernel for the activation), "triton" (the latter two always) or "reference".

    Returns:
        (T, F), in autocast's dtype under autocast, else in x's dtype, which w13 must share. The pre-activations are
        rounded to that dtype, the activation is computed in fp32.
    """
    checks.check_float("x", x, 2)
    checks.check_float("w13", w13, 2)
    checks.check_same_product_dtype("w13", w13, "x", x)
    if w13.shape[0] % 2:
        raise ValueError(f"w13: got shape {tuple(w13.shape)}, expected (2F, D) with an even first size")
    checks.check_shape("x", x, (x.shape[0], w13.shape[1]))
    dtype = checks.autocast_dtype(x)
    save_h = torch.is_grad_enabled() and (x.requires_grad or w13.requires_grad)
    fits = backends.whole_chunks(dtype, w13.shape[1], w13.shape[0] // 2)
    name = backends.resolve(backend, "linear_swiglu", x.device, dtype, whole_chunks=fits)
    x, w13 = x.to(dtype), w13.to(dtype)
    if name == "cuda" and x.shape[0] < _FUSED_ROWS:
        return swiglu(F.linear(x, w13), backend=name)
    return _linear_swiglu(x, w13, save_h, name)[0]


def _forward_impl(x: Tensor, w13: Tensor, save_h: bool, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "cuda":
        from .cuda_impl import grouped_gemm as cuda_kernels

        return cuda_kernels.grouped_swiglu(x.contiguous(), w13.contiguous()[None], None, keep_h=save_h)
    if backend == "triton":
        from .triton_impl import swiglu as kernels

        h = F.linear(x, w13)
        a = kernels.swiglu(h)
    else:
        a, h = reference.linear_swiglu(x, w13)
    return a, h if save_h else h.new_empty(0, h.shape[1])


def _forward_fake(x: Tensor, w13: Tensor, save_h: bool, backend: str) -> tuple[Tensor, Tensor]:
    num_tokens, double_width = x.shape[0], w13.shape[0]
    return x.new_empty(num_tokens, double_width // 2), x.new_empty(num_tokens if save_h else 0, double_width)


def _setup(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, w13, _save_h, ctx.backend = inputs
    h = output[1]
    ctx.mark_non_differentiable(h)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, w13, h)


def _backward(ctx: Any, grad: Tensor | None, _dh: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    x, w13, h = ctx.saved_tensors
    dh = swiglu_backward(grad, h, backends.companion(ctx.backend, "swiglu", grad.device.type, grad.dtype))
    dx = dh @ w13 if ctx.needs_input_grad[0] else None
    dw13 = dh.T @ x if ctx.needs_input_grad[1] else None
    return dx, dw13, None, None


_linear_swiglu = define_op(
    "linear_swiglu(Tensor x, Tensor w13, bool save_h, str backend) -> (Tensor, Tensor)",
    _forward_impl,
    _forward_fake,
    setup_context=_setup,
    backward=_backward,
)
