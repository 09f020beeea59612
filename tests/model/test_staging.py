"""Averages of the host updated through a device's buffers, piece by piece: every element once, with its own bits."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from dit_moe_kernels import RandomBits, availability, average_
from torch import Tensor

from dit_moe.training import staging
from dit_moe.training.averages import AveragedWeights
from dit_moe.training.staging import Piece, update_staged

from .training_cases import SETTINGS, assert_equal, shaken, trainer

BACKEND = "triton" if availability("triton", "cpu") is None else "reference"  # of tensors on the CPU
SIZES = (0, 1, 1023, 1024, 5000, 3 * 2048, 0)  # in pieces of 2048 elements: 0, 1, 1, 1, 3, 3, 0


def drawn(dtype: torch.dtype, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for size in SIZES]


def test_every_element_is_updated_once_with_its_source() -> None:
    tensors, sources, seen = drawn(torch.float32, 0), drawn(torch.float32, 1), []
    expected = [tensor + 2 * source for tensor, source in zip(tensors, sources, strict=True)]

    def update(copy: Tensor, piece: Piece) -> None:
        seen.append((piece.number, piece.start, len(copy)))
        copy.add_(piece.source, alpha=2)

    update_staged(tensors, sources, update, slot_bytes=2048 * 4)
    assert all(torch.equal(left, right) for left, right in zip(tensors, expected, strict=True))
    assert seen == [(1, 0, 1), (2, 0, 1023), (3, 0, 1024)] + [
        (number, start, min(2048, SIZES[number] - start)) for number in (4, 5) for start in (0, 2048, 4096)
    ]


def test_what_does_not_fit_is_refused() -> None:
    tensors = [torch.zeros(4, 3).T]
    with pytest.raises(ValueError, match="tensor 0: got strides"):
        update_staged(tensors, [torch.zeros(3, 4)], lambda copy, piece: None)
    with pytest.raises(ValueError, match="slot_bytes: got 1000, expected a multiple of 4096"):
        update_staged(tensors, [torch.zeros(3, 4)], lambda copy, piece: None, slot_bytes=1000)


def averages_of(weights: list[Tensor], by_kernel: bool) -> AveragedWeights:
    averages = AveragedWeights({str(number): weight for number, weight in enumerate(weights)}, torch.bfloat16)
    averages._by_kernel = by_kernel
    for average, value in zip(averages.tensors.values(), drawn(torch.bfloat16, 3), strict=True):
        average.copy_(value)
    return averages


def test_pieces_get_the_bits_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, bits = drawn(torch.bfloat16, 4), RandomBits(2**40 + 1, 3)
    monkeypatch.setattr("dit_moe.training.averages.next_random_bits", lambda generator, device: bits)
    monkeypatch.setattr("dit_moe.training.averages.average_", partial(average_, backend=BACKEND))
    monkeypatch.setattr("dit_moe.training.averages.update_staged", small_pieces)
    whole, staged = averages_of(weights, by_kernel=True), averages_of(weights, by_kernel=True)
    whole.update(1, [0.7])
    staged._update_staged(1 - 0.7, None)
    assert_equal(whole.tensors, staged.tensors)


def test_staged_averages_start_at_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dit_moe.training.averages.update_staged", small_pieces)
    weights = drawn(torch.bfloat16, 4)
    for dtype in (torch.float32, torch.bfloat16):
        averages = AveragedWeights({str(number): weight for number, weight in enumerate(weights)}, dtype)
        for average in averages.tensors.values():
            average.fill_(3)
        averages._staged = True
        averages.reset()
        assert_equal(averages.tensors, {str(number): weight.to(dtype) for number, weight in enumerate(weights)})


def small_pieces(*args: object) -> None:
    update_staged(*args, slot_bytes=2048 * 2)  # type: ignore[arg-type]


def test_without_kernels_they_are_rounded_up_or_down_by_chance() -> None:
    weights = [weight.float() for weight in drawn(torch.bfloat16, 4)]
    averages = averages_of(weights, by_kernel=False)
    exact = [torch.lerp(average.double(), weight.double(), 0.3) for average, weight in pairs(averages, weights)]
    averages._update_staged(0.3, torch.Generator().manual_seed(0))
    error = torch.cat([average.double() - x for average, x in pairs(averages, exact)])
    distance = torch.cat(exact).abs() * 2**-7
    assert (error.abs() <= distance + 1e-6).all()
    assert (error / distance).mean().abs() < 4 * (error / distance).std() / len(error) ** 0.5


def pairs(averages: AveragedWeights, others: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    return list(zip(averages.tensors.values(), others, strict=True))


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_averages_of_the_host_are_those_of_the_gpu(dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    """Bit for bit, in tensors of many pieces; the update sees weights written just before, none written after."""
    sizes = (2 * staging.SLOT_BYTES // dtype.itemsize + 12345, 7, 1 << 20)
    weights = {str(size): torch.randn(size, device="cuda").to(weight_dtype) for size in sizes}
    here, there = (AveragedWeights(weights, dtype, device) for device in ("model", "cpu"))
    generators = [torch.Generator("cuda").manual_seed(3) for _ in range(2)]
    for step in (1, 2):
        news = [torch.randn(size, device="cuda") for size in sizes]
        for averages, generator in zip((here, there), generators, strict=True):
            torch.cuda._sleep(50_000_000)
            for weight, new in zip(weights.values(), news, strict=True):
                weight.copy_(new)
            averages.update(step, [0.9], generator)
            for weight in weights.values():
                weight.zero_()
    for name, average in here.tensors.items():
        assert there.tensors[name].device.type == "cpu"
        assert torch.equal(average.cpu(), there.tensors[name]), name


@pytest.mark.gpu
@pytest.mark.parametrize("ema_dtype", ["fp32", "bf16"])
def test_where_averages_lie_changes_no_bit_of_a_run(ema_dtype: str) -> None:
    states = []
    for ema_device in ("model", "cpu"):
        settings = replace(SETTINGS, ema_dtype=ema_dtype, ema_device=ema_device, ema_every=2, dtype="bf16-stochastic")
        run = shaken(trainer(settings, device="cuda"))
        run.run()
        states.append({name: tensor.cpu() for name, tensor in run.state().items()})
    assert_equal(*states)
