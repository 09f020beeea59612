"""Rows of results and the tidy CSV that holds them."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

KEY = ("suite", "case", "tokens", "batch", "mode", "provider", "dtype", "routing", "timer")
OK = "ok"


@dataclass(frozen=True)
class Row:
    """One measured figure, or the reason why there is none; None means "does not apply".

    Args:
        suite, case, mode, provider, dtype, routing, timer: what was measured, see docs/performance.md.
        tokens: T, tokens of one call.
        batch: images of one call, where the suite has images.
        median_ms, p20_ms, p80_ms: time of one call.
        tflops: 10^12 floating-point operations a second, after the suite's formula.
        gbps: 10^9 bytes a second, each input read once and each output written once.
        peak_mib: highest memory during one call, with its inputs and weights.
        ratio_to_gemm: median_ms over that of the gemm provider in the same run.
        status: "ok", maybe with a remark, or "unavailable", "failed" or "skipped" and why.
    """

    suite: str
    case: str
    tokens: int | None
    batch: int | None
    mode: str
    provider: str
    dtype: str
    routing: str
    timer: str
    median_ms: float | None = None
    p20_ms: float | None = None
    p80_ms: float | None = None
    tflops: float | None = None
    gbps: float | None = None
    peak_mib: float | None = None
    ratio_to_gemm: float | None = None
    status: str = OK

    @property
    def ok(self) -> bool:
        """Whether the figures are right and complete."""
        return self.status.partition(":")[0] == OK

    @property
    def intensity(self) -> float:
        """Operations per compulsory byte; needs both rates."""
        if not self.tflops or not self.gbps:
            raise ValueError(f"intensity: got tflops {self.tflops} and gbps {self.gbps}, expected both")
        return self.tflops * 1e3 / self.gbps

    @property
    def key(self) -> tuple[Any, ...]:
        """What the row is about, without the figures."""
        return tuple(getattr(self, name) for name in KEY)


COLUMNS = tuple(field.name for field in fields(Row))
_INTEGERS = ("tokens", "batch")
_FLOATS = ("median_ms", "p20_ms", "p80_ms", "tflops", "gbps", "peak_mib", "ratio_to_gemm")


def add_ratios(rows: Iterable[Row]) -> list[Row]:
    """Fill ratio_to_gemm of every timed row whose case, tokens, mode, dtype, routing and timer have a gemm row."""
    rows = list(rows)
    yardstick = {_without_provider(row): row.median_ms for row in rows if row.provider == "gemm" and row.median_ms}
    return [
        replace(row, ratio_to_gemm=row.median_ms / yardstick[_without_provider(row)])
        if row.median_ms is not None and _without_provider(row) in yardstick
        else row
        for row in rows
    ]


def _without_provider(row: Row) -> tuple[Any, ...]:
    return tuple(getattr(row, name) for name in KEY if name != "provider")


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """Old rows, each replaced by the new row of the same key, then the rest of the new ones."""
    merged = {row.key: row for row in old}
    merged.update({row.key: row for row in new})
    return list(merged.values())


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write rows, floats with five significant digits."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: _text(value) for name, value in asdict(row).items()})


def _text(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def read_csv(path: Path) -> list[Row]:
    """Read what `write_csv` wrote.

    Raises:
        ValueError: the columns are others.
    """
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path}: got columns {reader.fieldnames}, expected {COLUMNS}")
        return [Row(**{name: _parse(name, text) for name, text in line.items()}) for line in reader]


def _parse(name: str, text: str) -> Any:
    if name in _INTEGERS:
        return int(text) if text else None
    if name in _FLOATS:
        return float(text) if text else None
    return text


def load(out: Path, suite: str) -> tuple[list[Row], list[dict[str, Any]]]:
    """Rows and run environments saved earlier; two empty lists where there are none."""
    table, notes = _files(out, suite)
    return (read_csv(table), json.loads(notes.read_text())["runs"]) if table.exists() and notes.exists() else ([], [])


def save(out: Path, suite: str, rows: Iterable[Row], runs: list[dict[str, Any]]) -> None:
    """Write out/<suite>.csv and out/<suite>.env.json.

    Args:
        out: folder, made if absent.
        suite: name of the suite.
        rows: its rows.
        runs: what `env.describe` returned for each run that the rows come from.
    """
    out.mkdir(parents=True, exist_ok=True)
    table, notes = _files(out, suite)
    write_csv(table, rows)
    notes.write_text(json.dumps({"runs": runs}, indent=1) + "\n")


def collect(result: dict[str, Any], runs: Iterable[dict[str, Any]], out: Path | None) -> None:
    """Gather result["runs"], and print the result; it is written after each run, for the next may end the process.

    Args:
        result: what is said of all runs.
        runs: each made when it is asked for.
        out: JSON file, or None for none.
    """
    result["runs"] = []
    for run in runs:
        result["runs"].append(run)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def _files(out: Path, suite: str) -> tuple[Path, Path]:
    return out / f"{suite}.csv", out / f"{suite}.env.json"
