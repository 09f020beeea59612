"""Functions on several processes: results by rank, failures and hangs with what the ranks say of them."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from benchmarks.ranks import Notes, RanksFailedError, rank_device, read_notes, run_on_ranks


def total(rank: int, num_ranks: int, folder: Path, *, of: int) -> int:
    numbers = torch.tensor([of + rank], device=rank_device())
    dist.all_reduce(numbers)
    return int(numbers)


def without_group(rank: int, num_ranks: int, folder: Path) -> bool:
    return dist.is_initialized()


def breaks(rank: int, num_ranks: int, folder: Path) -> None:
    Notes(folder, rank).add(before=rank)
    if rank == 1:
        raise ValueError("the second rank broke")
    dist.barrier()


def hangs(rank: int, num_ranks: int, folder: Path) -> None:
    Notes(folder, rank).add(before=rank)
    time.sleep(1000)


def test_results_by_rank(tmp_path: Path) -> None:
    assert run_on_ranks(2, [partial(total, of=3)], tmp_path) == {"total": [7, 7]}


def test_one_process_without_a_group(tmp_path: Path) -> None:
    assert run_on_ranks(1, [without_group], tmp_path, group=False) == {"without_group": [False]}


def test_a_rank_that_breaks_ends_all_and_says_why(tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError, match="the second rank broke"):
        run_on_ranks(2, [breaks], tmp_path)
    assert read_notes(tmp_path, 1) == {"before": 1}


def test_a_hang_ends_and_says_where(tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError, match="in hangs"):
        run_on_ranks(1, [hangs], tmp_path, 15, group=False)
    assert read_notes(tmp_path, 0) == {"before": 0}
