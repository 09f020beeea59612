"""`dit-moe train`: train a pixel-space model on one device."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from ..config import DiTConfig
from ..data import ImageDataset, load_dataset
from ..model import DiT
from ..presets import model_config
from ..runs import METRICS_FILE, MODEL_FILE, STATE_FILE, append_report, resume_run, save_run, stop_on_signals
from ..training import Trainer, TrainingReport, TrainingSettings
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

# The shape of the model where neither an option nor a preset says otherwise: small enough for pictures of 32 pixels.
_SMALL = {"patch_size": 2, "hidden_size": 256, "depth": 6, "num_heads": 4}
_SKIPPED_SHOWN = 5


class TrainPrecision(str, Enum):
    """Arithmetic of training: fp32, or bf16 by autocast with fp32 weights."""

    fp32 = "fp32"
    bf16 = "bf16"


class Schedule(str, Enum):
    """Learning rate after the warm-up."""

    constant = "constant"
    cosine = "cosine"


_MODEL, _OPTIMISER, _RUN = "Model", "Optimisation", "Run"
Preset = Annotated[
    str | None, typer.Option(help="Take a preset's shape, such as DiT-MoE-S/2-8E2A.", rich_help_panel=_MODEL)
]
PatchSize = Annotated[int | None, typer.Option(help="Side of a patch [2].", rich_help_panel=_MODEL)]
HiddenSize = Annotated[int | None, typer.Option(help="Width of a token [256].", rich_help_panel=_MODEL)]
Depth = Annotated[int | None, typer.Option(help="Blocks [6].", rich_help_panel=_MODEL)]
NumHeads = Annotated[int | None, typer.Option(help="Attention heads [4].", rich_help_panel=_MODEL)]
MlpRatio = Annotated[float | None, typer.Option(help="Width of an expert in token widths [4].", rich_help_panel=_MODEL)]
NumExperts = Annotated[
    int | None, typer.Option(help="Experts per block [8]; 0 is a dense DiT.", rich_help_panel=_MODEL)
]
TopK = Annotated[int | None, typer.Option(help="Experts per token [2].", rich_help_panel=_MODEL)]
SharedExperts = Annotated[
    int | None, typer.Option(help="Width of the shared expert in token widths [2].", rich_help_panel=_MODEL)
]
BalanceAlpha = Annotated[float | None, typer.Option(help="Factor of the balance loss [0.01].", rich_help_panel=_MODEL)]
ClassDropout = Annotated[
    float | None, typer.Option(help="Share of dropped class ids, for guidance [0.1].", rich_help_panel=_MODEL)
]
BatchSize = Annotated[int, typer.Option(help="Images per step.", rich_help_panel=_OPTIMISER)]
LearningRate = Annotated[float, typer.Option(help="Learning rate of AdamW.", rich_help_panel=_OPTIMISER)]
ScheduleOption = Annotated[Schedule, typer.Option(help="Rate after the warm-up.", rich_help_panel=_OPTIMISER)]
Warmup = Annotated[int, typer.Option(help="Steps of linear warm-up.", rich_help_panel=_OPTIMISER)]
WeightDecay = Annotated[float, typer.Option(help="Weight decay of AdamW.", rich_help_panel=_OPTIMISER)]
Beta2 = Annotated[float, typer.Option(help="Second beta of AdamW.", rich_help_panel=_OPTIMISER)]
EmaDecay = Annotated[float, typer.Option(help="Decay of the averaged weights.", rich_help_panel=_OPTIMISER)]
GradClip = Annotated[float, typer.Option(help="Largest norm of the gradient.", rich_help_panel=_OPTIMISER)]
Flip = Annotated[bool, typer.Option("--flip", help="Mirror images at random.", rich_help_panel=_OPTIMISER)]
PrecisionOption = Annotated[TrainPrecision, typer.Option(help="Arithmetic.", rich_help_panel=_RUN)]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", rich_help_panel=_RUN)]
LogEvery = Annotated[int, typer.Option(min=1, help="Steps between reports.", rich_help_panel=_RUN)]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between saves.", rich_help_panel=_RUN)]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.", rich_help_panel=_RUN)]


def train(
    data: Annotated[str, typer.Option(help="mnist, digits, emoji, or a folder with one subfolder per class.")],
    out: Annotated[Path, typer.Option(help="Folder for the run's state, model and metrics.")],
    steps: Annotated[int, typer.Option(help="Steps in all.")],
    image_size: Annotated[int | None, typer.Option(help="Scale images to this size; folders need one.")] = None,
    grey: Annotated[bool, typer.Option("--grey", help="Read a folder's images as grey.")] = False,
    preset: Preset = None,
    patch_size: PatchSize = None,
    hidden_size: HiddenSize = None,
    depth: Depth = None,
    num_heads: NumHeads = None,
    mlp_ratio: MlpRatio = None,
    num_experts: NumExperts = None,
    top_k: TopK = None,
    num_shared_experts: SharedExperts = None,
    balance_alpha: BalanceAlpha = None,
    class_dropout: ClassDropout = None,
    batch_size: BatchSize = 64,
    lr: LearningRate = 1e-4,
    schedule: ScheduleOption = Schedule.constant,
    warmup_steps: Warmup = 0,
    weight_decay: WeightDecay = 0.0,
    beta2: Beta2 = 0.999,
    ema_decay: EmaDecay = 0.9999,
    grad_clip: GradClip = 1.0,
    flip: Flip = False,
    dtype: PrecisionOption = TrainPrecision.fp32,
    device: DeviceOption = "auto",
    backend: BackendOption = Backend.auto,
    seed: Seed = 0,
    log_every: LogEvery = 50,
    save_every: SaveEvery = 1000,
    resume: Resume = False,
) -> None:
    """Train a DiT or DiT-MoE on the pixels of labelled images, with rectified flow.

    Ctrl-C or SIGTERM ends after the current step and saves; the same command with --resume goes on.
    """
    console = Console()
    with reported_errors():
        settings = TrainingSettings(
            steps=steps, batch_size=batch_size, learning_rate=lr, warmup_steps=warmup_steps, schedule=schedule.value,
            beta2=beta2, weight_decay=weight_decay, ema_decay=ema_decay, grad_clip=grad_clip, dtype=dtype.value,
            flip=flip, seed=seed,
        )  # fmt: skip
        shape = dict(
            patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
            num_experts=num_experts, top_k=top_k, num_shared_experts=num_shared_experts, balance_alpha=balance_alpha,
            class_dropout_prob=class_dropout,
        )  # fmt: skip
        if (out / STATE_FILE).exists() and not resume:
            raise ValueError(f"{out} holds a run: pass --resume to go on with it, or another --out")
        target = resolve_device(device)
        images = _load(console, data, image_size, grey, shape, preset)
        torch.manual_seed(seed)
        trainer = Trainer(DiT(_config(images, shape, preset)), images, settings, target)
        if resume:
            resume_run(trainer, out)
            console.print(f"resumed at step {trainer.step}", highlight=False, soft_wrap=True)
        out.mkdir(parents=True, exist_ok=True)
        _introduce(console, trainer)
        _train(console, trainer, out, backend, log_every, save_every)


def _train(console: Console, trainer: Trainer, out: Path, backend: Backend, log_every: int, save_every: int) -> None:
    last: list[TrainingReport] = []
    steps = trainer.settings.steps
    with chosen_backend(backend) as choices, stop_on_signals() as stop:

        def on_report(report: TrainingReport) -> None:
            if not last:
                print_choices(console, choices)
            last[:] = [report]
            append_report(report, out)

        while trainer.step < steps and not stop():
            until = min(steps, (trainer.step // save_every + 1) * save_every)
            train_with_progress(
                trainer, console, report_every=log_every, until=until, on_report=on_report, should_stop=stop
            )
            save_run(trainer, out)
    if stop.signal is not None:
        console.print(
            f"stopped at step {trainer.step} of {steps}, saved in {out}; --resume goes on",
            highlight=False,
            soft_wrap=True,
        )
        raise typer.Exit(128 + stop.signal)
    if last and last[0].expert_load:
        print_expert_load(console, last[0].expert_load)
    console.print(f"averaged model: {out / MODEL_FILE}, metrics: {out / METRICS_FILE}", highlight=False, soft_wrap=True)


def _load(
    console: Console, source: str, image_size: int | None, grey: bool, shape: dict[str, Any], preset: str | None
) -> ImageDataset:
    patch_size = _shape(shape, preset)["patch_size"]
    images = load_dataset(source, image_size=image_size, patch_size=patch_size, channels=1 if grey else None)
    if images.skipped:
        console.print(f"skipped {len(images.skipped)} files that cannot be read as images:", style="yellow")
        for line in images.skipped[:_SKIPPED_SHOWN]:
            console.print(f"  {line}", markup=False, highlight=False, soft_wrap=True)
    return images


def _shape(shape: dict[str, Any], preset: str | None) -> dict[str, Any]:
    """Fields of the model that options or a preset give."""
    base = _SMALL if preset is None else model_config(preset).to_dict()
    return {**base, **{name: value for name, value in shape.items() if value is not None}}


def _config(images: ImageDataset, shape: dict[str, Any], preset: str | None) -> DiTConfig:
    pixels = dict(input_size=images.image_size, in_channels=images.channels, num_classes=images.num_classes)
    return DiTConfig.from_dict({**_shape(shape, preset), **pixels, "learn_sigma": False})


def _introduce(console: Console, trainer: Trainer) -> None:
    config, data = trainer.model.config, trainer.data
    experts = f"{config.num_experts} experts, top {config.top_k}" if config.is_moe else "dense"
    parameters = sum(param.numel() for param in trainer.model.parameters())
    console.print(
        f"model: {config.depth} blocks, width {config.hidden_size}, {experts}, {config.num_tokens} tokens an image, "
        f"{parameters:,} parameters; {trainer.settings.dtype} on {describe_device(trainer.device)}",
        highlight=False,
        soft_wrap=True,
    )
    size = f"{data.channels} x {data.image_size} x {data.image_size}"
    console.print(
        f"data: {data.name}, {len(data):,} images of {size}, {data.num_classes} classes",
        highlight=False,
        soft_wrap=True,
    )
