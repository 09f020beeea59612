"""`dit-moe upcycle`: a DiT-MoE with more experts from an existing checkpoint."""

from __future__ import annotations

import time
from typing import Annotated

import typer
from rich.console import Console

from ..checkpoint import load_checkpoint
from ..upcycle import upcycle as upcycled
from .common import HeadsOption, reported_errors
from .convert import (
    DtypeOption,
    ForceOption,
    Format,
    FormatOption,
    SourceArgument,
    TargetArgument,
    VerifyOption,
    check_target,
    report,
    torch_dtype,
    write,
)


def upcycle(
    source: SourceArgument,
    target: TargetArgument,
    num_experts: Annotated[int, typer.Option(help="Experts per block of the new model.")],
    top_k: Annotated[int | None, typer.Option(help="Experts per token of the new model.")] = None,
    num_shared_experts: Annotated[
        int | None, typer.Option(help="Width of the shared expert in model widths; by default the source's.")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Equal the source at step 0, or fail.")] = False,
    noise_std: Annotated[float, typer.Option(help="Noise on the copies, relative to their weights.")] = 0.0,
    router_init_std: Annotated[
        float | None, typer.Option(help="Noise on the router; by default 0.02, and 0 with --exact.")
    ] = None,
    rescale: Annotated[bool, typer.Option(help="Scale w2 to make up for smaller routing weights.")] = True,
    seed: Annotated[int, typer.Option(help="Seed of all noise.")] = 0,
    to: FormatOption = Format.native,
    dtype: DtypeOption = None,
    num_heads: HeadsOption = None,
    verify: VerifyOption = True,
    force: ForceOption = False,
) -> None:
    """Start a DiT-MoE from a dense DiT or from a DiT-MoE with fewer experts."""
    with reported_errors():
        check_target(source, target, force)
        start = time.perf_counter()
        model = load_checkpoint(source, num_heads, dtype=torch_dtype(dtype), verify=verify)
        bigger = upcycled(
            model,
            num_experts,
            top_k=top_k,
            num_shared_experts=num_shared_experts,
            exact=exact,
            noise_std=noise_std,
            router_init_std=router_init_std,
            rescale=rescale,
            seed=seed,
        )
        write(bigger, target, to)
        report(bigger, target, to, time.perf_counter() - start)
        if to is Format.official and bigger.config.top_k != 2:
            _note(f"official keys do not tell top_k: load this file with top_k={bigger.config.top_k}")
        if exact and model.config.is_moe and not noise_std:
            _note("copies that are always chosen together never part in training without noise: see --noise-std")
        if not model.config.is_moe and not exact:
            _note("a GELU MLP does not fit SwiGLU experts: the new model's output is not the source's, see --exact")
        if bigger.config.shared_expert != "swiglu":
            _note("the shared expert is the source's GELU MLP: this model has no official layout")


def _note(text: str) -> None:
    Console().print(f"note: {text}", style="yellow", highlight=False)
