"""Draw the plots of a folder of results: `python -m benchmarks.plot DIR`.

Throughput of the routed layer against tokens, latency of whole models against their FLOPs with the dense DiT beside,
memory, and the routed layer under the roofline of the peaks measured in the same run. Only CSV and JSON are read.
"""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from . import results
from .cases import CASES
from .results import Row

_TITLE_COLUMNS = 32  # of 3.2 inches, which is also what the legend takes
# name -> (label, colour, marker); the same provider looks the same in every plot
STYLES = {
    "ours-triton": ("this library, fused (Triton)", "#f77f00", "o"),
    "ours-triton-compiled": ("this library, torch.compile", "#bc6c25", "*"),
    "ours-unfused": ("this library, unfused (Triton)", "#f9c784", "s"),
    "ours-cuda": ("this library, CUDA", "#c1121f", "D"),
    "gemm": ("bare cuBLAS products (yardstick)", "#000000", "_"),
    "torch-grouped-mm": ("torch grouped_mm, eager", "#0077b6", "^"),
    "torch-grouped-mm-compiled": ("torch grouped_mm, torch.compile", "#48cae4", "v"),
    "sonicmoe": ("SonicMoE", "#6a4c93", "P"),
    "moe-ops": ("moe-ops", "#9d4edd", "X"),
    "megablocks": ("MegaBlocks dropless MLP", "#2d6a4f", "h"),
    "stk": ("stk block-sparse", "#74c69d", "p"),
    "padded": ("padded batched product", "#8d99ae", "<"),
    "loop": ("loop over experts (official code's way)", "#7f5539", ">"),
    "dense-same-name": ("dense DiT of the same name", "#457b9d", "s"),
    "dense-same-name-compiled": ("dense DiT of the same name, torch.compile", "#a8dadc", "s"),
    "dense-flops": ("dense, same FLOPs", "#3a5a40", "d"),
    "dense-params": ("dense, same parameters", "#a3b18a", "1"),
    "copy": ("device copy of as many bytes", "#000000", "_"),
}
_UNFILLED = "_1"  # markers without an inside
_MODES = {"fwd": "forward", "fwd_bwd": "forward and backward"}


def draw_all(folder: Path) -> list[Path]:
    """Draw every plot for which the folder has rows; returns the files written."""
    matplotlib.use("Agg")
    written: list[Path] = []
    for name, draw in _PLOTS.items():
        suite = name.partition("-")[0]
        rows, runs = results.load(folder, suite)
        figure = draw([row for row in rows if row.ok], runs)
        if figure is not None:
            written.append(folder / f"{name}.png")
            figure.savefig(written[-1], dpi=130, bbox_inches="tight")
    return written


def _throughput(rows: list[Row], runs: list[dict[str, Any]]) -> Figure | None:
    """TFLOP/s of the routed layer against tokens: a row of panels for each mode, a column for each case."""
    rows = [row for row in rows if row.tflops and row.routing == "balanced" and row.provider != "dense-params"]
    return _grid(
        rows,
        runs,
        title="Routed layer, balanced routing: useful arithmetic per second",
        y_label="TFLOP/s (6·T·K·D·F forward, ×3 with backward)",
        y_of=lambda row: row.tflops,
    )


def _ratio(rows: list[Row], runs: list[dict[str, Any]]) -> Figure | None:
    """Time over the yardstick's against tokens."""
    rows = [
        row for row in rows if row.ratio_to_gemm and row.routing == "balanced" and not row.provider.startswith("dense")
    ]
    return _grid(
        rows,
        runs,
        title="Routed layer, balanced routing: time over that of the bare cuBLAS products (lower is better)",
        y_label="time / yardstick's time",
        y_of=lambda row: row.ratio_to_gemm,
        log_y=True,
    )


def _layer_memory(rows: list[Row], runs: list[dict[str, Any]], log_y: bool = True) -> Figure | None:
    """Peak memory of the routed layer against tokens."""
    rows = [row for row in rows if row.peak_mib and row.routing == "balanced" and row.timer == "eager"]
    rows = [row for row in rows if not row.batch and not row.provider.startswith("dense") and row.provider != "gemm"]
    return _grid(
        rows,
        runs,
        title="Routed layer: peak memory of one call, its inputs and weights included",
        y_label="peak memory (MiB)",
        y_of=lambda row: row.peak_mib,
        log_y=log_y,
    )


def _grid(
    rows: list[Row],
    runs: list[dict[str, Any]],
    *,
    title: str,
    y_label: str,
    y_of: Callable[[Row], float | None],
    log_y: bool = False,
) -> Figure | None:
    """Panels by mode and case, a line for each provider and timer, tokens along x."""
    cases, modes = sorted({row.case for row in rows}, key=_size), _distinct(row.mode for row in rows)
    if not rows:
        return None
    figure = Figure(figsize=(4.6 * len(cases) + 3.2, 3.7 * len(modes) + 0.8), layout="constrained")
    axes = figure.subplots(len(modes), len(cases), squeeze=False)
    for line, mode in enumerate(modes):
        for column, case in enumerate(cases):
            panel = axes[line][column]
            _lines(panel, [row for row in rows if row.mode == mode and row.case == case], y_of)
            panel.set_title(f"DiT-MoE-{case} layer, {_MODES[mode]}", fontsize=10)
            panel.set_xlabel("tokens T")
            panel.set_ylabel(y_label, fontsize=9)
            if log_y:
                _make_log(panel, panel.yaxis)
            else:
                panel.set_ylim(bottom=0)
    return _finish(figure, title, runs, list(axes.flat))


def _lines(panel: Axes, rows: list[Row], y_of: Callable[[Row], float | None]) -> None:
    series: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        series[row.provider, row.timer].append((row.tokens or 0, y_of(row) or 0.0))
    for provider, timer in sorted(series, key=lambda key: (_order(key[0]), key[1])):
        label, colour, marker = _style(provider)
        points = sorted(series[provider, timer])
        panel.plot(
            *zip(*points, strict=True),
            "-" if timer == "eager" else "--",
            color=colour,
            marker=marker,
            markersize=5,
            linewidth=1.4,
            label=label,
            zorder=_depth(provider),
        )
    ticks = sorted({row.tokens for row in rows if row.tokens})
    panel.set_xscale("log", base=2)
    panel.set_xticks(ticks, [f"{tick:,}" for tick in ticks], fontsize=8)
    panel.minorticks_off()
    panel.grid(alpha=0.3)


def _latency(rows: list[Row], runs: list[dict[str, Any]]) -> Figure | None:
    """Time of one denoising forward per image against its FLOPs: a panel for each resolution and batch size."""
    rows = _fastest([row for row in rows if row.median_ms and row.tflops and row.batch])
    if not rows:
        return None
    groups: dict[tuple[int, int], list[Row]] = defaultdict(list)
    for row in rows:
        groups[_pixels(row), row.batch or 0].append(row)
    figure, panels = _panels(len(groups), width=5.0, height=3.9)
    for panel, ((side, batch), chosen) in zip(panels, sorted(groups.items()), strict=True):
        for provider in sorted({row.provider for row in chosen}, key=_order):
            label, colour, marker = _style(provider)
            points = sorted((_gflops_per_image(row), _ms_per_image(row)) for row in chosen if row.provider == provider)
            x, y = zip(*points, strict=True)
            panel.plot(x, y, "-", color=colour, marker=marker, label=label, zorder=_depth(provider))
        _name_models(panel, chosen)
        _make_log(panel, panel.xaxis)
        _make_log(panel, panel.yaxis)
        panel.margins(0.14)
        panel.set_title(f"{side} × {side} pixels, batch {batch}", fontsize=10)
        panel.set_xlabel("GFLOP of one forward of one image (2 per multiply-add, attention included)", fontsize=8)
        panel.set_ylabel("time per image (ms), the faster of\neager calls and CUDA graph", fontsize=9)
    title = "One denoising forward: latency against arithmetic, DiT-MoE and dense DiT"
    return _finish(figure, title, runs, panels)


def _name_models(panel: Axes, rows: list[Row]) -> None:
    """The name of each DiT-MoE above its first point, that of the dense DiT of the same size below its."""
    for prefix, place, align in (("ours", (-5, 6), "right"), ("dense-same", (5, -11), "left")):
        first: dict[str, Row] = {}
        for row in sorted(rows, key=_ms_per_image):
            if row.provider.startswith(prefix):
                first.setdefault(row.case.partition("@")[0], row)
        for name, row in first.items():
            panel.annotate(
                f"MoE-{name}" if prefix == "ours" else f"DiT-{name.partition('/')[0]}",
                (_gflops_per_image(row), _ms_per_image(row)),
                textcoords="offset points",
                xytext=place,
                ha=align,
                fontsize=7,
                zorder=4.0,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.5},
            )


def _model_memory(rows: list[Row], runs: list[dict[str, Any]]) -> Figure | None:
    """Peak memory of whole models by batch: a panel for each resolution and model."""
    rows = [row for row in rows if row.peak_mib and row.batch and row.timer == "eager"]
    if not rows:
        return None
    cases = sorted({row.case for row in rows}, key=lambda case: (case.count("@"), _size(case)))
    figure, panels = _panels(len(cases), width=4.0, height=3.4)
    for panel, case in zip(panels, cases, strict=True):
        chosen = [row for row in rows if row.case == case]
        batches = sorted({row.batch or 0 for row in chosen})
        for provider in sorted({row.provider for row in chosen}, key=_order):
            label, colour, marker = _style(provider)
            own = [row for row in chosen if row.provider == provider]
            points = sorted((row.batch or 0, (row.peak_mib or 0.0) / 1024) for row in own)
            panel.plot(
                *zip(*points, strict=True), "-", color=colour, marker=marker, label=label, zorder=_depth(provider)
            )
        panel.set_xscale("log", base=2)
        panel.set_xticks(batches, [str(batch) for batch in batches])
        panel.minorticks_off()
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        side = _pixels(chosen[0])
        panel.set_title(f"{case.partition('@')[0]}, {side} × {side} pixels", fontsize=10)
        panel.set_xlabel("batch (images)")
        panel.set_ylabel("peak memory (GiB)")
    return _finish(figure, "One denoising forward: peak memory, parameters included", runs, panels)


def _panels(count: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    """A figure with so many panels, row by row, at most three beside each other; only the last row may be short."""
    columns = min(count, 3)
    lines = -(-count // columns)
    figure = Figure(figsize=(width * columns + 3.2, height * lines + 0.8), layout="constrained")
    panels = list(figure.subplots(lines, columns, squeeze=False).flat)
    for unused in panels[count:]:
        unused.set_axis_off()
    return figure, panels[:count]


def _make_log(panel: Axes, axis: Axis) -> None:
    """A logarithmic axis with plain numbers at 1, 2 and 5 of each decade."""
    (panel.set_xscale if axis is panel.xaxis else panel.set_yscale)("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=15))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(labelsize=8)
    panel.grid(alpha=0.3)


def _roofline(rows: list[Row], runs: list[dict[str, Any]]) -> Figure | None:
    """Achieved arithmetic against intensity (operations per compulsory byte), under the measured peaks."""
    peaks = next((run["peaks"] for run in reversed(runs) if run.get("peaks")), None)
    rows = _fastest([row for row in rows if row.tflops and row.gbps and row.routing == "balanced"])
    if not rows or peaks is None:
        return None
    figure = Figure(figsize=(11.5, 5.2), layout="constrained")
    panel = figure.subplots()
    intensities = [row.intensity for row in rows]
    low, high = min(intensities) / 2, max(max(intensities) * 2, 2e3)
    ridge = peaks["bf16_tflops"] * 1e3 / peaks["copy_gbps"]
    panel.plot(
        [min(low, ridge / 4), ridge, high],
        [min(low, ridge / 4) * peaks["copy_gbps"] / 1e3, peaks["bf16_tflops"], peaks["bf16_tflops"]],
        color="black",
        linewidth=1.5,
        label=f"peaks in this run: copy {peaks['copy_gbps'] / 1e3:.2f} TB/s, bf16 {peaks['bf16_tflops']:.0f} TFLOP/s",
    )
    for provider in sorted({row.provider for row in rows}, key=_order):
        label, colour, marker = _style(provider)
        for mode, fill in (("fwd", colour), ("fwd_bwd", "none")):
            chosen = [row for row in rows if row.provider == provider and row.mode == mode]
            panel.scatter(
                [row.intensity for row in chosen],
                [row.tflops or 0.0 for row in chosen],
                marker=marker,
                facecolors=colour if marker in _UNFILLED else fill,
                edgecolors=None if marker in _UNFILLED else colour,
                s=34,
                label=label,
                zorder=_depth(provider),
            )
    _make_log(panel, panel.xaxis)
    _make_log(panel, panel.yaxis)
    panel.set_xlabel("arithmetic intensity: FLOP per byte of inputs read once and outputs written once")
    panel.set_ylabel("achieved TFLOP/s")
    title = "Routed layer under the roofline: filled forward, open forward and backward"
    return _finish(figure, title, runs, [panel])


def _finish(figure: Figure, title: str, runs: list[dict[str, Any]], panels: list[Axes]) -> Figure:
    """Title with the machine, and one legend for all panels at the right."""
    gpu = next((run["gpu"]["name"] for run in reversed(runs) if run.get("gpu")), "CPU, smoke run")
    torch_version = runs[-1]["packages"]["torch"] if runs else ""
    wrapped = textwrap.fill(title, round(_TITLE_COLUMNS * (figure.get_figwidth() / 3.2 - 1)))  # the legend beside it
    figure.suptitle(f"{wrapped}\n{gpu}, torch {torch_version}", fontsize=12, x=0.02, ha="left")
    entries: dict[str, Any] = {}
    dashes: set[str] = set()
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            entries.setdefault(label, handle)
            dashes.add(str(handle.get_linestyle()) if isinstance(handle, Line2D) else "-")
    labels_in_order = [label for label, _, _ in STYLES.values()]
    entries = dict(sorted(entries.items(), key=lambda entry: (*labels_in_order, entry[0]).index(entry[0])))
    if "--" in dashes:
        entries["solid line: eager calls"] = Line2D([], [], color="#555555")
        entries["dashed line: CUDA graph"] = Line2D([], [], color="#555555", linestyle="--")
    figure.legend(entries.values(), entries.keys(), loc="outside right upper", fontsize=8, frameon=False)
    return figure


def _fastest(rows: Iterable[Row]) -> list[Row]:
    """The faster timer of each measurement."""
    best: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        key = row.key[:-1]
        if key not in best or (row.median_ms or 0) < (best[key].median_ms or 0):
            best[key] = row
    return list(best.values())


def _gflops_per_image(row: Row) -> float:
    return (row.tflops or 0) * (row.median_ms or 0) / (row.batch or 1)


def _ms_per_image(row: Row) -> float:
    return (row.median_ms or 0) / (row.batch or 1)


def _size(case: str) -> int:
    """Place of a case's model among the paper's sizes."""
    name = case.partition("@")[0]
    return CASES.index(name) if name in CASES else -1


def _pixels(row: Row) -> int:
    return int(row.case.partition("@")[2] or 256)


def _style(provider: str) -> tuple[str, str, str]:
    return STYLES.get(provider, (provider, "#555555", "."))


def _order(provider: str) -> int:
    return list(STYLES).index(provider) if provider in STYLES else len(STYLES)


def _depth(provider: str) -> float:
    """This library's lines lie on top."""
    return 3.0 if provider.startswith("ours") else 2.0


def _distinct(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


# file name -> drawing; the suite is what comes before the first hyphen
_PLOTS: dict[str, Callable[[list[Row], list[dict[str, Any]]], Figure | None]] = {
    "moe_layer-throughput": _throughput,
    "moe_layer-ratio": _ratio,
    "moe_layer-memory": _layer_memory,
    "moe_layer-roofline": _roofline,
    "model-latency": _latency,
    "model-memory": _model_memory,
    "memory-layer": partial(_layer_memory, log_y=False),
}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plot", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with the CSV and JSON files of a run")
    folder = parser.parse_args().folder
    written = draw_all(folder)
    for path in written:
        print(f"wrote {path}")
    if not written:
        print(f"benchmarks: no rows to draw in {folder}", file=sys.stderr)
    return 0 if written else 1


if __name__ == "__main__":
    sys.exit(main())
