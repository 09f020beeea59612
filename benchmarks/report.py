"""The tables that a run prints."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from .results import OK, Row


def table(rows: Iterable[Row]) -> str:
    """One block for each task, one line for each provider: time, spread, rate, ratio to the yardstick, memory."""
    blocks = []
    for _, group in groupby(rows, key=lambda row: row.key[:5] + row.key[6:8]):
        own = list(group)
        row = own[0]
        sizes = [f"T={row.tokens}" if row.tokens is not None else "", f"batch={row.batch}" if row.batch else ""]
        head = " ".join(part for part in (row.suite, row.case, *sizes, row.mode, row.dtype, row.routing) if part)
        blocks.append("\n".join([head, _HEADER, *(_line(row) for row in own)]))
    return "\n\n".join(blocks)


_HEADER = (
    f"  {'provider':26} {'timer':6} {'ms':>9} {'p20':>9} {'p80':>9} {'TFLOP/s':>8} {'GB/s':>7} {'/gemm':>6} {'MiB':>8}"
)


def _line(row: Row) -> str:
    head = f"  {row.provider:26} {row.timer:6} "
    if row.median_ms is None:
        return head + row.status
    times = " ".join(_number(value, 9, 4) for value in (row.median_ms, row.p20_ms, row.p80_ms))
    rates = f"{_number(row.tflops, 8, 1)} {_number(row.gbps, 7, 0)} {_number(row.ratio_to_gemm, 6, 3)}"
    note = "" if row.status == OK else f"  {row.status}"
    return f"{head}{times} {rates} {_number(row.peak_mib, 8, 0)}{note}"


def _number(value: float | None, width: int, digits: int) -> str:
    return " " * width if value is None else f"{value:{width}.{digits}f}"
