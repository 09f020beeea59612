"""The trainer with its passes as graphs, on a stand-in for graphs that works on the CPU: gradients, sums, refusals."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace

import pytest

from dit_moe.graphs import NotCapturable
from dit_moe.training import Trainer
from dit_moe.training.graphed import GraphedBackward

from .training_cases import SETTINGS, assert_equal, first, shaken, trainer, weights


class PlainGraph:
    """Runs a step again and writes what it leaves to the memory of its first run, as a replayed graph does."""

    def __init__(self, run: Trainer, step: Callable[[], object], reset: Callable[[], object]) -> None:
        self.run, self.step, self.replays = run, step, 0
        for _ in range(3):  # two rehearsals and the capture
            reset()
            step()
        self.gradients = [param.grad for param in run.parameters.values()]
        assert run._graphed is not None
        self.outputs = run._graphed._outputs

    def replay(self) -> None:
        graphed, self.replays = self.run._graphed, self.replays + 1
        assert graphed is not None
        for param in self.run.parameters.values():
            param.grad = param.grad if graphed._accumulate else None
        self.step()
        for param, gradient in zip(self.run.parameters.values(), self.gradients, strict=True):
            gradient.copy_(param.grad)
        for old, new in zip(self.outputs, graphed._outputs, strict=True):
            old.copy_(new)
        graphed._outputs = self.outputs

    def reset(self) -> None:
        self.gradients = []


def graphed(run: Trainer, capture: Callable | None = None) -> Trainer:
    adds_up = run.settings.micro_batches > 1 and run.settings.dtype in ("fp32", "bf16")
    run._graphed = GraphedBackward(
        run.model, list(run.parameters.values()), accumulate=adds_up,
        capture=capture or (lambda step, reset: PlainGraph(run, step, reset)),
    )  # fmt: skip
    return run


@pytest.mark.parametrize("micro_batches", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "bf16-weights", "bf16-stochastic"])
def test_equals_the_eager_trainer(dtype: str, micro_batches: int) -> None:
    settings = replace(SETTINGS, dtype=dtype, micro_batches=micro_batches, flip=True)
    eager, run = shaken(trainer(settings)), graphed(shaken(trainer(settings)))
    reports = []
    for each in (eager, run):
        each.run(until=4, report_every=2, on_report=reports.append)
    assert_equal(weights(eager), weights(run))
    assert run._graphed is not None and run._graphed.mode == "CUDA graph"
    assert run._graphed._graph.replays == 4 * micro_batches  # type: ignore[union-attr]
    for left, right in zip(reports[:2], reports[2:], strict=True):
        assert (left.loss, left.balance_loss, left.grad_norm) == (right.loss, right.balance_loss, right.grad_norm)
        assert left.expert_load == right.expert_load


def test_gradients_keep_their_memory() -> None:
    run = graphed(trainer())
    run.train_step()
    assert run._graphed is not None
    kept = [gradient.data_ptr() for gradient in run._graphed._gradients if gradient is not None]
    assert first(run).grad is None  # the optimiser drops the name only
    run.train_step()
    assert [gradient.data_ptr() for gradient in run._graphed._gradients if gradient is not None] == kept


def test_a_failed_capture_runs_eagerly_and_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[str] = []

    def fail(step: Callable[[], object], reset: Callable[[], object]) -> None:
        tried.append("once")
        reset()
        step()  # what a rehearsal leaves must not count
        raise NotCapturable("capturing a step failed (RuntimeError: no)")

    eager, run = shaken(trainer()), graphed(shaken(trainer()), fail)
    with caplog.at_level(logging.WARNING, "dit_moe"):
        for each in (eager, run):
            each.run(until=3)
    assert_equal(weights(eager), weights(run))
    assert run._graphed is not None and run._graphed.mode == "eager (capturing a step failed (RuntimeError: no))"
    assert tried == ["once"] and len(caplog.records) == 1


def test_hooks_are_run() -> None:
    run, calls = graphed(trainer()), []
    run.train_step()
    handle = run.model.blocks[0].register_forward_hook(lambda *args: calls.append("module"))
    run.train_step()
    handle.remove()
    handle = first(run).register_hook(lambda gradient: calls.append("gradient"))
    run.train_step()
    handle.remove()
    assert calls == ["module", "gradient"]
    run.train_step()
    assert run._graphed is not None and run._graphed.mode == "CUDA graph"


def test_none_on_the_cpu() -> None:
    assert SETTINGS.cuda_graph and trainer()._graphed is None
    assert trainer(replace(SETTINGS, cuda_graph=False))._graphed is None
