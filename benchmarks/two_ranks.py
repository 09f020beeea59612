"""Measure training on two GPUs of one host against one: `python -m benchmarks.two_ranks --help`.

Each part runs in processes of its own with a time limit; what failed is written with its reason, and what was found
before that is kept. The results are written to DIR/two_ranks.json after each start of processes.

compare     50 steps of a small model: losses, balance losses and gradient norms of DDP, FSDP2, experts over two ranks
            and both, against one rank; in bf16 beside the spread of one rank whose batches are shuffled
step_time   a whole step of XL/2-8E2A, one GPU with its CUDA graph against experts over two, at the same global batch
xl          XL/2-8E2A with fp32 weights, moments and averages on two ranks: bytes, losses, seconds
g           G/2-16E2A in 8 bytes a parameter on two ranks: bytes, losses, seconds
resume      a run stopped at a checkpoint and taken up again, compared bit for bit, and by one rank
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from dit_moe.parallel import ParallelConfig, plan

from . import env, rank_exact, rank_speed
from .ranks import RanksFailedError, Scenario, read_notes, run_on_ranks
from .trainers import say

_ALLOCATOR = "PYTORCH_CUDA_ALLOC_CONF"
_BOTH = ParallelConfig("fsdp", 2)
# Seconds after which a start of processes is ended.
_LIMITS = {
    "compare": {"one": 120, "two": 150},
    "step_time": {"one": 150, "two": 150},
    "xl": {"two": 90},
    "g": {"two": 200},
    "resume": {"two": 90, "one": 60},
}
_REASON_CHARACTERS = 6000


class Bench:
    """Starts processes for the parts and keeps what they found.

    Args:
        options: of the command line.
        given: the command line.
        work: folder of the starts.
    """

    def __init__(self, options: argparse.Namespace, given: Sequence[str], work: Path) -> None:
        self.options, self._given, self._work = options, list(given), work
        self._end = time.monotonic() + options.budget
        self.results: dict[str, Any] = {"environment": self._environment("cpu"), "parts": {}}

    def start(self, part: str, name: str, num_ranks: int, scenario: Scenario) -> dict[str, Any]:
        """Run a scenario in new processes; the notes of the first rank."""
        found: dict[str, Any] = {}
        self.results["parts"].setdefault(part, {})[name] = found
        left = self._end - time.monotonic()
        limit = min(_LIMITS[part][name], left)
        if left < 5:
            found["failed"] = f"not started: the {self.options.budget} s of this command are used up"
            self.write()
            return {}
        folder = self._work / part / name
        folder.mkdir(parents=True)
        say(f"{part}, {name}: at most {limit:.0f} s")
        start = time.monotonic()
        try:
            run_on_ranks(num_ranks, [scenario], folder, limit, self.options.device, group=num_ranks > 1)
        except RanksFailedError as error:
            found["failed"] = str(error)[-_REASON_CHARACTERS:]
            say(f"{part}, {name}: failed: {found['failed']}")
        found["seconds"] = time.monotonic() - start
        found["ranks"] = [read_notes(folder, rank) for rank in range(num_ranks)]
        say(f"{part}, {name}: {found['seconds']:.1f} s")
        self.write()
        return found["ranks"][0]

    def judge(self, part: str, judgement: dict[str, Any]) -> None:
        """Keep and tell a part's conclusions."""
        self.results["parts"][part]["judgement"] = judgement
        say(f"{part}: {json.dumps(judgement, indent=1)}")
        self.write()

    def finish(self) -> None:
        """Describe the GPUs too, which takes some of their memory."""
        self.results["environment"] = self._environment(self.options.device)
        self.write()

    def write(self) -> None:
        """Write all that is known."""
        self.options.out.mkdir(parents=True, exist_ok=True)
        (self.options.out / "two_ranks.json").write_text(json.dumps(self.results, indent=1) + "\n")

    def _environment(self, device: str) -> dict[str, Any]:
        topology = _topology() if self.options.device == "cuda" else None
        return {**env.describe(self._given, device, "two_ranks"), "topology": topology}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 1 if something failed."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    os.environ.setdefault(_ALLOCATOR, "expandable_segments:True")
    with tempfile.TemporaryDirectory() as work:
        bench = Bench(options, given, Path(work))
        for part in options.parts:
            PARTS[part](bench)
        bench.finish()
    steps = [step for part in bench.results["parts"].values() for step in part.values()]
    return int(any("failed" in step for step in steps))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="in this order")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--batch", type=int, nargs="+", default=[128, 64, 256], help="global batches of step_time")
    parser.add_argument(
        "--router", choices=("even", "initial"), default="even",
        help="of step_time: as training makes them, or new ones, which send nearly all tokens to the same experts",
    )  # fmt: skip
    parser.add_argument("--budget", type=float, default=560.0, help="seconds for everything; what is left is skipped")
    parser.add_argument("--tiny", action="store_true", help="narrow models, for a smoke run")
    return parser


def compare(bench: Bench) -> None:
    """Fp32 within 1e-5 of one rank; bf16 within the spread of one rank."""
    tiny = bench.options.tiny
    one = bench.start("compare", "one", 1, partial(rank_exact.alone, tiny=tiny))
    two = bench.start("compare", "two", 2, partial(rank_exact.spread, tiny=tiny))
    bench.results["parts"]["compare"]["two"].pop("ranks", None)  # the second rank's are the same
    bench.results["parts"]["compare"]["two"]["figures"] = two
    bench.judge("compare", rank_exact.judge(one, two))


def step_time(bench: Bench) -> None:
    """At most 0.6 of one rank's time, each side with as few recomputed blocks as its memory asks for."""
    tiny, batches, even = bench.options.tiny, bench.options.batch, bench.options.router == "even"
    alone = partial(rank_speed.step_alone, batches=batches, tiny=tiny, even=even)
    one = bench.start("step_time", "one", 1, alone)
    settings = rank_speed.spread_settings(one, batches, even)
    if settings:
        two = bench.start("step_time", "two", 2, partial(rank_speed.step_spread, settings=settings, tiny=tiny))
        bench.judge("step_time", rank_speed.judge(one, two))


def xl(bench: Bench) -> None:
    """With moments and averages in fp32, as one 80 GB GPU cannot hold them."""
    options = {"steps": 6, "batch_size": 4 if bench.options.tiny else 32, "dtype": "bf16", "warmup_steps": 6}
    _states(bench, "xl", "DiT-MoE-XL/2-8E2A", options, plan.StateBytes())


def g(bench: Bench) -> None:
    """As docs/parallel.md says; one update of the averages."""
    options = {
        "steps": 5, "batch_size": 4 if bench.options.tiny else 32, "dtype": "bf16-stochastic", "moments": "bf16",
        "ema_device": "cpu", "ema_dtype": "bf16", "ema_every": 3, "warmup_steps": 5, "recompute": True,
    }  # fmt: skip
    state = plan.StateBytes(weights=2, gradients=2, moments=4, averages=0)
    _states(bench, "g", "DiT-MoE-G/2-16E2A", options, state)


def _states(bench: Bench, part: str, name: str, options: dict[str, Any], state: plan.StateBytes) -> None:
    tiny = bench.options.tiny
    scenario = partial(rank_speed.states, name=name, parallel=_BOTH, options=options, tiny=tiny)
    seen = bench.start(part, "two", 2, scenario)
    planned = plan.memory(rank_speed.preset(name, tiny), _BOTH, 2, options["batch_size"] // 2, state)
    judgement = {"planned bytes a rank": asdict(planned), "planned sum": planned.total}
    bench.judge(part, {**judgement, "met": seen.get("finite", False)})


def resume(bench: Bench) -> None:
    """The same end, bit for bit."""
    tiny = bench.options.tiny
    two = bench.start("resume", "two", 2, partial(rank_exact.resumed, tiny=tiny))
    one = bench.start("resume", "one", 1, partial(rank_exact.resumed_alone, tiny=tiny)) if two else {}
    bench.judge("resume", rank_exact.judge_resumed(bench.results["parts"]["resume"]["two"].get("ranks", []), one))


def _topology() -> str | None:
    """How the GPUs are linked."""
    try:
        command = ["nvidia-smi", "topo", "-m"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        say(f"nvidia-smi gave no topology ({type(error).__name__})")
        return None


PARTS: dict[str, Callable[[Bench], None]] = {
    "compare": compare, "step_time": step_time, "xl": xl, "g": g, "resume": resume,
}  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
