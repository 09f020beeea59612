"""Train what one of several ranks holds of a model, and count its bytes: `python -m benchmarks.rank_share --help`.

A share of a model's blocks stands for a rank's part of the whole, so that one GPU answers whether the states of, say,
DiT-MoE-G/2-16E2A fit two, and what a step and an update of averages in the host's memory take there. What ranks send
each other is left out: figures of a step are bounds from below.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dit_moe import DiTConfig, model_config
from dit_moe.parallel import ParallelConfig
from dit_moe.training import TrainingSettings

from . import env
from .results import collect
from .trainers import device_bytes, new_trainer, say, train_measured


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; prints and writes one JSON object."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    result = {
        "preset": options.preset,
        "ranks": options.ranks,
        "parallel": options.parallel,
        "environment": env.describe(given, options.device, "rank_share"),
    }
    with _process_group(options.parallel, device):
        collect(result, _runs(options, device), options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="DiT-MoE-G/2-16E2A", help="name in dit_moe.DiT_models")
    parser.add_argument("--ranks", type=int, default=2, help="train 1/RANKS of the preset's blocks")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32], help="images of a step; a run for each")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--parallel", choices=("none", "fsdp"), default="fsdp", help="fsdp is over this one rank")
    parser.add_argument("--moments", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--ema-device", choices=("model", "cpu"), default="cpu", help="where averages lie")
    parser.add_argument("--ema-dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--ema-every", type=int, default=2, help="steps between updates of the averages")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="narrow blocks and small images, for a smoke run")
    parser.add_argument("--out", type=Path, default=None, help="JSON file of the results")
    return parser


def _runs(options: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    for batch in options.batch:
        yield _run(batch, options, device)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _run(batch: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    try:
        return measure(batch, options, device)
    except torch.OutOfMemoryError as error:
        say(f"batch {batch}: out of memory")
        return {"batch": batch, "out_of_memory": str(error).partition("\n")[0], "device": device_bytes(device)}


def measure(batch: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Bytes and seconds of training with one batch size."""
    config = share_of(options.preset, options.ranks, options.tiny)
    settings = TrainingSettings(
        steps=options.steps,
        batch_size=batch,
        warmup_steps=options.steps,
        dtype="bf16-stochastic",
        moments=options.moments,
        ema_device=options.ema_device,
        ema_dtype=options.ema_dtype,
        ema_every=options.ema_every,
        recompute_blocks=config.depth,
        cuda_graph=False,
    )
    trainer, made = new_trainer(config, settings, device, ParallelConfig(options.parallel))
    say(f"batch {batch}: {config.depth} blocks, trainer made in {made:.1f} s")
    measured = train_measured(trainer)
    return {
        "batch": batch,
        "blocks": config.depth,
        **measured,
        "made_seconds": made,
        "settings": settings.to_dict(),
    }


def share_of(preset: str, ranks: int, tiny: bool = False) -> DiTConfig:
    """The preset with 1/ranks of its blocks, or a narrow one with two.

    Raises:
        ValueError: the blocks cannot be shared so.
    """
    config = model_config(preset)
    if ranks < 1 or config.depth % ranks:
        raise ValueError(f"ranks: got {ranks}, expected a divisor of the {config.depth} blocks of {preset}")
    config = replace(config, depth=config.depth // ranks)
    if not tiny:
        return config
    return replace(config, depth=2, hidden_size=32, num_heads=2, input_size=8, num_experts=4, num_classes=10)


@contextmanager
def _process_group(parallel: str, device: torch.device) -> Iterator[None]:
    """A group of this process alone, where the model is to be spread over it."""
    if parallel == "none":
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


if __name__ == "__main__":
    raise SystemExit(main())
