"""Training on several ranks against one process with the whole batch: losses, norms, counts, weights after 50 steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.ranks import run_on_ranks

from . import scenarios

TOGETHER = [scenarios.trained_ddp, scenarios.trained_fsdp, scenarios.trained_ddp_ep2, scenarios.trained_fsdp_ep2]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Every training on two ranks."""
    return run_on_ranks(2, TOGETHER, tmp_path_factory.mktemp("two"))


def assert_same_training(one: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    # fp32 sums in another order move these losses by 2e-7 (one process with its batch reversed), so 1e-5 has room.
    for name in ("loss", "balance", "norm"):
        torch.testing.assert_close(torch.tensor(ranks[0][name]), torch.tensor(one[name]), rtol=1e-5, atol=0)
    for rank in ranks:
        assert all(torch.equal(seen, expected) for seen, expected in zip(rank["counts"], one["counts"], strict=True))
        assert rank["norm"] == ranks[0]["norm"]
    assert ranks[0]["weights"].keys() == one["weights"].keys()
    for name, expected in one["weights"].items():
        torch.testing.assert_close(ranks[0]["weights"][name], expected, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("scenario", [scenario.__name__ for scenario in TOGETHER])
def test_two_ranks_train_as_one(one, two, scenario):
    assert_same_training(one, two[scenario])
