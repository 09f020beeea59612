"""AveragedWeights: the exponential moving average that sampling uses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from dit_moe_kernels import average_, next_random_bits
from torch import Tensor

from .rounding import has_kernels, round_stochastically_
from .shards import local_part
from .staging import Piece, update_staged

_CHUNK = 64


class AveragedWeights:
    """Averages of named weights, on their device or in the host's memory.

    Averages that the host keeps of weights on a GPU are updated on the GPU, in pieces that are copied there and back;
    the same draws give the same bits as averages that lie there.

    Args:
        weights: name -> weight, the same live tensors at each update.
        dtype: of the averages; torch.bfloat16 is rounded stochastically.
        device: "model" or "cpu".
        every: steps from one update to the next.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], dtype: torch.dtype = torch.float32, device: str = "model", every: int = 1
    ) -> None:
        self._weights = dict(weights)
        self.every = every
        self.tensors = {
            name: torch.empty_like(
                weight,
                dtype=dtype,
                device="cpu" if device == "cpu" else weight.device,
                requires_grad=False,
                memory_format=torch.contiguous_format,
            )
            for name, weight in self._weights.items()
        }
        weight, average = (next(iter(tensors.values())) for tensors in (self._weights, self.tensors))
        self._staged = average.device != weight.device
        self._by_kernel = dtype == torch.bfloat16 and has_kernels(weight.device)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Start the averages at the weights."""
        if self._staged:  # a plain copy would have one thread touch all of the host's pages
            update_staged(*self._parts(), lambda average, piece: average.copy_(piece.source))
            return
        for name, average in self.tensors.items():
            local_part(average).copy_(local_part(self._weights[name]))

    @torch.no_grad()
    def update(self, step: int, decays: list[float], generator: torch.Generator | None = None) -> None:
        """average = decay * average + (1 - decay) * weight, in steps that `every` divides.

        Args:
            step: steps done, this one included.
            decays: of this step and of the every - 1 before it.
            generator: source of stochastic rounding, on the weights' device.
        """
        if step % self.every:
            return
        share = 1.0
        for decay in decays:
            share *= decay
        if self._staged:
            self._update_staged(1 - share, generator)
        elif self._by_kernel:
            self._update_by_kernel(1 - share, generator)
        else:
            names = list(self.tensors)
            for start in range(0, len(names), _CHUNK):
                self._update(names[start : start + _CHUNK], 1 - share, generator)

    def _update_staged(self, share: float, generator: torch.Generator | None) -> None:
        averages, weights = self._parts()
        random = next_random_bits(generator, weights[0].device) if self._by_kernel else None

        def update(average: Tensor, piece: Piece) -> None:
            if random is not None:
                average_(average, piece.source, share, random, piece.number, piece.start)
            else:
                _mix([average], [piece.source.float()], share, generator)

        update_staged(averages, weights, update)

    def _parts(self) -> tuple[list[Tensor], list[Tensor]]:
        """What this rank holds of the averages, and of their weights."""
        averages = [local_part(tensor) for tensor in self.tensors.values()]
        return averages, [local_part(self._weights[name]) for name in self.tensors]

    def _update_by_kernel(self, share: float, generator: torch.Generator | None) -> None:
        random = next_random_bits(generator, local_part(next(iter(self.tensors.values()))).device)
        for number, (name, tensor) in enumerate(self.tensors.items()):
            average_(local_part(tensor), local_part(self._weights[name]), share, random, number)

    def _update(self, names: list[str], share: float, generator: torch.Generator | None) -> None:
        averages = [local_part(self.tensors[name]) for name in names]
        _mix(averages, [local_part(self._weights[name]).float() for name in names], share, generator)


def _mix(averages: list[Tensor], weights: list[Tensor], share: float, generator: torch.Generator | None) -> None:
    """averages += share * (weights - averages) by PyTorch, in fp32; bf16 averages are rounded stochastically."""
    if averages[0].dtype == torch.float32:
        torch._foreach_lerp_(averages, weights, share)
        return
    for average, weight in zip(averages, weights, strict=True):
        round_stochastically_(average, average.float().lerp_(weight, share), generator)
