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
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from . import results
from .results import Row

_TITLE_COLUMNS = 58
# name -> (label, colour, marker); the same provider looks the same in every plot
STYLES = {
    "ours-triton": ("this library, fused (Triton)", "#c1121f", "o"),
    "ours-triton-compiled": ("this library, torch.compile", "#e5383b", "*"),
    "ours-unfused": ("this library, unfused (Triton)", "#f4845f", "s"),
    "ours-cuda": ("this library, CUDA", "#f7b267", "D"),
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


def _layer_memory(rows: list[Row], runs: list[dict[str, Any]]) -> Figure | None:
    rows = [row for row in rows if row.peak_mib and row.routing == "balanced" and row.timer == "eager"]
    rows = [row for row in rows if not row.provider.startswith("dense") and row.provider != "gemm"]
    return _grid(
        rows,
        runs,
        title="Routed layer: peak memory of one call, its inputs and weights included",
        y_label="peak memory (MiB)",
        y_of=lambda row: row.peak_mib,
        log_y=True,
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
    cases, modes = _distinct(row.case for row in rows), _distinct(row.mode for row in rows)
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
                panel.set_yscale("log")
                panel.yaxis.set_major_formatter("{x:g}")
                panel.yaxis.set_minor_formatter("{x:g}")
                panel.tick_params(axis="y", which="minor", labelsize=7)
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
    """Time of one denoising forward per image against its FLOPs: a column for each resolution, a row for each batch."""
    rows = _fastest([row for row in rows if row.median_ms and row.tflops and row.batch])
    if not rows:
        return None
    sides = sorted({_pixels(row) for row in rows})
    batches = sorted({row.batch or 0 for row in rows})
    batches = sorted(sorted(batches, key=lambda batch: -sum(row.batch == batch for row in rows))[:3])  # the fullest
    figure = Figure(figsize=(5.2 * len(sides) + 3.2, 3.7 * len(batches) + 0.8), layout="constrained")
    axes = figure.subplots(len(batches), len(sides), squeeze=False)
    for line, batch in enumerate(batches):
        for column, side in enumerate(sides):
            panel = axes[line][column]
            chosen = [row for row in rows if row.batch == batch and _pixels(row) == side]
            if not chosen:
                panel.set_axis_off()
                continue
            for provider in sorted({row.provider for row in chosen}, key=_order):
                label, colour, marker = _style(provider)
                own = [row for row in chosen if row.provider == provider]
                points = sorted((_gflops_per_image(row), (row.median_ms or 0.0) / batch, row.case) for row in own)
                panel.plot(
                    [p[0] for p in points],
                    [p[1] for p in points],
                    "-",
                    color=colour,
                    marker=marker,
                    label=label,
                    zorder=_depth(provider),
                )
                if provider.startswith(("ours", "dense-same")):
                    for flops, time, case in points:
                        name = case.partition("@")[0]
                        ours = provider.startswith("ours")
                        panel.annotate(
                            f"MoE-{name}" if ours else f"DiT-{name.partition('/')[0]}",
                            (flops, time),
                            textcoords="offset points",
                            xytext=(-5, 5) if ours else (5, -10),
                            ha="right" if ours else "left",
                            fontsize=7,
                        )
            panel.set_xscale("log")
            panel.set_yscale("log")
            panel.grid(alpha=0.3, which="both")
            panel.set_title(f"{side} × {side} pixels, batch {batch}", fontsize=10)
            panel.set_xlabel("GFLOP of one forward of one image (2 per multiply-add, attention included)", fontsize=8)
            panel.set_ylabel("time per image (ms), the faster of\neager calls and CUDA graph", fontsize=9)
    title = "One denoising forward: latency against arithmetic, DiT-MoE and dense DiT"
    return _finish(figure, title, runs, list(axes.flat))


def _model_memory(rows: list[Row], runs: list[dict[str, Any]]) -> Figure | None:
    """Peak memory of whole models by batch: a column for each model, a row for each resolution."""
    rows = [row for row in rows if row.peak_mib and row.batch and row.timer == "eager"]
    names, sides = _distinct(row.case.partition("@")[0] for row in rows), sorted({_pixels(row) for row in rows})
    if not rows:
        return None
    figure = Figure(figsize=(4.0 * len(names) + 3.2, 3.4 * len(sides) + 0.8), layout="constrained")
    axes = figure.subplots(len(sides), len(names), squeeze=False)
    for panel, (side, name) in zip(axes.flat, product(sides, names), strict=True):
        chosen = [row for row in rows if row.case.partition("@")[0] == name and _pixels(row) == side]
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
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.set_title(f"{name}, {side} × {side} pixels", fontsize=10)
        panel.set_xlabel("batch (images)")
        panel.set_ylabel("peak memory (GiB)")
    return _finish(figure, "One denoising forward: peak memory, parameters included", runs, list(axes.flat))


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
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.grid(alpha=0.3, which="both")
    panel.set_xlabel("arithmetic intensity: FLOP per byte of inputs read once and outputs written once")
    panel.set_ylabel("achieved TFLOP/s")
    title = "Routed layer under the roofline: filled forward, open forward and backward"
    return _finish(figure, title, runs, [panel])


def _finish(figure: Figure, title: str, runs: list[dict[str, Any]], panels: list[Axes]) -> Figure:
    """Title with the machine, and one legend for all panels at the right."""
    gpu = next((run["gpu"]["name"] for run in reversed(runs) if run.get("gpu")), "CPU, smoke run")
    torch_version = runs[-1]["packages"]["torch"] if runs else ""
    wrapped = textwrap.fill(title, _TITLE_COLUMNS)  # the legend stands beside it
    figure.suptitle(f"{wrapped}\n{gpu}, torch {torch_version}", fontsize=12, x=0.02, ha="left")
    entries: dict[str, Any] = {}
    dashes: set[str] = set()
    for panel in panels:
        handles, labels = panel.get_legend_handles_labels()
        for handle, label in zip(handles, labels, strict=True):
            entries.setdefault(label, handle)
            dashes.add(str(handle.get_linestyle()) if isinstance(handle, Line2D) else "-")
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
    "memory-layer": _layer_memory,
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
