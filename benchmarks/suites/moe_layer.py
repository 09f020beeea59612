"""moe_layer: the routed layer alone (router, softmax, top-K, dispatch, experts, combine), no shared expert."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product

import torch
from torch import Tensor

from ..cases import TINY_CASE, expert_flops, layer_shape
from ..engine import Builder, Candidate, Context, Unavailable, WrongResult, compare
from ..problems import Expected, MoEProblem, expected_layer, make_problem, with_gradients
from ..providers import BASELINES, layer_providers
from ..providers.base import Layer, Provider
from ..providers.dense import DenseMlp, dense_complaint
from ..providers.gemm import Gemm
from ..results import OK, Row
from .base import Choice, Suite, Task, choose, choose_providers

PROVIDERS = (*layer_providers(), *BASELINES)
_COPIES_OF_L2 = 3  # inputs rotate until they exceed this many L2 caches
_MAX_COPIES = 8


def plan(choice: Choice) -> list[Task]:
    """Every case, token count, routing and mode."""
    return [
        Task("moe_layer", case, mode, routing, choice.dtype, choice.device, names, tuple(choice.timers), tokens=tokens)
        for names in [choose_providers(choice, PROVIDERS)]
        for case, tokens, routing, mode in product(
            choose(choice.cases, ("S/2-8E2A", "XL/2-8E2A", "G/2-16E2A"), (TINY_CASE,), choice),
            choose(choice.tokens, (1024, 4096, 8192, 32768), (64,), choice),
            choose(choice.routings, ("balanced",), ("balanced", "skewed", "one"), choice),
            choose(choice.modes, ("fwd", "fwd_bwd"), ("fwd", "fwd_bwd"), choice),
        )
    ]


def run(task: Task, context: Context) -> list[Row]:
    """Check and time every provider on the same inputs."""
    shape = layer_shape(task.case)
    first = make_problem(shape, task.token_count, task.routing, task.torch_dtype, task.device)
    problems = [first] + [
        make_problem(shape, task.token_count, task.routing, task.torch_dtype, task.device, seed=copy)
        for copy in range(1, _copies(first, task.device))
    ]
    expected = expected_layer(first, task.mode)
    known = layer_providers()

    def builder(name: str) -> Builder:
        if name == "gemm":
            return lambda: _gemm(problems, task, context)
        if name in BASELINES:
            return lambda: _dense(problems, task, match=name.removeprefix("dense-"))
        return lambda: _routed(known[name], problems, expected, task, context)

    return compare(context, task.template, task.timers, {name: builder(name) for name in task.providers})


def _copies(problem: MoEProblem, device: str) -> int:
    if device == "cpu":
        return 1
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    hidden = problem.rows * 3 * problem.shape.expert_hidden_size * problem.x.element_size()
    return min(_MAX_COPIES, -(-_COPIES_OF_L2 * l2_bytes // (_held(problem) + hidden)))


def _routed(
    provider: Provider, problems: list[MoEProblem], expected: Expected, task: Task, context: Context
) -> Candidate:
    reason = provider.availability(task.device)
    if reason is not None:
        raise Unavailable(reason)
    layers = [provider.build(problem) for problem in problems]
    # The output first: a provider that is wrong there may break the GPU context in its backward.
    complaint = expected.output_complaint(_results(layers[0], problems[0], "fwd")["out"])
    if complaint is None and task.mode != "fwd":
        complaint = expected.complaint(_results(layers[0], problems[0], task.mode))
    if complaint is not None and not context.keep_failed:
        raise WrongResult(complaint)
    return Candidate(
        calls=[layer_call(layer, problem, task.mode) for layer, problem in zip(layers, problems, strict=True)],
        flops=expert_flops(problems[0].shape, task.token_count, task.mode),
        bytes=_traffic(problems[0], task.mode),
        held_bytes=_held(problems[0]),
        status=_status(provider, complaint),
    )


def _status(provider: Provider, complaint: str | None) -> str:
    """Fine, with the provider's remark if it has one, or wrong but timed all the same."""
    if complaint is not None:
        return f"failed: wrong result, {complaint}"
    note = getattr(provider, "note", None)
    return OK if note is None else f"{OK}: {note}"


def layer_call(layer: Layer, problem: MoEProblem, mode: str) -> Callable[[], object]:
    """The call to time: forward without gradients, or forward and all gradients."""
    if mode == "fwd":

        def forward() -> Tensor:
            with torch.no_grad():
                return layer.forward(problem.x)

        return forward
    leaves = (problem.x, *layer.weights.values())
    return lambda: torch.autograd.grad(layer.forward(problem.x), leaves, problem.dout)


def _results(layer: Layer, problem: MoEProblem, mode: str) -> dict[str, Tensor]:
    if mode == "fwd":
        with torch.no_grad():
            return {"out": layer.forward(problem.x)}
    results = with_gradients(layer.forward(problem.x), {"x": problem.x, **layer.weights}, problem.dout, mode)
    out, dx = results.pop("out"), results.pop("x")
    return {"out": out, "x": dx, **layer.canonical(results)}


def _held(problem: MoEProblem) -> int:
    """Bytes of x and the weights."""
    tensors = (problem.x, problem.gate, problem.w13, problem.w2)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _traffic(problem: MoEProblem, mode: str) -> int:
    """Compulsory bytes: forward reads x and weights and writes out; backward reads these and dout, writes gradients."""
    activation = problem.x.numel() * problem.x.element_size()
    forward = _held(problem) + activation
    return forward if mode == "fwd" else forward + 2 * _held(problem) + activation


def _gemm(problems: list[MoEProblem], task: Task, context: Context) -> Candidate:
    return Candidate(
        calls=[Gemm().build(problem, task.mode, context.clock) for problem in problems],
        flops=expert_flops(problems[0].shape, task.token_count, task.mode),
    )


def _dense(problems: list[MoEProblem], task: Task, match: str) -> Candidate:
    mlps = [DenseMlp(problem, match) for problem in problems]
    complaint = dense_complaint(mlps[0])
    if complaint is not None:
        raise WrongResult(complaint)

    def call(mlp: DenseMlp) -> object:
        if task.mode == "fwd":
            with torch.no_grad():
                return mlp.forward()
        return torch.autograd.grad(mlp.forward(), mlp.leaves, mlp.dout)

    return Candidate(
        calls=[partial(call, mlp) for mlp in mlps],
        flops=mlps[0].flops(task.mode),
        held_bytes=sum(leaf.numel() * leaf.element_size() for leaf in mlps[0].leaves),
    )


SUITE = Suite("moe_layer", PROVIDERS, plan, run)
