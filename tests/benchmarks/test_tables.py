"""Tables and plots are made from rows alone, with holes where a provider has no figure."""

from pathlib import Path

import pytest

from benchmarks import results, tables
from benchmarks.results import Row

RUN = {"gpu": {"name": "Some GPU"}, "packages": {"torch": "2.11.0"}, "time_utc": "2026-11-23T00:00:00", "command": []}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    layer = [
        Row("moe_layer", "XL/2-8E2A", tokens, None, mode, provider, "bf16", "balanced", timer, **figures)
        for tokens in (4096, 32768)
        for mode in ("fwd", "fwd_bwd")
        for provider, timer, figures in (
            ("ours-triton", "eager", {"median_ms": 1.25, "tflops": 500.0, "gbps": 800.0, "peak_mib": 900.0}),
            ("ours-triton", "graph", {"median_ms": 1.2, "tflops": 520.0, "gbps": 820.0}),
            ("gemm", "eager", {"median_ms": 1.0, "tflops": 600.0}),
            ("gemm", "graph", {"median_ms": 1.0, "tflops": 600.0}),
            ("loop", "eager", {"median_ms": 5.0, "tflops": 120.0, "gbps": 200.0, "peak_mib": 950.0}),
            ("loop", "graph", {"status": "skipped: the call waits for the GPU"}),
            ("stk", "eager", {"status": "failed: wrong result, output: error 1, allowed 0.1"}),
            ("stk", "graph", {"status": "failed: wrong result, output: error 1, allowed 0.1"}),
        )
    ]
    models = [
        Row(
            "model",
            case,
            256 * batch,
            batch,
            "fwd",
            provider,
            "bf16",
            "balanced",
            "eager",
            ms,
            ms,
            ms,
            400.0,
            None,
            8e3,
        )
        for case in ("S/2-8E2A", "S/2-8E2A@512")
        for batch in (1, 16)
        for provider, ms in (("ours-triton", 20.0), ("dense-same-name", 10.0))
    ]
    results.save(
        tmp_path, "moe_layer", results.add_ratios(layer), [{**RUN, "peaks": {"bf16_tflops": 700.0, "copy_gbps": 3e3}}]
    )
    results.save(tmp_path, "model", models, [RUN])
    return tmp_path


def test_tables(folder: Path) -> None:
    text = tables.markdown(folder)
    assert "| `ours-triton` | 1.250 / 1.200 (1.20) | 1.250 / 1.200 (1.20) |" in text
    assert "| `loop` | 5.000 / - (5.00) |" in text
    assert "| `stk` | failed: wrong result | failed: wrong result |" in text
    assert "Some GPU, torch 2.11.0, 2026-11-23" in text
    assert "| `ours-triton` | 16 | 20.00 (eager) | 800 | 500.0 | 400 | 7.81 |" in text


def test_other_machines_lie_in_the_folders_folders(folder: Path) -> None:
    rows, runs = results.load(folder, "model")
    results.save(folder / "other", "model", rows[:1], [{**runs[0], "gpu": {"name": "Another GPU"}}])
    (folder / "experiments").mkdir()
    text = tables.markdown(folder)
    assert text.count("### model, ") == 2 and "### model, Another GPU, torch 2.11.0, 2026-11-23" in text
    assert text.count("### moe_layer, ") == 1 and text.count("| DiT-MoE-S/2-8E2A |") == 1


def test_flops_table_is_the_papers(folder: Path) -> None:
    """arXiv 2407.11633, table 1: total and activated parameters (M), 'Gflops'."""
    text = tables.markdown(folder)
    for model, numbers in {
        "S/2-8E2A": "199 | 72 | 15.43",
        "B/2-8E2A": "796 | 286 | 61.68",
        "L/2-8E2A": "2,824 | 1,012 | 219.26",
        "XL/2-8E2A": "4,168 | 1,493 | 323.74",
        "G/2-16E2A": "16,504 | 3,182 | 690.94",
    }.items():
        assert f"| DiT-MoE-{model} | {numbers} |" in text


def test_markers() -> None:
    page = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter\n"
    replaced = tables.replace_between_markers(page, "new")
    assert replaced == f"before\n{tables.BEGIN}\n\nnew\n\n{tables.END}\nafter\n"
    assert tables.replace_between_markers(replaced, "new") == replaced
    with pytest.raises(ValueError, match="marker"):
        tables.replace_between_markers("no markers", "new")


def test_committed_page_has_the_markers() -> None:
    page = Path(__file__).parents[2] / "docs" / "performance.md"
    tables.replace_between_markers(page.read_text(), "")


def test_plots(folder: Path) -> None:
    pytest.importorskip("matplotlib")
    from benchmarks.plot import draw_all

    written = draw_all(folder)
    assert {path.name for path in written} == {
        "moe_layer-throughput.png",
        "moe_layer-ratio.png",
        "moe_layer-memory.png",
        "moe_layer-roofline.png",
        "model-latency.png",
        "model-memory.png",
    }
    assert all(path.stat().st_size > 10_000 for path in written)
    assert draw_all(folder / "empty") == []


def test_plots_keep_layers_and_models_apart(folder: Path) -> None:
    """A whole model's memory is no point of a layer's curve, and no panel of the latencies is empty."""
    pytest.importorskip("matplotlib")
    from benchmarks import plot

    rows, runs = results.load(folder, "model")
    assert plot._layer_memory(rows, runs) is None
    figure = plot._latency(rows[:4] + rows[6:], runs)  # without 512 pixels at batch 1
    assert [panel.get_title() for panel in figure.axes if panel.lines] == [
        "256 × 256 pixels, batch 1",
        "256 × 256 pixels, batch 16",
        "512 × 512 pixels, batch 16",
    ]
    assert all(panel.lines for panel in figure.axes)
