"""AdamW over named parameters, a bucket at a time, with fp32 master weights where the model's own are narrower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from dit_moe_kernels import adamw_, next_random_bits
from torch import Tensor
from torch.optim.adamw import adamw

from .rounding import has_kernels, round_stochastically_
from .shards import local_part

_BUCKET_ELEMENTS = 64 * 2**20  # fp32 copies of a bucket's gradients and moments stay below 800 MB


class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, algorithm 2) by PyTorch's fused kernel.

    State in bf16 is updated by a Triton kernel on a GPU, elsewhere by PyTorch's on fp32 copies.

    Parameters in bf16 get master weights in fp32, which the update changes and the parameters then follow; or, without
    masters, are updated in fp32 and rounded stochastically. DTensors are updated shard by shard. Nothing waits for the
    device.

    Args:
        parameters: name -> fp32 or bf16 parameter.
        betas: decay of the first and the second moment.
        weight_decay: share of a weight that learning rate 1 takes off.
        moments: torch.float32, or torch.bfloat16, rounded stochastically.
        eps: added to the root of the second moment.
        keep_masters: whether bf16 parameters get master weights.
        masters: fp32 values that bf16 parameters were rounded from; None takes the parameters' own.

    Raises:
        TypeError: a parameter of another dtype.
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        moments: torch.dtype = torch.float32,
        eps: float = 1e-8,
        keep_masters: bool = True,
        masters: Mapping[str, Tensor] | None = None,
    ) -> None:
        for name, param in parameters.items():
            if param.dtype not in (torch.float32, torch.bfloat16):
                raise TypeError(f"{name}: got dtype {param.dtype}, expected float32 or bfloat16")
        self.parameters = dict(parameters)
        self.betas, self.weight_decay, self.eps = betas, weight_decay, eps
        # Where a parameter has no master, its own tensor.
        self.weights = {
            name: param
            if param.dtype == torch.float32 or not keep_masters
            else (masters or self.parameters)[name].detach().float()
            for name, param in self.parameters.items()
        }
        self.exp_avg = {name: _zeros(param, moments) for name, param in self.parameters.items()}
        self.exp_avg_sq = {name: _zeros(param, moments) for name, param in self.parameters.items()}
        device = next(iter(self.parameters.values())).device
        self.updates = torch.zeros(1, device=device)
        self._sums: dict[str, Tensor] = {}
        self._buckets = list(_buckets(self.parameters))
        self._by_kernel = has_kernels(device)

    def gradients(self) -> dict[str, Tensor]:
        """The gradient of each parameter that has one: in fp32 after `sum_gradients`, else as backward left it."""
        found = {name: param.grad for name, param in self.parameters.items() if param.grad is not None}
        return {**found, **self._sums}

    def sum_gradients(self) -> None:
        """Add bf16 gradients to fp32 sums and drop them; to be called after the backward pass of each micro-batch.

        Backward passes add up gradients in the parameters' dtype, where bf16 would round after each micro-batch.
        """
        for name, param in self.parameters.items():
            if param.grad is None or param.dtype == torch.float32:
                continue
            if name not in self._sums:
                self._sums[name] = param.grad.float()
            else:
                self._sums[name].add_(param.grad)
            param.grad = None

    def zero_gradients(self) -> None:
        """Drop all gradients."""
        self._sums.clear()
        for param in self.parameters.values():
            param.grad = None

    @torch.no_grad()
    def step(
        self,
        learning_rate: float,
        *,
        divisor: Tensor | None = None,
        skip: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Update all parameters that have a gradient.

        Args:
            learning_rate: of this step.
            divisor: () fp32 on the device, by which the gradients are divided first, as clipping asks.
            skip: () fp32 on the device; 1 leaves everything as it is, 0 does not.
            generator: source of stochastic rounding, on the device.
        """
        gradients = self.gradients()
        kept = {name: self._kept(name) for name in gradients} if self._by_kernel else {}
        by_kernel = {name: tensors for name, tensors in kept.items() if _is_narrow(tensors)}
        if by_kernel:
            self._step_by_kernel(by_kernel, gradients, learning_rate, divisor, skip, generator)
        for bucket in self._buckets:
            names = [name for name in bucket if name in gradients and name not in by_kernel]
            if names:
                self._step_bucket(names, gradients, learning_rate, divisor, skip, generator)
        self.updates += 1 if skip is None else 1 - skip

    def _kept(self, name: str) -> list[Tensor]:
        """What lies here of a parameter's weight and its two moments."""
        return [local_part(tensors[name]) for tensors in (self.weights, self.exp_avg, self.exp_avg_sq)]

    def _step_by_kernel(
        self,
        kept: Mapping[str, list[Tensor]],
        gradients: dict[str, Tensor],
        learning_rate: float,
        divisor: Tensor | None,
        skip: Tensor | None,
        generator: torch.Generator | None,
    ) -> None:
        done = (self.updates + 1).double()
        corrections = 1 - self.betas[0] ** done, (1 - self.betas[1] ** done).sqrt()
        divisor = torch.ones_like(self.updates) if divisor is None else divisor.view(1)
        skip = torch.zeros_like(self.updates) if skip is None else skip.view(1)
        scalars = torch.cat([*(correction.float() for correction in corrections), divisor, skip])
        random = next_random_bits(generator, self.updates.device)
        for number, name in enumerate(self.parameters):
            if name not in kept:
                continue
            weight, exp_avg, exp_avg_sq = kept[name]
            adamw_(
                weight, local_part(gradients[name]), exp_avg, exp_avg_sq, scalars, random, number,
                learning_rate=learning_rate, betas=self.betas, weight_decay=self.weight_decay, eps=self.eps,
            )  # fmt: skip
        self.copy_weights(list(kept))

    def _step_bucket(
        self,
        names: list[str],
        gradients: dict[str, Tensor],
        learning_rate: float,
        divisor: Tensor | None,
        skip: Tensor | None,
        generator: torch.Generator | None,
    ) -> None:
        kept = [tensor for tensors in zip(*map(self._kept, names), strict=True) for tensor in tensors]
        new = [tensor.float() for tensor in kept]  # the tensor itself where it is fp32
        count = len(names)
        adamw(
            new[:count],
            [local_part(gradients[name]).float() for name in names],
            new[count : 2 * count],
            new[2 * count :],
            [],
            list(self.updates.repeat(count).unbind()),
            fused=True,
            grad_scale=divisor,
            found_inf=skip,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=learning_rate,
            weight_decay=self.weight_decay,
            eps=self.eps,
            maximize=False,
        )
        for tensor, exact in zip(kept, new, strict=True):
            if tensor.dtype != exact.dtype:
                round_stochastically_(tensor, exact, generator)
        self.copy_weights(names)

    @torch.no_grad()
    def copy_weights(self, names: list[str] | None = None) -> None:
        """Round master weights to the parameters, where there are any."""
        pairs = [(self.parameters[name], self.weights[name]) for name in (names or self.parameters)]
        narrow = [(param, weight) for param, weight in pairs if param.dtype != weight.dtype]
        if narrow:
            torch._foreach_copy_([local_part(param) for param, _ in narrow], [local_part(new) for _, new in narrow])

    def state(self) -> dict[str, Tensor]:
        """The live tensors by name: "updates", and NAME.exp_avg and NAME.exp_avg_sq of each parameter."""
        state = {"updates": self.updates}
        for name in self.parameters:
            state[f"{name}.exp_avg"] = self.exp_avg[name]
            state[f"{name}.exp_avg_sq"] = self.exp_avg_sq[name]
        return state


def _is_narrow(kept: list[Tensor]) -> bool:
    """Whether a parameter has elements here whose state is kept in bf16, as the kernel wants it."""
    narrow = any(tensor.dtype == torch.bfloat16 for tensor in kept)
    return narrow and kept[0].numel() > 0 and all(tensor.is_contiguous() for tensor in kept)


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(like, dtype=dtype, requires_grad=False)


def _buckets(parameters: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names in order, cut so that a bucket's local elements stay few; shards without elements are left out."""
    bucket: list[str] = []
    size = 0
    for name, param in parameters.items():
        elements = local_part(param).numel()
        if not elements:
            continue
        if bucket and size + elements > _BUCKET_ELEMENTS:
            yield bucket
            bucket, size = [], 0
        bucket.append(name)
        size += elements
    if bucket:
        yield bucket
