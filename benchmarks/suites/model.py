"""model and training: whole models, one denoising forward, or forward and backward of one training step.

Forward: parameters in the task's dtype, no gradients. Training: parameters in fp32 under autocast to the task's dtype,
the rectified-flow loss plus the balance loss, gradients of all parameters; no optimizer, whose cost depends on the
number of parameters alone and whose state for XL does not fit beside them.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor, nn

from ..cases import TINY_CASE
from ..engine import OUT_OF_MEMORY, Candidate, Context, WrongResult, compare
from ..models import DEFAULT_PROVIDERS, PROVIDERS, Model, ModelShop, moe_config
from ..results import Row
from .base import Choice, Suite, Task, choose, choose_providers

FRESH = "fresh"  # routing: as new routers do it, unevenly
_CHECK_DEPTH = 2  # blocks of the copy whose results are compared with fp32: a whole XL in fp32 would not fit twice
_CHECK_BATCH = 8  # images: enough tokens that those which rounding sends to another expert are as many in both results


def plan_model(choice: Choice) -> list[Task]:
    """Every case at 256 and 512 pixels, and batch size; forward only."""
    names = ("S/2-8E2A", "B/2-8E2A", "L/2-8E2A", "XL/2-8E2A", "G/2-16E2A")
    cases = choose(choice.cases, [f"{name}{size}" for name in names for size in ("", "@512")], (TINY_CASE,), choice)
    return _tasks("model", choice, cases, choose(choice.batches, (1, 4, 16, 64, 128), (1, 2), choice), "fwd")


def plan_training(choice: Choice) -> list[Task]:
    """Every case and batch size; forward and backward."""
    cases = choose(choice.cases, ("S/2-8E2A", "B/2-8E2A", "L/2-8E2A", "XL/2-8E2A"), (TINY_CASE,), choice)
    return _tasks("training", choice, cases, choose(choice.batches, (16, 32), (2,), choice), "fwd_bwd")


def _tasks(suite: str, choice: Choice, cases: Sequence[str], batches: Sequence[int], mode: str) -> list[Task]:
    providers = choose_providers(choice, PROVIDERS, DEFAULT_PROVIDERS)
    if choice.modes is not None and mode not in choice.modes:
        return []
    return [
        Task(
            suite,
            case,
            mode,
            FRESH,
            choice.dtype,
            choice.device,
            providers,
            tuple(choice.timers),
            tokens=batch * moe_config(case).num_tokens,
            batch=batch,
        )
        for case, batch in product(cases, batches)
    ]


def run(task: Task, context: Context) -> list[Row]:
    """Check and time every provider's model, in turns as long as all fit, else alone."""
    rows = _compare(task, context)
    crowded = [name for name in task.providers if any(r.provider == name and r.status == OUT_OF_MEMORY for r in rows)]
    for provider in crowded if len(task.providers) > 1 else ():
        gc.collect()
        alone = _compare(replace(task, providers=(provider,)), context)
        rows = [row for row in rows if row.provider != provider] + alone
    return rows


def _compare(task: Task, context: Context) -> list[Row]:
    shop = ModelShop(task.case, task.device, parameter_dtype(task))

    def build(provider: str) -> Candidate:
        complaint = None
        if not provider.startswith("dense-"):  # the dense twins are plain PyTorch, without any op of ours
            complaint = _complaint(replace(task, batch=_CHECK_BATCH, tokens=None, providers=(), timers=()), provider)
        if complaint is not None and not context.keep_failed:
            raise WrongResult(complaint)
        model = shop.build(provider)
        call = model_call(task, model)
        scale = 1 if task.mode == "fwd" else 3
        return Candidate(
            [call],
            flops=scale * task.image_count * model.flops,
            held_bytes=model.held_bytes,
            status="ok" if complaint is None else f"failed: wrong result, {complaint}",
        )

    builders = {provider: functools.partial(build, provider) for provider in task.providers}
    return compare(context, task.template, task.timers, builders)


def parameter_dtype(task: Task) -> torch.dtype:
    """The task's dtype for inference, fp32 for training."""
    return task.torch_dtype if task.mode == "fwd" else torch.float32


def model_call(task: Task, model: Model) -> Callable[[], Tensor | tuple[Tensor | None, ...]]:
    """One forward, or one forward and backward that returns the gradients of all parameters, on fixed random inputs."""
    x, t, y, noise = _inputs(task)
    module = model.module.train(task.mode != "fwd")

    def forward() -> Tensor:
        with torch.no_grad(), model.inside():
            return module(x, t, y)

    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]

    def step() -> tuple[Tensor | None, ...]:
        with model.inside(), _autocast(task):
            loss = _loss(module, x, t, y, noise)
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    return forward if task.mode == "fwd" else step


def _loss(module: nn.Module, x: Tensor, t: Tensor, y: Tensor, noise: Tensor) -> Tensor:
    """Rectified flow: the first channels predict noise - x at a point between them; the rest stay free."""
    mixed = (1 - t[:, None, None, None]) * x + t[:, None, None, None] * noise
    out, aux = module(mixed, t, y, return_aux=True)
    return (out[:, : x.shape[1]].float() - (noise - x)).square().mean() + aux.balance_loss


def _autocast(task: Task) -> torch.autocast:
    enabled = task.torch_dtype != torch.float32
    return torch.autocast(task.device, dtype=task.torch_dtype if enabled else torch.bfloat16, enabled=enabled)


def _inputs(task: Task) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    config, generator = moe_config(task.case), torch.Generator(task.device).manual_seed(0)
    size = (task.image_count, config.in_channels, config.input_size, config.input_size)
    x, noise = (torch.randn(size, generator=generator, device=task.device) for _ in range(2))
    t = torch.rand(task.image_count, generator=generator, device=task.device)
    y = torch.randint(config.num_classes, (task.image_count,), generator=generator, device=task.device)
    dtype = parameter_dtype(task)
    return x.to(dtype), t, y, noise.to(dtype)


@functools.cache
def _complaint(task: Task, provider: str) -> str | None:
    """Compare a provider with the fp32 reference backend on a model of two blocks: outputs, and in training gradients.

    The rule is twice the root mean square error of the reference backend in the same dtype: a rule on the largest error
    would be decided by the single token that rounding sends to another expert in the second block.
    """
    shop = ModelShop(task.case, task.device, parameter_dtype(task), depth=_CHECK_DEPTH)
    model = shop.build(provider)
    got = _check_results(task, model)
    plain = shop.build("ours-reference")
    same = _check_results(task, plain)
    wide = torch.float64 if task.torch_dtype == torch.float32 else torch.float32
    plain.module.to(wide)
    wanted = _check_results(replace(task, dtype="fp32"), plain)
    for name in got.keys() & wanted.keys():
        error, allowed = _rms(got[name], wanted[name]), 2 * _rms(same[name], wanted[name])
        allowed += 1e-5 * wanted[name].double().square().mean().sqrt().item()
        if not error <= allowed:
            return f"{name}: RMS error {error:.3g}, allowed {allowed:.3g}"
    return None


def _check_results(task: Task, model: Model) -> dict[str, Tensor]:
    """The output, and in training the gradients of the parameters by name, all in evaluation mode: no class dropout."""
    module = model.module.eval()
    dtype = next(module.parameters()).dtype
    x, t, y, noise = (value.to(dtype) if value.ndim == 4 else value for value in _inputs(task))
    if task.mode == "fwd":
        with torch.no_grad(), model.inside():
            return {"output": module(x, t, y)}
    named = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
    with model.inside(), _autocast(task):
        loss = _loss(module, x, t, y, noise)
    grads = torch.autograd.grad(loss, tuple(named.values()), allow_unused=True)
    return {f"gradient of {name}": grad for name, grad in zip(named, grads, strict=True) if grad is not None}


def _rms(got: Tensor, wanted: Tensor) -> float:
    return (got.double() - wanted.double()).square().mean().sqrt().item()


MODEL = Suite("model", PROVIDERS, plan_model, run)
TRAINING = Suite("training", PROVIDERS, plan_training, run)
