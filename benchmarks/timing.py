"""How a figure is taken: warm-up, interleaved rounds, CUDA events and CUDA graphs, quantiles.

Within a round every candidate is timed once, eagerly and as a graph, so that slow drifts of the clock (heat, power,
other users of the host) fall on all alike. A sample is the mean over a small batch of calls between two events. Before
each sample the L2 cache is overwritten, which also lets the host run ahead of the GPU; small inputs rotate through
copies. At its power limit the GPU's clock follows what it runs with a delay of some tenths of a second, so long calls
are repeated for so long before each sample: otherwise a sample would have the clock that its neighbour's power allows.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from dit_moe.graphs import GraphCapture, NotCapturable

Call = Callable[[], object]


@dataclass(frozen=True)
class TimingOptions:
    """How long to measure.

    Args:
        rounds: samples of each candidate.
        batch_ms: wanted length of one sample.
        min_calls: fewest calls in one sample; with one, the host's time to launch it would stand in every large figure,
            though in a running program it hides behind the GPU's work on the call before.
        max_calls: most calls in one sample.
        max_batch_ms: longest sample of several calls; a call of a quarter of a second hides its launches by itself.
        settle_ms: how long a candidate whose call takes a millisecond or more runs before each of its samples.
        warmup_ms: matrix products before the first sample, which bring the GPU to its working temperature and clock.
    """

    rounds: int = 15
    batch_ms: float = 5.0
    min_calls: int = 8
    max_calls: int = 50
    max_batch_ms: float = 120.0
    settle_ms: float = 300.0
    warmup_ms: float = 1500.0


@dataclass(frozen=True)
class Sample:
    """Time of one call in milliseconds: the median over the rounds, and the 20th and 80th percentiles."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def summarize(times_ms: Sequence[float]) -> Sample:
    """Median and percentiles of at least one time."""
    if len(times_ms) == 1:
        return Sample(times_ms[0], times_ms[0], times_ms[0])
    fifths = statistics.quantiles(times_ms, n=5, method="inclusive")
    return Sample(statistics.median(times_ms), fifths[0], fifths[3])


class CpuClock:
    """Times calls on the CPU."""

    def start_task(self) -> None:
        """Nothing to prepare."""

    def warm_up(self, milliseconds: float) -> None:
        """Nothing to do."""

    def synchronize(self) -> None:
        """Nothing runs in the background."""

    def time_ms(self, calls: Sequence[Call], count: int, ahead: int = 0) -> float:
        """Mean time of `count` calls, taken from `calls` in turn; no calls go ahead here."""
        begin = time.perf_counter()
        for i in range(count):
            calls[i % len(calls)]()
        return (time.perf_counter() - begin) * 1e3 / count

    def peak_bytes(self, call: Call) -> int | None:
        """Not measured on the CPU."""
        call()
        return None

    def capture(self, calls: Sequence[Call]) -> Call:
        """There are no CUDA graphs here."""
        raise NotCapturable("no CUDA graphs on the CPU")


_LONG_CALL_MS = 1.0
_CALLS_WITH_LEAD = 8  # in a sample: short calls, which the launches of the first could be a good part of


class CudaClock:
    """Times calls on the current GPU."""

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
        self._flush = torch.empty(max(4 * l2_bytes, 2**26), dtype=torch.int8, device="cuda")
        self._capture = GraphCapture(torch.device("cuda"))

    def start_task(self) -> None:
        """Take a new memory pool for the graphs of the next task."""
        self._capture = GraphCapture(torch.device("cuda"))

    def warm_up(self, milliseconds: float) -> None:
        """Keep the GPU busy with matrix products of random data."""
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        out = torch.empty_like(a)
        begin = time.perf_counter()
        while (time.perf_counter() - begin) * 1e3 < milliseconds:
            for _ in range(8):
                torch.mm(a, a, out=out)
            torch.cuda.synchronize()

    def synchronize(self) -> None:
        """Wait for the GPU; raises if an earlier kernel failed."""
        torch.cuda.synchronize()

    def time_ms(self, calls: Sequence[Call], count: int, ahead: int = 0) -> float:
        """Mean time of `count` calls, taken from `calls` in turn, between two events, behind `ahead` untimed ones."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for i in range(ahead):
            calls[i % len(calls)]()
        self._flush.zero_()
        if count >= _CALLS_WITH_LEAD:
            calls[-1]()  # the host is a call ahead then, as in a loop, and its first launches are not timed
        begin.record()
        for i in range(count):
            calls[i % len(calls)]()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / count

    def peak_bytes(self, call: Call) -> int | None:
        """Memory that one call needs on top of what is allocated before it."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before

    def capture(self, calls: Sequence[Call]) -> Call:
        """Record all `calls` as one CUDA graph and return its replay.

        All graphs share a memory pool: they are replayed one after the other and their outputs are not read.

        Raises:
            NotCapturable: a call waits for the GPU, or the capture failed.
        """

        def step() -> None:
            for call in calls:
                call()

        graph = self._capture(step)
        graph.replay()
        torch.cuda.synchronize()
        return graph.replay


Clock = CpuClock | CudaClock


def measure_peaks(tiny: bool = False) -> dict[str, float]:
    """What this GPU sustains on random data: bf16 products in TFLOP/s, and a copy in GB/s, bytes read plus written.

    Args:
        tiny: a single short sample instead of a warmed-up median.
    """
    peaks = _peaks(CudaClock(), tiny)
    torch.cuda.empty_cache()  # the workers need the memory
    return peaks


def _peaks(clock: CudaClock, tiny: bool) -> dict[str, float]:
    size, copied, (rounds, calls) = 8192, 2**30, (1, 1) if tiny else (9, 20)
    clock.warm_up(0.0 if tiny else 1500.0)
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    source = torch.randint(-100, 100, (copied,), device="cuda", dtype=torch.int8)
    target = torch.empty_like(source)
    product_ms = summarize([clock.time_ms([lambda: torch.mm(a, b, out=out)], calls) for _ in range(rounds)]).median_ms
    copy_ms = summarize([clock.time_ms([lambda: target.copy_(source)], calls) for _ in range(rounds)]).median_ms
    return {"bf16_tflops": 2 * size**3 / product_ms / 1e9, "copy_gbps": 2 * copied / copy_ms / 1e6}


def make_clock(device: str) -> Clock:
    """The clock for "cpu" or "cuda"."""
    return CudaClock() if device == "cuda" else CpuClock()


@dataclass
class Timed:
    """One candidate under one timer while it is measured.

    Args:
        calls: taken in turn; each stands for calls_per_unit calls of the candidate.
        calls_per_unit: more than one where a call replays a graph of several.
        count: how many of `calls` make a sample.
        ahead: how many of `calls` go before it.
        times_ms: samples, per call of the candidate.
        failure: what stopped this entry.
    """

    calls: Sequence[Call]
    calls_per_unit: int
    count: int = 1
    ahead: int = 0
    times_ms: list[float] = field(default_factory=list)
    failure: Exception | None = None

    def take(self, clock: Clock) -> None:
        """Add one sample; an entry that fails, for instance for lack of memory, is left out from then on."""
        if self.failure is None:
            gc.collect()  # what earlier samples left in cycles
            try:
                self.times_ms.append(clock.time_ms(self.calls, self.count, self.ahead) / self.calls_per_unit)
            except Exception as error:
                self.failure = error


def time_round_robin(clock: Clock, entries: Sequence[Timed], options: TimingOptions) -> None:
    """Fill each entry's times_ms, one sample a round, starting each round with another entry."""
    with _no_collection():
        for entry in entries:
            entry.count = len(entry.calls)
            for _ in range(2):
                entry.take(clock)
            call_ms = min(entry.times_ms, default=1.0) * entry.calls_per_unit
            wanted = calls_in_sample(call_ms, options)
            entry.count = -(-wanted // len(entry.calls)) * len(entry.calls)  # each copy of the inputs equally often
            entry.ahead = calls_to_settle(call_ms, options)
            entry.times_ms.clear()
        for round_index in range(options.rounds):
            first = round_index % max(len(entries), 1)
            for entry in (*entries[first:], *entries[:first]):
                entry.take(clock)


def calls_in_sample(call_ms: float, options: TimingOptions) -> int:
    """How many calls of this length make a sample."""
    call_ms = max(call_ms, 1e-4)
    wanted = min(max(round(options.batch_ms / call_ms), options.min_calls), options.max_calls)
    return min(wanted, max(1, int(options.max_batch_ms / call_ms)))


def calls_to_settle(call_ms: float, options: TimingOptions) -> int:
    """How many calls of this length go before a sample; short ones leave the GPU idle in between and its clock high."""
    return math.ceil(options.settle_ms / call_ms) if call_ms >= _LONG_CALL_MS else 0


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python collects cycles between samples alone, for its pauses fall on calls at random; older objects rest."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def first_line(error: BaseException) -> str:
    """The type and the first line of an error's message, short enough for a table."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else 'no message'}"
