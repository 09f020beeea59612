"""The folder of a training run: checkpoints to resume from, the averaged model, class names and the metrics so far.

checkpoints/step-N/   weights, averages, moments, in shards; settings, model and data in its record.json
model.safetensors     the averaged weights in the native format, for sampling
classes.json          class names, in the order of their ids
metrics.jsonl         one report a line
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from .checkpoint import CheckpointError, save_model
from .checkpoint.files import written_aside
from .training import Trainer, TrainingReport
from .training.checkpoints import Checkpoints

CHECKPOINTS, MODEL_FILE, CLASSES_FILE, METRICS_FILE = (
    "checkpoints",
    "model.safetensors",
    "classes.json",
    "metrics.jsonl",
)
# Settings that may change when a run goes on: how far, and where its memory is.
_FREE_SETTINGS = ("steps", "recompute_blocks", "cuda_graph", "ema_device")


class RunFolder:
    """Saves a trainer's run and resumes it; with several ranks, every method is to be called on all of them.

    Args:
        path: the folder; made when something is written.
        keep: checkpoints that stay.
        asynchronous: write checkpoints in a thread; `close` waits for the last.
    """

    def __init__(self, path: str | os.PathLike, *, keep: int = 2, asynchronous: bool = False) -> None:
        self.path = Path(path)
        self.checkpoints = Checkpoints(self.path / CHECKPOINTS, keep=keep, asynchronous=asynchronous)

    def save(self, trainer: Trainer, *, export: bool = True) -> None:
        """Write a checkpoint, and with `export` the averaged model beside it; a crash leaves the old ones or the new.

        Raises:
            OSError: the folder cannot be written.
        """
        record = {"step": trainer.step, **_identity(trainer)}
        self.checkpoints.save(trainer.state(), trainer.step, record)
        if export:
            self.export(trainer)

    def export(self, trainer: Trainer) -> None:
        """Write the averaged model and the class names.

        Raises:
            OSError: the folder cannot be written.
        """
        model = trainer.averaged_model()
        if model is None:  # another rank has it
            return
        self.path.mkdir(parents=True, exist_ok=True)
        save_model(model, self.path / MODEL_FILE)
        save_class_names(trainer.data.class_names, self.path)

    def start(self) -> None:
        """Forget the metrics of a run that ended before its first checkpoint."""
        if self.checkpoints.latest() is None:
            (self.path / METRICS_FILE).unlink(missing_ok=True)

    def resume(self, trainer: Trainer) -> None:
        """Load the newest checkpoint, for the same model, data and settings but for how far and where memory is.

        Raises:
            FileNotFoundError: the folder holds no checkpoint.
            CheckpointError: it is damaged, or of another model, data or settings.
        """
        record = self.checkpoints.record()
        changed = _changes(record, _identity(trainer))
        if changed:
            raise CheckpointError(f"cannot resume {self.checkpoints.latest()}: {'; '.join(changed)}")
        self.checkpoints.load(trainer.state())
        trainer.restored(record["step"])
        if trainer.rank == 0:
            _forget_after(self.path / METRICS_FILE, trainer.step)

    def append(self, report: TrainingReport) -> None:
        """Add one line to the run's metrics."""
        self.path.mkdir(parents=True, exist_ok=True)
        with open(self.path / METRICS_FILE, "a", encoding="utf-8") as file:
            file.write(json.dumps(report.to_dict()) + "\n")

    def close(self) -> None:
        """Wait for a checkpoint that is still being written.

        Raises:
            OSError: it could not be written.
        """
        self.checkpoints.wait()


def save_class_names(class_names: tuple[str, ...], folder: str | os.PathLike) -> None:
    """Write the class names beside the model."""
    with written_aside(Path(folder) / CLASSES_FILE) as aside:
        aside.write_text(json.dumps(list(class_names), ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def class_names_beside(checkpoint: str | os.PathLike) -> tuple[str, ...]:
    """Class names kept in a checkpoint's folder; empty where there are none.

    Raises:
        CheckpointError: the file is not a list of names.
    """
    path = Path(checkpoint).parent / CLASSES_FILE
    if not path.is_file():
        return ()
    try:
        names = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: expected a list of class names in JSON, got {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{path}: expected a list of class names in JSON")
    return tuple(names)


class StopRequest:
    """Whether SIGINT or SIGTERM came, and which; true once one did."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def __call__(self) -> bool:
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn the first SIGINT or SIGTERM into a request to stop after the current step; a second one acts as usual.

    To be used in the main thread, where Python handles signals.
    """
    request = StopRequest()
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def on_signal(number: int, frame: FrameType | None) -> None:
        request.signal = signal.Signals(number)
        restore()

    for number in previous:
        signal.signal(number, on_signal)
    try:
        yield request
    finally:
        restore()


def _identity(trainer: Trainer) -> dict[str, dict[str, Any]]:
    """What must be the same for a run to go on."""
    settings = {key: value for key, value in trainer.settings.to_dict().items() if key not in _FREE_SETTINGS}
    return {"model": trainer.config.to_dict(), "settings": settings, "data": trainer.data.identity()}


def _changes(record: dict[str, Any], now: dict[str, dict[str, Any]]) -> list[str]:
    return [
        f"{part}.{key} was {record[part].get(key)!r}, is {value!r}"
        for part, values in now.items()
        for key, value in values.items()
        if record[part].get(key) != value
    ]


def _forget_after(metrics: Path, step: int) -> None:
    """Drop lines of steps that a stopped run did after its last save, and will do again."""
    if not metrics.is_file():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # a line cut short by a crash
            continue
    with written_aside(metrics) as aside:
        aside.write_text("".join(kept), encoding="utf-8")
