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
from torch.nn import functional

from dit_moe import DiTConfig, model_config
from dit_moe.layers import sincos_pos_embed
from dit_moe.parallel import ParallelConfig
from dit_moe.training import Trainer, TrainingSettings
from dit_moe.training.shards import local_part

from .ranks import Notes, rank_device
from .trainers import device_bytes, new_trainer, say, timed, train_measured, wait

EXPERTS_OVER_2 = ParallelConfig("ddp", 2)
BAR = 0.6
# Numbers of recomputed blocks, of XL's 28, by global batch: on one GPU to try, the first that fits it with its graph;
# with experts over two the fewest, which are not tried: a rank without room would leave the other waiting.
RECOMPUTE: dict[int, tuple[int, ...]] = {64: (0, 8), 128: (18, 24), 256: (28,)}
RECOMPUTE_SPREAD = {64: 0, 128: 0, 256: 18}
_RATIOS = ("median", "unwatched", "forward_backward", "update")
_WARM_UP, _STEPS, _MORE_STEPS = 5, 12, 4


class Setting(NamedTuple):
    """A training step to be timed: images over all ranks, recomputed blocks, and whether the routers are made even."""

    batch: int
    recompute: int
    even: bool = True


def preset(name: str, tiny: bool) -> DiTConfig:
    """A preset, or a narrow model with its number of experts and two blocks."""
    config = model_config(name)
    if not tiny:
        return config
    return replace(config, depth=2, hidden_size=32, num_heads=2, input_size=8, num_classes=10)


def step_alone(
    rank: int, num_ranks: int, folder: Path, *, batches: Sequence[int], tiny: bool, even: bool = True
) -> None:
    """Steps of XL/2-8E2A on one rank, as a user has them: with a CUDA graph, as few recomputed blocks as fit."""
    notes, config = Notes(folder, rank), preset("DiT-MoE-XL/2-8E2A", tiny)
    for batch in batches:
        tried: dict[str, Any] = {}
        for recompute in (1,) if tiny else RECOMPUTE.get(batch, (config.depth,)):
            setting = Setting(batch, recompute, even)
            figures = _attempt(setting, config)
            if "failed" not in figures:
                notes.add(**{str(batch): {"recompute": recompute, **figures, "did not fit": tried}})
                break
            tried[str(recompute)] = figures["failed"]
            notes.add(**{str(batch): {"did not fit": tried}})


def step_spread(rank: int, num_ranks: int, folder: Path, *, settings: Sequence[Setting], tiny: bool) -> None:
    """The same steps with experts over the ranks: figures by batch and recomputed blocks; and what exchanges take."""
    notes, config = Notes(folder, rank), preset("DiT-MoE-XL/2-8E2A", tiny)
    found: dict[str, dict[str, Any]] = {}
    for setting in settings:
        figures = measured(setting, config, EXPERTS_OVER_2)
        found.setdefault(str(setting.batch), {})[str(setting.recompute)] = figures
        notes.add(**found)
    batches = sorted({setting.batch for setting in settings})
    notes.add(exchange=[_exchange_seconds(batch // num_ranks, config) for batch in batches])


def spread_settings(one: Mapping[str, Any], batches: Sequence[int], even: bool) -> list[Setting]:
    """What to time with experts over the ranks, of the batches that one rank has done.

    The fewest recomputed blocks that the memory asks for, as a user would train; and as many as on one rank.
    """
    done = [(batch, one[str(batch)]["recompute"]) for batch in batches if "recompute" in one.get(str(batch), {})]
    return [
        Setting(batch, recompute, even)
        for batch, alone in done
        for recompute in sorted({RECOMPUTE_SPREAD.get(batch, 0), alone})
    ]


def judge(one: Mapping[str, Any], many: Mapping[str, Any]) -> dict[str, Any]:
    """Ratios of the times at each batch, of the fastest setting of experts over ranks, and whether they meet the bar.

    One rank's time is that with as few recomputed blocks as fit it, so both sides are what a user would run. Where the
    fastest setting recomputes another number of blocks, the ratio at one rank's number stands beside it.
    """
    found = {}
    for batch, alone in one.items():
        if "median_seconds" not in alone or not many.get(batch):
            continue
        settings = {int(recompute): figures["median_seconds"] for recompute, figures in many[batch].items()}
        fastest = min(settings, key=lambda recompute: settings[recompute])
        figures, equal = many[batch][str(fastest)], settings.get(alone["recompute"])
        found[batch] = {
            **{f"{name} ratio": figures[f"{name}_seconds"] / alone[f"{name}_seconds"] for name in _RATIOS},
            "recomputed blocks": {"one rank": alone["recompute"], "experts over ranks": fastest},
            "median ratio at equal recomputing": None if equal is None else equal / alone["median_seconds"],
            "met": figures["median_seconds"] / alone["median_seconds"] <= BAR,
        }
    return found


@torch.no_grad()
def make_even(trainer: Trainer) -> None:
    """Take out of every router's weight what all tokens have in common, so that new routers use all experts alike.

    Position embeddings have a mean, and a new router, whose weight is random, turns this common part of its input into
    a common preference: nearly all tokens choose the same experts, and one of two ranks has most of the rows. In
    training the balance loss works against that, so a step timed with new routers would tell of a run's first steps
    alone. Here weights lose their component along the mean m of the normalised position embeddings,
    W -= (W m) m^T / |m|^2; what tells tokens apart stays. To be called for one rank and for several alike.
    """
    config = trainer.config
    embeddings = sincos_pos_embed(config.hidden_size, config.input_size // config.patch_size)
    mean_D = functional.layer_norm(embeddings.float(), (config.hidden_size,)).mean(-2).flatten().to(trainer.device)
    mean_D /= mean_D.norm()
    for name, weight in trainer.optimizer.weights.items():
        if name.endswith(".moe.gate.weight"):
            own = local_part(weight)  # whole rows, also where FSDP has cut it
            own.copy_(own.float() - (own.float() @ mean_D)[:, None] * mean_D)
    trainer.optimizer.copy_weights()


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
    if setting.even:
        make_even(trainer)
    router = "even" if setting.even else "initial"
    figures = {"router": router, **_seconds_of(trainer), "made_seconds": made, "settings": settings.to_dict()}
    if trainer.rank == 0:
        say(
            f"{trainer.num_ranks} ranks, batch {setting.batch}, {setting.recompute} blocks recomputed: "
            f"{figures['median_seconds'] * 1e3:.1f} ms, made in {made:.1f} s, "
            f"a rank's largest share of a layer's rows {figures['largest share of rows of a rank']:.3f}"
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
    trainer.report()
    seconds = [timed(trainer.train_step, device) for _ in range(_STEPS)]
    report = trainer.report()
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
        "largest share of rows of a rank": max(map(busiest_share, report.expert_load)),
        "mean share of the busier rank": statistics.mean(map(busiest_share, report.expert_load)),
        "loss": report.loss,
        "device": device_bytes(device),
    }


def busiest_share(loads: Sequence[float], ranks: int = 2) -> float:
    """Of a layer's rows, the share of the rank with most of them, its experts being shared out in order."""
    own = len(loads) // ranks
    return max(sum(loads[first : first + own]) for first in range(0, len(loads), own)) / sum(loads)


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
    sent = torch.randn(rows, config.hidden_size, dtype=torch.bfloat16, device=device)
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
