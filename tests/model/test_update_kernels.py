"""The update kernels against PyTorch's AdamW in fp64, and their rounding; interpreted where there is no GPU."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from dit_moe_kernels import RandomBits, adamw_, average_
from torch import Tensor, nn

pytest.importorskip("triton")

from dit_moe.training.averages import AveragedWeights
from dit_moe.training.optimizer import AdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OPTIONS = {"learning_rate": 1e-2, "betas": (0.9, 0.99), "weight_decay": 0.1, "eps": 1e-8}
BITS = RandomBits(2**62 + 12345, 7)
COUNT = 3000  # not a multiple of the kernel's block


def scalars(step: int, divisor: float = 1.0, skip: float = 0.0) -> Tensor:
    return torch.tensor([1 - 0.9**step, (1 - 0.99**step) ** 0.5, divisor, skip], device=DEVICE)


def drawn(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Weight, gradient and moments, which bf16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(COUNT, generator=generator).bfloat16().float() for _ in range(4)]
    tensors[3] = tensors[3].square().bfloat16().float()
    return tuple(tensor.to(DEVICE) for tensor in tensors)  # type: ignore[return-value]


def truth(step: int, divisor: float = 1.0) -> list[Tensor]:
    """Weight and moments after one step, by PyTorch in fp64."""
    weight, gradient, exp_avg, exp_avg_sq = (tensor.double() for tensor in drawn())
    param = torch.nn.Parameter(weight)
    optimizer = torch.optim.AdamW([param], lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1, eps=1e-8, foreach=False)
    param.grad = gradient / divisor
    optimizer.state[param] = {
        "step": torch.tensor(float(step - 1)), "exp_avg": exp_avg.clone(), "exp_avg_sq": exp_avg_sq.clone()
    }  # fmt: skip
    optimizer.step()
    state = optimizer.state[param]
    return [param.detach(), state["exp_avg"], state["exp_avg_sq"]]


@pytest.mark.parametrize("gradient_dtype", [torch.float32, torch.bfloat16])
def test_fp32_state_is_pytorchs(gradient_dtype: torch.dtype) -> None:
    weight, gradient, exp_avg, exp_avg_sq = drawn()
    adamw_(weight, gradient.to(gradient_dtype), exp_avg, exp_avg_sq, scalars(3, 2.0), RandomBits(1, 2), 3, **OPTIONS)
    for actual, expected in zip((weight, exp_avg, exp_avg_sq), truth(3, 2.0), strict=True):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)


def narrow_step(random: RandomBits = BITS, tensor: int = 3, **options: float) -> list[Tensor]:
    weight, gradient, exp_avg, exp_avg_sq = (tensor.bfloat16() for tensor in drawn())
    adamw_(weight, gradient, exp_avg, exp_avg_sq, scalars(3, **options), random, tensor, **OPTIONS)
    return [weight, exp_avg, exp_avg_sq]


def test_bf16_state_is_rounded_to_either_side_without_bias() -> None:
    for actual, expected in zip(narrow_step(), truth(3), strict=True):
        # bf16 numbers are at most 2^-7 of their size apart; 1e-6 is the fp32 update's own error.
        error, distance = actual.double() - expected, expected.abs() * 2**-7
        assert (error.abs() <= distance + 1e-6).all()
        share = error / distance
        assert share.abs().mean() > 0.05
        assert share.mean().abs() < 4 * share.std() / COUNT**0.5
        nearest = expected.float().bfloat16()
        assert 0.1 < (actual != nearest).float().mean() < 0.5


def test_random_bits_differ_where_they_should() -> None:
    first = narrow_step()
    assert all(torch.equal(left, right) for left, right in zip(first, narrow_step(), strict=True))
    for other in (narrow_step(RandomBits(5, 7)), narrow_step(RandomBits(BITS.seed, 8)), narrow_step(tensor=4)):
        for left, right in zip(first, other, strict=True):
            assert 0.1 < (left != right).float().mean() < 0.7


def test_skipped_and_not_finite() -> None:
    before = [tensor.bfloat16() for index, tensor in enumerate(drawn()) if index != 1]
    assert all(torch.equal(left, right) for left, right in zip(before, narrow_step(skip=1.0), strict=True))
    average = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0], device=DEVICE).bfloat16()
    average_(average, torch.zeros(4, device=DEVICE), 0.0, RandomBits(1, 0), 0)
    assert average[3] == 1 and not average[:3].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_average(dtype: torch.dtype) -> None:
    average, weight, *_ = drawn()
    expected = torch.lerp(average.double(), weight.double(), 1e-3)
    actual = average.to(dtype)
    average_(actual, weight.bfloat16(), 1e-3, RandomBits(9, 1), 5)
    if dtype == torch.float32:
        torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-7)
        return
    error, distance = actual.double() - expected, expected.abs() * 2**-7
    assert (error.abs() <= distance + 1e-6).all()
    assert (actual != average.bfloat16()).any()
    assert (error / distance).mean().abs() < 4 * (error / distance).std() / COUNT**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_draws_the_same_bits(dtype: torch.dtype) -> None:
    """A last bit of fp32 moves a rounding in one of thousands; other random bits would move a third of them."""
    results = []
    for backend in ("triton", "reference"):
        state = [tensor.to(dtype) for tensor in drawn()]
        adamw_(*state, scalars(3, 2.0), BITS, 3, **OPTIONS, backend=backend)
        average, weight = (tensor.to(dtype) for tensor in drawn(1)[:2])
        average_(average, weight, 0.3, BITS, 4, 2048, backend=backend)
        results.append([state[0], state[2], state[3], average])
    for left, right in zip(*results, strict=True):
        if dtype == torch.float32:
            torch.testing.assert_close(left, right, rtol=1e-6, atol=1e-6)
        else:
            assert (left != right).float().mean() < 0.01


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"start": 100}, ValueError, "start: got 100, expected a multiple of 1024"),
        ({"average": torch.zeros(4, 3).T}, ValueError, "average: got strides"),
        ({"average": torch.zeros(3, 4).half()}, TypeError, "average: got dtype torch.float16"),
        ({"weight": torch.zeros(4, 3)}, ValueError, "weight: got shape"),
    ],
)
def test_wrong_arguments_of_average_(changed: dict, error: type[Exception], message: str) -> None:
    arguments = {"average": torch.zeros(3, 4), "weight": torch.zeros(3, 4), "share": 0.5, "random": BITS, "tensor": 0}
    with pytest.raises(error, match=message):
        average_(**{**arguments, **changed})


def test_wrong_arguments_of_adamw_() -> None:
    good = dict(zip(("weight", "gradient", "exp_avg", "exp_avg_sq"), drawn(), strict=True))
    for name, value in (("exp_avg", torch.zeros(3)), ("gradient", torch.zeros(3)), ("scalars", torch.ones(3))):
        arguments = {**good, "scalars": scalars(1), name: value.to(DEVICE)}
        with pytest.raises(ValueError, match=f"{name}: got shape"):
            adamw_(**arguments, random=BITS, tensor=0, **OPTIONS)


def next_bits(counter: Iterator[int], generator: torch.Generator, device: torch.device) -> RandomBits:
    return RandomBits(1, next(counter))


@pytest.mark.parametrize("masters", [False, True])
def test_the_optimiser_and_averages_by_kernels(masters: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the same classes' PyTorch path: as far apart as rounding may bring two runs of one."""
    runs = []
    for by_kernel in (True, False):
        torch.manual_seed(0)
        layer = nn.Linear(40, 30).bfloat16().to(DEVICE)
        optimizer = AdamW(dict(layer.named_parameters()), moments=torch.bfloat16, keep_masters=masters)
        averages = AveragedWeights(optimizer.weights, torch.bfloat16)
        generator, counter = torch.Generator(DEVICE).manual_seed(1), itertools.count()
        for module in ("optimizer", "averages"):
            monkeypatch.setattr(f"dit_moe.training.{module}.next_random_bits", partial(next_bits, counter))
        optimizer._by_kernel = averages._by_kernel = by_kernel
        for step in range(4):
            for param in layer.parameters():
                param.grad = torch.randn_like(param) * 3
            skip = torch.tensor(float(step == 2), device=DEVICE)
            optimizer.step(1e-2, divisor=torch.tensor(2.0, device=DEVICE), skip=skip, generator=generator)
            averages.update(step + 1, [0.9], generator)
        assert optimizer.updates.item() == 3
        if masters:
            assert torch.equal(layer.weight, optimizer.weights["weight"].bfloat16())
        runs.append(({**optimizer.weights}, averages.tensors, optimizer.exp_avg, optimizer.exp_avg_sq))
    # Three steps' roundings, each at most 2^-7 of the size then: 0.2 for weights, in moments 1.
    for left, right, atol in zip(*runs, (2e-3, 2e-3, 2e-2, 2e-4), strict=True):
        for name, tensor in left.items():
            torch.testing.assert_close(tensor.float(), right[name].float(), rtol=4 * 2**-7, atol=atol)


@pytest.mark.gpu
def test_a_generators_state_decides() -> None:
    """The optimiser's own choice on a GPU: the same seed gives the same bits, and each step draws others."""
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        layer = nn.Linear(40, 30).bfloat16().cuda()
        optimizer = AdamW(dict(layer.named_parameters()), moments=torch.bfloat16, keep_masters=False)
        assert optimizer._by_kernel
        generator = torch.Generator("cuda").manual_seed(seed)
        for _ in range(2):
            before = generator.get_offset()
            for param in layer.parameters():
                param.grad = torch.ones_like(param)
            optimizer.step(1e-3, generator=generator)
            assert generator.get_offset() > before
        results.append(layer.weight.detach())
    assert torch.equal(results[0], results[1]) and not torch.equal(results[0], results[2])
