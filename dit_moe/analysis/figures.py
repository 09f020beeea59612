"""Figures of the experts' choices, in the layout of the paper's figures 5 to 7 and beside them.

Every function returns a matplotlib Figure that belongs to no window; `save_png` writes it. Shares are of a row's
choices: they do not depend on how many images, steps or tokens were counted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..checkpoint.files import written_aside
from .findings import Analysis, best
from .statistics import Estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 6  # the paper draws 12 layers as 2 x 6
_MOST_CLASSES = 100  # the paper draws every tenth of 1000
_NAMED_CLASSES = 20
_LINES = {"class": "tab:orange", "position": "tab:green", "step": "tab:blue"}  # the paper's colour of each


def figure_class(analysis: Analysis, names: Sequence[str] = (), *, per_layer: bool = False) -> Figure:
    """Figure 5: experts by class, one map a layer.

    Args:
        analysis: what to draw; the null class and classes without images are left out.
        names: of the classes; written beside the rows where they are few.
        per_layer: give each layer a colour scale of its own, as the paper does; otherwise layers can be compared.
    """
    counts = analysis.counts.by_class()[: analysis.counts.num_classes]
    drawn = np.flatnonzero(counts.sum((1, 2)))
    drawn = drawn[:: max(1, math.ceil(len(drawn) / _MOST_CLASSES))]
    labels = None
    if len(drawn) <= _NAMED_CLASSES:
        labels = [names[index] if index < len(names) else str(index) for index in drawn.tolist()]
    return _maps(counts[drawn].swapaxes(0, 1), "Oranges", "class", per_layer, labels)


def figure_patch(analysis: Analysis, *, per_layer: bool = False) -> Figure:
    """Figure 6: experts by token position in raster order, one map a layer; `per_layer` as in `figure_class`."""
    return _maps(analysis.counts.patches.sum(0, dtype=np.int64), "Greens", "position, raster order", per_layer)


def figure_step(analysis: Analysis, *, per_layer: bool = False) -> Figure:
    """Figure 7: experts by sampling step, 0 being the noisiest, one map a layer; `per_layer` as in `figure_class`."""
    return _maps(analysis.counts.steps.sum(0, dtype=np.int64), "Blues", "sampling step", per_layer)


def figure_patch_maps(analysis: Analysis) -> Figure | None:
    """Where in the image each expert is chosen: a square map for each layer (row) and expert (column).

    None where the tokens do not form a square.
    """
    side = math.isqrt(analysis.counts.num_tokens)
    if side**2 != analysis.counts.num_tokens:
        return None
    shares = _shares(analysis.counts.patches.sum(0, dtype=np.int64))  # (L, N, E)
    layers, _, experts = shares.shape
    figure = _figure(max(4.5, 0.85 * experts + 1.4), 0.85 * layers + 0.9)
    axes: Any = figure.subplots(layers, experts, squeeze=False)
    image = None
    for layer, expert in np.ndindex(layers, experts):
        axis = axes[layer, expert]
        image = axis.imshow(
            shares[layer, :, expert].reshape(side, side), cmap="Greens", vmin=0, vmax=shares.max(), aspect="equal"
        )
        axis.set_xticks([])
        axis.set_yticks([])
        if layer == 0:
            axis.set_title(f"expert {expert}", fontsize=8)
        if expert == 0:
            axis.set_ylabel(f"layer {layer}", fontsize=8)
    _colour_bar(figure, image, axes, f"share of the position's choices, % (even: {100 / experts:.3g})")
    return figure


def figure_information(analysis: Analysis) -> Figure:
    """What class, position and step tell of the expert, layer by layer, with intervals and shuffled baselines."""
    figure = _figure(8, 3.6)
    axis: Any = figure.subplots()
    layers = np.arange(analysis.counts.num_layers)
    handles = []
    for shift, (name, colour) in zip((-0.12, 0, 0.12), _LINES.items(), strict=True):
        estimate, baseline = information_of(analysis, name)
        centre = best(estimate)
        error = np.nan_to_num(np.abs(np.stack([centre - estimate.low, estimate.high - centre])))
        handles += [
            axis.errorbar(
                layers + shift, centre, error, color=colour, marker="o", ms=4, lw=1.2, capsize=2,
                label=f"expert and {name}",
            ),
            *axis.plot(layers + shift, baseline.mean, color=colour, ls=":", lw=1, marker="_", label=f"{name} shuffled"),
        ]  # fmt: skip
    axis.axhline(0, color="0.7", lw=0.8, zorder=0)
    axis.set_xlabel("MoE layer")
    axis.set_ylabel("mutual information, bits")
    axis.set_xticks(layers if len(layers) <= 30 else layers[::5])
    axis.legend(handles=handles, fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, 1.24), frameon=False)
    return figure


def figure_step_entropy(analysis: Analysis) -> Figure:
    """How evenly the experts are loaded at each step: entropy of the load, one line a layer, first to last dark."""
    from matplotlib import colormaps

    figure = _figure(8, 3.6)
    axis: Any = figure.subplots()
    values = best(analysis.step_entropy)
    layers, steps = values.shape
    colours = colormaps["viridis"](np.linspace(0, 0.92, layers))
    for layer in range(layers):
        shown: dict[str, Any] = (
            {"label": f"layer {layer}"} if layers <= 12 or layer in (0, layers // 2, layers - 1) else {}
        )
        axis.plot(values[layer], color=colours[layer], lw=1, **shown)
        axis.fill_between(
            np.arange(steps), analysis.step_entropy.low[layer], analysis.step_entropy.high[layer],
            color=colours[layer], alpha=0.15, lw=0,
        )  # fmt: skip
    axis.plot(values.mean(0), color="black", lw=2, label="mean of the layers")
    axis.axvline(steps / 2 - 0.5, color="0.6", ls="--", lw=0.8)
    axis.set_xlabel("sampling step (0 is the noisiest; dashed: half)")
    axis.set_ylabel("entropy of the load\n(1 is even)")
    axis.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, 1.3), frameon=False)
    return figure


def figure_load(analysis: Analysis) -> Figure:
    """Each expert's share of its layer's choices, 1 being even."""
    layers, experts = analysis.load.shape
    figure = _figure(max(4.5, 0.55 * experts + 1.5), max(2.2, 0.28 * layers + 1.2))
    axis: Any = figure.subplots()
    reach = max(0.1, float(np.abs(analysis.load - 1).max()))
    image = axis.imshow(analysis.load, cmap="RdBu_r", vmin=1 - reach, vmax=1 + reach, aspect="auto")
    if layers * experts <= 400:
        for (layer, expert), value in np.ndenumerate(analysis.load):
            colour = "white" if abs(value - 1) > 0.7 * reach else "black"  # the scale is dark at both ends
            axis.text(expert, layer, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_xticks(range(experts))
    axis.set_yticks(range(layers) if layers <= 30 else range(0, layers, 5))
    axis.set_xlabel("expert")
    axis.set_ylabel("MoE layer")
    _colour_bar(figure, image, axis, "load (1 is even)")
    return figure


def information_of(analysis: Analysis, name: str) -> tuple[Estimate, Any]:
    """Estimate and baseline of "class", "position" or "step"."""
    return {
        "class": (analysis.class_information, analysis.class_baseline),
        "position": (analysis.patch_information, analysis.patch_baseline),
        "step": (analysis.step_information, analysis.step_baseline),
    }[name]


def save_png(figure: Figure, path: str | os.PathLike, dpi: int = 110) -> None:
    """Write a figure as PNG; the file appears only when it is whole."""
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=dpi, bbox_inches="tight")


def _maps(counts: np.ndarray, colours: str, rows: str, per_layer: bool, labels: Sequence[str] | None = None) -> Figure:
    """One map a layer of counts (L, R, E), as shares of each row's choices."""
    shares = _shares(counts)
    layers, _, experts = shares.shape
    columns = min(_COLUMNS, layers)
    grid = math.ceil(layers / columns)
    figure = _figure(1.9 * columns + 1.3, 2.6 * grid + 0.3)
    axes: Any = figure.subplots(grid, columns, squeeze=False)
    low, high = float(shares.min()), float(shares.max())
    image = None
    for index, axis in enumerate(axes.flat):
        if index >= layers:
            axis.set_visible(False)
            continue
        scale: dict[str, Any] = {} if per_layer else {"vmin": low, "vmax": max(high, low + 1e-6)}
        image = axis.imshow(shares[index], cmap=colours, aspect="auto", interpolation="nearest", **scale)
        axis.set_title(f"MoE Layer {index}", fontsize=9)
        axis.set_xticks(range(experts) if experts <= 8 else range(0, experts, math.ceil(experts / 8)))
        axis.tick_params(labelsize=7)
        if index % columns:
            axis.set_yticklabels([])
        else:
            axis.set_ylabel(rows, fontsize=8)
        if labels is not None:
            axis.set_yticks(range(len(labels)), labels if index % columns == 0 else [])
        if index + columns >= layers:
            axis.set_xlabel("expert", fontsize=8)
    if not per_layer:
        _colour_bar(figure, image, axes, f"share of the row's choices, % (even: {100 / experts:.3g})")
    return figure


def _shares(counts: np.ndarray) -> np.ndarray:
    """Per cent of each row's choices."""
    return 100 * counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def _colour_bar(figure: Figure, image: Any, axes: Any, label: str) -> None:
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02)
    bar.set_label(label, fontsize=8)
    bar.ax.tick_params(labelsize=7)


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'dit-moe[analysis]'") from error
    return Figure(figsize=(width, height), layout="constrained")
