"""`dit-moe plan`: what training a model on many GPUs takes, from formulas."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ..parallel import ParallelConfig
from ..parallel.plan import Machine, StateBytes, memory, rows_bytes, step_seconds, traffic
from ..presets import model_config
from .common import reported_errors


def plan(
    preset: Annotated[str, typer.Argument(help="A model, such as DiT-MoE-XL/2-8E2A.")],
    ranks: Annotated[int, typer.Option(min=1, help="GPUs in all.")],
    data_parallel: Annotated[str, typer.Option(help="none, ddp or fsdp.")] = "fsdp",
    expert_parallel: Annotated[int, typer.Option(min=1, help="GPUs that share one set of experts.")] = 1,
    images: Annotated[int, typer.Option(min=1, help="Images per GPU and step.")] = 32,
    recompute: Annotated[bool, typer.Option(help="Run blocks again in the backward pass.")] = False,
    keep_gathered: Annotated[bool, typer.Option(help="Keep gathered weights for the backward pass.")] = False,
    weights: Annotated[
        int, typer.Option(min=2, help="Bytes of weights and masters per parameter.")
    ] = StateBytes.weights,
    gradients: Annotated[int, typer.Option(min=2, help="Bytes of gradients per parameter.")] = StateBytes.gradients,
    moments: Annotated[int, typer.Option(min=0, help="Bytes of AdamW's moments per parameter.")] = StateBytes.moments,
    averages: Annotated[int, typer.Option(min=0, help="Bytes of the averages per parameter.")] = StateBytes.averages,
    gpus_per_host: Annotated[int, typer.Option(min=1, help="GPUs on fast links.")] = Machine.gpus_per_host,
    flops: Annotated[float, typer.Option(help="Assumed operations per second.")] = Machine.flops,
    host_bandwidth: Annotated[float, typer.Option(help="Assumed bytes per second in a host.")] = Machine.host_bandwidth,
    network_bandwidth: Annotated[
        float, typer.Option(help="Assumed bytes per second between hosts.")
    ] = Machine.network_bandwidth,
) -> None:
    """Memory and traffic of each GPU and lower bounds of a step's time, by formulas and assumed rates."""
    console = Console()
    with reported_errors():
        config = model_config(preset)
        parallel = ParallelConfig(data_parallel, expert_parallel, reshard_after_forward=not keep_gathered)
        state = StateBytes(weights, gradients, moments, averages)
        machine = Machine(gpus_per_host, flops, host_bandwidth, network_bandwidth)
        held = memory(config, parallel, ranks, images, state)
        sent = traffic(config, parallel, ranks, images, recompute=recompute, state=state)
        seconds = step_seconds(config, parallel, ranks, images, recompute=recompute, state=state, machine=machine)
        layer = rows_bytes(config, parallel, images)
    gib = 2**30
    _print(console, "GiB on each GPU", {**_scaled(vars(held), 1 / gib), "total, without activations": held.total / gib})
    _print(console, "GB that each GPU sends in a step", _scaled(vars(sent), 1e-9))
    if layer:
        _print(console, "MB that each GPU sends in one all-to-all of one layer", {"rows": layer / 1e6})
    _print(console, "Milliseconds at least, from the assumed rates", _scaled(seconds, 1e3))


def _scaled(values: dict[str, float], factor: float) -> dict[str, float]:
    return {name.replace("_", " "): value * factor for name, value in values.items()}


def _print(console: Console, title: str, values: dict[str, float]) -> None:
    table = Table(title=title, title_justify="left", show_header=False)
    for name, value in values.items():
        table.add_row(name, f"{value:.2f}")
    console.print(table)
