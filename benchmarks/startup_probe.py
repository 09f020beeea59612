"""What `suites.startup` runs in a fresh process: import, build a model, do training steps, say when each was done."""

from __future__ import annotations

import argparse
import json
import time


def main() -> None:
    """Print a JSON object of wall-clock times (seconds since the epoch) after each stage."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("--case", "--provider", "--device", "--dtype"):
        parser.add_argument(name, required=True)
    parser.add_argument("--batch", type=int, required=True)
    options = parser.parse_args()

    import torch

    import dit_moe  # noqa: F401  the time of this import is part of the measurement

    marks = {"imported": time.time()}
    from .models import ModelShop
    from .suites.base import Task
    from .suites.model import model_call, parameter_dtype

    task = Task(
        "startup",
        options.case,
        "fwd_bwd",
        "balanced",
        options.dtype,
        options.device,
        (),
        (),
        batch=options.batch,
    )
    model = ModelShop(task.case, task.device, parameter_dtype(task)).build(options.provider)
    optimizer = torch.optim.AdamW([p for p in model.module.parameters() if p.requires_grad], lr=1e-4)
    parameters = optimizer.param_groups[0]["params"]
    call = model_call(task, model)
    marks["built"] = time.time()
    for stage in ("first step", "second step"):
        for parameter, grad in zip(parameters, call(), strict=True):
            parameter.grad = grad
        optimizer.step()
        if task.device == "cuda":
            torch.cuda.synchronize()
        marks[stage] = time.time()
    print(json.dumps(marks))


if __name__ == "__main__":
    main()
