"""Tables of docs/performance.md from CSV: `python -m benchmarks.tables benchmarks/results docs/performance.md`.

Whatever stands between the two marker lines is replaced.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from dit_moe.flops import count_activated_parameters, count_parameters, macs

from . import results
from .cases import CASES
from .models import dense_config, moe_config
from .results import OK, Row

BEGIN, END = "<!-- tables: begin, written by benchmarks.tables -->", "<!-- tables: end -->"


def markdown(folder: Path) -> str:
    """The table of FLOPs, and those of the folder's results and of its folders', which are other machines'."""
    folders = [folder, *sorted(path for path in folder.iterdir() if path.is_dir())]
    return "\n\n".join([_flops_table(), *(part for each in folders for part in _of_machine(each))])


def _of_machine(folder: Path) -> list[str]:
    parts = []
    for suite, unit, tabulate in (("moe_layer", "tokens", _by_tokens), ("grouped_gemm", "tokens", _by_tokens)):
        rows, runs = results.load(folder, suite)
        parts += [f"### {suite}, {_machine(runs)}", *tabulate(rows, unit)] if rows else []
    for suite in ("model", "training"):
        rows, runs = results.load(folder, suite)
        parts += [f"### {suite}, {_machine(runs)}", *_by_batch(rows)] if rows else []
    for suite in ("permute", "memory", "startup"):
        rows, runs = results.load(folder, suite)
        parts += [f"### {suite}, {_machine(runs)}", _flat(rows)] if rows else []
    return parts


def replace_between_markers(text: str, tables: str) -> str:
    """The page with new tables.

    Raises:
        ValueError: the page lacks the marker lines.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"page: got no marker lines, expected {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{after}"


def _flops_table() -> str:
    lines = []
    for case in CASES:
        config = moe_config(case)
        dense = dense_config(config, "same-name")
        lines.append(
            [
                f"DiT-MoE-{case}",
                f"{count_parameters(config) / 1e6:,.0f}",
                f"{count_activated_parameters(config) / 1e6:,.0f}",
                f"{macs(config, attention=False) / 1e9:.2f}",
                f"{macs(config) / 1e9:.2f}",
                f"{macs(moe_config(case + '@512')) / 1e9:.1f}",
                f"{macs(dense) / 1e9:.2f}",
                f"{macs(config) / macs(dense):.2f}",
            ]
        )
    head = ["model", "parameters (M)", "activated (M)", "GMACs as in the paper's table 1", "GMACs with attention"]
    head += ["at 512 pixels", "dense DiT of that name, with attention", "DiT-MoE / dense"]
    return "### Arithmetic of one forward of one image, 256 pixels\n\n" + _table(head, lines)


def _by_tokens(rows: list[Row], unit: str) -> list[str]:
    """A table for each case, mode and routing: providers down, tokens across, eager and graph times with ratios."""
    parts = []
    for case, mode, routing in dict.fromkeys((row.case, row.mode, row.routing) for row in rows):
        chosen = [row for row in rows if (row.case, row.mode, row.routing) == (case, mode, routing)]
        sizes = sorted({row.tokens or 0 for row in chosen})
        providers = dict.fromkeys(row.provider for row in chosen)
        lines = [[f"`{name}`", *(_cell(chosen, name, size) for size in sizes)] for name in providers]
        head = ["ms eager / CUDA graph (ratio to gemm of the faster)", *(f"{size:,} {unit}" for size in sizes)]
        parts.append(f"**{case}, {mode}, {routing} routing**\n\n" + _table(head, lines))
    return parts


def _cell(rows: list[Row], provider: str, tokens: int) -> str:
    own = {row.timer: row for row in rows if row.provider == provider and row.tokens == tokens}
    timed = [row for row in own.values() if row.median_ms is not None]
    if not timed:
        return next((row.status.partition(",")[0] for row in own.values()), "")
    best = min(timed, key=lambda row: row.median_ms or 0.0)
    times = " / ".join(_number(own[timer].median_ms, 3) if timer in own else "-" for timer in ("eager", "graph"))
    ratio = f" ({min(row.ratio_to_gemm for row in timed if row.ratio_to_gemm):.2f})" if best.ratio_to_gemm else ""
    note = "" if best.ok else " wrong"
    return times + ratio + note


def _by_batch(rows: list[Row]) -> list[str]:
    """A table for each case: providers and batches down; time, images a second, arithmetic, memory across."""
    parts = []
    for case in dict.fromkeys(row.case for row in rows):
        lines = []
        for provider, batch in dict.fromkeys((row.provider, row.batch) for row in rows if row.case == case):
            own = [row for row in rows if (row.case, row.provider, row.batch) == (case, provider, batch)]
            timed = [row for row in own if row.median_ms]
            if not timed:
                lines.append([f"`{provider}`", str(batch), own[0].status, "", "", "", ""])
                continue
            best = min(timed, key=lambda row: row.median_ms or 0.0)
            milliseconds, images = best.median_ms or 0.0, batch or 0
            lines.append(
                [
                    f"`{provider}`",
                    str(batch),
                    f"{_number(milliseconds, 2)} ({best.timer})",
                    f"{images / milliseconds * 1e3:,.0f}",
                    _number((best.tflops or 0.0) * milliseconds / max(images, 1), 1),
                    _number(best.tflops, 0),
                    _number(max(row.peak_mib or 0.0 for row in own) / 1024, 2),
                ]
            )
        head = ["provider", "batch", "ms, the faster timer", "images/s", "GFLOP per image", "TFLOP/s", "peak GiB"]
        parts.append(f"**{case}**\n\n" + _table(head, lines))
    return parts


def _flat(rows: Iterable[Row]) -> str:
    lines = [
        [
            row.case,
            str(row.tokens or ""),
            str(row.batch or ""),
            row.mode,
            row.routing,
            f"`{row.provider}`",
            row.timer,
            _number(row.median_ms, 4),
            _number(row.gbps, 0),
            _number(row.peak_mib, 0),
            row.status.removeprefix(OK).removeprefix(": "),
        ]
        for row in rows
    ]
    head = ["case", "tokens", "batch", "mode", "routing", "provider", "timer", "ms", "GB/s", "peak MiB", "remark"]
    return _table(head, lines)


def _machine(runs: Sequence[dict]) -> str:
    last = runs[-1]
    return f"{(last.get('gpu') or {}).get('name', 'CPU')}, torch {last['packages']['torch']}, {last['time_utc'][:10]}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in row) + " |" for row in rows)


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("folder", type=Path, help="folder with the CSV and JSON files")
    parser.add_argument("page", type=Path, nargs="?", help="Markdown page to update; without it the tables are printed")
    options = parser.parse_args()
    tables = markdown(options.folder)
    if options.page is None:
        print(tables)
    else:
        options.page.write_text(replace_between_markers(options.page.read_text(), tables))
    return 0


if __name__ == "__main__":
    sys.exit(main())
