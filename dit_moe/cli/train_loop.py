"""The run behind `dit-moe train`: resume, train, save, and leave when asked to."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import typer
from rich.console import Console

from ..runs import METRICS_FILE, MODEL_FILE, RunFolder, stop_on_signals
from ..training import Trainer, TrainingReport
from ..training.ranks import AgreedStop
from .common import Backend, chosen_backend, describe_device, print_choices
from .display import print_expert_load, train_with_progress


@dataclass(frozen=True)
class RunPlan:
    """How a run is watched and kept.

    Args:
        console: where to print; quiet on all ranks but the first.
        backend: of the kernels.
        log_every, save_every: steps between reports, and between checkpoints.
        resume: go on from the newest checkpoint.
    """

    console: Console
    backend: Backend
    log_every: int
    save_every: int
    resume: bool


def introduce(console: Console, trainer: Trainer) -> None:
    """Print what is trained, on what, and where."""
    config, data = trainer.config, trainer.data
    experts = f"{config.num_experts} experts, top {config.top_k}" if config.is_moe else "dense"
    parameters = sum(param.numel() for param in trainer.model.parameters())
    where = describe_device(trainer.device)
    if trainer.num_ranks > 1:
        sharing = trainer.parallel.expert_parallel
        experts_too = f", {sharing} share the experts" if sharing > 1 else ""
        where += f" and {trainer.num_ranks - 1} more ({trainer.parallel.data_parallel}{experts_too})"
    size = f"{data.channels} x {data.image_size} x {data.image_size}"
    for line in (
        f"model: {config.depth} blocks, width {config.hidden_size}, {experts}, {config.num_tokens} tokens an image, "
        f"{parameters:,} parameters; {trainer.settings.dtype} on {where}",
        f"data: {data.name}, {len(data):,} images of {size}, {data.num_classes} classes",
    ):
        console.print(line, highlight=False, soft_wrap=True)


def train_to_the_end(trainer: Trainer, folder: RunFolder, plan: RunPlan) -> None:
    """Train to the last step or until a signal comes, with a checkpoint at the end either way.

    Raises:
        typer.Exit: with 128 + N after signal N.
    """
    console, steps = plan.console, trainer.settings.steps
    if plan.resume:
        folder.resume(trainer)
        console.print(f"resumed at step {trainer.step}", highlight=False, soft_wrap=True)
    elif trainer.rank == 0:
        folder.start()
    last: list[TrainingReport] = []
    with chosen_backend(plan.backend) as choices, stop_on_signals() as stop:
        agreed = AgreedStop(stop)
        stopped = False

        def should_stop() -> bool:
            nonlocal stopped
            stopped = agreed()
            return stopped

        def on_report(report: TrainingReport) -> None:
            if not last:
                print_choices(console, choices)
            last[:] = [report]
            if trainer.rank == 0:
                folder.append(report)

        while trainer.step < steps and not stopped:
            until = min(steps, (trainer.step // plan.save_every + 1) * plan.save_every)
            train_with_progress(
                trainer, console, report_every=plan.log_every, until=until, on_report=on_report, should_stop=should_stop
            )
            folder.save(trainer)
        folder.close()
    if stopped and trainer.step < steps:
        console.print(
            f"stopped at step {trainer.step} of {steps}, saved in {folder.path}; --resume goes on",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(128 + (stop.signal or signal.SIGTERM))
    if last and last[0].expert_load:
        print_expert_load(console, last[0].expert_load)
    console.print(
        f"averaged model: {folder.path / MODEL_FILE}, metrics: {folder.path / METRICS_FILE}",
        highlight=False,
        soft_wrap=True,
    )
