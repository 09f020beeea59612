"""The CSV keeps what is written, and a second run replaces only what it measured."""

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import results
from benchmarks.results import COLUMNS, Row

ROW = Row(
    "moe_layer", "XL/2-8E2A", 4096, None, "fwd", "ours-triton", "bf16", "balanced", "eager", 0.5, 0.4, 0.6, 521.25
)


def test_columns_are_the_agreed_ones() -> None:
    assert ",".join(COLUMNS) == (
        "suite,case,tokens,batch,mode,provider,dtype,routing,timer,"
        "median_ms,p20_ms,p80_ms,tflops,gbps,peak_mib,ratio_to_gemm,status"
    )


def test_round_trip(tmp_path: Path) -> None:
    failed = replace(ROW, provider="stk", median_ms=None, status='failed: "quoted", with a comma')
    results.write_csv(tmp_path / "a.csv", [ROW, failed])
    assert results.read_csv(tmp_path / "a.csv") == [replace(ROW, p20_ms=0.4), failed]
    (tmp_path / "b.csv").write_text("suite,case\n")
    with pytest.raises(ValueError, match="columns"):
        results.read_csv(tmp_path / "b.csv")


def test_ratio_is_taken_within_the_same_task() -> None:
    gemm = replace(ROW, provider="gemm", median_ms=0.25)
    other = replace(gemm, tokens=8192, median_ms=9.0)
    graph = replace(ROW, timer="graph")
    untimed = replace(ROW, provider="loop", median_ms=None)
    ratios = [row.ratio_to_gemm for row in results.add_ratios([ROW, gemm, other, graph, untimed])]
    assert ratios == [2.0, 1.0, 1.0, None, None]


def test_append_replaces_same_rows(tmp_path: Path) -> None:
    other = replace(ROW, provider="loop")
    results.save(tmp_path, "moe_layer", [ROW, other], [{"run": 1}])
    rows, runs = results.load(tmp_path, "moe_layer")
    merged = results.merge(rows, [replace(ROW, median_ms=0.45), replace(ROW, tokens=8)])
    assert [(row.provider, row.tokens, row.median_ms) for row in merged] == [
        ("ours-triton", 4096, 0.45),
        ("loop", 4096, 0.5),
        ("ours-triton", 8, 0.5),
    ]
    assert runs == [{"run": 1}]
    assert results.load(tmp_path, "model") == ([], [])


def test_status() -> None:
    assert ROW.ok and replace(ROW, status="ok: with a remark").ok
    assert not replace(ROW, status="failed: out of memory").ok
