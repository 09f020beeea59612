"""`dit-moe evaluate`: sample many images, resumably and on several ranks, and compare them with a reference."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from ..evaluate import SamplingSettings, merge_shards, rank_from_environment, sample_shards
from ..metrics import MetricsUnavailableError, compute_metrics, missing_requirements
from .common import (
    Backend,
    BackendOption,
    CheckpointOption,
    DeviceOption,
    HeadsOption,
    Precision,
    Sampler,
    StepsOption,
    VaeOption,
    chosen_backend,
    codec_for,
    default_steps,
    local_device,
    print_choices,
    reported_errors,
)
from .sampling_options import (
    BatchSizeOption,
    CfgOption,
    CfgSchedule,
    CompileOption,
    GraphsOption,
    IntervalOption,
    SamplerOption,
    ScheduleOption,
    SeedOption,
    WeightsDtypeOption,
    load_engine,
    print_mode,
)


def evaluate(
    ckpt: CheckpointOption,
    out: Annotated[Path, typer.Option(help="Folder for the shards; give the same one again to resume.")],
    reference: Annotated[
        Path | None, typer.Option(help="ADM's reference .npz; without it images are sampled and merged only.")
    ] = None,
    num_images: Annotated[int, typer.Option(min=1, help="Images; 50,000 for figures that compare.")] = 50_000,
    sampler: SamplerOption = Sampler.rf,
    steps: StepsOption = None,
    cfg: CfgOption = 1.5,
    cfg_interval: IntervalOption = (0.0, 1.0),
    cfg_schedule: ScheduleOption = CfgSchedule.constant,
    classes: Annotated[str, typer.Option(help="balanced or random.")] = "balanced",
    vae: VaeOption = None,
    inception: Annotated[Path | None, typer.Option(help="Inception weights, instead of torch hub's copy.")] = None,
    seed: SeedOption = 0,
    batch_size: BatchSizeOption = 32,
    shard_size: Annotated[int, typer.Option(min=1, help="Images a file.")] = 500,
    dtype: WeightsDtypeOption = Precision.fp32,
    device: DeviceOption = "auto",
    backend: BackendOption = Backend.auto,
    graphs: GraphsOption = True,
    compile: CompileOption = False,
    num_heads: HeadsOption = None,
) -> None:
    """Sample many images and compute FID, sFID, IS, precision and recall (docs/evaluation.md).

    Under torchrun each rank samples its share; run the command once more without torchrun to merge and compare.
    """
    console = Console()
    with reported_errors(), chosen_backend(backend) as choices:
        rank, world_size = rank_from_environment()
        if reference is not None:
            missing = missing_requirements(reference, inception)
            if missing:  # before hours of sampling, not after
                raise MetricsUnavailableError("cannot compute metrics, missing: " + "; ".join(missing))
        settings = SamplingSettings(
            num_images=num_images, sampler=sampler.value, steps=default_steps(sampler, steps), cfg_scale=cfg, seed=seed,
            guidance_interval=cfg_interval, cfg_schedule=cfg_schedule.value,
            classes=classes, shard_size=shard_size, clip=sampler is not Sampler.rf and vae is None,
        )  # fmt: skip
        engine = load_engine(ckpt, num_heads, local_device(device), dtype, graphs, compile)
        codec = codec_for(engine.model, vae, engine.device)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("sampling", total=None)
            sample_shards(
                engine, out, settings, batch_size=batch_size, rank=rank, world_size=world_size,
                decode=None if codec is None else codec.decode, decoder="none" if vae is None else vae.name,
                on_progress=lambda done, total: progress.update(task, completed=done, total=total),
            )  # fmt: skip
        print_choices(console, choices)
        print_mode(console, engine)
        if world_size > 1:
            console.print(f"rank {rank} of {world_size}: done", highlight=False)
            return
        merged = out / "samples.npz"
        console.print(f"{merge_shards(out, merged)} images: {merged}", highlight=False, soft_wrap=True)
        if reference is not None:
            metrics = compute_metrics(merged, reference, inception=inception, device=engine.device)
            console.print(_table(metrics))


def _table(metrics: dict[str, float]) -> Table:
    table = Table(show_header=False)
    for name, value in metrics.items():
        table.add_row(name, f"{value:.4f}")
    return table
