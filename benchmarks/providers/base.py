"""What a provider of the routed layer is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from ..problems import MoEProblem


@dataclass(frozen=True)
class Layer:
    """One provider's routed layer over one problem's weights.

    Args:
        forward: (T, D) -> (T, D).
        weights: the tensors that receive gradients besides x, in the provider's own layout, by any names.
        canonical: gradients of `weights` -> gradients of "gate", "w13" and "w2" in the problem's layout.
    """

    forward: Callable[[Tensor], Tensor]
    weights: Mapping[str, Tensor]
    canonical: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]


class Provider(Protocol):
    """An implementation of the routed layer: router, softmax and top-K, dispatch, SwiGLU experts, combine."""

    name: str

    def availability(self, device: str) -> str | None:
        """Why it cannot run on "cpu" or "cuda", or None."""

    def build(self, problem: MoEProblem) -> Layer:
        """The layer over these weights; may share their storage."""


def same_layout(grads: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """For providers whose weights are already named and laid out as the problem's."""
    return grads


def problem_weights(problem: MoEProblem) -> dict[str, Tensor]:
    """The problem's weights as the leaves of a provider that uses their layout."""
    return {"gate": problem.gate, "w13": problem.w13, "w2": problem.w2}
