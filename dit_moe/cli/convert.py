"""`dit-moe convert`: official checkpoints to our native format and back."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..checkpoint import load_checkpoint, save_model, save_official
from ..model import DiT
from .common import HeadsOption, reported_errors


class Format(str, Enum):
    """The key layout of a written file."""

    native = "native"
    official = "official"


class Dtype(str, Enum):
    """The dtypes that a file may be written in."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


SourceArgument = Annotated[Path, typer.Argument(help="Checkpoint: .pt, .pth or .safetensors, official or native.")]
TargetArgument = Annotated[Path, typer.Argument(help="File to write; official files may end in .pt or .safetensors.")]
FormatOption = Annotated[Format, typer.Option("--to", help="Key layout of the file to write.")]
DtypeOption = Annotated[Dtype | None, typer.Option(help="Dtype of the weights; by default as in the source.")]
ForceOption = Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")]
VerifyOption = Annotated[bool, typer.Option(help="Check the checksums of a .pt source, which reads it once more.")]


def convert(
    source: SourceArgument,
    target: TargetArgument,
    to: FormatOption = Format.native,
    dtype: DtypeOption = None,
    num_heads: HeadsOption = None,
    top_k: Annotated[int | None, typer.Option(help="Experts per token, which official files do not tell.")] = None,
    verify: VerifyOption = True,
    force: ForceOption = False,
) -> None:
    """Convert a checkpoint: official DiT-MoE, Meta's dense DiT or native, to native or official keys."""
    with reported_errors():
        check_target(source, target, force)
        start = time.perf_counter()
        model = load_checkpoint(source, num_heads, dtype=torch_dtype(dtype), top_k=top_k, verify=verify)
        write(model, target, to)
        report(model, target, to, time.perf_counter() - start)


def check_target(source: Path, target: Path, force: bool) -> None:
    """Refuse to write over a file that was not named for it.

    Raises:
        ValueError: the target exists without `force`, or is the source.
    """
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"{target} is the source: write to another file")
    if target.exists() and not force:
        raise ValueError(f"{target} exists: pass --force to overwrite it")
    if not target.parent.is_dir():
        raise ValueError(f"{target.parent} is no folder")


def torch_dtype(dtype: Dtype | None) -> torch.dtype | None:
    """The torch dtype of a command-line choice."""
    return None if dtype is None else getattr(torch, dtype.value)


def write(model: DiT, target: Path, to: Format) -> None:
    """Write the model in the chosen layout."""
    if to is Format.official:
        save_official(model, target)
    else:
        save_model(model, target)


def report(model: DiT, target: Path, to: Format, seconds: float) -> None:
    """Print what was written."""
    config = model.config
    experts = f"{config.num_experts} experts, top {config.top_k}" if config.is_moe else "dense"
    table = Table(show_header=False, title=Text(str(target)))
    dtypes = ", ".join(sorted({str(param.dtype).removeprefix("torch.") for param in model.parameters()}))
    rows = {
        "layout": to.value,
        "model": f"{config.depth} blocks, width {config.hidden_size}, {config.num_heads} heads, {experts}",
        "parameters": f"{sum(param.numel() for param in model.parameters()):,}",
        "dtype": dtypes,
        "size": f"{target.stat().st_size / 2**20:,.1f} MiB",
        "time": f"{seconds:.1f} s",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
