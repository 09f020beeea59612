"""What `suites.startup` runs in a fresh process: import, build a model or a routed layer, do steps, say when."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from .suites.base import Task

STAGES = ("imported", "built", "optimizer", "first step", "second step")


@dataclass(frozen=True)
class Training:
    """What is trained.

    Args:
        parameters: what the optimizer updates.
        gradients: one forward and backward -> the parameters' gradients, None for one that has none.
    """

    parameters: Sequence[Tensor]
    gradients: Callable[[], Iterable[Tensor | None]]


def main() -> None:
    """Print a JSON object of wall-clock times (seconds since the epoch) after each of STAGES."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--case", "--provider", "--device", "--dtype"):
        parser.add_argument(name, required=True)
    parser.add_argument("--batch", type=int, help="images, for a whole model")
    parser.add_argument("--tokens", type=int, help="tokens, for the routed layer alone")
    options = parser.parse_args()

    import torch

    import dit_moe  # noqa: F401  the time of this import is part of the measurement

    times = [time.time()]
    from .suites.base import Task

    shape = {"tokens": options.tokens, "batch": options.batch}
    task = Task("startup", options.case, "fwd_bwd", "balanced", options.dtype, options.device, (), (), **shape)
    training = _layer(task, options.provider) if options.batch is None else _model(task, options.provider)
    times.append(_now(task.device))
    optimizer = torch.optim.AdamW(training.parameters, lr=1e-4)
    times.append(_now(task.device))
    for _ in range(2):
        for parameter, grad in zip(training.parameters, training.gradients(), strict=True):
            parameter.grad = grad
        optimizer.step()
        times.append(_now(task.device))
    print(json.dumps(dict(zip(STAGES, times, strict=True))))


def _now(device: str) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.time()


def _model(task: Task, provider: str) -> Training:
    """A whole model: fp32 parameters under autocast, as in the training suite."""
    from .models import ModelShop
    from .suites.model import model_call, parameter_dtype

    model = ModelShop(task.case, task.device, parameter_dtype(task)).build(provider)
    step = model_call(task, model)
    return Training([p for p in model.module.parameters() if p.requires_grad], lambda: step())


def _layer(task: Task, provider: str) -> Training:
    """The routed layer alone: parameters and tokens in the task's dtype, as in the moe_layer suite."""
    import torch

    from .cases import layer_shape
    from .problems import make_problem
    from .providers import layer_providers

    shape, tokens = layer_shape(task.case), task.token_count
    problem = make_problem(shape, tokens, task.routing, task.torch_dtype, task.device, with_margin=False)
    layer = layer_providers()[provider].build(problem)
    leaves = (problem.x, *layer.weights.values())

    def step() -> tuple[Tensor, ...]:
        return torch.autograd.grad(layer.forward(problem.x), leaves, problem.dout)[1:]  # the tokens' is computed too

    return Training(leaves[1:], step)


if __name__ == "__main__":
    main()
