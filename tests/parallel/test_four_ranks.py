"""Four ranks: experts over two and data over two, experts over all four, and the checkpoints of two ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.ranks import run_on_ranks

from . import scenarios
from .test_cases import assert_gradients, whole_gradients
from .test_training import assert_same_training

pytestmark = pytest.mark.slow
TRAINED = [scenarios.trained_ddp, scenarios.trained_ddp_ep2, scenarios.trained_fsdp_ep2, scenarios.trained_fsdp_ep4]


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Everything on four ranks, after two ranks have written checkpoints."""
    folder = tmp_path_factory.mktemp("four")
    for name in ("writers", "ranks"):
        (folder / name).mkdir()
    run_on_ranks(2, [scenarios.saved], folder / "writers")
    cases = [scenarios.uneven_gradients, scenarios.one_sided_gradients, scenarios.loaded]
    return run_on_ranks(4, [*TRAINED, *cases], folder / "ranks", timeout=300)


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in TRAINED])
def test_four_ranks_train_as_one(one, four, scenario):
    assert_same_training(one, four[scenario])


def test_gradients(four):
    for seen in four["uneven_gradients"][0].values():
        assert_gradients(seen, whole_gradients(scenarios.fresh_model(), 11))
    for (_, experts), seen in four["one_sided_gradients"][0].items():
        assert_gradients(seen, whole_gradients(scenarios.to_two_experts(scenarios.fresh_model(), experts), 8))


def test_two_ranks_checkpoints_are_read_by_four(four):
    expected = dict(scenarios.fresh_model().state_dict())
    assert len(four["loaded"][0]) == 12
    for seen in four["loaded"][0].values():
        torch.testing.assert_close(seen, expected, rtol=0, atol=0)
