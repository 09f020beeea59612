"""routed_ffn: the whole routed layer; without gradients one op, since small layers wait for the host."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import backends, checks, configs, reference, router
from .expert_ffn import check_addend, check_expert_weights, expert_ffn, run_forward
from .library import define_op
from .route import route, run_route


def routed_ffn(
    x: Tensor,
    gate: Tensor,
    w13: Tensor,
    w2: Tensor,
    top_k: int,
    *,
    addend: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Route every token, send it through its experts and sum the weighted results: `route`, then `expert_ffn`.

    Args:
        x: (T, D) float, tokens.
        gate: (E, D) float, the router's weight; its dtype may differ from x's.
        w13: (E, 2F, D) float, gate rows first, then up rows.
        w2: (E, D, F) float.
        top_k: K, at most E.
        addend: (T, D) float in x's dtype, added before the sum's rounding as in `expert_ffn`; None adds nothing.
        backend: "auto", "cuda" (Hopper; see `route` and `expert_ffn`), "triton" or "reference".

    Returns:
        out (T, D) as `expert_ffn` gives it; probs (T, E) and tokens_per_expert (E,) as `route` does.
    """
    tensors = (x, gate, w13, w2, addend)
    wants_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if not wants_gradient and checks.autocast_dtype(x) == x.dtype == w13.dtype == w2.dtype:  # nothing is to be cast
        _check(*tensors, top_k)
        fits = backends.whole_chunks(x.dtype, x.shape[1], w2.shape[2])
        name = backends.resolve(backend, "expert_ffn", x.device, x.dtype, whole_chunks=fits)
        if name == router.resolve(backend, x, gate):
            return _routed_ffn(x, gate, w13, w2, None if addend is None else addend.to(x.dtype), top_k, name)
    routing = route(x, gate, top_k, backend=backend)
    out = expert_ffn(x, w13, w2, routing.topk_weights, routing.plan, addend=addend, backend=backend)
    return out, routing.probs, routing.plan.tokens_per_expert


def _check(x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, addend: Tensor | None, top_k: int) -> None:
    checks.check_float("x", x, 2)
    checks.check_float("gate", gate, 2)
    checks.check_same_device("gate", gate, "x", x)
    check_expert_weights(w13, w2, x)
    checks.check_shape("gate", gate, (w13.shape[0], x.shape[1]))
    checks.check_top_k(top_k, gate.shape[0])
    if addend is not None:
        check_addend(addend, x)


def _impl(
    x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, addend: Tensor | None, top_k: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    if backend == "cuda":
        from .cuda_impl import routed_ffn as kernels

        x, gate, w13, w2 = (t.contiguous() for t in (x, gate, w13, w2))
        return kernels.routed_ffn(x, gate, w13, w2, None if addend is None else addend.contiguous(), top_k)
    tile_rows = configs.choose_tile_rows(x.shape[0] * top_k, gate.shape[0])
    weights, _ids, probs, _balance, *plan = run_route(x, gate, top_k, tile_rows, 0.0, backend)
    counts, offsets, row_to_slot, slot_to_row, *tiles = plan
    maps = (offsets, row_to_slot, slot_to_row, tiles[0], tiles[1])
    return run_forward(x, w13, w2, weights, addend, *maps, tile_rows, False, backend)[0], probs, counts


def _fake(x: Tensor, gate: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    wide = reference.accumulation_dtype(torch.promote_types(x.dtype, gate.dtype))
    probs = x.new_empty(x.shape[0], gate.shape[0], dtype=wide)
    return x.new_empty(x.shape), probs, x.new_empty(gate.shape[0], dtype=torch.int32)


_routed_ffn = define_op(
    "routed_ffn(Tensor x, Tensor gate, Tensor w13, Tensor w2, Tensor? addend, int top_k, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _impl,
    _fake,
)
