"""Train what one of several ranks holds of a model, and count its bytes: `python -m benchmarks.rank_share --help`.

A share of a model's blocks stands for a rank's part of the whole, so that one GPU answers whether the states of, say,
DiT-MoE-G/2-16E2A fit two, and what a step and an update of averages in the host's memory take there. What ranks send
each other is left out: figures of a step are bounds from below.
"""

from __future__ import annotations

import argparse
import gc
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dit_moe import DiT, DiTConfig, model_config
from dit_moe.data import Batch
from dit_moe.parallel import ParallelConfig
from dit_moe.training import Trainer, TrainingSettings
from dit_moe.training.shards import local_part

from . import env


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; prints and writes one JSON object."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = _parser().parse_args(given)
    device = torch.device("cuda", torch.cuda.current_device()) if options.device == "cuda" else torch.device("cpu")
    command = ["python", "-m", "benchmarks.rank_share", *given]
    result: dict[str, Any] = {
        "preset": options.preset,
        "ranks": options.ranks,
        "parallel": options.parallel,
        "runs": [],
        "environment": env.describe(given, options.device) | {"command": command},
    }
    with _process_group(options.parallel, device):
        for batch in options.batch:
            result["runs"].append(_run(batch, options, device))
            if options.out:  # after each batch: the next may end the process
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(result, indent=1) + "\n")
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
    print(json.dumps(result, indent=1))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="DiT-MoE-G/2-16E2A", help="name in dit_moe.DiT_models")
    parser.add_argument("--ranks", type=int, default=2, help="train 1/RANKS of the preset's blocks")
    parser.add_argument("--batch", type=int, nargs="+", default=[16, 32], help="images of a step; a run for each")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--parallel", choices=("none", "fsdp"), default="fsdp", help="fsdp is over this one rank")
    parser.add_argument("--moments", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--ema-device", choices=("model", "cpu"), default="cpu", help="where averages lie")
    parser.add_argument("--ema-dtype", choices=("fp32", "bf16"), default="bf16")
    parser.add_argument("--ema-every", type=int, default=2, help="steps between updates of the averages")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="narrow blocks and small images, for a smoke run")
    parser.add_argument("--out", type=Path, default=None, help="JSON file of the results")
    return parser


def _run(batch: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    try:
        return measure(batch, options, device)
    except torch.OutOfMemoryError as error:
        _say(f"batch {batch}: out of memory")
        return {"batch": batch, "out_of_memory": str(error).partition("\n")[0], "device": device_bytes(device)}


def measure(batch: int, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Bytes and seconds of training with one batch size."""
    config = share_of(options.preset, options.ranks, options.tiny)
    settings = TrainingSettings(
        steps=options.steps,
        batch_size=batch,
        warmup_steps=options.steps,
        dtype="bf16-stochastic",
        moments=options.moments,
        ema_device=options.ema_device,
        ema_dtype=options.ema_dtype,
        ema_every=options.ema_every,
        recompute_blocks=config.depth,
        cuda_graph=False,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    with torch.device("meta"):
        model = DiT(config)
    data = RandomLatents(4 * batch, config, device)
    start = time.perf_counter()
    trainer = Trainer(model, data, settings, device, ParallelConfig(options.parallel))
    _wait(device)
    made = time.perf_counter() - start
    _say(f"batch {batch}: {config.depth} blocks, trainer made in {made:.1f} s")
    gradients = _count_gradients(trainer)
    steps = _timed_steps(trainer, device)
    optimizer = trainer.optimizer
    parameters = trainer.parameters
    held = {
        "weights": _bytes(parameters.values()),
        "masters": _bytes(w for name, w in optimizer.weights.items() if w is not parameters[name]),
        "gradients": gradients["bytes"],
        "moments": _bytes([*optimizer.exp_avg.values(), *optimizer.exp_avg_sq.values()]),
    }
    averages = _bytes(trainer.averages.tensors.values())
    if options.ema_device == "model":
        held["averages"] = averages
    elements = sum(param.numel() for param in parameters.values())
    return {
        "batch": batch,
        "blocks": config.depth,
        "parameters": elements,
        "device_states": held,
        "device_bytes_a_parameter": sum(held.values()) / elements,
        "averages": averages,
        "made_seconds": made,
        "steps": steps,
        "device": device_bytes(device),
        "host_peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "settings": settings.to_dict(),
    }


def share_of(preset: str, ranks: int, tiny: bool = False) -> DiTConfig:
    """The preset with 1/ranks of its blocks, or a narrow one with two.

    Raises:
        ValueError: the blocks cannot be shared so.
    """
    config = model_config(preset)
    if ranks < 1 or config.depth % ranks:
        raise ValueError(f"ranks: got {ranks}, expected a divisor of the {config.depth} blocks of {preset}")
    config = replace(config, depth=config.depth // ranks)
    if not tiny:
        return config
    return replace(config, depth=2, hidden_size=32, num_heads=2, input_size=8, num_experts=4, num_classes=10)


def device_bytes(device: torch.device) -> dict[str, int]:
    """What PyTorch allocated at most, and what is in use of the GPU, other programs' included; empty on a CPU."""
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info()
    return {
        "max_allocated": torch.cuda.max_memory_allocated(),
        "max_reserved": torch.cuda.max_memory_reserved(),
        "used": total - free,
        "total": total,
    }


def _timed_steps(trainer: Trainer, device: torch.device) -> list[dict[str, Any]]:
    """A step after the other, the update of the averages apart; its first pins buffers and compiles."""
    updated: list[float] = []
    update = trainer.averages.update

    def timed(step: int, *rest: Any) -> None:
        updated.append(_timed(lambda: update(step, *rest), device))

    trainer.averages.update = timed  # type: ignore[assignment, method-assign]
    steps = []
    for number in range(1, trainer.settings.steps + 1):
        took = _timed(trainer.train_step, device)
        report = trainer.report()
        due = number % trainer.settings.ema_every == 0
        step = {
            "seconds": took - updated[-1],
            "averages_seconds": updated[-1] if due else None,
            "loss": report.loss,
            "grad_norm": report.grad_norm,
        }
        steps.append(step)
        averages = f", averages {updated[-1]:.2f} s" if due else ""
        _say(f"step {number} of {trainer.settings.steps}: {step['seconds']:.3f} s{averages}, loss {report.loss:.4f}")
    return steps


def _count_gradients(trainer: Trainer) -> dict[str, int]:
    """A dictionary that holds the gradients' bytes once a step has run."""
    found: dict[str, int] = {}
    step = trainer.optimizer.step

    def counted(*inputs: Any, **named: Any) -> None:
        found["bytes"] = _bytes(trainer.optimizer.gradients().values())
        step(*inputs, **named)

    trainer.optimizer.step = counted  # type: ignore[method-assign]
    return found


class RandomLatents:
    """Latents without meaning, with classes, on the device; data and its feed in one.

    Args:
        count: how many.
        config: of the model that takes them.
        device: where they lie.
    """

    name = "random latents"
    draws = False

    def __init__(self, count: int, config: DiTConfig, device: torch.device) -> None:
        self.channels, self.image_size, self.num_classes = config.in_channels, config.input_size, config.num_classes
        self.class_names = tuple(map(str, range(config.num_classes)))
        self.index_device = device
        generator = torch.Generator(device).manual_seed(0)
        shape = (count, config.in_channels, config.input_size, config.input_size)
        self._x = torch.randn(shape, generator=generator, device=device)
        self._class_ids = torch.randint(config.num_classes, (count,), generator=generator, device=device)

    def __len__(self) -> int:
        return len(self._x)

    def identity(self) -> dict[str, Any]:
        """As of any training data."""
        return {"name": self.name, "count": len(self)}

    def feed(self, device: torch.device) -> RandomLatents:
        """These."""
        return self

    def batch(self, indices: Tensor, mirrored: Tensor, noise: Tensor | None) -> Batch:
        """As `Feed.batch`."""
        return Batch(self._x[indices], self._class_ids[indices])


@contextmanager
def _process_group(parallel: str, device: torch.device) -> Iterator[None]:
    """A group of this process alone, where the model is to be spread over it."""
    if parallel == "none":
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(local_part(tensor).nbytes for tensor in tensors)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    start = time.perf_counter()
    run()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
