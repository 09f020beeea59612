"""`dit-moe train`: train a model on one device, or on those that torchrun gives."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from rich.console import Console

from ..config import DiTConfig
from ..data import CachedDataset, ImageDataset, load_dataset
from ..model import DiT
from ..parallel import ParallelConfig
from ..presets import model_config
from ..runs import RunFolder
from ..tracking import GridSampler
from ..training import Trainer, TrainingSettings
from ..training.ranks import joined_ranks
from . import train_options as options
from .common import Backend, BackendOption, DeviceOption, codec_for, local_device, reported_errors, resolve_device
from .train_loop import RunPlan, introduce, train_to_the_end

# The shape of the model where neither an option nor a preset says otherwise: small enough for pictures of 32 pixels.
_SMALL = {"patch_size": 2, "hidden_size": 256, "depth": 6, "num_heads": 4}
_SKIPPED_SHOWN = 5


def train(
    data: Annotated[str, typer.Option(help="mnist, digits, emoji, a folder with one subfolder per class, or a cache.")],
    out: Annotated[Path, typer.Option(help="Folder for the run's state, model and metrics.")],
    steps: Annotated[int, typer.Option(help="Steps in all.")],
    config: options.Config = None,
    image_size: Annotated[int | None, typer.Option(help="Scale images to this size; folders need one.")] = None,
    grey: Annotated[bool, typer.Option("--grey", help="Read a folder's images as grey.")] = False,
    preset: options.Preset = None,
    patch_size: options.PatchSize = None,
    hidden_size: options.HiddenSize = None,
    depth: options.Depth = None,
    num_heads: options.NumHeads = None,
    mlp_ratio: options.MlpRatio = None,
    num_experts: options.NumExperts = None,
    top_k: options.TopK = None,
    num_shared_experts: options.SharedExperts = None,
    balance_alpha: options.BalanceAlpha = None,
    class_dropout: options.ClassDropout = None,
    objective: options.ObjectiveOption = options.TrainObjective.rf,
    batch_size: options.BatchSize = 64,
    lr: options.LearningRate = 1e-4,
    schedule: options.ScheduleOption = options.Schedule.constant,
    warmup_steps: options.Warmup = 0,
    weight_decay: options.WeightDecay = 0.0,
    beta2: options.Beta2 = 0.999,
    ema_decay: options.EmaDecay = 0.9999,
    grad_clip: options.GradClip = 1.0,
    flip: options.Flip = False,
    dtype: options.PrecisionOption = options.TrainPrecision.fp32,
    micro_batches: options.MicroBatches = 1,
    recompute_blocks: options.RecomputeBlocks = 0,
    cuda_graph: options.CudaGraph = True,
    moments: options.Moments = options.StateDtype.fp32,
    ema_dtype: options.EmaDtype = options.StateDtype.fp32,
    ema_device: options.EmaDeviceOption = options.EmaDevice.model,
    ema_every: options.EmaEvery = 1,
    data_parallel: options.DataParallelOption = None,
    expert_parallel: options.ExpertParallel = 1,
    device: DeviceOption = "auto",
    backend: BackendOption = Backend.auto,
    seed: options.Seed = 0,
    log_every: options.LogEvery = 50,
    save_every: options.SaveEvery = 1000,
    keep: options.Keep = 2,
    async_save: options.AsyncSave = False,
    resume: options.Resume = False,
    tensorboard: options.TensorBoard = False,
    peak_tflops: options.PeakTflops = None,
    sample_every: options.SampleEvery = 0,
    sample_classes: options.SampleClasses = 8,
    sample_images: options.SampleImages = 8,
    sample_steps: options.SampleSteps = 50,
    sample_cfg: options.SampleCfg = 4.0,
    vae: options.SampleVae = None,
) -> None:
    """Train a DiT or DiT-MoE on labelled images or their cached latents, with rectified flow or DDPM.

    Ctrl-C or SIGTERM ends after the current step and saves; the same command with --resume goes on. Under torchrun,
    each process trains on its share of every batch.
    """
    with reported_errors():
        settings = TrainingSettings(
            steps=steps, objective=objective.value, batch_size=batch_size, micro_batches=micro_batches,
            learning_rate=lr, warmup_steps=warmup_steps, schedule=schedule.value, beta2=beta2,
            weight_decay=weight_decay, ema_decay=ema_decay, grad_clip=grad_clip, dtype=dtype.value,
            moments=moments.value, ema_dtype=ema_dtype.value, ema_device=ema_device.value, ema_every=ema_every,
            recompute_blocks=recompute_blocks, cuda_graph=cuda_graph, flip=flip, seed=seed,
        )  # fmt: skip
        shape = dict(
            patch_size=patch_size, hidden_size=hidden_size, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio,
            num_experts=num_experts, top_k=top_k, num_shared_experts=num_shared_experts, balance_alpha=balance_alpha,
            class_dropout_prob=class_dropout,
        )  # fmt: skip
        target = resolve_device(local_device(device))
        with joined_ranks(target):
            parallel = _parallel(data_parallel, expert_parallel)
            console = Console(quiet=dist.is_initialized() and dist.get_rank() > 0)
            folder = RunFolder(out, keep=keep, asynchronous=async_save)
            if folder.checkpoints.latest() is not None and not resume:
                raise ValueError(f"{out} holds a run: pass --resume to go on with it, or another --out")
            images = _load(console, data, image_size, grey, shape, preset)
            model = _model(_config(images, shape, preset, objective), seed, parallel)
            trainer = Trainer(model, images, settings, target, parallel)
            grids = None
            if sample_every:
                codec = codec_for(trainer.model, vae, target)
                grids = GridSampler(
                    out / "samples", sample_classes, sample_images, steps=sample_steps,
                    cfg_scale=sample_cfg if trainer.config.class_dropout_prob else 1.0, codec=codec, seed=seed,
                )  # fmt: skip
            plan = RunPlan(
                console, backend, log_every, save_every, resume, tensorboard,
                None if peak_tflops is None else peak_tflops * 1e12, grids, sample_every,
            )  # fmt: skip
            introduce(console, trainer)
            train_to_the_end(trainer, folder, plan)


def _parallel(data_parallel: options.DataParallel | None, expert_parallel: int) -> ParallelConfig:
    """DDP where torchrun started several processes and nothing else is asked for."""
    if data_parallel is not None:
        return ParallelConfig(data_parallel.value, expert_parallel)
    many = dist.is_initialized() and dist.get_world_size() > 1
    return ParallelConfig("ddp" if many else "none", expert_parallel)


def _model(config: DiTConfig, seed: int, parallel: ParallelConfig) -> DiT:
    torch.manual_seed(seed)
    if parallel.data_parallel == "fsdp" or parallel.expert_parallel > 1:
        # A model too large for one device need not lie there whole, and the host would draw for minutes.
        with torch.device("meta"):
            return DiT(config)
    return DiT(config)


def _load(
    console: Console, source: str, image_size: int | None, grey: bool, shape: dict[str, Any], preset: str | None
) -> ImageDataset | CachedDataset:
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


def _config(
    images: ImageDataset | CachedDataset, shape: dict[str, Any], preset: str | None, objective: options.TrainObjective
) -> DiTConfig:
    pixels = dict(input_size=images.image_size, in_channels=images.channels, num_classes=images.num_classes)
    learn_sigma = objective is options.TrainObjective.ddpm
    return DiTConfig.from_dict({**_shape(shape, preset), **pixels, "learn_sigma": learn_sigma})
