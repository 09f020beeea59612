"""Updates of training state in one pass, rounded stochastically where it is kept in bf16: AdamW and the moving average.

A tensor's random bits are Philox numbers of a seed, a counter, the tensor's number and the element's place, so they do
not depend on how the work is split.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import backends, checks, reference_updates
from .library import define_op
from .reference_updates import AVERAGE_PIECE

_DTYPES = (torch.float32, torch.bfloat16)


class RandomBits(NamedTuple):
    """Where random bits come from: a seed (63 bits) and a counter (31 bits) that no other update has with it."""

    seed: int
    counter: int


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    scalars: Tensor,
    random: RandomBits,
    tensor: int,
    *,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    eps: float,
    backend: str = "auto",
) -> None:
    """One step of AdamW in fp32, in place; what is kept in bf16 is rounded stochastically.

    Args:
        weight, exp_avg, exp_avg_sq: of one shape, contiguous, fp32 or bf16.
        gradient: that shape, fp32 or bf16.
        scalars: (4,) fp32: 1 - beta1^t, sqrt(1 - beta2^t), what to divide the gradient by, and 1 to change nothing.
        random, tensor: seed and counter, and the tensor's number among those of the update.
        learning_rate, betas, weight_decay, eps: as in Loshchilov and Hutter 2019, algorithm 2.
        backend: "auto", "triton" or "reference".

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, strides or devices.
    """
    kept = {"weight": weight, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    for name, state in kept.items():
        _check_state(name, state)
    for name, other in {**kept, "gradient": gradient}.items():
        _check_beside(name, other, "weight", weight)
    if scalars.dtype != torch.float32:
        raise TypeError(f"scalars: got dtype {scalars.dtype}, expected torch.float32")
    checks.check_shape("scalars", scalars, (4,))
    checks.check_same_device("scalars", scalars, "weight", weight)
    name = backends.resolve(backend, "updates", weight.device.type, weight.dtype)
    _adamw(
        weight, gradient, exp_avg, exp_avg_sq, scalars, *random, tensor, learning_rate, *betas, weight_decay, eps, name
    )


def average_(
    average: Tensor,
    weight: Tensor,
    share: float,
    random: RandomBits,
    tensor: int,
    start: int = 0,
    *,
    backend: str = "auto",
) -> None:
    """average += share * (weight - average) in fp32, in place, rounded stochastically where the average is bf16.

    Args:
        average: contiguous, fp32 or bf16.
        weight: average's shape, fp32 or bf16.
        share: 0 to 1.
        random, tensor: seed and counter, and the tensor's number among those of the update.
        start: place of the first element in that tensor, where average is a piece of it; a multiple of AVERAGE_PIECE.
        backend: "auto", "triton" or "reference".

    Raises:
        TypeError, ValueError: wrong dtypes, shapes, strides or devices, or another start.
    """
    _check_state("average", average)
    _check_beside("weight", weight, "average", average)
    if start < 0 or start % AVERAGE_PIECE:  # its elements would not get the bits that are theirs in the whole tensor
        raise ValueError(f"start: got {start}, expected a multiple of {AVERAGE_PIECE}")
    name = backends.resolve(backend, "updates", average.device.type, average.dtype)
    _average(average, weight, share, *random, tensor, start, name)


def next_random_bits(generator: torch.Generator | None, device: torch.device) -> RandomBits:
    """Seed and counter of a CUDA generator, or of the device's own, which moves on; nothing waits for the device."""
    if generator is None:
        index = torch.cuda.current_device() if device.index is None else device.index
        generator = torch.cuda.default_generators[index]
    offset = generator.get_offset()
    generator.set_offset(offset + 4)
    return RandomBits(generator.initial_seed() & (2**63 - 1), (offset // 4) & (2**31 - 1))


def _check_state(name: str, state: Tensor) -> None:
    if not state.is_contiguous():
        raise ValueError(f"{name}: got strides {state.stride()}, expected a contiguous tensor")
    if state.dtype not in _DTYPES:
        raise TypeError(f"{name}: got dtype {state.dtype}, expected one of {_DTYPES}")


def _check_beside(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, expected one of {_DTYPES}")
    checks.check_same_device(name, tensor, other_name, other)
    checks.check_shape(name, tensor, tuple(other.shape))


def _adamw_impl(weight: Tensor, gradient: Tensor, *rest: object) -> None:
    *arguments, backend = rest
    if backend == "triton":
        from .triton_impl import updates as kernels

        kernels.adamw_(weight, gradient.contiguous(), *arguments)  # type: ignore[arg-type]
    else:
        reference_updates.adamw_(weight, gradient, *arguments)  # type: ignore[arg-type]


def _average_impl(average: Tensor, weight: Tensor, *rest: object) -> None:
    *arguments, backend = rest
    if backend == "triton":
        from .triton_impl import updates as kernels

        kernels.average_(average, weight.contiguous(), *arguments)  # type: ignore[arg-type]
    else:
        reference_updates.average_(average, weight, *arguments)  # type: ignore[arg-type]


def _nothing(*args: object) -> None:
    return None


_adamw = define_op(
    "adamw_(Tensor(a!) weight, Tensor gradient, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor scalars, int seed,"
    " int counter, int tensor, float learning_rate, float beta1, float beta2, float weight_decay, float eps,"
    " str backend) -> ()",
    _adamw_impl,
    _nothing,
)
_average = define_op(
    "average_(Tensor(a!) average, Tensor weight, float share, int seed, int counter, int tensor, int start,"
    " str backend) -> ()",
    _average_impl,
    _nothing,
)
