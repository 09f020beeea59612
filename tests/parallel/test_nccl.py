"""The trainer over NCCL: two GPUs against one process on one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.ranks import run_on_ranks

from . import trainer_scenarios as scenarios
from .test_trainer import TRAINED, assert_same_training

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
Start = Callable[..., dict[str, list[Any]]]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Start:
    """Start processes with a GPU each."""

    def start(num_ranks: int, *cases: Callable[..., Any]) -> dict[str, list[Any]]:
        folder = tmp_path_factory.mktemp("nccl") / "ranks"
        folder.mkdir()
        return run_on_ranks(num_ranks, cases, folder, 200, "cuda", group=num_ranks > 1)

    return start


@pytest.fixture(scope="module")
def alone(start: Start) -> dict[str, Any]:
    return start(1, scenarios.trainer_alone)["trainer_alone"][0]


@pytest.fixture(scope="module")
def two(start: Start) -> dict[str, list[Any]]:
    return start(2, *TRAINED, scenarios.trainer_saves, scenarios.trainer_resumes, scenarios.trainer_stops)


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in TRAINED])
def test_two_gpus_train_as_one(alone, two, scenario):
    assert_same_training(alone, two[scenario])


@pytest.mark.parametrize("name", ["ddp", "fsdp", "fsdp_ep2", "ddp_ep2"])
def test_resumed_gpus_end_as_unbroken_ones_bit_for_bit(two, name):
    how = scenarios.KINDS[name]
    key = (name, how.data_parallel, how.expert_parallel)
    for unbroken, resumed in zip(two["trainer_saves"], two["trainer_resumes"], strict=True):
        for part, tensor in unbroken[name].items():
            assert torch.equal(tensor, resumed[key][part]), part


def test_both_stop_after_the_same_step(two):
    assert two["trainer_stops"] == [{"step": 4}, {"step": 4}]


def test_eight_bytes_a_parameter_train_and_resume(start):
    """Averages in the host's memory, of weights that lie in parts on the GPUs."""
    for rank in start(2, scenarios.trainer_least_state)["trainer_least_state"]:
        for run in rank.values():
            assert all(torch.equal(tensor, run["again"][name]) for name, tensor in run["state"].items())
