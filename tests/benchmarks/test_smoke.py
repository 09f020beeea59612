"""Every suite runs in tiny form on the CPU: rows for all providers, figures for those that can run here, no crash."""

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import results, run
from benchmarks.cases import MODES, ROUTINGS, TIMERS
from benchmarks.results import Row
from benchmarks.suites import SUITES, Choice


def measure(suite: str, out: Path, *arguments: str) -> list[Row]:
    """The rows of a suite after a tiny run in this process."""
    common = ["--suite", suite, "--device", "cpu", "--tiny", "--rounds", "1", "--in-process", "--out", str(out)]
    assert run.main([*common, *arguments]) == 0
    rows, runs = results.load(out, suite)
    assert runs[-1]["packages"]["torch"] == torch.__version__
    return rows


def timed(rows: list[Row]) -> set[str]:
    """Providers with an eager figure in every task; their rows are complete and sane."""
    eager = [row for row in rows if row.timer == "eager"]
    for row in eager:
        assert row.ok == (row.median_ms is not None), row
        if row.median_ms is not None:
            assert 0 < row.p20_ms <= row.median_ms <= row.p80_ms
    return {row.provider for row in eager} - {row.provider for row in eager if not row.ok}


def test_moe_layer(tmp_path: Path) -> None:
    rows = measure(
        "moe_layer", tmp_path, "--provider", "torch-grouped-mm,padded,loop,gemm,dense-flops,dense-params,stk"
    )
    assert timed(rows) == {"torch-grouped-mm", "padded", "loop", "gemm", "dense-flops", "dense-params"}
    assert {(row.mode, row.routing, row.timer) for row in rows} == {
        (mode, routing, timer) for mode in MODES for routing in ROUTINGS for timer in TIMERS
    }
    reasons = {(row.provider == "stk", row.timer): row.status.partition(":")[0] for row in rows if not row.ok}
    assert reasons == {(True, "eager"): "unavailable", (True, "graph"): "unavailable", (False, "graph"): "skipped"}
    times = {row.key: row.median_ms for row in rows if row.ok}
    for row in rows:
        if row.ok:
            gemm = times[replace(row, provider="gemm").key]
            assert math.isclose(row.ratio_to_gemm, row.median_ms / gemm, rel_tol=1e-3)


def test_moe_layer_ours(tmp_path: Path) -> None:
    """Through Triton's interpreter on a machine without a GPU: the gate of the check is what matters."""
    small = ("--tokens", "16", "--timer", "eager", "--routing", "skewed")
    rows = measure("moe_layer", tmp_path, "--provider", "ours-triton,ours-unfused", *small)
    assert timed(rows) == {"ours-triton", "ours-unfused"}


def test_grouped_gemm(tmp_path: Path) -> None:
    rows = measure(
        "grouped_gemm",
        tmp_path,
        "--provider",
        "torch-grouped-mm,loop,gemm,ours-triton",
        "--tokens",
        "8",
        "--routing",
        "one",
    )
    assert timed(rows) == {"torch-grouped-mm", "loop", "gemm", "ours-triton"}


def test_permute(tmp_path: Path) -> None:
    rows = measure(
        "permute", tmp_path, "--provider", "torch-grouped-mm,copy,ours-triton", "--tokens", "8", "--routing", "skewed"
    )
    assert timed(rows) == {"torch-grouped-mm", "copy", "ours-triton"}
    assert {row.case for row in rows} == {"tiny", "tiny#plan", "tiny#permute", "tiny#unpermute"}


@pytest.mark.parametrize("suite", ["model", "training"])
def test_models(suite: str, tmp_path: Path) -> None:
    rows = measure(suite, tmp_path, "--provider", "loop,dense-same-name,dense-flops,dense-params", "--batch", "2")
    assert timed(rows) == {"loop", "dense-same-name", "dense-flops", "dense-params"}
    assert {(row.tokens, row.batch) for row in rows} == {(32, 2)}
    assert all(row.tflops is not None for row in rows if row.ok)


def test_memory(tmp_path: Path) -> None:
    rows = measure("memory", tmp_path, "--provider", "padded,loop,dense-flops,stk", "--mode", "fwd_bwd")
    found = {(row.provider, row.batch) for row in rows if row.ok}
    assert found == {("padded", None), ("loop", None), ("loop", 2), ("dense-flops", 2)}
    assert all(row.median_ms is None for row in rows)


def test_startup(tmp_path: Path) -> None:
    rows = measure("startup", tmp_path, "--provider", "dense-same-name", "--case", "tiny")
    assert timed(rows) == {"dense-same-name"}
    assert {row.case for row in rows} == {"tiny#cold", "tiny#warm"}
    for row in rows:
        assert row.median_ms > 100  # Python and torch alone take longer


def test_startup_of_the_layer(tmp_path: Path) -> None:
    """The routed layer alone, where a case may name its start; the stages follow one another."""
    rows = measure("startup", tmp_path, "--provider", "loop,torch-grouped-mm,sonicmoe", "--case", "tiny#layer-cold")
    assert timed(rows) == {"loop", "torch-grouped-mm"}
    assert {(row.case, row.tokens, row.batch) for row in rows} == {("tiny#layer-cold", 64, None)}
    reason = next(row.status for row in rows if row.provider == "sonicmoe")
    assert reason.startswith("unavailable: the package sonic-moe")
    for row in rows:
        if row.ok:
            seconds = [float(text) for text in re.findall(r"([\d.]+) s\b", row.status)]
            assert len(seconds) == 5 and seconds == sorted(seconds)
            assert seconds[3] == pytest.approx(row.median_ms / 1e3, abs=0.01)
    with pytest.raises(ValueError, match="case"):
        SUITES["startup"].plan(Choice(cases=["tiny#hot"]))


def test_default_run_is_a_short_one_and_draws(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--rounds", "1", "--provider", "loop,gemm,copy,dense-flops", "--timer", "eager"]
    assert run.main([*arguments, "--in-process", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.glob("*.csv")} == {"permute.csv", "moe_layer.csv", "model.csv"}
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        return
    assert {"moe_layer-throughput.png", "model-latency.png"} <= {path.name for path in tmp_path.glob("*.png")}


@pytest.mark.parametrize("suite", list(SUITES))
def test_full_size_plans(suite: str) -> None:
    """Every suite plans something for a GPU, without duplicates, and every task survives the way to a worker."""
    tasks = SUITES[suite].plan(Choice())
    assert tasks and len({task.template.key for task in tasks}) == len(tasks)
    for task in tasks:
        assert type(task).from_dict(task.to_dict()) == task
        assert set(task.providers) <= set(SUITES[suite].providers)


def test_unknown_names_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run.main(["--provider", "no-such-provider"])
    assert "no-such-provider" in capsys.readouterr().err
