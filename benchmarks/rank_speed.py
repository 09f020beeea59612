"""How fast and how large training on several ranks is: parts of `benchmarks.two_ranks`."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from dit_moe import DiTConfig, model_config
from dit_moe.parallel import ParallelConfig
from dit_moe.training import Trainer, TrainingSettings

from .ranks import Notes, rank_device
from .trainers import device_bytes, new_trainer, say, timed, train_measured, wait

EXPERTS_OVER_2 = ParallelConfig("ddp", 2)
BAR = 0.6
# Numbers of recomputed blocks to try on one GPU, of XL's 28, by global batch: the first that fits it with its graph.
RECOMPUTE: dict[int, tuple[int, ...]] = {64: (0, 8), 128: (18, 24), 256: (28,)}
_WARM_UP, _STEPS, _MORE_STEPS = 3, 8, 4


class Setting(NamedTuple):
    """A training step to be timed on one rank and on several: images over all ranks, and recomputed blocks."""

    batch: int
    recompute: int


def preset(name: str, tiny: bool) -> DiTConfig:
    """A preset, or a narrow model with its number of experts and two blocks."""
    config = model_config(name)
    if not tiny:
        return config
    return replace(config, depth=2, hidden_size=32, num_heads=2, input_size=8, num_classes=10)


def step_alone(rank: int, num_ranks: int, folder: Path, *, batches: Sequence[int], tiny: bool) -> None:
    """Steps of XL/2-8E2A on one rank, as a user has them: with a CUDA graph."""
    notes, config = Notes(folder, rank), preset("DiT-MoE-XL/2-8E2A", tiny)
    for batch in batches:
        tried: dict[str, Any] = {}
        for recompute in (0, 1) if tiny else RECOMPUTE.get(batch, (config.depth,)):
            setting = Setting(batch, recompute)
            figures = _attempt(setting, config)
            if "failed" not in figures:
                notes.add(**{str(batch): {"recompute": recompute, **figures, "did not fit": tried}})
                break
            tried[str(recompute)] = figures["failed"]
            notes.add(**{str(batch): {"did not fit": tried}})


def step_spread(rank: int, num_ranks: int, folder: Path, *, settings: Sequence[Setting], tiny: bool) -> None:
    """The same steps with experts over the ranks, also without recomputing; and what the exchanges alone take."""
    notes, config = Notes(folder, rank), preset("DiT-MoE-XL/2-8E2A", tiny)
    for setting in settings:
        figures = measured(setting, config, EXPERTS_OVER_2)
        notes.add(**{str(setting.batch): {"recompute": setting.recompute, **figures}})
    notes.add(exchange=[_exchange_seconds(setting.batch // num_ranks, config) for setting in settings])
    for setting in settings:
        if 0 < setting.recompute < config.depth or (setting.recompute and tiny):
            figures = measured(Setting(setting.batch, 0), config, EXPERTS_OVER_2)
            notes.add(**{f"{setting.batch} without recomputing": figures})


def judge(one: Mapping[str, Any], many: Mapping[str, Any]) -> dict[str, Any]:
    """Ratios of the medians at each batch, and whether they meet the bar."""
    found = {}
    for batch, figures in many.items():
        if batch in one and "median_seconds" in one[batch] and "median_seconds" in figures:
            ratios = {
                f"{name} ratio": figures[f"{name}_seconds"] / one[batch][f"{name}_seconds"]
                for name in ("median", "unwatched", "forward_backward", "update")
            }
            found[batch] = {**ratios, "recompute": figures["recompute"], "met": ratios["median ratio"] <= BAR}
    return found


def _attempt(setting: Setting, config: DiTConfig) -> dict[str, Any]:
    """Figures of one rank, or what failed where it has no room for its graph."""
    try:
        figures = measured(setting, config, None)
    except torch.OutOfMemoryError as error:
        figures = {"failed": str(error).partition("\n")[0]}
    _free()  # only here nothing holds the trainer any more
    if rank_device().type == "cuda" and figures.get("passes", "CUDA graph") != "CUDA graph":
        return {"failed": figures["passes"], "median_seconds": figures["median_seconds"]}
    return figures


def measured(setting: Setting, config: DiTConfig, parallel: ParallelConfig | None) -> dict[str, Any]:
    """Seconds of steps of one trainer, which ends here; bf16 weights, moments and averages, all on the device."""
    settings = TrainingSettings(
        steps=1000, batch_size=setting.batch, dtype="bf16-stochastic", moments="bf16", ema_dtype="bf16",
        recompute_blocks=setting.recompute,
    )  # fmt: skip
    trainer, made = new_trainer(config, settings, rank_device(), parallel)
    figures = {**_seconds_of(trainer), "made_seconds": made, "settings": settings.to_dict()}
    if trainer.rank == 0:
        say(
            f"{trainer.num_ranks} ranks, batch {setting.batch}, {setting.recompute} blocks recomputed: "
            f"{figures['median_seconds'] * 1e3:.1f} ms, made in {made:.1f} s"
        )
    del trainer
    _free()
    return figures


def _seconds_of(trainer: Trainer) -> dict[str, Any]:
    device = trainer.device
    start = time.perf_counter()
    for _ in range(_WARM_UP):
        trainer.train_step()
    wait(device)
    warm_up = time.perf_counter() - start
    report = trainer.report()
    seconds = [timed(trainer.train_step, device) for _ in range(_STEPS)]
    unwatched = timed(partial(trainer.run, until=trainer.step + _MORE_STEPS, report_every=10**6), device) / _MORE_STEPS
    updates, hosts, totals = _split(trainer)
    trainer.report()
    return {
        "median_seconds": statistics.median(seconds),
        "seconds": seconds,
        "unwatched_seconds": unwatched,
        "forward_backward_seconds": statistics.median(
            total - update for total, update in zip(totals, updates, strict=True)
        ),
        "update_seconds": statistics.median(updates),
        "host_seconds": statistics.median(hosts),
        "warm_up_seconds": warm_up,
        "passes": "eager" if trainer._graphed is None else trainer._graphed.mode,
        "largest expert load": max(map(max, report.expert_load)),
        "loss": report.loss,
        "device": device_bytes(device),
    }


def _split(trainer: Trainer) -> tuple[list[float], list[float], list[float]]:
    """Seconds of the updates, which are waited for; of the host's part of the passes before; and of whole steps."""
    updates: list[float] = []
    hosts: list[float] = []
    starts: list[float] = []
    update = trainer._update

    def timed_update() -> tuple[Tensor, Tensor]:
        hosts.append(time.perf_counter() - starts[-1])
        found: list[tuple[Tensor, Tensor]] = []
        updates.append(timed(lambda: found.append(update()), trainer.device))
        return found[0]

    def step() -> None:
        starts.append(time.perf_counter())
        trainer.train_step()

    trainer._update = timed_update  # type: ignore[method-assign]
    totals = [timed(step, trainer.device) for _ in range(_MORE_STEPS)]
    trainer._update = update  # type: ignore[method-assign]
    return updates, hosts, totals


def _exchange_seconds(images: int, config: DiTConfig) -> dict[str, float]:
    """One all-to-all of a layer's rows, and one all-reduce of what DDP averages, with nothing beside them."""
    device, ranks = rank_device(), dist.get_world_size()
    rows = images * config.num_tokens * config.top_k // ranks * ranks
    sent = torch.zeros(rows, config.hidden_size, dtype=torch.bfloat16, device=device)
    received = torch.empty_like(sent)
    seconds = _repeated(lambda: dist.all_to_all_single(received, sent), device)
    return {"images a rank": images, "bytes": sent.nbytes, "seconds": seconds}


def _repeated(run: Callable[[], object], device: torch.device, times: int = 20) -> float:
    for _ in range(3):
        run()
    return timed(lambda: [run() for _ in range(times)], device) / times


def states(
    rank: int, num_ranks: int, folder: Path, *, name: str, parallel: ParallelConfig, options: Mapping[str, Any],
    tiny: bool,
) -> None:  # fmt: skip
    """Train a preset for a few steps: seconds to make it, bytes of its states, peaks, losses, seconds of steps."""
    notes, config = Notes(folder, rank), preset(name, tiny)
    changes = dict(options)
    if changes.pop("recompute", False):
        changes["recompute_blocks"] = config.depth
    settings = TrainingSettings(**changes)
    trainer, made = new_trainer(config, settings, rank_device(), parallel)
    notes.add(made_seconds=made, made_device=device_bytes(rank_device()), settings=settings.to_dict())
    if rank == 0:
        say(f"{name}: trainer made in {made:.1f} s")
    figures = train_measured(trainer)
    finite = all(math.isfinite(step["loss"]) and math.isfinite(step["grad_norm"]) for step in figures["steps"])
    notes.add(**figures, finite=finite)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
