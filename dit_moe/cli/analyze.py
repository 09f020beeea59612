"""`dit-moe analyze`: count the experts' choices while a model samples, and report what they do."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..analysis import Analysis, analyse
from ..analysis.report import COUNTS_FILE, missing_requirements, write_report
from ..analysis.run import probe_sampling, record_sampling
from ..checkpoint import load_checkpoint
from ..evaluate import SamplingSettings
from ..images import save_grid, to_uint8
from ..runs import class_names_beside
from .common import (
    Backend,
    BackendOption,
    CheckpointOption,
    DeviceOption,
    HeadsOption,
    Precision,
    Sampler,
    StepsOption,
    chosen_backend,
    default_steps,
    print_choices,
    reported_errors,
    resolve_device,
)
from .sampling_options import BatchSizeOption, CfgOption, SamplerOption, SeedOption, WeightsDtypeOption

_SAMPLES_SHOWN, _SAMPLES_IN_A_ROW = 40, 20
_PIXEL_CHANNELS = (1, 3)  # grey, colour; anything else is a latent
_SAMPLES_FILE = "samples.png"
_MARKS = {"holds": "green", "holds in part": "yellow", "does not hold": "red"}


def analyze(
    ckpt: CheckpointOption,
    out: Annotated[Path, typer.Option(help="Folder for counts, figures and report; the same one again resumes.")],
    images: Annotated[int, typer.Option(min=1, help="Images to sample.")] = 1000,
    sampler: SamplerOption = Sampler.rf,
    steps: StepsOption = None,
    cfg: CfgOption = 1.5,
    half: Annotated[
        str, typer.Option(help="Half of a guided batch to count: conditional, unconditional or both.")
    ] = "conditional",
    classes: Annotated[str, typer.Option(help="balanced or random.")] = "balanced",
    step_patch: Annotated[
        bool, typer.Option("--step-patch", help="Also keep counts of each position at each step.")
    ] = False,
    groups: Annotated[int, typer.Option(min=1, help="Groups of images, for intervals.")] = 20,
    resamples: Annotated[int, typer.Option(min=2, help="Bootstrap draws.")] = 500,
    probe: Annotated[
        int, typer.Option(min=0, help="Images whose tokens every expert is asked about, for pruning; 0 leaves it out.")
    ] = 16,
    per_layer_scale: Annotated[
        bool, typer.Option("--per-layer-scale", help="Colour scales of figures 5 to 7 by layer, as in the paper.")
    ] = False,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 64,
    dtype: WeightsDtypeOption = Precision.fp32,
    device: DeviceOption = "auto",
    backend: BackendOption = Backend.auto,
    num_heads: HeadsOption = None,
) -> None:
    """Watch the experts while a model samples, and report what their choice depends on (docs/analysis.md)."""
    console = Console()
    with reported_errors(), chosen_backend(backend) as choices:
        if missing_requirements():  # before the sampling, not after
            raise ImportError(f"needs {' and '.join(missing_requirements())}: pip install 'dit-moe[analysis]'")
        model = load_checkpoint(ckpt, num_heads, device=resolve_device(device), dtype=dtype.torch_dtype)
        settings = SamplingSettings(
            num_images=images, sampler=sampler.value, steps=default_steps(sampler, steps), cfg_scale=cfg, seed=seed,
            classes=classes, clip=sampler is not Sampler.rf and model.config.in_channels in _PIXEL_CHANNELS,
        )  # fmt: skip
        out.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()

        def keep_samples(indices: range, pixels: torch.Tensor) -> None:
            if indices.start == 0 and model.config.in_channels in _PIXEL_CHANNELS:
                shown = to_uint8(pixels[:_SAMPLES_SHOWN])
                save_grid(out / _SAMPLES_FILE, shown, _SAMPLES_IN_A_ROW, scale=max(1, 48 // shown.shape[1]))

        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("sampling", total=images)
            counts = record_sampling(
                model, settings, out / COUNTS_FILE, batch_size=batch_size, num_groups=groups, half=half,
                step_patch=step_patch, checkpoint=ckpt.name, on_images=keep_samples,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )  # fmt: skip
        print_choices(console, choices)
        sampled = time.perf_counter()
        console.print(f"{counts.num_images} images sampled and counted in {sampled - start:.1f} s", highlight=False)
        with console.status("statistics and figures"):
            found = analyse(counts, resamples=resamples, seed=seed)
            asked = probe_sampling(model, settings, num_images=probe) if probe else None
            page = write_report(
                found, out, class_names=class_names_beside(ckpt), probe=asked, samples=out / _SAMPLES_FILE,
                per_layer_scale=per_layer_scale,
            )  # fmt: skip
        _summarise(console, found)
        console.print(
            f"report: {page} ({time.perf_counter() - sampled:.1f} s)", highlight=False, markup=False, soft_wrap=True
        )


def _summarise(console: Console, found: Analysis) -> None:
    table = Table(title="information on the expert, mean over the layers", title_justify="left")
    for name in ("", "bits", "95 % interval"):
        table.add_column(name)
    for name, numbers in found.mean_information.items():
        table.add_row(name, f"{numbers.value:.4f}", f"{numbers.low:.4f} to {numbers.high:.4f}")
    console.print(table)
    for finding in found.findings:
        console.print(f"[{_MARKS[finding.verdict]}]{finding.verdict}[/]: {finding.title}", highlight=False)
