"""Options that the commands which sample have in common, and what they make of them."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ..checkpoint import load_checkpoint
from ..engine import SamplingEngine
from .common import Precision, Sampler, resolve_device

SamplerOption = Annotated[Sampler, typer.Option(help="rf for models trained with rectified flow.")]
CfgOption = Annotated[float, typer.Option(help="Guidance; 1 is none.")]
SeedOption = Annotated[int, typer.Option(help="Seed of the noise, and of random classes.")]
BatchSizeOption = Annotated[int, typer.Option(min=1, help="Images sampled at once.")]
WeightsDtypeOption = Annotated[Precision, typer.Option(help="Dtype of the weights.")]
GraphsOption = Annotated[bool, typer.Option(help="On a GPU, replay captured steps where the model allows it.")]
CompileOption = Annotated[bool, typer.Option("--compile", help="Run the captured model through torch.compile.")]
IntervalOption = Annotated[
    tuple[float, float],
    typer.Option(metavar="LO HI", help="Guide only where LO < t <= HI; t runs from 1 (noise) to 0."),
]


class CfgSchedule(str, Enum):
    """How guidance grows from noise to image."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


ScheduleOption = Annotated[
    CfgSchedule, typer.Option(help="How guidance grows from noise to image, about the same mean.")
]


def load_engine(
    ckpt: Path, num_heads: int | None, device: str, dtype: Precision, graphs: bool, compile: bool
) -> SamplingEngine:
    """The engine around a checkpoint's model."""
    model = load_checkpoint(ckpt, num_heads, device=resolve_device(device), dtype=dtype.torch_dtype)
    return SamplingEngine(model, enabled=graphs, compile=compile)


def print_mode(console: Console, engine: SamplingEngine) -> None:
    """Say how the steps ran."""
    console.print(Text(f"sampling: {engine.mode}", style="cyan"), soft_wrap=True)
