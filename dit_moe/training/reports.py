"""What training tells: means of the steps since the last report, and where the first number broke."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class TrainingDivergedError(RuntimeError):
    """A loss or a gradient is no longer finite; the message names the step and the tensor."""


@dataclass(frozen=True)
class TrainingReport:
    """Means over the steps since the last report, and over all ranks.

    Args:
        step: steps done in all.
        loss: of the objective, without the balance loss.
        balance_loss: summed over the layers, factor alpha included.
        grad_norm: norm of the gradient before clipping.
        learning_rate: of the last step.
        images_per_second: over all ranks; 0 where no step was timed.
        expert_load: for each layer, each expert's share of the choices times the number of experts: 1 is even.
    """

    step: int
    loss: float
    balance_loss: float
    grad_norm: float
    learning_rate: float
    images_per_second: float
    expert_load: tuple[tuple[float, ...], ...]

    @property
    def expert_entropy(self) -> tuple[float, ...]:
        """For each layer, the entropy of its choices in units of the greatest possible: 1 is even, 0 one expert."""
        return tuple(_entropy(loads) for loads in self.expert_load)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict that JSON can hold."""
        return asdict(self)


class RunningTotals:
    """Sums over steps that stay on the device until `read`, and the first step whose numbers are not finite.

    Args:
        names: of the parameters, in the order of `add`'s squared norms.
        layers, experts: shape of the experts' load; (0, 0) for a dense model.
        device: of all tensors.
        distributed: whether other ranks see other images.
    """

    def __init__(
        self, names: Sequence[str], layers: int, experts: int, device: torch.device, *, distributed: bool = False
    ) -> None:
        self.names = ["the loss", "the balance loss", *(f"the gradient of {name}" for name in names)]
        self.distributed = distributed
        self._sums = torch.zeros(3, device=device)
        self._loads = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        self._broken = torch.zeros(len(self.names), dtype=torch.bool, device=device)
        self._broken_step = torch.full((), -1, dtype=torch.int64, device=device)
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        for tensor in (self._sums, self._loads, self._broken):
            tensor.zero_()
        self._broken_step.fill_(-1)
        self.steps = 0
        self.start = time.perf_counter()

    def begin_step(self) -> None:
        """Start the clock, if this is the first step since the last reading."""
        if not self.steps:
            self.start = time.perf_counter()

    def add(self, step: int, loss: Tensor, balance: Tensor, squares: Tensor, norm: Tensor, loads: Tensor) -> None:
        """Add one step's numbers; nothing waits for the device.

        Args:
            step: steps done, this one included.
            loss, balance, norm: () fp32.
            squares: (P,) fp32, squared norms of the gradients.
            loads: (L, E) int.
        """
        losses = torch.stack([loss, balance])
        broken = ~torch.cat([losses, squares]).isfinite()
        first = (self._broken_step < 0) & broken.any()
        self._broken |= broken & first
        self._broken_step.masked_fill_(first, step)
        self._sums += torch.cat([losses, norm[None]])
        self._loads += loads
        self.steps += 1

    def read(self, step: int, learning_rate: float, batch_size: int) -> TrainingReport:
        """The report of the steps since the last; waits for the device and, if distributed, for all ranks.

        Raises:
            TrainingDivergedError: a loss or a gradient was not finite.
        """
        if self.distributed:
            # A loss may break on one rank alone; gradients, loads and norms are the same on all.
            dist.all_reduce(self._sums.div_(dist.get_world_size()))
            broken = torch.cat([self._broken_step[None], self._broken.long()])
            dist.all_reduce(broken, dist.ReduceOp.MAX)
            self._broken_step, self._broken = broken[0], broken[1:].bool()
        steps = max(1, self.steps)
        loss, balance, norm = (total / steps for total in self._sums.tolist())
        broken_step = int(self._broken_step)
        seconds = time.perf_counter() - self.start
        loads = self._loads.float()
        loads = loads / loads.mean(1, keepdim=True).clamp(min=1e-9)
        speed = self.steps * batch_size / seconds if self.steps else 0.0
        report = TrainingReport(
            step, loss, balance, norm, learning_rate, speed, tuple(map(tuple, loads.tolist()))
        )  # fmt: skip
        names = [name for name, is_broken in zip(self.names, self._broken.tolist(), strict=True) if is_broken]
        self.reset()
        if broken_step >= 0:
            raise TrainingDivergedError(_diagnosis(broken_step, names, len(self.names) - 2))
        return report


def _diagnosis(step: int, names: list[str], num_gradients: int) -> str:
    gradients = [name for name in names if name.startswith("the gradient of ")]
    losses = [name for name in names if name not in gradients]
    what = " and ".join(losses) if losses else gradients[0]
    text = f"step {step}: {what} is no longer finite"
    if gradients:
        text += f"; {len(gradients)} of {num_gradients} gradients are not, in the model's order first {gradients[0]}"
    return f"{text}. The step was not taken. Try a smaller learning rate or more warm-up steps"


def _entropy(loads: Sequence[float]) -> float:
    total = sum(loads)
    if len(loads) < 2 or not total:
        return 1.0
    shares = [load / total for load in loads if load > 0]
    return -sum(share * math.log(share) for share in shares) / math.log(len(loads))
