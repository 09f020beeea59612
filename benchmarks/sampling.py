"""Time whole guided trajectories of the sampling engine beside single forwards: `python -m benchmarks.sampling --help`.

A trajectory of N steps with guidance runs N forwards at twice its batch, so its time over N times that of such a
forward, captured in a CUDA graph and taken in turns with it, says what the engine adds. Without the autoencoder.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_moe import sample_rectified_flow
from dit_moe.engine import SamplingEngine

from . import env
from .cases import TINY_CASE
from .models import fresh_model, moe_config, random_forward
from .results import collect
from .suites.base import DTYPES
from .timing import make_clock
from .trainers import timed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; prints and writes one JSON object."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    result = {"environment": env.describe(given, options.device, "sampling")}
    collect(result, (measure(case, options) for case in options.case), options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--case", nargs="+", default=["XL/2-8E2A" if on_gpu else TINY_CASE], help="as in benchmarks.run"
    )
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_gpu else "fp32")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="JSON file of the results")
    return parser


@torch.no_grad()
def measure(case: str, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of a trajectory and of a forward, their ratio, memory, and whether two trajectories are the same bits."""
    device = options.device
    model = fresh_model(moe_config(case), device, DTYPES[options.dtype]).eval()
    generator = torch.Generator(device).manual_seed(0)
    config = model.config
    shape = (options.images, config.in_channels, config.input_size, config.input_size)
    noise = torch.randn(shape, device=device, generator=generator)
    class_ids = torch.arange(options.images, device=device) % config.num_classes
    engine = SamplingEngine(model, enabled=device == "cuda")

    def trajectory() -> Tensor:
        return sample_rectified_flow(engine, noise, class_ids, steps=options.steps, cfg_scale=4.0)

    results: list[Tensor] = []
    first_seconds, _ = (timed(lambda: results.append(trajectory()), torch.device(device)) for _ in range(2))
    clock = make_clock(device)
    forward = random_forward(model, 2 * options.images, clock, generator)
    clock.warm_up(2000 if device == "cuda" else 0)
    trajectories, forwards = [], []
    for _ in range(options.rounds):
        trajectories.append(timed(trajectory, torch.device(device)))
        forwards.append(clock.time_ms([forward], options.steps) / 1e3)
    sampled, single = statistics.median(trajectories), statistics.median(forwards)
    return {
        "case": case,
        "images": options.images,
        "steps": options.steps,
        "dtype": options.dtype,
        "mode": engine.mode,
        "first_seconds": first_seconds,
        "seconds": trajectories,
        "median_seconds": sampled,
        "forward_seconds": forwards,
        "median_forward_seconds": single,
        "ratio_to_forwards": sampled / (options.steps * single),
        "repeats_bit_for_bit": torch.equal(*results),
        "finite": bool(results[0].isfinite().all()),
        "peak_reserved_bytes": torch.cuda.max_memory_reserved() if device == "cuda" else None,
    }


if __name__ == "__main__":
    sys.exit(main())
