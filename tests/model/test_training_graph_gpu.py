"""The trainer's CUDA graphs against its eager steps: the same bits, memory, and a capture that fails."""

from __future__ import annotations

import gc
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dit_moe_kernels import use_backend

from dit_moe import DiT
from dit_moe.runs import RunFolder
from dit_moe.training import Trainer

from .training_cases import CONFIG, SETTINGS, assert_equal, bars, shaken, weights

pytestmark = pytest.mark.gpu

WIDE = replace(CONFIG, hidden_size=64)
CASES: list[dict[str, Any]] = [
    {"dtype": "fp32"},
    {"dtype": "bf16"},
    {"dtype": "bf16-weights"},
    {"dtype": "bf16-stochastic", "moments": "bf16", "ema_dtype": "bf16"},
    {"dtype": "bf16-weights", "recompute_blocks": 2},
    {"dtype": "bf16-weights", "objective": "ddpm"},
]


def on_gpu(graph: bool, config: Any = WIDE, **options: Any) -> Trainer:
    torch.manual_seed(0)
    return shaken(Trainer(DiT(config), bars(), replace(SETTINGS, cuda_graph=graph, **options), "cuda"))


def mode(run: Trainer) -> str:
    assert run._graphed is not None
    return run._graphed.mode


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("options", CASES, ids=lambda options: "-".join(map(str, options.values())))
def test_equals_the_eager_trainer(options: dict[str, Any], micro_batches: int) -> None:
    with use_backend("triton"):
        eager, run = (on_gpu(graph, micro_batches=micro_batches, **options) for graph in (False, True))
        reports = []
        for each in (eager, run):
            each.run(until=4, report_every=2, on_report=reports.append)
    assert mode(run) == "CUDA graph" and eager._graphed is None
    assert_equal(weights(eager), weights(run))
    for left, right in zip(reports[:2], reports[2:], strict=True):
        assert (left.loss, left.balance_loss, left.grad_norm) == (right.loss, right.balance_loss, right.grad_norm)
        assert left.expert_load == right.expert_load


def test_resumed_run_equals_an_unbroken_one(tmp_path: Path) -> None:
    with use_backend("triton"):
        whole, broken, again = (on_gpu(True, dtype="bf16-weights") for _ in range(3))
        whole.run(until=6)
        broken.run(until=3)
        RunFolder(tmp_path).save(broken)
        again.train_step()  # its graph is made before the weights come
        RunFolder(tmp_path).resume(again)
        again.run(until=6)
    assert mode(again) == "CUDA graph"
    assert_equal(weights(whole), weights(again))


def test_a_failing_capture_falls_back(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Broken within the capture only, where torch's generator is left capturing."""
    with use_backend("triton"):
        eager, run = (on_gpu(graph, dtype="bf16") for graph in (False, True))
        plain = run._differentiate

        def breaking(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if torch.cuda.is_current_stream_capturing():
                inputs[0].sum().item()
            return plain(*inputs)

        monkeypatch.setattr(run, "_differentiate", breaking)
        torch.cuda.manual_seed(3)
        expected = torch.randn(4, device="cuda")
        torch.cuda.manual_seed(3)
        with caplog.at_level(logging.WARNING, "dit_moe"):
            for each in (eager, run):
                each.run(until=3)
        assert torch.equal(torch.randn(4, device="cuda"), expected)
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert mode(run).startswith("eager (capturing a step failed") and len(caplog.records) == 1
    assert_equal(weights(eager), weights(run))


def test_kernels_that_wait_are_refused_with_their_reason() -> None:
    run = on_gpu(True)
    with use_backend("reference"):
        run.train_step()
        assert "synchroniz" in mode(run)
    with use_backend("triton"):
        run.train_step()
    assert mode(run) == "CUDA graph"


def test_memory_does_not_grow() -> None:
    with use_backend("triton"):
        run = on_gpu(True, micro_batches=2, dtype="bf16-weights")
        used = []
        for _ in range(6):
            run.train_step()
            torch.cuda.synchronize()
            used.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
        assert max(used[2:]) == used[2] == used[-1]
        before = torch.cuda.memory_allocated()
        del run
        gc.collect()
        assert torch.cuda.memory_allocated() < before
