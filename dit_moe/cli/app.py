"""The typer application that joins the commands."""

from __future__ import annotations

from typing import Annotated

import typer

from .analyze import analyze
from .cache import cache
from .common import SHOW_TRACEBACKS
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .info import info
from .plan import plan
from .sample import sample
from .train import train
from .upcycle import upcycle

app = typer.Typer(
    help="DiT-MoE: diffusion transformers with a mixture of experts.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def common_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show an error's traceback instead of one line.")] = False,
) -> None:
    """Options before the command's name."""
    SHOW_TRACEBACKS.set(debug)


for command in (demo, info, plan, cache, train, sample, evaluate, analyze, convert, upcycle):
    app.command()(command)
