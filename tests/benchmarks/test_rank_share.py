"""One rank's share of a model, in its tiny form: bytes by hand, averages at their interval."""

from __future__ import annotations

import pytest

from benchmarks import rank_share
from dit_moe import flops
from tests.benchmarks.conftest import CollectingMain


@pytest.mark.parametrize(
    ("options", "on_device", "averages"),
    [
        ("--parallel fsdp", 8, 2),  # weights, gradients, two moments in bf16
        ("--parallel none --moments fp32 --ema-device model --ema-dtype fp32", 16, 4),
    ],
)
def test_tiny_run_counts_bytes_and_times_the_averages(
    options: str,
    on_device: int,
    averages: int,
    collected: CollectingMain,
) -> None:
    result = collected(rank_share.main, f"--tiny --device cpu --batch 2 4 --steps 3 --ema-every 2 {options}")
    assert [run["batch"] for run in result["runs"]] == [2, 4]
    config = rank_share.share_of(result["preset"], result["ranks"], tiny=True)
    positions = (config.input_size // config.patch_size) ** 2 * config.hidden_size  # not trained
    parameters = flops.count_parameters(config) - positions
    for run in result["runs"]:
        assert run["parameters"] == parameters
        assert run["device_bytes_a_parameter"] == on_device
        assert run["averages"] == averages * parameters
        assert [step["averages_seconds"] is not None for step in run["steps"]] == [False, True, False]
        assert all(step["seconds"] > 0 for step in run["steps"])
    assert result["environment"]["command"][2] == "benchmarks.rank_share"


def test_the_share_of_a_rank_is_whole_blocks() -> None:
    assert rank_share.share_of("DiT-MoE-G/2-16E2A", 2).depth == 20
    with pytest.raises(ValueError, match="ranks: got 3, expected a divisor of the 40 blocks"):
        rank_share.share_of("DiT-MoE-G/2-16E2A", 3)
