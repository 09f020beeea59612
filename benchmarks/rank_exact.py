"""Whether several ranks train as one does, and go on from a checkpoint bit for bit: parts of `benchmarks.two_ranks`."""

from __future__ import annotations

import traceback
import zlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from dit_moe_kernels import use_backend
from torch import Tensor

from dit_moe import DiT, DiTConfig
from dit_moe.parallel import ParallelConfig, full_state_dict
from dit_moe.runs import RunFolder
from dit_moe.training import Trainer, TrainingReport, TrainingSettings
from dit_moe.training.shards import local_part
from dit_moe.training.trainer import _Draws

from .ranks import Notes, rank_device
from .trainers import RandomLatents, say

SMALL = DiTConfig(
    input_size=8, patch_size=2, in_channels=4, hidden_size=128, depth=4, num_heads=4, num_experts=8, num_classes=10,
    learn_sigma=False,
)  # fmt: skip
TINY = DiTConfig(
    input_size=4, patch_size=2, in_channels=2, hidden_size=32, depth=2, num_heads=2, num_experts=4, num_classes=3,
    learn_sigma=False,
)  # fmt: skip
STEPS, BATCH = 50, 16
SPREADS = {
    "ddp": ParallelConfig("ddp"),
    "fsdp": ParallelConfig("fsdp"),
    "ddp, experts over 2": ParallelConfig("ddp", 2),
    "fsdp, experts over 2": ParallelConfig("fsdp", 2),
}
# The products of fp32 are exact fp32 ones on either backend of the kernels, as long as nobody allows TF32.
CASES: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32", "shuffles": 4},
    "fp32, reference": {"dtype": "fp32", "backend": "reference", "cuda_graph": False, "shuffles": 1},
    "bf16": {"dtype": "bf16", "shuffles": 12},
}
NUMBERS = ("loss", "balance_loss", "grad_norm")
FP32_BAR = 1e-5
_RESUMED: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32"},
    "least state": {
        "dtype": "bf16-stochastic", "moments": "bf16", "ema_dtype": "bf16", "ema_device": "cpu", "ema_every": 5,
        "recompute_blocks": 2,
    },
}  # fmt: skip


def alone(rank: int, num_ranks: int, folder: Path, *, tiny: bool) -> None:
    """Each case without torch.distributed, and again with the images of each batch in other orders."""
    notes = Notes(folder, rank)
    for name, case in CASES.items():
        runs = []
        for shuffle in range(1 + (1 if tiny else case["shuffles"])):
            runs.append(_trained(case, None, shuffle, tiny))
            notes.add(**{name: runs})
        say(f"one rank, {name}: {len(runs)} runs, {runs[0]['passes']}, loss {runs[0]['loss'][-1]:.5f} at last")
    notes.add(tf32=torch.backends.cuda.matmul.allow_tf32, precision=torch.get_float32_matmul_precision())


def spread(rank: int, num_ranks: int, folder: Path, *, tiny: bool) -> None:
    """Each case with the model spread in each way."""
    notes = Notes(folder, rank)
    for name, case in CASES.items():
        runs: dict[str, Any] = {}
        for how, parallel in SPREADS.items():
            try:
                runs[how] = _trained(case, parallel, 0, tiny)
            except Exception as error:  # most likely the same on all ranks, which then go on together
                runs[how] = {"failed": traceback.format_exc()}
                say(f"rank {rank}, {name}, {how}: {type(error).__name__}: {error}")
            notes.add(**{name: runs})
            if rank == 0 and "loss" in runs[how]:
                say(f"{num_ranks} ranks, {name}, {how}: loss {runs[how]['loss'][-1]:.5f} at last")


def judge(one: Mapping[str, Any], many: Mapping[str, Any]) -> dict[str, Any]:
    """Largest relative differences over the steps beside those of one rank's own runs, and whether the bars are met."""
    found: dict[str, Any] = {}
    for name in CASES:
        if name not in one or name not in many:
            continue
        runs = one[name]
        own = {number: [difference(a[number], b[number]) for a, b in combinations(runs, 2)] for number in NUMBERS}
        spread_of = {number: max(values) for number, values in own.items()}
        case: dict[str, Any] = {"one rank against itself, shuffled": spread_of}
        for how, run in many[name].items():
            if "failed" in run:
                case[how] = {"met": False, "failed": run["failed"]}
                continue
            seen: dict[str, Any] = {number: difference(run[number], runs[0][number]) for number in NUMBERS}
            seen["steps with other expert loads"] = sum(
                a != b for a, b in zip(run["loads"], runs[0]["loads"], strict=True)
            )
            bars = [FP32_BAR] * 3 if name.startswith("fp32") else [spread_of["loss"]]
            seen["met"] = all(seen[number] <= bar for number, bar in zip(NUMBERS, bars, strict=False))
            case[how] = seen
        found[name] = case
    if {"fp32", "bf16"} <= one.keys() & many.keys():
        exact = one["fp32"][0]["loss"]
        losses = {"one rank, shuffled": max(difference(run["loss"], exact) for run in one["bf16"])}
        losses |= {how: difference(run["loss"], exact) for how, run in many["bf16"].items() if "loss" in run}
        found["losses in bf16 against those of one rank in fp32"] = losses
    return found


def difference(seen: Sequence[float], expected: Sequence[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(seen, expected, strict=True))


def resumed(rank: int, num_ranks: int, folder: Path, *, tiny: bool) -> None:
    """Two runs that are not stopped, of which one saves half-way, and one that goes on from there."""
    notes, parallel = Notes(folder, rank), SPREADS["fsdp, experts over 2"]
    steps = 20
    for name, changes in _RESUMED.items():
        place = RunFolder(_place(folder, name))
        losses: list[float] = []
        first = _small_trainer(tiny, parallel, steps=steps, **changes)
        first.run(until=steps // 2)
        place.save(first)
        whole = full_state_dict(first.state())
        if rank == 0:
            torch.save(whole, _place(folder, name) / "whole.pt")
        first.run(report_every=1, on_report=lambda report, losses=losses: losses.append(report.loss))  # type: ignore[misc]
        later = _small_trainer(tiny, parallel, seed=rank + 5, steps=steps, **changes)
        place.resume(later)
        at = later.step
        later.run()
        again = _small_trainer(tiny, parallel, steps=steps, **changes)
        again.run()
        end = _parts_of(first)
        notes.add(
            **{
                name: {
                    "resumed at": at,
                    "steps": later.step,
                    "losses": losses,
                    "resumed: differing tensors": _differing(_parts_of(later), end),
                    "run twice: differing tensors": _differing(_parts_of(again), end),
                    "tensors": len(end),
                }
            }
        )


def resumed_alone(rank: int, num_ranks: int, folder: Path, *, tiny: bool) -> None:
    """One rank, without torch.distributed, goes on from the checkpoints of several."""
    notes = Notes(folder, rank)
    for name, changes in _RESUMED.items():
        losses: list[float] = []
        run = _small_trainer(tiny, seed=7, steps=20, **changes)
        RunFolder(_place(folder, name)).resume(run)
        whole = torch.load(_place(folder, name) / "whole.pt")
        loaded = _differing({key: tensor.cpu() for key, tensor in run.state().items()}, whole)
        at = run.step
        run.run(report_every=1, on_report=lambda report, losses=losses: losses.append(report.loss))  # type: ignore[misc]
        notes.add(**{name: {"resumed at": at, "loaded: differing tensors": loaded, "losses": losses}})


def judge_resumed(ranks: Sequence[Mapping[str, Any]], one: Mapping[str, Any]) -> dict[str, Any]:
    """Whether all ranks ended with the same bits, and how far one rank's losses from the checkpoint are from theirs."""
    found: dict[str, Any] = {}
    for name in _RESUMED:
        if not ranks or any(name not in rank for rank in ranks):
            continue
        differing = [rank[name]["resumed: differing tensors"] for rank in ranks]
        found[name] = {
            "met": not any(differing) and all(rank[name]["resumed at"] == 10 for rank in ranks),
            "an unbroken run repeats itself": not any(rank[name]["run twice: differing tensors"] for rank in ranks),
        }
        if name in one:
            found[name]["one rank loads the same bits"] = not one[name]["loaded: differing tensors"]
            found[name]["one rank: largest relative difference of losses"] = difference(
                one[name]["losses"], ranks[0][name]["losses"]
            )
    return found


def _place(folder: Path, name: str) -> Path:
    """Where all starts of the part find a run: beside the folder of this one."""
    return folder.parent / f"run {name}"


def _trained(case: Mapping[str, Any], parallel: ParallelConfig | None, shuffle: int, tiny: bool) -> dict[str, Any]:
    settings = {name: value for name, value in case.items() if name not in ("backend", "shuffles")}
    with use_backend(case.get("backend", "auto")):
        trainer = _small_trainer(tiny, parallel, **settings)
        if shuffle:
            _shuffle(trainer, shuffle)
        reports: list[TrainingReport] = []
        trainer.run(report_every=1, on_report=reports.append)
    found: dict[str, Any] = {number: [getattr(report, number) for report in reports] for number in NUMBERS}
    found["loads"] = [_checksum(report.expert_load) for report in reports]
    found["passes"] = "eager" if trainer._graphed is None else trainer._graphed.mode
    return found


def _small_trainer(
    tiny: bool, parallel: ParallelConfig | None = None, seed: int = 0, steps: int = STEPS, **settings: Any
) -> Trainer:
    """Random everywhere: a fresh model predicts zero and has hardly a gradient."""
    config, device = TINY if tiny else SMALL, rank_device()
    torch.manual_seed(seed)
    model = DiT(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "pos_embed":
                parameter.add_(torch.randn_like(parameter) * 0.05)
    data = RandomLatents(4 * BATCH, config, device)
    options = {"batch_size": BATCH, "warmup_steps": 5, "ema_decay": 0.99, "seed": 3} | settings
    return Trainer(model, data, TrainingSettings(steps=steps, **options), device, parallel)


def _shuffle(trainer: Trainer, seed: int) -> None:
    """Give each step its images, times, noise and dropped classes in another order: the same sums in another order."""
    indices, draw, batch = trainer.order.indices, trainer._draw, trainer.settings.batch_size

    def places() -> Tensor:
        return torch.randperm(batch, generator=torch.Generator().manual_seed(1000 * seed + trainer.step))

    def shuffled(tensor: Tensor) -> Tensor:
        return tensor[places().to(tensor.device)]

    def shuffled_draws() -> _Draws:
        draws = draw()  # these data have no posterior
        return draws._replace(**{name: shuffled(getattr(draws, name)) for name in draws._fields[:-1]})

    trainer.order.indices = lambda step: shuffled(indices(step))  # type: ignore[method-assign]
    trainer._draw = shuffled_draws  # type: ignore[method-assign]


def _parts_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: local_part(tensor).cpu() for name, tensor in trainer.state().items()}


def _differing(seen: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> list[str]:
    if seen.keys() != expected.keys():
        return sorted(seen.keys() ^ expected.keys())
    return [name for name, tensor in expected.items() if not torch.equal(seen[name], tensor)]


def _checksum(loads: tuple[tuple[float, ...], ...]) -> int:
    return zlib.crc32(repr([[round(load, 4) for load in layer] for layer in loads]).encode())
