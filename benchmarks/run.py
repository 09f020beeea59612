"""Command line: measure suites and write tidy CSV, `python -m benchmarks.run --help`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from . import env, results
from .cases import MODES, ROUTINGS, TIMERS
from .isolate import Job, run_here, run_isolated
from .report import table
from .short import short_run
from .suites import SUITES, Choice, Task
from .suites.base import DTYPES
from .timing import TimingOptions, measure_peaks

_ALIASES = {"bwd": "fwd_bwd"}
_SHORT_ROUNDS = 9  # of a run without --suite
_TINY_TIMING = TimingOptions(rounds=3, batch_ms=1.0, min_calls=1, max_calls=2, settle_ms=0.0, warmup_ms=0.0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns 0 if every task was run, whatever became of single providers."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: torch sees no GPU; add --device cpu --tiny for a smoke run", file=sys.stderr)
        return 2
    if device == "cpu" and not options.tiny:
        print("benchmarks: no GPU is used, so this is a smoke run with tiny sizes (--tiny)", file=sys.stderr)
        options.tiny = True
    environment = env.describe(given, device)
    if device == "cuda":
        environment["peaks"] = measure_peaks(options.tiny)
    choice = _choice(options, device)
    plans = [(name, choice) for name in options.suite] if options.suite else short_run(choice)
    for name, chosen in plans:
        tasks = SUITES[name].plan(chosen)
        if tasks:
            _run_suite(name, tasks, options, environment)
        else:
            print(f"benchmarks: nothing to run in suite {name} with these choices", file=sys.stderr)
    if options.plot or not options.suite:
        _draw(options.out)
    return 0


def _draw(out: Path) -> None:
    """Draw the plots, if matplotlib is there."""
    try:
        from .plot import draw_all
    except ModuleNotFoundError as error:
        print(f"benchmarks: no plots, {error}", file=sys.stderr)
        return
    for path in draw_all(out):
        print(f"wrote {path}")


def _run_suite(name: str, tasks: list[Task], options: argparse.Namespace, environment: dict) -> None:
    """Measure one suite, printing and saving after each task, so that an interrupted run keeps what it has."""
    job = Job(tasks, _timing(options), options.keep_failed)
    rows, runs = results.load(options.out, name) if options.append else ([], [])
    for task_rows in run_here(job) if options.in_process else run_isolated(job, options.stall_seconds):
        print(table(task_rows) + "\n", flush=True)
        rows = results.merge(rows, task_rows)
        results.save(options.out, name, rows, [*runs, environment])
    print(f"wrote {options.out / name}.csv and .env.json", flush=True)


def _timing(options: argparse.Namespace) -> TimingOptions:
    default = _TINY_TIMING if options.tiny else TimingOptions()
    if not options.suite:
        default = replace(default, rounds=min(default.rounds, _SHORT_ROUNDS))
    given = {name: getattr(options, name) for name in ("rounds", "batch_ms", "settle_ms")}
    return replace(default, **{name: value for name, value in given.items() if value is not None})


def _choice(options: argparse.Namespace, device: str) -> Choice:
    return Choice(
        cases=options.case,
        tokens=options.tokens,
        batches=options.batch,
        modes=options.mode,
        routings=options.routing,
        providers=options.provider,
        timers=options.timer or TIMERS,
        dtype=options.dtype or ("bf16" if device == "cuda" else "fp32"),
        device=device,
        tiny=options.tiny,
    )


def _list_of(*known: str) -> Callable[[str], list[str]]:
    """A parser of comma-separated names, which rejects unknown ones if there are any known ones."""

    def parse(text: str) -> list[str]:
        names = [_ALIASES.get(name, name) for name in text.split(",") if name]
        for name in names:
            if known and name not in known:
                raise argparse.ArgumentTypeError(f"got {name!r}, expected among {', '.join(known)}")
        return names

    return parse


def _integers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {number}, expected 1 or more")
    return number


def _parser() -> argparse.ArgumentParser:
    providers = sorted({name for suite in SUITES.values() for name in suite.providers})
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    add = parser.add_argument
    add("--suite", type=_list_of(*SUITES), metavar="A,B", help=f"among {', '.join(SUITES)}; default: a short selection")
    add("--case", type=_list_of(), metavar="A,B", help="shapes of the paper's models, such as XL/2-8E2A")
    add("--tokens", type=_integers, metavar="N,N", help="tokens of one call")
    add("--batch", type=_integers, metavar="N,N", help="images of one call (model, training, memory, startup)")
    add("--mode", type=_list_of(*MODES), metavar="A,B", help="fwd, fwd_bwd (also spelled bwd)")
    add("--routing", type=_list_of(*ROUTINGS), metavar="A,B", help="balanced, skewed, one")
    add("--provider", type=_list_of(*providers), metavar="A,B", help=", ".join(providers))
    add("--timer", type=_list_of(*TIMERS), metavar="A,B", help="eager, graph (default: both)")
    add("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, fp32 on the CPU")
    add("--device", choices=("cuda", "cpu"), help="default: the GPU if there is one")
    add("--tiny", action="store_true", help="small shapes and few samples: does it run at all?")
    add("--rounds", type=_positive, help="samples of each provider")
    add("--batch-ms", type=float, help="length of one sample in milliseconds")
    add("--settle-ms", type=float, help="how long a call of a millisecond or more is repeated before each sample")
    add("--out", type=Path, default=Path("runs/bench"), help="folder of the results (default: %(default)s)")
    add("--plot", action="store_true", help="draw the plots at the end (always done without --suite)")
    add("--append", action="store_true", help="keep the rows in --out that this run does not measure again")
    add("--keep-failed", action="store_true", help="time providers with wrong results too; their status says so")
    add("--stall-seconds", type=float, default=300.0, help="give up a provider that is silent so long")
    add("--in-process", action="store_true", help="no worker process; a crash then ends the run")
    return parser


if __name__ == "__main__":
    sys.exit(main())
