"""The report: scalars as JSON, figures as PNG, and one HTML page that holds everything and needs nothing."""

from __future__ import annotations

import base64
import importlib.util
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.files import written_aside
from . import figures
from .findings import Analysis, best
from .pruning import ExpertProbe

COUNTS_FILE, SCALARS_FILE, REPORT_FILE = "counts.npz", "scalars.json", "report.html"
_DIGITS = 5


def missing_requirements() -> list[str]:
    """Packages that the figures and the report need and that are not installed."""
    return [name for name in ("matplotlib", "jinja2") if importlib.util.find_spec(name) is None]


def write_report(
    analysis: Analysis,
    folder: Path,
    *,
    class_names: Sequence[str] = (),
    probe: ExpertProbe | None = None,
    samples: Path | None = None,
    per_layer_scale: bool = False,
) -> Path:
    """Write scalars.json, the figures and report.html into a folder; each file appears only when it is whole.

    Args:
        analysis: what to report.
        folder: an existing folder.
        class_names: by class id, where known.
        probe: costs of dropping or merging experts, or None to leave that part out.
        samples: a PNG of sampled images to show, or None.
        per_layer_scale: colour scales of figures 5 to 7 by layer, as in the paper.

    Returns:
        The path of report.html.

    Raises:
        ImportError: matplotlib or jinja2 is not installed.
    """
    if missing_requirements():
        raise ImportError(f"the report needs {' and '.join(missing_requirements())}: pip install 'dit-moe[analysis]'")
    import jinja2

    drawn = {
        "class": figures.figure_class(analysis, class_names, per_layer=per_layer_scale),
        "patch": figures.figure_patch(analysis, per_layer=per_layer_scale),
        "patch-maps": figures.figure_patch_maps(analysis),
        "step": figures.figure_step(analysis, per_layer=per_layer_scale),
        "information": figures.figure_information(analysis),
        "step-entropy": figures.figure_step_entropy(analysis),
        "load": figures.figure_load(analysis),
    }
    pictures = {}
    for name, figure in drawn.items():
        if figure is not None:
            figures.save_png(figure, folder / f"{name}.png")
            pictures[name.replace("-", "_")] = _embedded(folder / f"{name}.png")
    if samples is not None and samples.is_file():
        pictures["samples"] = _embedded(samples)
    numbers = scalars(analysis, probe)
    with written_aside(folder / SCALARS_FILE) as aside:
        aside.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("dit_moe.analysis", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    page = environment.get_template("report.html.j2").render(
        analysis=analysis, counts=analysis.counts, numbers=numbers, pictures=pictures, probe=probe,
        merges=probe.cheapest_merges() if probe else [], provenance=analysis.counts.provenance,
        per_layer_scale=per_layer_scale, findings=analysis.findings,
        max_bits=math.log2(analysis.counts.num_experts),
    )  # fmt: skip
    with written_aside(folder / REPORT_FILE) as aside:
        aside.write_text(page, encoding="utf-8")
    return folder / REPORT_FILE


def scalars(analysis: Analysis, probe: ExpertProbe | None = None) -> dict[str, Any]:
    """The numbers of the report as JSON can hold them, with their provenance; NaN becomes null."""
    counts = analysis.counts
    layers = []
    for layer in range(counts.num_layers):
        row: dict[str, Any] = {"layer": layer}
        for name in ("class", "position", "step"):
            estimate, baseline = figures.information_of(analysis, name)
            row[name] = {
                "bits": _number(best(estimate)[layer]),
                "low": _number(estimate.low[layer]),
                "high": _number(estimate.high[layer]),
                "uncorrected": _number(estimate.value[layer]),
                "shuffled": _number(baseline.mean[layer]),
                "p_value": _number(baseline.p_value[layer]),
            }
        entropy = analysis.load_entropy
        row["load_entropy"] = {
            "value": _number(best(entropy)[layer]),
            "low": _number(entropy.low[layer]),
            "high": _number(entropy.high[layer]),
        }
        row["load"] = [_number(value) for value in analysis.load[layer]]
        if probe is not None:
            row["drop_cost"] = [_number(value) for value in probe.drop_cost[layer]]
            row["output_norm"] = [_number(value) for value in probe.output_norm[layer]]
            row["mean_weight"] = [_number(value) for value in probe.weight[layer]]
        layers.append(row)
    return {
        "provenance": counts.provenance,
        "images": counts.num_images,
        "steps": counts.num_steps,
        "tokens": counts.num_tokens,
        "experts": counts.num_experts,
        "top_k": counts.top_k,
        "half": counts.half,
        "choices": int(counts.images.sum(dtype=np.int64)),
        "groups": len(counts.steps),
        "resamples": analysis.resamples,
        "shuffles": analysis.shuffles,
        "findings": [{"verdict": finding.verdict, **asdict(finding)} for finding in analysis.findings],
        "layers": layers,
        "step_entropy": [[_number(value) for value in row] for row in best(analysis.step_entropy)],
    }


def _number(value: Any) -> float | None:
    return None if np.isnan(value) else float(f"{float(value):.{_DIGITS}g}")


def _embedded(path: Path) -> str:
    """A PNG as a data URL."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode("ascii")
