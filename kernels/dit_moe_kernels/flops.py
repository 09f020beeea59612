"""Formulas that teach `torch.utils.flop_counter.FlopCounterMode` what this library's ops compute.

Products only, two operations for a multiply-add, as the counter does for torch's own ops; unused rows of a plan with
unrouted slots are counted as if they were routed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

Shape = Sequence[int]


def register_flop_formulas() -> None:
    """Register the formulas; call it once before a FlopCounterMode is made. Further calls do nothing.

    Importing the package does not do it, because torch's counter imports Triton, which takes longer than all the rest.
    """
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    for name, formula in _FORMULAS.items():
        op = getattr(torch.ops.dit_moe, name)
        if op not in flop_registry:
            register_flop_formula(op)(formula)


# The counter calls a formula with the op's arguments, shapes in place of tensors, and the output's shape by name.


def _product(x: Shape, w: Shape, *_: Any, **__: Any) -> int:
    """x (rows, I) with w (E, O, I) or (I, O): a row meets one expert's weights; or (O, I): all of them."""
    return 2 * x[0] * w[-1] * w[-2]


def _weight_gradient(grad: Shape, x: Shape, *_: Any, **__: Any) -> int:
    return 2 * grad[0] * grad[1] * x[1]


def _router_gradients(
    grad: Shape,
    x: Shape,
    gate: Shape,
    rows: Shape | None,
    slot_to_row: Shape | None,
    wants_dx: bool,
    wants_dgate: bool,
    *_: Any,
    **__: Any,
) -> int:
    return (wants_dx + wants_dgate) * _product(x, gate)


def _expert_ffn(x: Shape, w13: Shape, w2: Shape, topk_weights: Shape, *_: Any, **__: Any) -> int:
    return 2 * topk_weights[0] * topk_weights[1] * (w13[1] * w13[2] + w2[1] * w2[2])


def _expert_ffn_backward(
    grad: Shape, h: Shape, x: Shape, w13: Shape, w2: Shape, topk_weights: Shape, *_: Any, **__: Any
) -> int:
    return 2 * _expert_ffn(x, w13, w2, topk_weights)


def _routed_ffn(
    x: Shape, gate: Shape, w13: Shape, w2: Shape, addend: Shape | None, top_k: int, *_: Any, **__: Any
) -> int:
    return _product(x, gate) + _expert_ffn(x, w13, w2, (x[0], top_k))


def _routed_ffn_backward(
    grad: Shape,
    dprobs: Shape | None,
    h: Shape,
    x: Shape,
    gate: Shape,
    w13: Shape,
    w2: Shape,
    topk_weights: Shape,
    *rest: Any,
    **__: Any,
) -> int:
    *_, wants_dx, wants_dgate, _backend = rest
    routing = _router_gradients(grad, x, gate, None, None, wants_dx, wants_dgate)
    return routing + _expert_ffn_backward(grad, h, x, w13, w2, topk_weights)


def _routed_rows(x: Shape, gate: Shape, w13: Shape, w2: Shape, top_k: int, *_: Any, **__: Any) -> int:
    return _routed_ffn(x, gate, w13, w2, None, top_k)


def _attention(qkv: Shape, *_: Any, **__: Any) -> int:
    images, tokens, _three, heads, width = qkv
    return 4 * images * heads * tokens**2 * width


_FORMULAS: dict[str, Callable[..., int]] = {
    "route": _product,
    "router_logits": _product,
    "router_gradients": _router_gradients,
    "linear_swiglu": _product,
    "qk_norm_attention": _attention,
    "routed_ffn": _routed_ffn,
    "routed_ffn_train": _routed_ffn,
    "routed_rows": _routed_rows,
    "grouped_gemm": _product,
    "grouped_gemm_dx": _product,
    "grouped_gemm_dw": _weight_gradient,
    "expert_ffn": _expert_ffn,
    "expert_ffn_backward": _expert_ffn_backward,
    "routed_ffn_backward": _routed_ffn_backward,
}
