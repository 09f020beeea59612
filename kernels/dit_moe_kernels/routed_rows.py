"""routed_rows and combine_norm_modulate: a routed layer whose combine is left to the norm behind it.

Without gradients a block needs the layer's output only as the branch that the next norm adds to the residual stream, so
the norm can read the experts' rows itself: the output is neither written nor read again.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, checks, configs, reference, reference_norm
from .library import define_op
from .norm_modulate import check_residual, residual_fake, residual_norm_modulate, run_residual, settle
from .permute import combine
from .route import route_fake, run_route
from .routed_ffn import check_routed_ffn, common_backend


class RoutedRows(NamedTuple):
    """The experts' results, still to be combined into tokens.

    rows: (N, D), sorted by expert.
    topk_weights: (T, K) fp32.
    slot_to_row: (N,) int32.
    addend: (T, D) in rows' dtype, added before the sum's rounding, or None.
    """

    rows: Tensor
    topk_weights: Tensor
    slot_to_row: Tensor
    addend: Tensor | None = None

    def combined(self) -> Tensor:
        """(T, D), as `routed_ffn` gives it."""
        return combine(self.rows, self.topk_weights, self.slot_to_row, self.addend)


def takes_rows(x: Tensor, gate: Tensor, w2: Tensor, backend: str = "auto") -> bool:
    """Whether `routed_rows` would run in CUDA on these tokens, where it and the norm are faster than the layer."""
    if torch.is_grad_enabled() or x.dtype != checks.autocast_dtype(x):
        return False
    return common_backend(backend, x, gate, w2) == "cuda"


def routed_rows(
    x: Tensor,
    gate: Tensor,
    w13: Tensor,
    w2: Tensor,
    top_k: int,
    *,
    addend: Tensor | None = None,
    backend: str = "auto",
) -> tuple[RoutedRows, Tensor, Tensor]:
    """`routed_ffn` without gradients and without its combine.

    Args:
        x, gate, w13, w2, top_k, addend: as in `routed_ffn`.
        backend: "auto", "cuda" (Hopper) or "reference".

    Returns:
        RoutedRows, probs (T, E), tokens_per_expert (E,).

    Raises:
        ValueError: a gradient is wanted.
        TypeError: x is not in autocast's dtype under autocast.
    """
    check_routed_ffn(x, gate, w13, w2, addend, top_k)
    _check_no_gradients("routed_rows", x, gate, w13, w2, addend)
    if x.dtype != (dtype := checks.autocast_dtype(x)):
        raise TypeError(f"x: got dtype {x.dtype}, expected autocast's {dtype}")
    w13, w2, addend = w13.to(dtype), w2.to(dtype), None if addend is None else addend.to(dtype)
    fits = backends.whole_chunks(x.dtype, x.shape[1], w2.shape[2])
    chosen = backends.resolve(backend, "routed_rows", x.device, x.dtype, whole_chunks=fits)
    rows, weights, slot_to_row, probs, counts = _routed_rows(x, gate, w13, w2, top_k, chosen)
    return RoutedRows(rows, weights, slot_to_row, addend), probs, counts


def _check_no_gradients(op: str, *tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(f"{op}: got tensors that require gradients, expected torch.no_grad()")


def _rows_impl(x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int, backend: str) -> tuple[Tensor, ...]:
    if backend == "cuda":
        from .cuda_impl import routed_ffn as kernels

        x, gate, w13, w2 = (t.contiguous() for t in (x, gate, w13, w2))
        return kernels.routed_rows(x, gate, w13, w2, top_k)
    tile_rows = configs.choose_tile_rows(x.shape[0] * top_k, gate.shape[0])
    weights, _ids, probs, _balance, counts, offsets, row_to_slot, slot_to_row, *_ = run_route(
        x, gate, top_k, tile_rows, 0.0, backend
    )
    rows, _h = reference.expert_rows(x, w13, w2, offsets, row_to_slot, top_k)
    return rows, weights, slot_to_row, probs, counts


def _rows_fake(x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int, backend: str) -> tuple[Tensor, ...]:
    tile_rows = configs.choose_tile_rows(x.shape[0] * top_k, gate.shape[0])
    weights, _ids, probs, _balance, counts, _offsets, _slots, slot_to_row, *_ = route_fake(x, gate, top_k, tile_rows)
    return x.new_empty(x.shape[0] * top_k, x.shape[1]), weights, slot_to_row, probs, counts


_routed_rows = define_op(
    "routed_rows(Tensor x, Tensor gate, Tensor w13, Tensor w2, int top_k, str backend)"
    f" -> ({', '.join(['Tensor'] * 5)})",
    _rows_impl,
    _rows_fake,
)


# ---- combine_norm_modulate


def combine_norm_modulate(
    x: Tensor,
    gate: Tensor,
    routed: RoutedRows,
    shift: Tensor,
    scale: Tensor,
    eps: float = 1e-6,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`residual_norm_modulate` with a branch that is combined on the way, with the same bits; without gradients.

    Args:
        x: (B, N, D) float, the residual stream.
        gate, shift, scale, eps, backend: as in `residual_norm_modulate`.
        routed: of B * N tokens.

    Returns:
        As `residual_norm_modulate`.

    Raises:
        ValueError: a gradient is wanted.
    """
    rows, weights, slot_to_row, addend = routed
    _check_no_gradients("combine_norm_modulate", x, gate, rows, weights, addend, shift, scale)
    checks.check_float("rows", rows, 2)
    checks.check_shape("topk_weights", weights, (x.shape[0] * x.shape[1], weights.shape[1]))
    checks.check_shape("rows", rows, (weights.numel(), x.shape[2]))
    check_residual(x, {"gate": gate, "shift": shift, "scale": scale}, "rows", rows)
    dtype, name = settle(backend, x, gate, rows, shift, scale)
    if name != "cuda":
        return residual_norm_modulate(x, gate, routed.combined().view(x.shape), shift, scale, eps, backend=backend)
    return _combine_norm(x, gate, rows, weights, slot_to_row, addend, shift, scale, eps, dtype, name)


def _combine_norm_impl(
    x: Tensor,
    gate: Tensor,
    rows: Tensor,
    topk_weights: Tensor,
    slot_to_row: Tensor,
    addend: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
    dtype: torch.dtype,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if backend != "cuda":
        y = reference.unpermute(rows, topk_weights, slot_to_row, topk_weights.shape[1], addend).view(x.shape)
        return reference_norm.residual_norm_modulate(x, gate, y, shift, scale, eps, dtype)
    addend = None if addend is None else addend.contiguous()
    routed = {"weights": topk_weights.contiguous(), "slot_to_row": slot_to_row, "addend": addend}
    return run_residual(x, gate, rows, shift, scale, eps, dtype, backend, **routed)


_combine_norm = define_op(
    "combine_norm_modulate(Tensor x, Tensor gate, Tensor rows, Tensor topk_weights, Tensor slot_to_row, Tensor? addend,"
    " Tensor shift, Tensor scale, float eps, ScalarType dtype, str backend) -> (Tensor, Tensor)",
    _combine_norm_impl,
    residual_fake,
)
