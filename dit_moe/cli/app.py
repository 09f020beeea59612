"""The typer application that joins the commands."""

from __future__ import annotations

import typer

from .analyze import analyze
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
for command in (demo, info, plan, train, sample, evaluate, analyze, convert, upcycle):
    app.command()(command)
