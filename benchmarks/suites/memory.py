"""memory: the highest memory in use during one call, each provider alone in the process's allocator.

The routed layer (cases as in moe_layer) and whole models (cases as in model and training, where --batch is given):
inputs, weights and everything a call allocates; nothing is timed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import torch

from ..cases import TINY_CASE, layer_shape
from ..engine import Context, Unavailable, ensure_alive, status_of
from ..models import DEFAULT_PROVIDERS, ModelShop, moe_config
from ..problems import make_problem
from ..providers import layer_providers
from ..results import OK, Row
from ..timing import Call
from .base import Choice, Suite, Task, choose, choose_providers
from .model import model_call, parameter_dtype
from .moe_layer import layer_call

_MODEL_PROVIDERS = tuple(name for name in DEFAULT_PROVIDERS if name.startswith("dense-"))
PROVIDERS = (*layer_providers(), *_MODEL_PROVIDERS)
_MIB = 2**20


def plan(choice: Choice) -> list[Task]:
    """Layers by tokens, then models by batch size."""
    cases = choose(choice.cases, ("XL/2-8E2A",), (TINY_CASE,), choice)
    modes = choose(choice.modes, ("fwd", "fwd_bwd"), ("fwd", "fwd_bwd"), choice)
    layers = choose_providers(choice, tuple(layer_providers()))
    models = choose_providers(choice, DEFAULT_PROVIDERS)
    common = Task("memory", "", "", "balanced", choice.dtype, choice.device, (), ("eager",))
    tasks = [
        replace(common, case=case, mode=mode, providers=layers, tokens=tokens)
        for case, tokens, mode in product(cases, choose(choice.tokens, (4096, 32768), (64,), choice), modes)
    ]
    for case, batch, mode in product(cases, choose(choice.batches, (16,), (2,), choice), modes):
        tokens = batch * moe_config(case).num_tokens
        tasks.append(replace(common, case=case, mode=mode, providers=models, tokens=tokens, batch=batch))
    return [task for task in tasks if task.providers]


def run(task: Task, context: Context) -> list[Row]:
    """One provider after the other, each built, called twice and freed."""
    return [replace(_measure(task, context, name), provider=name, timer="eager") for name in task.providers]


def _measure(task: Task, context: Context, provider: str) -> Row:
    if provider in context.skip:
        return replace(task.template, status=context.skip[provider])
    context.watch(provider)
    build = _layer if task.batch is None else _model
    try:
        peak = _peak_bytes(lambda: build(task, provider), task.device)
        return replace(task.template, peak_mib=None if peak is None else peak / _MIB, status=OK)
    except Exception as error:
        status = status_of(error)
    ensure_alive(context.clock, provider)
    return replace(task.template, status=status)


def _layer(task: Task, provider: str) -> Call:
    known = layer_providers()[provider]
    reason = known.availability(task.device)
    if reason is not None:
        raise Unavailable(reason)
    problem = make_problem(layer_shape(task.case), task.token_count, task.routing, task.torch_dtype, task.device)
    if task.mode == "fwd":  # the gradient of the output is nothing that a forward holds
        problem = replace(problem, dout=problem.dout.new_empty(0))
    return layer_call(known.build(problem), problem, task.mode)


def _model(task: Task, provider: str) -> Call:
    return model_call(task, ModelShop(task.case, task.device, parameter_dtype(task)).build(provider))


def _peak_bytes(build: Callable[[], Call], device: str) -> int | None:
    """Highest memory of the second call, above what was allocated before the provider was built."""
    gc.collect()
    if device == "cpu":
        build()()
        return None
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    call = build()
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


SUITE = Suite("memory", PROVIDERS, plan, run)
