"""Compare candidates on one task: build, check, time in turns, and turn every failure into a row that says why."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch

from .results import OK, Row, add_ratios
from .timing import Call, Clock, NotCapturable, Timed, TimingOptions, first_line, summarize, time_round_robin

MIB = 2**20
OUT_OF_MEMORY = "failed: out of memory"


class Unavailable(Exception):
    """A provider cannot run here; the message is the reason."""


class WrongResult(Exception):
    """A provider's result disagrees with the reference; the message says where and by how much."""


class DeviceLost(Exception):
    """The GPU no longer answers this process; args[0] is the provider at fault."""


@dataclass
class Candidate:
    """What one provider runs for a task; built only after its results were checked.

    Args:
        calls: the call to time, one for each copy of the inputs.
        flops: floating-point operations of one call.
        bytes: compulsory traffic of one call: each input read once, each output written once.
        held_bytes: inputs and weights of one call, added to its peak memory.
        status: "ok", maybe with a remark, or what to say of a candidate that is timed although it is wrong.
    """

    calls: Sequence[Call]
    flops: float | None = None
    bytes: float | None = None
    held_bytes: int = 0
    status: str = OK


Builder = Callable[[], Candidate]


class Watcher(Protocol):
    """Hears which provider is about to run, so that a crash can be blamed on it."""

    def __call__(self, provider: str) -> None: ...


@dataclass
class Context:
    """What a suite needs to run a task.

    Args:
        clock: of the task's device.
        options: how long to measure.
        watch: told of each provider before it runs.
        skip: providers that are not to be run, with the status to report for them.
        keep_failed: time providers whose results are wrong too; their status says so.
    """

    clock: Clock
    options: TimingOptions
    watch: Watcher = lambda provider: None
    skip: dict[str, str] = field(default_factory=dict)
    keep_failed: bool = False


def compare(context: Context, template: Row, timers: Sequence[str], builders: Mapping[str, Builder]) -> list[Row]:
    """Measure every provider on one task.

    Args:
        context: clock, options and watcher.
        template: the rows' task columns.
        timers: "eager", "graph" or both.
        builders: provider name -> function that builds, checks and returns its candidate.

    Returns:
        A row for every provider and timer, measured or not.

    Raises:
        DeviceLost: a provider broke the GPU context; nothing more can run in this process.
    """
    rows: dict[tuple[str, str], Row] = {}
    entries: dict[tuple[str, str], Timed] = {}
    candidates: dict[str, Candidate] = {}
    context.clock.start_task()
    for provider, build in builders.items():
        candidate, status, peak_mib = _prepare(context, provider, build)
        for timer in timers:
            row = replace(template, provider=provider, timer=timer, status=status, peak_mib=peak_mib)
            if candidate is not None:
                candidates[provider] = candidate
                try:
                    entries[provider, timer] = _timed(context.clock, candidate, timer)
                except NotCapturable as reason:
                    row = replace(row, status=f"skipped: {reason}")
                except Exception as error:
                    row = replace(row, status=status_of(error))
                if row.status != candidate.status:
                    ensure_alive(context.clock, provider)
            rows[provider, timer] = row
    context.watch("timing")
    time_round_robin(context.clock, list(entries.values()), context.options)
    for (provider, timer), entry in entries.items():
        row = rows[provider, timer]
        if entry.failure is None:
            rows[provider, timer] = _measured(row, candidates[provider], entry)
        else:
            rows[provider, timer] = replace(row, status=status_of(entry.failure))
            ensure_alive(context.clock, provider)
    return add_ratios(rows.values())


def _prepare(context: Context, provider: str, build: Builder) -> tuple[Candidate | None, str, float | None]:
    """Build, check and warm up a candidate; returns it (None if it cannot be timed), its status and peak memory."""
    if provider in context.skip:
        return None, context.skip[provider], None
    context.watch(provider)
    try:
        candidate = build()
        for call in candidate.calls:
            call()
        peak = context.clock.peak_bytes(candidate.calls[0])
        return candidate, candidate.status, None if peak is None else (peak + candidate.held_bytes) / MIB
    except Exception as error:
        status = status_of(error)
    ensure_alive(context.clock, provider)
    return None, status, None


def _timed(clock: Clock, candidate: Candidate, timer: str) -> Timed:
    if timer == "graph":
        return Timed([clock.capture(candidate.calls)], calls_per_unit=len(candidate.calls))
    return Timed(candidate.calls, calls_per_unit=1)


def _measured(row: Row, candidate: Candidate, entry: Timed) -> Row:
    sample = summarize(entry.times_ms)
    return replace(
        row,
        median_ms=sample.median_ms,
        p20_ms=sample.p20_ms,
        p80_ms=sample.p80_ms,
        tflops=candidate.flops / sample.median_ms / 1e9 if candidate.flops else None,
        gbps=candidate.bytes / sample.median_ms / 1e6 if candidate.bytes else None,
    )


def status_of(error: Exception) -> str:
    """The status that reports a failure; unexpected ones also print their traceback."""
    if isinstance(error, Unavailable):
        return f"unavailable: {error}"
    if isinstance(error, WrongResult):
        return f"failed: wrong result, {error}"
    if isinstance(error, torch.OutOfMemoryError):
        return OUT_OF_MEMORY
    traceback.print_exc()
    return f"failed: {first_line(error)}"


def ensure_alive(clock: Clock, provider: str) -> None:
    """Free what a failed provider held, and find out whether it took the GPU context with it."""
    gc.collect()
    try:
        clock.synchronize()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    except Exception as error:
        raise DeviceLost(provider) from error
