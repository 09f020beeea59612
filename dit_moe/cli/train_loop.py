"""The run behind `dit-moe train`: resume, train, save, and leave when asked to."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import typer
from rich.console import Console

from ..runs import METRICS_FILE, MODEL_FILE, RunFolder, stop_on_signals
from ..tracking import GridSampler, TensorBoardLog, peak_flops, utilisation
from ..training import Trainer, TrainingReport
from ..training.ranks import AgreedStop
from .common import Backend, chosen_backend, describe_device, print_choices
from .display import print_expert_load, report_line, train_with_progress


@dataclass(frozen=True)
class RunPlan:
    """How a run is watched and kept.

    Args:
        console: where to print; quiet on all ranks but the first.
        backend: of the kernels.
        log_every, save_every: steps between reports, and between checkpoints.
        resume: go on from the newest checkpoint.
        tensorboard: log to the folder tensorboard/ of the run.
        peak: FLOP/s of one device, for the utilisation; None where only known GPUs' shall be told.
        grids: draws samples every sample_every steps; None draws none.
        sample_every: at least 1 with grids.
    """

    console: Console
    backend: Backend
    log_every: int
    save_every: int
    resume: bool
    tensorboard: bool = False
    peak: float | None = None
    grids: GridSampler | None = None
    sample_every: int = 0

    def next_stop(self, step: int, last: int) -> int:
        """The next step after which something is to be done beside training."""
        every = [self.save_every, *([self.sample_every] if self.grids is not None else [])]
        return min(last, *((step // steps + 1) * steps for steps in every))


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
    peak = plan.peak or peak_flops(trainer.device, trainer.settings.dtype)
    peak = None if peak is None else peak * trainer.num_ranks
    log = None
    if plan.tensorboard and trainer.rank == 0:
        log = TensorBoardLog(folder.path / "tensorboard", trainer.config, peak, trainer.step)
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
            if log is not None:
                log.report(report)

        def describe(report: TrainingReport) -> str:
            line = report_line(report)
            if peak is None:
                return line
            return f"{line}  MFU {utilisation(trainer.config, report.images_per_second, peak):.1%}"

        while trainer.step < steps and not stopped:
            train_with_progress(
                trainer, console, report_every=plan.log_every, until=plan.next_stop(trainer.step, steps),
                on_report=on_report, should_stop=should_stop, describe=describe,
            )  # fmt: skip
            if trainer.step % plan.save_every == 0 or trainer.step == steps or stopped:
                folder.save(trainer)
            if plan.grids is not None and trainer.step % plan.sample_every == 0:
                grid = plan.grids.draw(trainer)
                if log is not None and grid is not None:
                    log.grid(grid, trainer.step)
        folder.close()
    if log is not None:
        log.close()
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
