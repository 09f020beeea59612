"""What several commands share: options, devices, errors in one line, and which backend ran."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import typer
from dit_moe_kernels import BackendUnavailableError, use_backend
from rich.console import Console
from rich.text import Text

from ..data import DataUnavailableError
from ..metrics import MetricsUnavailableError
from ..model import DiT
from ..training import TrainingDivergedError
from ..vae import LatentCodec, load_codec

USER_ERRORS = (
    ValueError,
    TypeError,
    OSError,
    ImportError,
    BackendUnavailableError,
    DataUnavailableError,
    MetricsUnavailableError,
    TrainingDivergedError,
    torch.OutOfMemoryError,
)
"""Errors that come from input, installation or machine: their message is what the user needs."""

SHOW_TRACEBACKS: ContextVar[bool] = ContextVar("SHOW_TRACEBACKS", default=False)
"""What `dit-moe --debug` sets."""


class Backend(str, Enum):
    """Implementations of the kernels."""

    auto = "auto"
    triton = "triton"
    cuda = "cuda"
    reference = "reference"


class Precision(str, Enum):
    """Arithmetic of a command."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The same as a torch dtype."""
        return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.value]


class Sampler(str, Enum):
    """Samplers: rectified flow, ancestral DDPM, DDIM."""

    rf = "rf"
    ddpm = "ddpm"
    ddim = "ddim"


DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N; auto takes a GPU where there is one.")]
BackendOption = Annotated[Backend, typer.Option(help="Implementation of the kernels.")]
CheckpointOption = Annotated[Path, typer.Option("--ckpt", help="Native or official checkpoint.")]
HeadsOption = Annotated[int | None, typer.Option(help="Attention heads, where neither keys nor a preset tell them.")]
StepsOption = Annotated[
    str | None,
    typer.Option(
        help="Sampling steps, by default 50, for ddpm 250; ddpm and ddim also take a respacing such as 10,20."
    ),
]
VaeOption = Annotated[Path | None, typer.Option(help="Folder of an AutoencoderKL in diffusers' format, for latents.")]


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """Print what the user can mend as one line on stderr and leave with status 1; with --debug let it through."""
    try:
        yield
    except USER_ERRORS as error:
        if SHOW_TRACEBACKS.get():
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
        raise typer.Exit(1) from None


def resolve_device(name: str) -> torch.device:
    """The device of a command-line choice.

    Raises:
        ValueError: no such device, or torch sees no GPU.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: got {name!r}, expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device: got {name!r}, but torch {torch.__version__} sees no GPU")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ValueError(f"device: got {name!r}, expected an index below {torch.cuda.device_count()}")
    return device


def local_device(name: str) -> str:
    """Under torchrun, "auto" and "cuda" mean this rank's own GPU."""
    local_rank = os.environ.get("LOCAL_RANK")
    if local_rank is None or name not in ("auto", "cuda") or not torch.cuda.is_available():
        return name
    return f"cuda:{local_rank}"


def default_steps(sampler: Sampler, text: str | None) -> int | str:
    """Sampling steps of a command line: a number, a respacing text as it is, or the sampler's default."""
    if text is None:
        return 250 if sampler is Sampler.ddpm else 50
    return int(text) if text.strip().lstrip("+-").isdecimal() else text


def codec_for(model: DiT, vae: Path | None, device: torch.device) -> LatentCodec | None:
    """The autoencoder for a model's latents; None for a model of pixels.

    Raises:
        ValueError: the model makes latents and no autoencoder is given.
        FileNotFoundError, ImportError: as in `load_codec`.
    """
    if vae is not None:
        return load_codec(vae, device)
    channels = model.config.in_channels
    if channels not in (1, 3):
        raise ValueError(
            f"this model makes latents of {channels} channels, not pixels: pass --vae FOLDER to decode them"
        )
    return None


def describe_device(device: torch.device) -> str:
    """Such as "cpu, 2 threads" or "NVIDIA H100 80GB HBM3"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads"


class BackendChoices(logging.Handler):
    """Collects which backend `auto` chose for each op family, and why, from the library's log.

    Args:
        backend: the backend asked for.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__(logging.INFO)
        self.backend = backend
        self.families: dict[tuple[str, ...], list[str]] = {}

    def emit(self, record: logging.LogRecord) -> None:
        if isinstance(record.args, tuple) and len(record.args) == 5:
            family, *choice = map(str, record.args)  # family, device, dtype, backend, why
            self.families.setdefault(tuple(choice), []).append(family)

    def lines(self) -> list[str]:
        """What ran, one line for all families of the same choice."""
        if self.backend is not Backend.auto:
            return [f"backend: {self.backend.value}, as asked"]
        return [
            f"backend: {backend} on {device} in {dtype.removeprefix('torch.')} for {', '.join(families)} ({why})"
            for (device, dtype, backend, why), families in self.families.items()
        ]


@contextlib.contextmanager
def chosen_backend(backend: Backend) -> Iterator[BackendChoices]:
    """Use a backend inside the block, and collect what `auto` chooses there."""
    logger = logging.getLogger("dit_moe_kernels")
    handler, level, propagate = BackendChoices(backend), logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        with use_backend(backend.value):
            yield handler
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagate


def print_choices(console: Console, choices: BackendChoices) -> None:
    """Say which backend ran."""
    for line in choices.lines():
        console.print(Text(line, style="cyan"), soft_wrap=True)
