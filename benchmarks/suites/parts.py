"""What the suites of single ops share: a provider's differentiable pieces, checked together and timed as one call."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..engine import Candidate, WrongResult
from ..problems import Expected, with_gradients


@dataclass(frozen=True)
class Part:
    """One op call.

    Args:
        forward: no arguments -> output.
        leaves: tensors that receive gradients, by name.
        dout: gradient of the output; None for an op without gradient, whose backward is empty.
    """

    forward: Callable[[], Tensor]
    leaves: Mapping[str, Tensor]
    dout: Tensor | None

    def run(self, mode: str) -> object:
        """Forward, or forward and backward."""
        if mode == "fwd" or self.dout is None:
            with torch.no_grad():
                return self.forward()
        return torch.autograd.grad(self.forward(), tuple(self.leaves.values()), self.dout)

    def results(self, mode: str) -> dict[str, Tensor]:
        """Output and gradients by name."""
        if mode == "fwd" or self.dout is None:
            with torch.no_grad():
                return {"out": self.forward()}
        return with_gradients(self.forward(), self.leaves, self.dout, mode)


def candidate(
    copies: Sequence[Sequence[Part]],
    expected: Sequence[Expected | None],
    mode: str,
    *,
    flops: float | None,
    traffic: float | None,
    keep_failed: bool,
) -> Candidate:
    """Check the first copy's parts and make a candidate that runs all parts in a row.

    Args:
        copies: for each copy of the inputs, the parts.
        expected: for each part what is right, or None if there is nothing to compare with.
        mode: "fwd" or "fwd_bwd".
        flops, traffic: of one call.
        keep_failed: time a wrong candidate too.

    Raises:
        WrongResult: a part's results are wrong and keep_failed is False.
    """
    status = "ok"
    for part, right in zip(copies[0], expected, strict=True):
        complaint = None if right is None else right.complaint(part.results(mode))
        if complaint is not None:
            if not keep_failed:
                raise WrongResult(complaint)
            status = f"failed: wrong result, {complaint}"

    def call(parts: Sequence[Part]) -> None:
        for part in parts:
            part.run(mode)

    return Candidate([partial(call, parts) for parts in copies], flops, traffic, status=status)


def rotation(call_bytes: int, device: str) -> int:
    """How many copies of the inputs exceed the L2 cache three times."""
    if device == "cpu":
        return 1
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return min(8, -(-3 * l2_bytes // call_bytes))
