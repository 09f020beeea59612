"""Trainers on random latents: the bytes that they hold and the seconds of their steps."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from dit_moe import DiT, DiTConfig
from dit_moe.data import Batch
from dit_moe.parallel import ParallelConfig
from dit_moe.training import Trainer, TrainingSettings
from dit_moe.training.shards import local_part


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


def new_trainer(
    config: DiTConfig, settings: TrainingSettings, device: torch.device, parallel: ParallelConfig | None = None
) -> tuple[Trainer, float]:
    """A trainer of a model that is made on its device, and the seconds that this took."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(0)
    start = time.perf_counter()
    with torch.device("meta"):
        model = DiT(config)
    data = RandomLatents(4 * settings.batch_size, config, device)
    trainer = Trainer(model, data, settings, device, parallel)
    wait(device)
    return trainer, time.perf_counter() - start


def train_measured(trainer: Trainer) -> dict[str, Any]:
    """Run the settings' steps: bytes of each kind of state, bytes in use, and each step's seconds, loss and norm."""
    gradients = _count_gradients(trainer)
    steps = _timed_steps(trainer)
    optimizer, parameters = trainer.optimizer, trainer.parameters
    held = {
        "weights": _bytes(parameters.values()),
        "masters": _bytes(w for name, w in optimizer.weights.items() if w is not parameters[name]),
        "gradients": gradients["bytes"],
        "moments": _bytes([*optimizer.exp_avg.values(), *optimizer.exp_avg_sq.values()]),
    }
    averages = _bytes(trainer.averages.tensors.values())
    if trainer.settings.ema_device == "model":
        held["averages"] = averages
    elements = sum(local_part(param).numel() for param in parameters.values())
    return {
        "parameters": elements,
        "device_states": held,
        "device_bytes_a_parameter": sum(held.values()) / elements,
        "averages": averages,
        "steps": steps,
        "device": device_bytes(trainer.device),
        "host_peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


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


def timed(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call, with all that it has given to the device."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    """Wait for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def say(text: str) -> None:
    """Tell whoever watches."""
    print(text, file=sys.stderr, flush=True)


def _timed_steps(trainer: Trainer) -> list[dict[str, Any]]:
    """A step after the other, the update of the averages apart; its first pins buffers and compiles."""
    updated: list[float] = []
    update = trainer.averages.update

    def timed_update(step: int, *rest: Any) -> None:
        updated.append(timed(lambda: update(step, *rest), trainer.device))

    trainer.averages.update = timed_update  # type: ignore[assignment, method-assign]
    steps = []
    for number in range(1, trainer.settings.steps + 1):
        took = timed(trainer.train_step, trainer.device)
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
        if trainer.rank == 0:
            text = f"step {number} of {trainer.settings.steps}: {step['seconds']:.3f} s{averages}"
            say(f"{text}, loss {report.loss:.4f}")
    trainer.averages.update = update  # type: ignore[method-assign]
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


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(local_part(tensor).nbytes for tensor in tensors)
