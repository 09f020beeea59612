"""The options of `dit-moe train`, by what they choose."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from .config_file import take_options_from


class TrainPrecision(str, Enum):
    """Arithmetic of training: fp32, bf16 by autocast, or bf16 weights with fp32 masters or without."""

    fp32 = "fp32"
    bf16 = "bf16"
    bf16_weights = "bf16-weights"
    bf16_stochastic = "bf16-stochastic"


class StateDtype(str, Enum):
    """Dtypes of the optimiser's moments and of the averaged weights."""

    fp32 = "fp32"
    bf16 = "bf16"


class EmaDevice(str, Enum):
    """Where the averaged weights lie."""

    model = "model"
    cpu = "cpu"


class Schedule(str, Enum):
    """Learning rate after the warm-up."""

    constant = "constant"
    cosine = "cosine"


class TrainObjective(str, Enum):
    """What the model learns: rectified flow's velocity, or DDPM's noise and variance."""

    rf = "rf"
    ddpm = "ddpm"


class DataParallel(str, Enum):
    """How the processes of torchrun share the work."""

    none = "none"
    ddp = "ddp"
    fsdp = "fsdp"


_MODEL, _OPTIMISER, _MEMORY, _RUN = "Model", "Optimisation", "Precision and memory", "Run"
_WATCH = "Watching"
Config = Annotated[
    str | None,
    typer.Option(
        help="YAML file, or name of a recipe, with values for these options; the command line wins.",
        callback=take_options_from,
        is_eager=True,
    ),
]
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
ObjectiveOption = Annotated[
    TrainObjective, typer.Option(help="Rectified flow, or DDPM with learned variance.", rich_help_panel=_OPTIMISER)
]
BatchSize = Annotated[int, typer.Option(help="Images per step, over all GPUs.", rich_help_panel=_OPTIMISER)]
LearningRate = Annotated[float, typer.Option(help="Learning rate of AdamW.", rich_help_panel=_OPTIMISER)]
ScheduleOption = Annotated[Schedule, typer.Option(help="Rate after the warm-up.", rich_help_panel=_OPTIMISER)]
Warmup = Annotated[int, typer.Option(help="Steps of linear warm-up.", rich_help_panel=_OPTIMISER)]
WeightDecay = Annotated[float, typer.Option(help="Weight decay of AdamW.", rich_help_panel=_OPTIMISER)]
Beta2 = Annotated[float, typer.Option(help="Second beta of AdamW.", rich_help_panel=_OPTIMISER)]
EmaDecay = Annotated[float, typer.Option(help="Decay of the averaged weights.", rich_help_panel=_OPTIMISER)]
GradClip = Annotated[float, typer.Option(help="Largest norm of the gradient.", rich_help_panel=_OPTIMISER)]
Flip = Annotated[bool, typer.Option("--flip", help="Mirror images at random.", rich_help_panel=_OPTIMISER)]
PrecisionOption = Annotated[
    TrainPrecision,
    typer.Option(
        help="bf16 keeps fp32 weights, bf16-weights fp32 masters, bf16-stochastic neither.", rich_help_panel=_MEMORY
    ),
]
MicroBatches = Annotated[
    int, typer.Option(help="Parts of the batch that run one after the other.", rich_help_panel=_MEMORY)
]
RecomputeBlocks = Annotated[
    int, typer.Option(help="Blocks that run again in the backward pass.", rich_help_panel=_MEMORY)
]
CudaGraph = Annotated[
    bool,
    typer.Option(
        "--cuda-graph/--no-cuda-graph",
        help="Run forward and backward as one CUDA graph, where one process trains on a GPU.",
        rich_help_panel=_MEMORY,
    ),
]
Moments = Annotated[StateDtype, typer.Option(help="Dtype of AdamW's moments.", rich_help_panel=_MEMORY)]
EmaDtype = Annotated[StateDtype, typer.Option(help="Dtype of the averaged weights.", rich_help_panel=_MEMORY)]
EmaDeviceOption = Annotated[
    EmaDevice, typer.Option(help="cpu keeps the averaged weights in the host's memory.", rich_help_panel=_MEMORY)
]
EmaEvery = Annotated[int, typer.Option(help="Steps between updates of the average.", rich_help_panel=_MEMORY)]
DataParallelOption = Annotated[
    DataParallel | None,
    typer.Option(help="Under torchrun: whole models (ddp) or parts (fsdp) on each GPU [ddp].", rich_help_panel=_RUN),
]
ExpertParallel = Annotated[int, typer.Option(help="GPUs that share one set of experts.", rich_help_panel=_RUN)]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", rich_help_panel=_RUN)]
LogEvery = Annotated[int, typer.Option(min=1, help="Steps between reports.", rich_help_panel=_RUN)]
SaveEvery = Annotated[int, typer.Option(min=1, help="Steps between saves.", rich_help_panel=_RUN)]
Keep = Annotated[int, typer.Option(min=1, help="Checkpoints that stay.", rich_help_panel=_RUN)]
AsyncSave = Annotated[
    bool, typer.Option("--async-save", help="Write checkpoints while training goes on.", rich_help_panel=_RUN)
]
TensorBoard = Annotated[
    bool, typer.Option("--tensorboard", help="Log to tensorboard/ in --out; needs the package.", rich_help_panel=_WATCH)
]
PeakTflops = Annotated[
    float | None, typer.Option(help="Peak of one GPU, for the utilisation [known for some].", rich_help_panel=_WATCH)
]
SampleEvery = Annotated[
    int, typer.Option(min=0, help="Steps between grids of samples in samples/; 0 is none.", rich_help_panel=_WATCH)
]
SampleClasses = Annotated[int, typer.Option(min=1, help="Classes in a grid, one row each.", rich_help_panel=_WATCH)]
SampleImages = Annotated[int, typer.Option(min=1, help="Images of each class.", rich_help_panel=_WATCH)]
SampleSteps = Annotated[int, typer.Option(min=1, help="Sampling steps.", rich_help_panel=_WATCH)]
SampleCfg = Annotated[float, typer.Option(help="Guidance of the samples; 1 is none.", rich_help_panel=_WATCH)]
SampleVae = Annotated[
    Path | None,
    typer.Option(help="Folder of an AutoencoderKL in diffusers' format, for grids of latents.", rich_help_panel=_WATCH),
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.", rich_help_panel=_RUN)]
