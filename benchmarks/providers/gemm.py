"""The yardstick: bare cuBLAS products over all T*K rows with a single expert's weights, each in its faster layout.

This is what the arithmetic costs when nothing is routed: the router, the gather, the activation and the sum over
choices take no time, and there is one large product where the experts need several.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..problems import MoEProblem
from ..timing import Call, Clock, summarize

_LAYOUT_ROUNDS = 7


@dataclass(frozen=True)
class _Product:
    """One of the products with its two storage layouts."""

    name: str
    layouts: tuple[Call, Call]


class Gemm:
    """Two products forward (up with gate and up columns, down), six with backward (also dA, dX, dW13, dW2)."""

    name = "gemm"

    def build(self, problem: MoEProblem, mode: str, clock: Clock) -> Callable[[], None]:
        """Time both layouts of each product in turns and return a call of the faster ones.

        Args:
            problem: gives the sizes and dtype; the operands are random, as large as the layer's.
            mode: "fwd" or "fwd_bwd".
            clock: of the device.
        """
        faster = [_faster(product, clock) for product in _products(problem, mode)]

        def call() -> None:
            for product in faster:
                product()

        return call


def _faster(product: _Product, clock: Clock) -> Call:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(_LAYOUT_ROUNDS + 1):
        for layout, collected in zip(product.layouts, times, strict=True):
            collected.append(clock.time_ms([layout], 4))
    first, second = (summarize(collected[1:]).median_ms for collected in times)  # the first round warms up
    return product.layouts[0] if first <= second else product.layouts[1]


def _products(problem: MoEProblem, mode: str) -> list[_Product]:
    """Operands: activations (N, ...), and each weight stored as (O, I) and as (I, O)."""
    rows, width, hidden = problem.rows, problem.shape.hidden_size, problem.shape.expert_hidden_size
    x = problem.x.detach().repeat_interleave(problem.shape.top_k, dim=0)
    a, dh, dy = (_random(problem, rows, columns) for columns in (hidden, 2 * hidden, width))
    w13, w2 = problem.w13.detach()[0], problem.w2.detach()[0]
    w13_t, w2_t = w13.t().contiguous(), w2.t().contiguous()
    products = [
        _Product("up", _pair((x, w13.t()), (x, w13_t))),
        _Product("down", _pair((a, w2.t()), (a, w2_t))),
    ]
    if mode == "fwd_bwd":
        products += [
            _Product("dA", _pair((dy, w2), (dy, w2_t.t()))),
            _Product("dX", _pair((dh, w13), (dh, w13_t.t()))),
            _Product("dW13", _pair((dh.t(), x), (x.t(), dh))),
            _Product("dW2", _pair((dy.t(), a), (a.t(), dy))),
        ]
    return products


def _random(problem: MoEProblem, *size: int) -> Tensor:
    return torch.randn(size, dtype=torch.float32, device=problem.x.device).to(problem.x.dtype)


def _pair(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Call, Call]:
    return _product(*first), _product(*second)


def _product(left: Tensor, right: Tensor) -> Call:
    out = left.new_empty(left.shape[0], right.shape[1])
    return lambda: torch.mm(left, right, out=out)
