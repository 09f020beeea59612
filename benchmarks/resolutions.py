"""Time one forward at 256 and at 512 pixels per operation: `python -m benchmarks.resolutions --help`.

Both sizes have the same weights and batch, run as CUDA graphs on a GPU, and take turns, since the clock of a GPU at its
power limit drifts by more than they differ.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dit_moe import DiT
from dit_moe.flops import flops

from . import env
from .cases import TINY_CASE
from .models import fresh_model, moe_config, random_forward
from .results import collect
from .suites.base import DTYPES
from .timing import Timed, TimingOptions, make_clock, summarize, time_round_robin

PIXELS = (256, 512)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; prints and writes one JSON object."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    result = {"environment": env.describe(given, options.device, "resolutions")}
    collect(result, (run for case in options.case for run in measure(case, options)), options.out)
    return 0


def _parser() -> argparse.ArgumentParser:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="+", default=["XL/2-8E2A" if on_gpu else TINY_CASE], help="of 256 pixels")
    parser.add_argument("--batch", nargs="+", type=int, default=[16, 64] if on_gpu else [2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_gpu else "fp32")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if on_gpu else "cpu")
    parser.add_argument("--out", type=Path, default=None, help="JSON file of the results")
    return parser


def measure(case: str, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """For each batch size the milliseconds and TFLOP/s of both sizes, and the large one's rate by the small one's."""
    models = _models(case, options.device, DTYPES[options.dtype])
    clock = make_clock(options.device)
    clock.warm_up(2000 if options.device == "cuda" else 0)
    for batch in options.batch:
        clock.start_task()
        generator = torch.Generator(options.device).manual_seed(0)
        forwards = [random_forward(model, batch, clock, generator) for model in models]
        entries = [Timed([forward], 1) for forward in forwards]
        time_round_robin(clock, entries, TimingOptions(rounds=options.rounds))
        run: dict[str, Any] = {"case": case, "batch": batch, "dtype": options.dtype}
        rates = []
        for pixels, model, entry in zip(PIXELS, models, entries, strict=True):
            if entry.failure is not None:
                raise entry.failure
            sample = summarize(entry.times_ms)
            rates.append(batch * flops(model.config) / sample.median_ms / 1e9)
            run[f"{pixels}_pixels"] = {**asdict(sample), "tflops": rates[-1]}
        yield {**run, "rate_512_by_256": rates[1] / rates[0]}


def _models(case: str, device: str, dtype: torch.dtype) -> list[DiT]:
    """Of both sizes, in eval mode; the large one has the small one's parameters, but for the positions."""
    small_config, large_config = (moe_config(f"{case}@{pixels}") for pixels in PIXELS)
    small = fresh_model(small_config, device, dtype).eval()
    with torch.device("meta"):
        large = DiT(large_config).eval()
    positions = torch.empty(large.pos_embed.shape, device=device, dtype=dtype)
    large.load_state_dict({**small.state_dict(), "pos_embed": positions}, assign=True)
    large.reset_pos_embed()
    return [small, large]


if __name__ == "__main__":
    sys.exit(main())
