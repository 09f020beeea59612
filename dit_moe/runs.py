"""The folder of a training run: its state to resume from, the averaged model, class names and the metrics so far.

training-state.safetensors  weights, averages, moments; settings, model and data as JSON in its metadata
model.safetensors           the averaged weights in the native format, for sampling
classes.json                class names, in the order of their ids
metrics.jsonl               one report a line
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

import torch

from .checkpoint import CheckpointError, save_model
from .checkpoint.files import written_aside
from .data import ImageDataset
from .training import Trainer, TrainingReport

STATE_FILE, MODEL_FILE, CLASSES_FILE, METRICS_FILE = (
    "training-state.safetensors",
    "model.safetensors",
    "classes.json",
    "metrics.jsonl",
)
_RECORD = "dit_moe_training"


def save_run(trainer: Trainer, folder: str | os.PathLike) -> None:
    """Write the state and the averaged model; each file is replaced at once, so a crash leaves the old or the new.

    Raises:
        OSError: the folder cannot be written.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    record = {"step": trainer.step, **_identity(trainer)}
    tensors = {name: tensor.detach().contiguous() for name, tensor in trainer.state().items()}
    with written_aside(folder / STATE_FILE) as aside:
        save_file(tensors, aside, metadata={"format": "pt", _RECORD: json.dumps(record)})
    save_model(trainer.averaged_model(), folder / MODEL_FILE)
    save_class_names(trainer.data.class_names, folder)


def resume_run(trainer: Trainer, folder: str | os.PathLike) -> None:
    """Load the state that `save_run` wrote, for the same model, data and settings; only `steps` may differ.

    Raises:
        FileNotFoundError: the folder holds no training state.
        CheckpointError: the state is damaged, or of another model, data or settings.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / STATE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"cannot resume: {path} is not there")
    try:
        with safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(_RECORD, "null"))
            if record is None:
                raise CheckpointError(f"{path}: not a training state")
            changed = _changes(record, _identity(trainer))
            if changed:
                raise CheckpointError(f"cannot resume {path}: {'; '.join(changed)}")
            trainer.load_state({name: file.get_tensor(name) for name in file.keys()}, record["step"])
    except (SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: damaged training state: {error}") from error
    _forget_after(Path(folder) / METRICS_FILE, trainer.step)


def append_report(report: TrainingReport, folder: str | os.PathLike) -> None:
    """Add one line to the run's metrics."""
    with open(Path(folder) / METRICS_FILE, "a", encoding="utf-8") as file:
        file.write(json.dumps(report.to_dict()) + "\n")


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
    data: ImageDataset = trainer.data
    return {
        "model": trainer.model.config.to_dict(),
        "settings": {key: value for key, value in trainer.settings.to_dict().items() if key != "steps"},
        "data": {"name": data.name, "images": len(data), "sum": int(data.images.sum(dtype=torch.int64))},
    }


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
