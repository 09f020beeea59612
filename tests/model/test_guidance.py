"""Guidance schedules and intervals against loops and integrals written out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_moe import DiT
from dit_moe.guidance import SCHEDULES, Guidance
from dit_moe.sampling import sample_ddim, sample_rectified_flow
from tests.model.util import tiny_model

Start = tuple[DiT, Tensor, Tensor]


@pytest.fixture
def start() -> Start:
    return tiny_model().double(), torch.randn(3, 4, 8, 8, dtype=torch.float64), torch.tensor([1, 7, 9])


def euler_by_hand(start: Start, scales: list[float]) -> Tensor:
    """Rectified flow with a scale for each step, both predictions from forwards of their own."""
    model, z, y = start
    steps = len(scales)
    with torch.no_grad():
        for i, scale in zip(range(steps, 0, -1), scales, strict=True):
            t = torch.full((3,), i / steps, dtype=torch.float64)
            conditional, null = model(z, t, y)[:, :4], model(z, t, torch.full_like(y, 10))[:, :4]
            z = z - (null + scale * (conditional - null)) / steps
    return z


@pytest.mark.parametrize(
    "options, scales",
    [
        ({}, [3, 3, 3, 3, 3]),
        ({"guidance_interval": (0.2, 0.8)}, [1, 3, 3, 3, 1]),  # above 0.2, up to 0.8
        ({"guidance_interval": (0.5, 1.0)}, [3, 3, 3, 1, 1]),
        ({"cfg_schedule": "linear"}, [1, 1.8, 2.6, 3.4, 4.2]),
        ({"cfg_schedule": "cosine"}, [1 + 2 * (1 + math.cos(math.pi * t)) for t in (1, 0.8, 0.6, 0.4, 0.2)]),
        ({"cfg_schedule": lambda t: t, "guidance_interval": (0.3, 0.9)}, [1, 2.6, 2.2, 1.8, 1]),
    ],
)
def test_scales_of_rectified_flow(options: dict[str, Any], scales: list[float], start: Start) -> None:
    sample = sample_rectified_flow(*start, 5, 3.0, **options)
    torch.testing.assert_close(sample, euler_by_hand(start, scales), rtol=1e-10, atol=1e-10)


def test_steps_without_guidance_cost_half(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches, denoise = start[0], [], DiT.denoise

    def count(self: DiT, x: Tensor, *args: Any, **options: Any) -> Any:
        batches.append(len(x))
        return denoise(self, x, *args, **options)

    monkeypatch.setattr(DiT, "denoise", count)
    sample_rectified_flow(model, *start[1:], 5, 3.0, guidance_interval=(0.2, 0.8))
    assert batches == [3, 6, 6, 6, 3]
    batches.clear()
    sample_ddim(model, *start[1:], 4, 3.0, guidance_interval=(0.2505, 0.7505))  # steps 750, 500, 250, 0 of 1000
    assert batches == [3, 6, 6, 3]
    batches.clear()
    sample_rectified_flow(model, *start[1:], 3, 3.0, cfg_schedule="linear")  # 0 at t = 1
    assert batches == [3, 6, 6]


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_average_to_one_and_do_not_fall(name: str) -> None:
    shares = [(i + 0.5) / 1000 for i in range(1000)]
    factors = [SCHEDULES[name](share) for share in shares]
    assert sum(factors) / 1000 == pytest.approx(1, abs=1e-6)
    assert factors == sorted(factors, reverse=True) and factors[-1] >= 0  # shares fall while sampling


def test_the_constant_schedule_keeps_the_scale_exactly() -> None:
    assert Guidance(0.1).scales([1.0, 0.5]) == [0.1, 0.1]
    assert Guidance(1).scales([1.0]) == [1] and Guidance(1, schedule="cosine").scales([0.3]) == [1]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval: got"),
        ({"guidance_interval": (-0.1, 0.5)}, "guidance_interval: got"),
        ({"guidance_interval": (0.1, 1.5)}, "guidance_interval: got"),
        ({"guidance_interval": (0.1,)}, "guidance_interval: got"),
        ({"cfg_schedule": "square"}, "cfg_schedule: got 'square', expected one of"),
        ({"cfg_schedule": lambda t: math.inf}, "cfg_schedule: got inf"),
    ],
)
def test_errors(options: dict[str, Any], message: str, start: Start) -> None:
    with pytest.raises(ValueError, match=message):
        sample_rectified_flow(*start, 5, 3.0, **options)
