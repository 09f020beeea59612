"""The benchmark of two ranks in its tiny form, over gloo: every part's figures, failures with reasons, the bars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import rank_exact, rank_speed, two_ranks


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


def test_the_bar_of_the_step() -> None:
    names = ("median_seconds", "unwatched_seconds", "forward_backward_seconds", "update_seconds")
    one = {"64": dict.fromkeys(names, 1.0), "128": {"did not fit": {}}}
    many = {batch: {"recompute": 0, **dict.fromkeys(names, 0.59)} for batch in ("64", "128")}
    assert rank_speed.judge(one, many) == {
        "64": {
            "median ratio": 0.59, "unwatched ratio": 0.59, "forward_backward ratio": 0.59, "update ratio": 0.59,
            "recompute": 0, "met": True,
        }
    }  # fmt: skip
