"""The benchmark of two ranks in its tiny form, over gloo: every part's figures, failures with reasons, the bars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

from benchmarks import rank_exact, rank_speed, two_ranks
from benchmarks.ranks import rank_device, run_on_ranks
from benchmarks.trainers import new_trainer
from dit_moe.layers import sincos_pos_embed
from dit_moe.parallel import ParallelConfig
from dit_moe.training import TrainingSettings


def run(out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Exit code and results."""
    code = two_ranks.main(["--tiny", "--device", "cpu", "--out", str(out), *options])
    return code, json.loads((out / "two_ranks.json").read_text())


def test_a_model_that_two_ranks_hold_is_counted(tmp_path: Path) -> None:
    code, results = run(tmp_path, "--parts", "xl")
    assert code == 0
    part = results["parts"]["xl"]
    assert part["judgement"]["met"]
    for rank in part["two"]["ranks"]:
        assert rank["device_bytes_a_parameter"] == 20  # fp32 weights, gradients, moments and averages
        assert len(rank["steps"]) == 6
    assert results["environment"]["command"][2] == "benchmarks.two_ranks"


def test_what_cannot_run_in_time_is_written_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(two_ranks._LIMITS, "g", {"two": 0.1})  # not even started
    code, results = run(tmp_path, "--parts", "g")
    assert code == 1
    assert "0 s being the longest time" in results["parts"]["g"]["two"]["failed"]
    assert not results["parts"]["g"]["judgement"]["met"]
    monkeypatch.setitem(two_ranks._LIMITS, "g", {"two": 100})
    code, results = run(tmp_path, "--parts", "g", "--budget", "1")
    assert code == 1
    assert results["parts"]["g"]["two"]["failed"].startswith("not started")


@pytest.mark.slow
def test_all_parts(tmp_path: Path) -> None:
    code, results = run(tmp_path, "--batch", "4", "8")
    assert code == 0
    judged = {name: part["judgement"] for name, part in results["parts"].items()}
    assert judged.keys() == two_ranks.PARTS.keys()
    for case in ("fp32", "fp32, reference"):
        assert all(judged["compare"][case][how]["met"] for how in rank_exact.SPREADS)
        assert judged["compare"][case]["one rank against itself, shuffled"]["loss"] > 0  # the order was another
    assert set(judged["step_time"]) == {"4", "8"}
    assert all(judgement["met"] for judgement in judged["resume"].values())
    assert judged["xl"]["met"] and judged["g"]["met"]
    assert results["parts"]["g"]["two"]["ranks"][1]["device_bytes_a_parameter"] == 8


def test_the_bars_of_the_comparison() -> None:
    def training(loss: float, norm: float = 1.0) -> dict[str, Any]:
        return {"loss": [2.0, loss], "balance_loss": [1.0, 1.0], "grad_norm": [1.0, norm], "loads": [1, 2]}

    one = {"fp32": [training(1.0)] * 2, "bf16": [training(1.0), training(1.02), training(0.99)]}
    many = {
        "fp32": {"near": training(1 + 9e-6), "norm too far": training(1.0, 1 + 2e-5)},
        "bf16": {"near": training(1.03), "far": training(1.04), "broken": {"failed": "ValueError"}},
    }
    found = rank_exact.judge(one, many)
    assert found["fp32"]["near"]["met"] and not found["fp32"]["norm too far"]["met"]
    assert found["bf16"]["one rank against itself, shuffled"]["loss"] == pytest.approx(0.03 / 1.02, rel=0.05)
    assert found["bf16"]["near"]["met"] and not found["bf16"]["far"]["met"]
    assert found["bf16"]["broken"] == {"met": False, "failed": "ValueError"}


def figures(seconds: float) -> dict[str, Any]:
    """Of a timed step."""
    return {f"{name}_seconds": seconds for name in ("median", "unwatched", "forward_backward", "update")}


def test_the_bar_of_the_step() -> None:
    one = {"64": {"recompute": 0, **figures(1.0)}, "128": {"recompute": 18, **figures(2.0)}, "256": {"did not fit": {}}}
    many = {
        "64": {"0": figures(0.61)},
        "128": {"0": figures(1.0), "18": figures(1.6)},
        "256": {"18": figures(1.0)},
    }
    found = rank_speed.judge(one, many)
    assert found.keys() == {"64", "128"}  # one rank had no room for the third
    assert not found["64"]["met"] and found["64"]["median ratio at equal recomputing"] == 0.61
    assert found["128"] == {
        "median ratio": 0.5, "unwatched ratio": 0.5, "forward_backward ratio": 0.5, "update ratio": 0.5,
        "recomputed blocks": {"one rank": 18, "experts over ranks": 0},
        "median ratio at equal recomputing": 0.8, "met": True,
    }  # fmt: skip


def test_what_is_timed_over_ranks() -> None:
    one = {"64": {"recompute": 0}, "128": {"recompute": 18}, "256": {"did not fit": {}}}
    assert rank_speed.spread_settings(one, [256, 128, 64], even=True) == [
        (128, 0, True),
        (128, 18, True),
        (64, 0, True),
    ]


def test_the_busier_rank() -> None:
    assert rank_speed.busiest_share([1.0, 1.0, 3.0, 1.0]) == pytest.approx(4 / 6)
    assert rank_speed.busiest_share([2.0, 2.0, 1.0, 1.0]) == pytest.approx(4 / 6)


def even_over_ranks(rank: int, num_ranks: int, folder: Path) -> dict[str, Any]:
    """Routers before and after, whole, and their loads in the step after."""
    config = rank_speed.preset("DiT-MoE-XL/2-8E2A", tiny=True)
    parallel = ParallelConfig("fsdp", 2) if num_ranks > 1 else None
    trainer, _ = new_trainer(config, TrainingSettings(steps=9, batch_size=4, dtype="fp32"), rank_device(), parallel)

    def gates() -> list[Tensor]:
        named = trainer.model.state_dict().items()
        found = [weight.detach() for name, weight in named if name.endswith("gate.weight")]
        return [weight.full_tensor() if isinstance(weight, DTensor) else weight.clone() for weight in found]

    before = gates()
    rank_speed.make_even(trainer)
    return {"before": before, "after": gates(), "pos_embed": sincos_pos_embed(config.hidden_size, 4)}


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_even_routers_have_no_common_preference(tmp_path: Path, num_ranks: int) -> None:
    for found in run_on_ranks(num_ranks, [even_over_ranks], tmp_path, 120, group=num_ranks > 1)["even_over_ranks"]:
        pos_embed = found["pos_embed"][0]
        normed = functional.layer_norm(pos_embed, pos_embed.shape[-1:])
        for before, after in zip(found["before"], found["after"], strict=True):
            assert (before @ normed.mean(0)).abs().max() > 0.01
            torch.testing.assert_close(after @ normed.mean(0), torch.zeros(8), atol=1e-6, rtol=0)
            # What tells positions apart is as it was.
            apart = normed - normed.mean(0)
            along = (apart @ normed.mean(0))[:, None] * normed.mean(0) / normed.mean(0).square().sum()
            torch.testing.assert_close((apart - along) @ before.T, (apart - along) @ after.T, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_steps_with_even_and_with_initial_routers(tmp_path: Path) -> None:
    for router in ("even", "initial"):
        code, results = run(tmp_path / router, "--parts", "step_time", "--batch", "8", "--router", router)
        assert code == 0
        part = results["parts"]["step_time"]
        assert part["one"]["ranks"][0]["8"]["router"] == router
        both = part["two"]["ranks"][1]["8"]
        assert both.keys() == {"0", "1"}  # with the one rank's recomputed block, and without
        for timed in both.values():
            assert timed["router"] == router
            assert 0.5 <= timed["largest share of rows of a rank"] <= 1
        assert part["judgement"]["8"]["recomputed blocks"]["one rank"] == 1
