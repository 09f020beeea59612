"""Run functions on several gloo processes of this machine, with an end to every hang."""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

Scenario = Callable[[int, int, Path], Any]


def run_on_ranks(num_ranks: int, scenarios: list[Scenario], folder: Path, timeout: float = 300) -> dict[str, list[Any]]:
    """Call each scenario with (rank, num_ranks, folder) on every rank; name of the scenario -> results by rank.

    One start of the processes serves all scenarios, which is most of their time. A scenario that fails on a rank ends
    the run, since the others would wait for it.
    """
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=_work, args=(rank, num_ranks, scenarios, str(folder)), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    while any(process.exitcode is None for process in processes):
        if any(process.exitcode for process in processes) or time.monotonic() > deadline:
            for process in processes:
                process.kill()
                process.join()
        time.sleep(0.05)
    if any(process.exitcode for process in processes):
        errors = [path.read_text() for path in sorted(folder.glob("error.*.txt"))]
        codes = [process.exitcode for process in processes]
        raise AssertionError("\n".join([f"exit codes {codes}, {timeout} s being the longest time", *errors]))
    by_rank = [torch.load(folder / f"results.{rank}.pt", weights_only=False) for rank in range(num_ranks)]
    return {name: [results[name] for results in by_rank] for name in by_rank[0]}


def _work(rank: int, num_ranks: int, scenarios: list[Scenario], folder: str) -> None:
    os.environ["DIT_MOE_BACKEND"] = "reference"  # the Triton interpreter would take minutes
    torch.set_num_threads(1)
    here = Path(folder)
    dist.init_process_group(
        "gloo", init_method=f"file://{here / 'store'}", rank=rank, world_size=num_ranks, timeout=timedelta(seconds=120)
    )
    results = {}
    for scenario in scenarios:
        try:
            torch.manual_seed(0)
            results[scenario.__name__] = scenario(rank, num_ranks, here)
        except BaseException:
            (here / f"error.{rank}.txt").write_text(f"rank {rank}, {scenario.__name__}:\n{traceback.format_exc()}")
            os._exit(1)  # no orderly end: the other ranks may be waiting for this one
    torch.save(results, here / f"results.{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
