"""What a provider of the routed layer is."""

from __future__ import annotations

import importlib.util
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


def missing_package(module: str, package: str, device: str) -> str | None:
    """Why an optional GPU package cannot run, or None.

    Args:
        module: what it is imported as; a submodule tells it from another package of the same name.
        package: its name on PyPI.
        device: "cpu" or "cuda".
    """
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the parent of a submodule is absent
        found = False
    if not found:
        return f"the package {package} is not installed"
    return None if device == "cuda" else f"got device {device!r}, expected 'cuda'"
