"""grouped_gemm: one matrix product per expert over rows sorted by expert, with gradients for rows and weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from . import backends, checks, reference
from .library import define_op
from .routing import RoutingPlan


def grouped_gemm(x: Tensor, w: Tensor, plan: RoutingPlan, *, backend: str = "auto") -> Tensor:
    """Multiply each expert's rows by its weight: out[r] = w[expert(r)] @ x[r].

    Args:
        x: (N, I) float, rows sorted by expert as `permute` gives them.
        w: (E, O, I) float, a weight per expert in nn.Linear's layout.
        plan: the routing that ordered the rows.
        backend: "auto", "cuda" (Hopper), "triton" or "reference".

    Returns:
        (N, O), in autocast's dtype under autocast, else in x's dtype, which w must share. Rows past the last row in
        use are unspecified.
    """
    checks.check_float("x", x, 2)
    checks.check_float("w", w, 3)
    checks.check_same_product_dtype("w", w, "x", x)
    checks.check_same_device("plan", plan.row_to_slot, "x", x)
    checks.check_shape("x", x, (plan.num_rows, w.shape[2]))
    checks.check_shape("w", w, (plan.num_experts, *w.shape[1:]))
    dtype = checks.autocast_dtype(x)
    fits = backends.whole_chunks(dtype, *w.shape[1:])
    name = backends.resolve(backend, "grouped_gemm", x.device, dtype, whole_chunks=fits)
    tiles = (plan.expert_offsets, plan.tile_expert, plan.tile_row, plan.tile_rows)
    return _grouped_gemm(x.to(dtype), w.to(dtype), *tiles, name)


# ---- forward

_PLAN_SCHEMA = "Tensor expert_offsets, Tensor tile_expert, Tensor tile_row, int tile_rows, str backend"


def _forward_impl(
    x: Tensor, w: Tensor, offsets: Tensor, tile_expert: Tensor, tile_row: Tensor, tile_rows: int, backend: str
) -> Tensor:
    if backend == "cuda":
        from .cuda_impl import grouped_gemm as cuda_kernels

        return cuda_kernels.grouped_gemm(x.contiguous(), w.contiguous(), offsets)
    if backend == "triton":
        from .triton_impl import grouped_gemm as kernels

        return kernels.grouped_gemm(x.contiguous(), w.contiguous(), offsets, tile_expert, tile_row, tile_rows)
    return reference.grouped_gemm(x, w, offsets)


def _forward_fake(x: Tensor, w: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], w.shape[1])


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, w, offsets, tile_expert, tile_row, ctx.tile_rows, ctx.backend = inputs
    ctx.save_for_backward(x, w, offsets, tile_expert, tile_row)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w, offsets, tile_expert, tile_row = ctx.saved_tensors
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = _grouped_gemm_dx(grad, w, offsets, tile_expert, tile_row, ctx.tile_rows, ctx.backend)
    if ctx.needs_input_grad[1]:
        dw = _grouped_gemm_dw(grad, x, offsets, ctx.backend)
    return dx, dw, None, None, None, None, None


_grouped_gemm = define_op(
    f"grouped_gemm(Tensor x, Tensor w, {_PLAN_SCHEMA}) -> Tensor",
    _forward_impl,
    _forward_fake,
    setup_context=_setup,
    backward=_backward,
)

# ---- gradients


def _dx_impl(
    grad: Tensor, w: Tensor, offsets: Tensor, tile_expert: Tensor, tile_row: Tensor, tile_rows: int, backend: str
) -> Tensor:
    if backend == "cuda":
        from .cuda_impl import grouped_gemm as cuda_kernels

        return cuda_kernels.grouped_gemm_dx(grad.contiguous(), w.contiguous(), offsets)
    if backend == "triton":
        from .triton_impl import grouped_gemm as kernels

        return kernels.grouped_gemm_dx(grad.contiguous(), w.contiguous(), offsets, tile_expert, tile_row, tile_rows)
    return reference.grouped_gemm_dx(grad, w, offsets)


def _dx_fake(grad: Tensor, w: Tensor, *_: Any) -> Tensor:
    return grad.new_empty(grad.shape[0], w.shape[2])


_grouped_gemm_dx = define_op(f"grouped_gemm_dx(Tensor grad, Tensor w, {_PLAN_SCHEMA}) -> Tensor", _dx_impl, _dx_fake)


def _dw_impl(grad: Tensor, x: Tensor, offsets: Tensor, backend: str) -> Tensor:
    if backend == "cuda":
        from .cuda_impl import grouped_gemm_dw as cuda_kernels

        return cuda_kernels.grouped_gemm_dw(grad.contiguous(), x.contiguous(), offsets)
    if backend == "triton":
        from .triton_impl import grouped_gemm_dw as kernels

        return kernels.grouped_gemm_dw(grad.contiguous(), x.contiguous(), offsets)
    return reference.grouped_gemm_dw(grad, x, offsets)


def _dw_fake(grad: Tensor, x: Tensor, offsets: Tensor, backend: str) -> Tensor:
    return grad.new_empty(offsets.shape[0] - 1, grad.shape[1], x.shape[1])


_grouped_gemm_dw = define_op(
    "grouped_gemm_dw(Tensor grad, Tensor x, Tensor expert_offsets, str backend) -> Tensor", _dw_impl, _dw_fake
)
