"""Run tasks in a worker process, so that a provider that crashes or hangs costs its own rows and nothing else.

The worker notes in a file which provider it is about to run. When it dies, the parent blames that provider, starts
another worker and goes on with the same task without it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TextIO

from .engine import Context, DeviceLost, ensure_alive
from .env import child_environment
from .results import Row
from .suites import SUITES, Task
from .timing import TimingOptions, first_line, make_clock


@dataclass
class Job:
    """Everything a worker needs.

    Args:
        tasks: what to measure, in order.
        options: how long.
        keep_failed: see `engine.Context`.
        skip: task index -> provider -> status to report instead of running it.
    """

    tasks: Sequence[Task]
    options: TimingOptions
    keep_failed: bool = False
    skip: dict[int, dict[str, str]] = field(default_factory=dict)

    def to_json(self, first: int) -> str:
        """The job from task `first` on."""
        return json.dumps(
            {
                "first": first,
                "tasks": [task.to_dict() for task in self.tasks],
                "options": asdict(self.options),
                "keep_failed": self.keep_failed,
                "skip": self.skip,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> tuple[Job, int]:
        """The job and the index of the first task."""
        values = json.loads(text)
        skip = {int(index): reasons for index, reasons in values["skip"].items()}
        tasks = [Task.from_dict(task) for task in values["tasks"]]
        return cls(tasks, TimingOptions(**values["options"]), values["keep_failed"], skip), values["first"]


def run_here(
    job: Job, first: int = 0, tell: Callable[[dict[str, Any]], None] = lambda event: None
) -> Iterator[list[Row]]:
    """Run the tasks in this process; yields each task's rows.

    Args:
        job: the tasks.
        first: index of the first task to run.
        tell: hears {"task": index, "provider": name} before each provider, {"task": index, "rows": [...]} after a task.
    """
    clock = make_clock(job.tasks[0].device)
    clock.warm_up(job.options.warmup_ms)
    for index in range(first, len(job.tasks)):
        task = job.tasks[index]
        context = Context(
            clock,
            job.options,
            watch=lambda provider, index=index: tell({"task": index, "provider": provider}),
            skip=job.skip.get(index, {}),
            keep_failed=job.keep_failed,
        )
        rows = _run_task(task, context)
        tell({"task": index, "rows": [asdict(row) for row in rows]})
        yield rows


def _run_task(task: Task, context: Context) -> list[Row]:
    """One task; failures outside any provider, such as inputs that do not fit, become rows too."""
    context.watch("inputs")
    if all(provider in context.skip for provider in task.providers):
        return _rows_without_figures(task, context.skip)
    context.clock.warm_up(min(context.options.warmup_ms, 300.0))
    try:
        return SUITES[task.suite].run(task, context)
    except DeviceLost:
        raise
    except Exception as error:
        traceback.print_exc()
        ensure_alive(context.clock, "inputs")
        return _rows_without_figures(task, dict.fromkeys(task.providers, f"failed: {first_line(error)}"))


def run_isolated(job: Job, stall_seconds: float) -> Iterator[list[Row]]:
    """Run the tasks in worker processes; yields each task's rows as soon as it is done.

    Args:
        job: the tasks; its `skip` is filled with the providers that crashed.
        stall_seconds: a worker that reports nothing for this long is stopped, and its current provider blamed.
    """
    first = 0
    while first < len(job.tasks):
        started, current, how = first, {"task": first, "provider": "inputs"}, ""
        for event in _one_worker(job.to_json(first), stall_seconds):
            if "rows" in event:
                yield [Row(**row) for row in event["rows"]]
                first = event["task"] + 1
                current = {"task": first, "provider": "inputs"}
            elif "reason" in event:
                how = event["reason"]
            elif "end" in event:
                how = how or event["end"]
            else:
                current = event
        # An earlier task of the same worker may have left it in a bad state: the inputs get another try in a fresh one.
        fresh = current["task"] == started
        if first < len(job.tasks) and (fresh or current["provider"] != "inputs"):
            _blame(job, current, how)


def _one_worker(job_text: str, stall_seconds: float) -> Iterator[dict[str, Any]]:
    """Run one worker to its end; yields what it reports, and at last {"end": how it ended}."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, event_file = Path(folder, "job.json"), Path(folder, "events.jsonl")
        job_file.write_text(job_text)
        event_file.touch()
        command = [sys.executable, "-m", "benchmarks.worker", str(job_file), str(event_file)]
        worker = subprocess.Popen(command, env=child_environment())
        how = ""
        try:
            with event_file.open() as events:
                while worker.poll() is None:
                    time.sleep(0.2)
                    yield from _complete_lines(events)
                    if time.time() - event_file.stat().st_mtime > stall_seconds:
                        how = f"no progress for {stall_seconds:.0f} s"
                        worker.kill()
                        worker.wait()
                yield from _complete_lines(events)
        finally:
            if worker.poll() is None:
                worker.kill()
                worker.wait()
        yield {"end": how or f"the process ended with code {worker.returncode}"}


def _complete_lines(events: TextIO) -> Iterator[dict[str, Any]]:
    """Events written since the last look; a line still being written is left for the next look."""
    while True:
        position = events.tell()
        line = events.readline()
        if not line.endswith("\n"):
            events.seek(position)
            return
        yield json.loads(line)


def _blame(job: Job, current: dict[str, Any], how: str) -> None:
    """Skip the provider that ran when the worker died; if it was no provider, skip the whole task."""
    task, provider = job.tasks[current["task"]], current["provider"]
    reasons = job.skip.setdefault(current["task"], {})
    culprits = [provider] if provider in task.providers and provider not in reasons else task.providers
    during = "" if provider in task.providers else f" during {provider}"
    for name in culprits:
        reasons.setdefault(name, f"failed: {how}{during}")
    print(f"benchmarks: {', '.join(culprits)} on {task.case}: {how}{during}", file=sys.stderr)


def _rows_without_figures(task: Task, statuses: dict[str, str]) -> list[Row]:
    return [
        replace(task.template, provider=provider, timer=timer, status=statuses[provider])
        for provider in task.providers
        for timer in task.timers
    ]
