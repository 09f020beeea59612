"""startup: wall-clock time from starting Python to the end of the first training step, in fresh processes.

XL/2-8E2A#cold starts with an empty Triton cache, #warm with the cache that the cold run filled.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import product

import torch

from ..cases import TINY_CASE
from ..engine import Context, Unavailable, status_of
from ..env import child_environment
from ..models import PROVIDERS
from ..results import OK, Row
from ..timing import summarize
from .base import Choice, Suite, Task, choose, choose_providers

_STARTS = ("cold", "warm")
_REPEATS = 3
_DEFAULT = ("ours-triton", "loop", "dense-same-name")
_TIME_LIMIT = 280  # seconds for one process, below the limit after which the parent gives up on the worker


def plan(choice: Choice) -> list[Task]:
    """Every case, cold and warm."""
    providers = choose_providers(choice, PROVIDERS, _DEFAULT)
    return [
        Task(
            "startup",
            f"{case}#{start}",
            "fwd_bwd",
            "balanced",
            choice.dtype,
            choice.device,
            providers,
            ("eager",),
            batch=batch,
        )
        for case, batch, start in product(
            choose(choice.cases, ("S/2-8E2A",), (TINY_CASE,), choice),
            choose(choice.batches, (16,), (2,), choice),
            _STARTS,
        )
    ]


def run(task: Task, context: Context) -> list[Row]:
    """Each provider in processes of its own, one after the other."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the children need the memory
    return [replace(_measure(task, context, name), provider=name, timer="eager") for name in task.providers]


def _measure(task: Task, context: Context, provider: str) -> Row:
    if provider in context.skip:
        return replace(task.template, status=context.skip[provider])
    case, _, start = task.case.partition("#")
    try:
        with tempfile.TemporaryDirectory() as cache:
            if start == "warm":
                _one_start(task, context, case, provider, cache)
            times = []
            for _ in range(max(1, min(_REPEATS, context.options.rounds // _REPEATS - 1))):
                with tempfile.TemporaryDirectory() as empty:
                    times.append(_one_start(task, context, case, provider, cache if start == "warm" else empty))
    except Exception as error:
        return replace(task.template, status=status_of(error))
    sample = summarize(times)
    return replace(task.template, median_ms=sample.median_ms, p20_ms=sample.p20_ms, p80_ms=sample.p80_ms, status=OK)


def _one_start(task: Task, context: Context, case: str, provider: str, cache: str) -> float:
    """Milliseconds of one process, with its Triton cache in `cache`."""
    context.watch(provider)
    options = {
        "--case": case,
        "--provider": provider,
        "--device": task.device,
        "--dtype": task.dtype,
        "--batch": str(task.batch),
    }
    arguments = [text for option in options.items() for text in option]
    begin = time.time()
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup_probe", *arguments],
        env=child_environment(TRITON_CACHE_DIR=cache),
        capture_output=True,
        text=True,
        timeout=_TIME_LIMIT,
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise (Unavailable if "Unavailable" in last else RuntimeError)(last.partition(": ")[2] or last)
    return (json.loads(child.stdout.splitlines()[-1])["first step"] - begin) * 1e3


SUITE = Suite("startup", PROVIDERS, plan, run)
