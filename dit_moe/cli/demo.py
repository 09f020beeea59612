"""`dit-moe demo`: train a small DiT-MoE on real digits, sample from it, and have the samples judged."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from ..checkpoint import load_model
from ..data import DataUnavailableError, ImageDataset
from ..demo import DemoPlan, Verdict, demo_data, demo_plan, judge, sample_classes
from ..images import save_grid
from ..model import DiT
from ..runs import METRICS_FILE, MODEL_FILE, RunFolder
from ..training import Trainer, TrainingReport
from .common import (
    Backend,
    BackendOption,
    DeviceOption,
    chosen_backend,
    describe_device,
    print_choices,
    reported_errors,
    resolve_device,
)
from .display import print_expert_load, train_with_progress

_COLUMNS = 10


def demo(
    out: Annotated[Path, typer.Option(help="Folder for pictures, model and metrics.")] = Path("demo"),
    device: DeviceOption = "auto",
    backend: BackendOption = Backend.auto,
    steps: Annotated[int | None, typer.Option(help="Training steps, instead of the demo's own.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of weights, training and samples.")] = 0,
) -> None:
    """Train a small DiT-MoE on handwritten digits (a minute or two on a CPU) and draw some of each."""
    console = Console()
    with reported_errors(), chosen_backend(backend) as choices:
        target = resolve_device(device)
        if target.type == "cpu":
            # Two threads made 590 images/s instead of 400 on an idle machine, but they wait for each other at every op:
            # beside one busy process it was 50 to 100, where a single thread kept its pace.
            torch.set_num_threads(1)
        data = demo_data()
        plan = _with_steps(demo_plan(target, data, seed), steps)
        data = data.padded_to_multiple(plan.patch_size)
        torch.manual_seed(seed)
        model = DiT(plan.config(data))
        _introduce(console, model, data, plan, target)
        out.mkdir(parents=True, exist_ok=True)
        (out / METRICS_FILE).unlink(missing_ok=True)
        trainer = Trainer(model, data, plan.training, target)
        folder = RunFolder(out)
        reports: list[TrainingReport] = []

        def on_report(report: TrainingReport) -> None:
            if not reports:
                print_choices(console, choices)
            reports.append(report)
            folder.append(report)

        start = time.perf_counter()
        train_with_progress(trainer, console, report_every=max(1, plan.training.steps // 10), on_report=on_report)
        trained = time.perf_counter() - start
        folder.export(trainer)
        console.print(
            f"loss {reports[0].loss:.4f} -> {reports[-1].loss:.4f} in {plan.training.steps} steps, {trained:.0f} s"
        )
        print_expert_load(console, reports[-1].expert_load)
        _sample(console, load_model(out / MODEL_FILE, target), plan, data, target, out)


def _sample(console: Console, model: DiT, plan: DemoPlan, data: ImageDataset, device: torch.device, out: Path) -> None:
    start = time.perf_counter()
    images, class_ids = sample_classes(model, plan, data.num_classes, device)
    console.print(f"sampled {len(images)} images in {time.perf_counter() - start:.1f} s")
    rows = images.reshape(data.num_classes, plan.images_per_class, *images.shape[1:])[:, :_COLUMNS]
    scale = max(1, 56 // data.image_size)
    save_grid(out / "samples.png", rows.reshape(-1, *images.shape[1:]), rows.shape[1], scale=scale)
    for name, row in zip(data.class_names, rows, strict=True):
        save_grid(out / f"class-{name}.png", row, rows.shape[1], scale=scale)
    console.print(
        f"pictures, one row a class: {out / 'samples.png'}, {out / 'class-*.png'}", highlight=False, soft_wrap=True
    )
    try:
        _print_verdict(console, judge(images, class_ids, data), data)
    except DataUnavailableError as error:
        console.print(f"not judged: {error}", style="yellow", highlight=False)


def _with_steps(plan: DemoPlan, steps: int | None) -> DemoPlan:
    if steps is None:
        return plan
    return replace(plan, training=replace(plan.training, steps=steps))


def _introduce(console: Console, model: DiT, data: ImageDataset, plan: DemoPlan, device: torch.device) -> None:
    config = model.config
    parameters = sum(param.numel() for param in model.parameters())
    console.print(
        f"model: {config.depth} blocks, width {config.hidden_size}, {config.num_experts} experts, "
        f"top {config.top_k}, {config.num_tokens} tokens an image, {parameters:,} parameters, {plan.training.dtype}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"data: {data.name}, {len(data):,} images; device: {describe_device(device)}", highlight=False)


def _print_verdict(console: Console, verdict: Verdict, data: ImageDataset) -> None:
    console.print("sampled images that the classifier names as asked, by class", highlight=False)
    table = Table()
    for name in data.class_names:
        table.add_column(name, justify="right")
    table.add_row(*(f"{accuracy:.0%}" for accuracy in verdict.class_accuracy))
    console.print(table)
    right = round(verdict.accuracy * verdict.num_sampled)
    console.print(
        f"a classifier fitted on real digits names {right} of {verdict.num_sampled} sampled ones as asked "
        f"([bold]{verdict.accuracy:.1%}[/bold]); of {verdict.num_held_out} real ones that it never saw it names "
        f"{verdict.held_out_accuracy:.1%} right",
        highlight=False,
        soft_wrap=True,
    )
