"""Run functions on several processes of this machine, one a rank, with an end to every hang; the tests do so too."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Scenario = Callable[[int, int, Path], Any]

_own_device = torch.device("cpu")


class RanksFailedError(RuntimeError):
    """A rank failed, or took too long; the message has what the ranks said."""


def rank_device() -> torch.device:
    """This rank's device inside `run_on_ranks`; elsewhere the CPU."""
    return _own_device


def run_on_ranks(
    num_ranks: int,
    scenarios: Sequence[Scenario],
    folder: Path,
    timeout: float = 300,
    device: str = "cpu",
    *,
    group: bool = True,
) -> dict[str, list[Any]]:
    """Call each scenario with (rank, num_ranks, folder) on every rank; name of the scenario -> results by rank.

    One start of the processes serves all scenarios, which is most of their time. A scenario that fails on a rank ends
    the run, since the others would wait for it.

    Args:
        num_ranks: processes.
        scenarios: functions of a module, or partials of such.
        folder: must exist and be this run's own.
        timeout: seconds until all ranks must have ended.
        device: "cpu", over gloo and with the reference backend; or "cuda", over NCCL and gloo, a GPU for each rank.
        group: false leaves torch.distributed alone, for one process as a user has it.

    Raises:
        RanksFailedError: a rank failed, or the time was over.
    """
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=_work, args=(rank, num_ranks, scenarios, str(folder), timeout, device, group))
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.daemon = True
        process.start()
    deadline = time.monotonic() + timeout
    try:
        while any(process.exitcode is None for process in processes):
            if any(process.exitcode for process in processes):
                break
            if time.monotonic() > deadline:
                _ask_where(processes)
                break
            time.sleep(0.05)
    finally:
        codes = [process.exitcode for process in processes]
        _end(processes)
    if any(codes) or None in codes:
        errors = [path.read_text() for name in ("error", "stack") for path in sorted(folder.glob(f"{name}.*.txt"))]
        raise RanksFailedError("\n".join([f"exit codes {codes}, {timeout:.0f} s being the longest time", *errors]))
    by_rank = [torch.load(folder / f"results.{rank}.pt", weights_only=False) for rank in range(num_ranks)]
    return {name: [results[name] for results in by_rank] for name in by_rank[0]}


def _ask_where(processes: Sequence[Any]) -> None:
    """Let processes that hang write down where."""
    for process in processes:
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(0.5)


def _end(processes: Sequence[Any]) -> None:
    """A process that runs still waits for one that is gone, or hangs."""
    for process in processes:
        if process.exitcode is None:
            process.kill()
        process.join()


def _work(
    rank: int, num_ranks: int, scenarios: Sequence[Scenario], folder: str, timeout: float, device: str, group: bool
) -> None:
    here = Path(folder)
    results = {}
    name = "start"
    stack = (here / f"stack.{rank}.txt").open("w")
    faulthandler.register(signal.SIGUSR1, stack)
    try:
        _join(rank, num_ranks, here, timeout, device, group)
        for scenario in scenarios:
            name = _name(scenario)
            torch.manual_seed(0)
            results[name] = scenario(rank, num_ranks, here)
    except BaseException:
        (here / f"error.{rank}.txt").write_text(f"rank {rank}, {name}:\n{traceback.format_exc()}")
        os._exit(1)  # no orderly end: the other ranks may be waiting for this one
    torch.save(results, here / f"results.{rank}.pt")
    if group:
        dist.barrier()
        dist.destroy_process_group()


def _join(rank: int, num_ranks: int, folder: Path, timeout: float, device: str, group: bool) -> None:
    global _own_device
    if device == "cuda":
        _own_device = torch.device("cuda", rank)
        torch.cuda.set_device(_own_device)
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_ranks))
    else:
        os.environ["DIT_MOE_BACKEND"] = "reference"  # the Triton interpreter would take minutes
        torch.set_num_threads(1)
    if group:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=num_ranks,
            timeout=timedelta(seconds=min(120, timeout)),
        )


def _name(scenario: Scenario) -> str:
    return (scenario.func if isinstance(scenario, partial) else scenario).__name__


class Notes:
    """What a rank has found so far, in a file that is there also when the rank is ended.

    Args:
        folder: of `run_on_ranks`.
        rank: whose notes these are.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self._path = _notes_path(folder, rank)
        self._found: dict[str, Any] = {}

    def add(self, **found: Any) -> None:
        """Note what JSON can hold."""
        self._found.update(found)
        aside = self._path.with_suffix(".tmp")
        aside.write_text(json.dumps(self._found))
        os.replace(aside, self._path)


def read_notes(folder: Path, rank: int) -> dict[str, Any]:
    """The notes of a rank, empty where it took none."""
    path = _notes_path(folder, rank)
    return json.loads(path.read_text()) if path.exists() else {}


def _notes_path(folder: Path, rank: int) -> Path:
    return folder / f"notes.{rank}.json"
