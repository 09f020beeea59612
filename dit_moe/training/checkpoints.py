"""Checkpoints of a run: sharded folders by torch.distributed.checkpoint, whole or not there at all.

checkpoints/step-00000500/record.json   step and identity of the run; written last, before the folder gets its name
checkpoints/step-00000500/*.distcp      the tensors, each rank's own parts
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from concurrent.futures import Future
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor

from ..checkpoint import CheckpointError
from ..checkpoint.files import flush_to_disk

_RECORD = "record.json"
_NAME = re.compile(r"step-(\d{8,})")


class Checkpoints:
    """The checkpoints in a folder: written aside and renamed, the newest ones kept.

    With several ranks every method but `latest` is a collective call, and the folder must be seen by all of them.

    Args:
        folder: made when the first checkpoint is written.
        keep: how many checkpoints stay, at least 1.
        asynchronous: `save` returns once the tensors are copied to the host's memory; a thread writes them.

    Raises:
        ValueError: keep < 1.
    """

    def __init__(self, folder: str | os.PathLike, *, keep: int = 2, asynchronous: bool = False) -> None:
        if keep < 1:
            raise ValueError(f"keep: got {keep}, expected at least 1")
        self.folder, self.keep, self.asynchronous = Path(folder), keep, asynchronous
        self._many = dist.is_initialized() and dist.get_world_size() > 1
        self._first = not self._many or dist.get_rank() == 0
        # Ranks tell each other of their parts over gloo, in a group of its own, since a thread may do it.
        self._group = dist.new_group(backend="gloo") if self._many else None
        self._pending: Future | None = None
        if not self._many:  # a filter for good, since a thread may be warned too
            warnings.filterwarnings("ignore", message="torch.distributed is (disabled|unavailable)")

    def save(self, tensors: dict[str, Tensor], step: int, record: dict[str, Any]) -> None:
        """Write a checkpoint; of a step that has one already, nothing is written.

        Args:
            tensors: the state, DTensors among them.
            step: names the checkpoint.
            record: what `load` shall give back beside the tensors, as JSON can hold it.

        Raises:
            OSError: this checkpoint, or one still being written, could not be.
        """
        import torch.distributed.checkpoint as dcp

        self.wait()
        final = self.folder / f"step-{step:08d}"
        if self._agreed(final.exists()):
            return
        aside = self.folder / f".{final.name}.tmp"
        if self._first:
            for left in self.folder.glob(".step-*.tmp"):  # by a run that was killed
                shutil.rmtree(left)
            aside.mkdir(parents=True)
        self._barrier()
        writer = dcp.FileSystemWriter(aside)
        ranks: dict[str, Any] = {"process_group": self._group, "no_dist": not self._many}
        if not self.asynchronous:
            try:
                dcp.save(tensors, storage_writer=writer, **ranks)
            except dcp.CheckpointException as error:
                raise OSError(f"a checkpoint in {self.folder} could not be written: {_cause(error)}") from error
            self._finish(aside, final, record)
            self._barrier()
            return
        written = cast(Future, dcp.async_save(tensors, storage_writer=writer, **ranks))
        # Callbacks run after a future's waiters are woken, so what `wait` waits for is a future of their end.
        finished: Future[None] = Future()
        self._pending = finished
        written.add_done_callback(lambda _: self._finish_later(written, finished, aside, final, record))

    def wait(self) -> None:
        """Wait for a checkpoint that is still being written.

        Raises:
            OSError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        error = pending.exception()
        if error is not None:
            raise OSError(f"a checkpoint in {self.folder} could not be written: {_cause(error)}") from error
        self._barrier()

    def latest(self) -> Path | None:
        """The newest checkpoint, or None."""
        found = self._found()
        return found[-1] if found else None

    def record(self) -> dict[str, Any]:
        """What was saved beside the tensors of the newest checkpoint.

        Raises:
            FileNotFoundError: there is no checkpoint.
            CheckpointError: it is damaged.
        """
        path = self.latest()
        if path is None:
            raise FileNotFoundError(f"cannot resume: no checkpoint in {self.folder}")
        try:
            return json.loads((path / _RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged checkpoint: {error}") from error

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Read the newest checkpoint into these tensors, however either is sharded.

        Raises:
            FileNotFoundError: there is no checkpoint.
            CheckpointError: it is damaged, or its tensors are others; the tensors here may have changed.
        """
        import torch.distributed.checkpoint as dcp

        path = self.latest()
        if path is None:
            raise FileNotFoundError(f"cannot resume: no checkpoint in {self.folder}")
        try:
            dcp.load(tensors, checkpoint_id=path, process_group=self._group, no_dist=not self._many)
        except (Exception, dcp.CheckpointException) as error:  # the second is no Exception
            raise CheckpointError(f"{path}: damaged checkpoint, or one of another model: {_cause(error)}") from error

    def _found(self) -> list[Path]:
        if not self.folder.is_dir():
            return []
        numbers = {path: _NAME.fullmatch(path.name) for path in self.folder.iterdir()}
        return sorted((path for path, match in numbers.items() if match), key=lambda path: int(path.name[5:]))

    def _finish(self, aside: Path, final: Path, record: dict[str, Any]) -> None:
        """Give a whole checkpoint its name, on the first rank, and drop old ones."""
        if not self._first:
            return
        (aside / _RECORD).write_text(json.dumps(record), encoding="utf-8")
        flush_to_disk(aside / _RECORD)
        flush_to_disk(aside)
        os.rename(aside, final)
        flush_to_disk(self.folder)
        for old in self._found()[: -self.keep]:
            # Renamed first: a checkpoint half deleted would look like a whole one.
            doomed = self.folder / f".{old.name}.tmp"
            os.rename(old, doomed)
            shutil.rmtree(doomed)

    def _finish_later(
        self, written: Future, finished: Future, aside: Path, final: Path, record: dict[str, Any]
    ) -> None:
        """The same in the thread that wrote; an error waits for `wait`."""
        try:
            written.result()
            self._finish(aside, final, record)
        except BaseException as error:
            finished.set_exception(error)
        else:
            finished.set_result(None)

    def _agreed(self, here: bool) -> bool:
        """The first rank's answer: folders may show late elsewhere."""
        if not self._many:
            return here
        answer = [here]
        dist.broadcast_object_list(answer, 0, group=self._group)
        return answer[0]

    def _barrier(self) -> None:
        if self._many:
            dist.barrier(group=self._group)


def _cause(error: BaseException) -> str:
    """One line of what went wrong; DCP wraps errors of all ranks in one with many lines of traceback."""
    failures = getattr(error, "failures", None)
    if failures:
        error = next(iter(failures.values()))[0]
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
