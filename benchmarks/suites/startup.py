"""startup: wall-clock time from starting Python to the end of the first training step, in fresh processes.

S/2-8E2A#cold starts with empty caches of Triton and torch.compile, #warm with those that an earlier start filled. A
case is a whole model, or its routed layer alone as XL/2-8E2A#layer-cold, #layer-warm. The row's status says when each
stage of `benchmarks.startup_probe` was over.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from ..cases import TINY_CASE
from ..engine import Context, Unavailable, status_of
from ..env import child_environment
from ..models import PROVIDERS as MODELS
from ..providers import layer_providers
from ..results import OK, Row
from ..startup_probe import STAGES
from ..timing import summarize
from .base import Choice, Suite, Task, choose, choose_providers

PROVIDERS = tuple(dict.fromkeys((*MODELS, *layer_providers())))
_STARTS = ("cold", "warm")
_LAYER = "layer"
_REPEATS = 3
_DEFAULT_MODELS = ("ours-cuda", "ours-triton", "loop", "dense-same-name")
_DEFAULT_LAYERS = ("ours-cuda", "ours-triton", "torch-grouped-mm", "torch-grouped-mm-compiled", "loop", "sonicmoe")
_TIME_LIMIT = 280  # seconds for one process, below the limit after which the parent gives up on the worker


def plan(choice: Choice) -> list[Task]:
    """Every case, cold and warm unless the case names one of them."""
    tasks = []
    for case in choose(choice.cases, ("S/2-8E2A", f"XL/2-8E2A#{_LAYER}"), (TINY_CASE, f"{TINY_CASE}#{_LAYER}"), choice):
        name, layer, starts = _split(case)
        known, default = (tuple(layer_providers()), _DEFAULT_LAYERS) if layer else (MODELS, _DEFAULT_MODELS)
        common = Task(
            "startup",
            "",
            "fwd_bwd",
            "balanced",
            choice.dtype,
            choice.device,
            choose_providers(choice, known, default),
            ("eager",),
        )
        sizes = choose(choice.tokens, (4096,), (64,), choice) if layer else choose(choice.batches, (16,), (2,), choice)
        unit, prefix = ("tokens", f"{_LAYER}-") if layer else ("batch", "")
        tasks += [replace(common, case=f"{name}#{prefix}{start}", **{unit: size}) for size in sizes for start in starts]
    return [task for task in tasks if task.providers]


def _split(case: str) -> tuple[str, bool, Sequence[str]]:
    """A case's model, whether its layer alone is meant, and the starts.

    Raises:
        ValueError: what follows the "#" is nothing of that.
    """
    name, _, detail = case.partition("#")
    words = [word for word in detail.split("-") if word]
    layer = words[:1] == [_LAYER]
    starts = tuple(words[layer:]) or _STARTS
    if len(words) > 2 or not set(starts) <= set(_STARTS):
        raise ValueError(f"case: got {case!r}, expected a name such as S/2-8E2A, #cold, #warm, #layer or #layer-cold")
    return name, layer, starts


def run(task: Task, context: Context) -> list[Row]:
    """Each provider in processes of its own, one after the other."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the children need the memory
    return [replace(_measure(task, context, name), provider=name, timer="eager") for name in task.providers]


def _measure(task: Task, context: Context, provider: str) -> Row:
    if provider in context.skip:
        return replace(task.template, status=context.skip[provider])
    name, layer, (start,) = _split(task.case)
    reason = layer_providers()[provider].availability(task.device) if layer else None
    if reason is not None:
        return replace(task.template, status=f"unavailable: {reason}")
    repeats = max(1, min(_REPEATS, context.options.rounds // _REPEATS - 1))
    try:
        with tempfile.TemporaryDirectory() as cache:
            if start == "warm":
                _one_start(task, context, name, provider, cache)
            starts = []
            for _ in range(repeats):
                with tempfile.TemporaryDirectory() as empty:
                    starts.append(_one_start(task, context, name, provider, cache if start == "warm" else empty))
    except subprocess.TimeoutExpired:
        return replace(task.template, status=f"failed: no second step within {_TIME_LIMIT} s")
    except Exception as error:
        return replace(task.template, status=status_of(error))
    sample = summarize([seconds["first step"] * 1e3 for seconds in starts])
    stages = ", ".join(f"{stage} {statistics.median(seconds[stage] for seconds in starts):.2f} s" for stage in STAGES)
    row = replace(task.template, median_ms=sample.median_ms, p20_ms=sample.p20_ms, p80_ms=sample.p80_ms)
    return replace(row, status=f"{OK}: {stages}")


def _one_start(task: Task, context: Context, case: str, provider: str, cache: str) -> dict[str, float]:
    """Seconds from the start of one process, with its caches in `cache`, to the end of each stage."""
    context.watch(provider)
    options = {"--case": case, "--provider": provider, "--device": task.device, "--dtype": task.dtype}
    options |= {"--tokens": str(task.tokens)} if task.batch is None else {"--batch": str(task.batch)}
    arguments = [text for option in options.items() for text in option]
    begin = time.time()
    child = subprocess.run(
        [sys.executable, "-m", "benchmarks.startup_probe", *arguments],
        env=child_environment(TRITON_CACHE_DIR=f"{cache}/triton", TORCHINDUCTOR_CACHE_DIR=f"{cache}/inductor"),
        capture_output=True,
        text=True,
        timeout=_TIME_LIMIT,
    )
    if child.returncode:
        last = (child.stderr.strip().splitlines() or ["no message"])[-1]
        raise (Unavailable if "Unavailable" in last else RuntimeError)(last.partition(": ")[2] or last)
    return {stage: end - begin for stage, end in json.loads(child.stdout.splitlines()[-1]).items()}


SUITE = Suite("startup", PROVIDERS, plan, run)
