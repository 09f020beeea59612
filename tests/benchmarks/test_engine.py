"""A provider that is absent, wrong, slow to fail, or that takes the process with it costs its own rows only."""

import dataclasses
import gc
import os
import signal
import sys
import time
from functools import partial

import pytest
import torch

from benchmarks import engine, isolate
from benchmarks.cases import layer_shape
from benchmarks.engine import Candidate, Context, Unavailable
from benchmarks.problems import expected_layer, make_problem, make_topk_ids, plain_layer, with_gradients
from benchmarks.results import Row
from benchmarks.suites import SUITES, Suite, Task
from benchmarks.timing import (
    CpuClock,
    NotCapturable,
    Timed,
    TimingOptions,
    calls_in_sample,
    calls_to_settle,
    summarize,
    time_round_robin,
)

OPTIONS = TimingOptions(rounds=3, batch_ms=0.1, max_calls=2, warmup_ms=0.0)
TEMPLATE = Row("moe_layer", "tiny", 4, None, "fwd", "", "fp32", "balanced", "")


def fail() -> Candidate:
    raise RuntimeError("broken\nsecond line")


def absent() -> Candidate:
    raise Unavailable("not installed")


def test_compare_reports_every_failure() -> None:
    calls = {"count": 0}

    def fails_later() -> None:
        calls["count"] += 1
        if calls["count"] > 4:
            raise torch.OutOfMemoryError("no memory")

    builders = {
        "gemm": lambda: Candidate([lambda: time.sleep(0.001)], flops=2e9),
        "ours-triton": lambda: Candidate([lambda: time.sleep(0.002)], flops=2e9, bytes=1e6),
        "loop": fail,
        "stk": absent,
        "padded": lambda: Candidate([fails_later]),
        "sonicmoe": fail,
    }
    heard: list[str] = []
    context = Context(CpuClock(), OPTIONS, watch=heard.append, skip={"sonicmoe": "failed: crashed before"})
    rows = {(row.provider, row.timer): row for row in engine.compare(context, TEMPLATE, ("eager", "graph"), builders)}
    assert heard == ["gemm", "ours-triton", "loop", "stk", "padded", "timing"]
    assert len(rows) == 12
    assert rows["loop", "eager"].status == "failed: RuntimeError: broken"
    assert rows["stk", "graph"].status == "unavailable: not installed"
    assert rows["padded", "eager"].status == "failed: out of memory" and rows["padded", "eager"].median_ms is None
    assert rows["sonicmoe", "eager"].status == "failed: crashed before"
    assert rows["gemm", "graph"].status.startswith("skipped: ")
    ours, gemm = rows["ours-triton", "eager"], rows["gemm", "eager"]
    assert gemm.ratio_to_gemm == 1 and ours.ratio_to_gemm == ours.median_ms / gemm.median_ms > 1
    assert ours.tflops == pytest.approx(2e9 / ours.median_ms / 1e9)
    assert ours.gbps == pytest.approx(1e6 / ours.median_ms / 1e6)


class BrokenClock(CpuClock):
    """A GPU whose context is gone."""

    def synchronize(self) -> None:
        raise RuntimeError("device-side assert")


def test_lost_device_is_told_apart_from_a_failed_provider() -> None:
    with pytest.raises(engine.DeviceLost, match="loop"):
        engine.compare(Context(BrokenClock(), OPTIONS), TEMPLATE, ("eager",), {"loop": fail})


class ScriptedClock(CpuClock):
    """Returns a time that depends on the call, and remembers the order."""

    def __init__(self) -> None:
        self.order: list[str] = []
        self.ahead: dict[str, int] = {}

    def time_ms(self, calls, count: int, ahead: int = 0) -> float:
        name = calls[0]()
        self.order.append(name)
        self.ahead[name] = ahead
        return {"a": 1.0, "b": 3.0}[name] * count / len(calls)


def test_rounds_interleave_and_rotate() -> None:
    clock = ScriptedClock()
    entries = [Timed([lambda: "a"], 1), Timed([lambda: "b"] * 3, 1)]
    time_round_robin(clock, entries, TimingOptions(rounds=4, batch_ms=2.0, min_calls=1, max_calls=10))
    assert "".join(clock.order[4:]) == "abbaabba"
    assert [entry.count for entry in entries] == [2, 3]  # 2 ms of 1 ms calls; one call of each copy of the inputs
    assert [len(entry.times_ms) for entry in entries] == [4, 4]
    time_round_robin(clock, entries, TimingOptions(rounds=1, batch_ms=0.1, min_calls=4))
    assert [entry.count for entry in entries] == [4, 6]  # a long call is not timed alone
    assert clock.ahead == {"a": 300, "b": 100}


@pytest.mark.parametrize(("call_ms", "count"), [(0.01, 50), (0.5, 10), (4.0, 8), (50.0, 2), (300.0, 1)])
def test_samples_have_many_short_calls_or_few_long_ones(call_ms: float, count: int) -> None:
    assert calls_in_sample(call_ms, TimingOptions()) == count


@pytest.mark.parametrize(("call_ms", "ahead"), [(0.9, 0), (1.0, 300), (7.0, 43), (400.0, 1)])
def test_long_calls_settle_before_a_sample(call_ms: float, ahead: int) -> None:
    assert calls_to_settle(call_ms, TimingOptions(settle_ms=300.0)) == ahead
    assert calls_to_settle(call_ms, TimingOptions(settle_ms=0.0)) == 0


def test_garbage_is_collected_between_samples_only() -> None:
    """A cycle made in a sample is gone before the next one begins, and the collector runs as before afterwards."""
    seen: list[tuple[bool, int]] = []

    class InCycle:
        alive = 0

        def __init__(self) -> None:
            self.me = self
            InCycle.alive += 1

        def __del__(self) -> None:
            InCycle.alive -= 1

    class Watching(CpuClock):
        def time_ms(self, calls, count: int, ahead: int = 0) -> float:
            seen.append((gc.isenabled(), InCycle.alive))
            return super().time_ms(calls, 1)

    assert gc.isenabled()
    time_round_robin(Watching(), [Timed([InCycle], 1)], TimingOptions(rounds=2))
    assert seen == [(False, 0)] * 4
    assert gc.isenabled()


def test_samples() -> None:
    sample = summarize([5.0, 1.0, 2.0, 3.0, 4.0, 6.0])
    assert (sample.p20_ms, sample.median_ms, sample.p80_ms) == (2.0, 3.5, 5.0)
    with pytest.raises(NotCapturable):
        CpuClock().capture([lambda: None])


# ---- the check


def results_of(problem, mode: str, change: float = 0.0) -> dict[str, torch.Tensor]:
    leaves = {"x": problem.x, "gate": problem.gate, "w13": problem.w13, "w2": problem.w2}
    out = plain_layer(*leaves.values(), problem.shape.top_k)
    return with_gradients(out * (1 + change), leaves, problem.dout, mode)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_check_accepts_plain_and_rejects_wrong(dtype: torch.dtype) -> None:
    problem = make_problem(layer_shape("tiny"), 64, "balanced", dtype, "cpu")
    expected = expected_layer(problem, "fwd_bwd")
    assert expected.complaint(results_of(problem, "fwd_bwd")) is None
    assert "output" in expected.complaint(results_of(problem, "fwd_bwd", change=0.05))
    for name in ("x", "gate", "w13", "w2"):
        wrong = results_of(problem, "fwd_bwd")
        wrong[name] = wrong[name] + 0.05 * wrong[name].abs().max()
        assert f"gradient of {name}" in expected.complaint(wrong)
    unwritten = results_of(problem, "fwd_bwd")
    unwritten["out"][3, 5] = float("nan")
    assert "output" in expected.complaint(unwritten)


# ---- the inputs


@pytest.mark.parametrize("routing", ["balanced", "skewed", "one"])
def test_routing_is_what_its_name_says(routing: str) -> None:
    shape, tokens = layer_shape("S/2-8E2A"), 512
    problem = make_problem(shape, tokens, routing, torch.float32, "cpu")
    logits = problem.x.detach() @ problem.gate.detach().T
    counts = logits.topk(2, dim=1).indices.flatten().bincount(minlength=8)
    fed = make_topk_ids(shape, tokens, routing, "cpu").flatten().long().bincount(minlength=8)
    best = logits.topk(3, dim=1).values
    assert (best[:, 1] - best[:, 2]).min() > 0.02
    if routing == "balanced":
        assert counts.min() > 0.5 * tokens * 2 / 8 and fed.min() > 0.7 * tokens * 2 / 8
    elif routing == "skewed":
        assert counts[0] == tokens and fed[0] == tokens and counts[1:].min() > 0 and fed[1:].min() > 0
    else:
        assert counts.tolist() == [tokens, tokens, 0, 0, 0, 0, 0, 0] and fed.tolist() == [2 * tokens, *[0] * 7]


# ---- worker processes


TASK = Task("moe_layer", "tiny", "fwd", "balanced", "fp32", "cpu", ("loop", "padded", "gemm"), ("eager",), tokens=16)


def crash_once(task: Task, context: Context) -> list[Row]:
    """A suite whose padded provider kills the process, as a segmentation fault would."""

    def build(name: str) -> Candidate:
        if name == "padded":
            os.kill(os.getpid(), signal.SIGKILL)
        return Candidate([lambda: None])

    builders = {name: partial(build, name) for name in task.providers}
    return engine.compare(context, task.template, task.timers, builders)


def test_blame_falls_on_the_provider_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without processes: the events of a worker that died are read as the parent reads them."""
    done = {"task": 0, "rows": [dataclasses.asdict(TASK.template)]}
    first = [{"task": 0, "provider": "loop"}, {"task": 0, "provider": "padded"}, {"end": "code -9"}]
    second = [done, {"task": 1, "provider": "timing"}, {"end": "code 1"}]
    third = [{"task": 1, "rows": []}, {"end": "code 0"}]
    workers = iter([first, second, third])
    jobs: list[str] = []
    monkeypatch.setattr(isolate, "_one_worker", lambda text, stall: jobs.append(text) or next(workers))
    job = isolate.Job([TASK, TASK], OPTIONS)
    assert len(list(isolate.run_isolated(job, 10.0))) == 2
    assert job.skip[0] == {"padded": "failed: code -9"}
    assert job.skip[1] == dict.fromkeys(TASK.providers, "failed: code 1 during timing")
    restored, index = isolate.Job.from_json(jobs[1])
    assert restored.skip == {0: {"padded": "failed: code -9"}} and restored.tasks == [TASK, TASK] and index == 0


def test_inputs_that_fail_in_a_used_worker_get_a_fresh_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """An earlier task may have broken the process; in a fresh worker the blame falls on the inputs themselves."""
    done = [{"task": index, "rows": [dataclasses.asdict(TASK.template)]} for index in range(2)]
    workers = iter([[done[0], {"end": "code 1"}], [{"end": "code 1"}], [done[1], {"end": "code 0"}]])
    monkeypatch.setattr(isolate, "_one_worker", lambda text, stall: next(workers))
    skips: list[int] = []
    monkeypatch.setattr(isolate, "_blame", lambda job, current, how: skips.append(current["task"]))
    assert len(list(isolate.run_isolated(isolate.Job([TASK, TASK], OPTIONS), 10.0))) == 2
    assert skips == [1]


def test_worker_process_that_dies_costs_one_provider(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With processes: a stand-in worker runs a suite whose padded provider kills its process."""
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys\n"
        "from benchmarks import isolate, worker\n"
        "from benchmarks.suites import SUITES, Suite\n"
        "from tests.benchmarks.test_engine import crash_once\n"
        "SUITES['moe_layer'] = Suite('moe_layer', (), None, crash_once)\n"
        "sys.exit(worker.main(*sys.argv[1:]))\n"
    )
    original = isolate.subprocess.Popen

    def spawn(command: list[str], env: dict[str, str]):
        return original([sys.executable, str(script), *command[3:]], env=env)

    monkeypatch.setattr(isolate.subprocess, "Popen", spawn)
    (rows,) = isolate.run_isolated(isolate.Job([TASK], OPTIONS), stall_seconds=120.0)
    assert {row.provider: row.ok for row in rows} == {"loop": True, "padded": False, "gemm": True}
    assert next(row.status for row in rows if row.provider == "padded") == "failed: the process ended with code -9"


def test_task_whose_inputs_fail_becomes_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_inputs(task: Task, context: Context) -> list[Row]:
        raise torch.OutOfMemoryError("inputs do not fit")

    monkeypatch.setitem(SUITES, "moe_layer", Suite("moe_layer", (), None, no_inputs))
    (rows,) = isolate.run_here(isolate.Job([TASK], OPTIONS))
    assert {row.provider for row in rows} == set(TASK.providers)
    assert all("inputs do not fit" in row.status for row in rows)
