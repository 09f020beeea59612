"""Time candidate tile configs of the Triton kernels: `python -m benchmarks.tune --case XL/2-8E2A --out DIR`.

Every candidate differs from the config in use in one field (or is that config), is checked against the config in use,
and is timed in turns with the others. The table goes to DIR/tune.json; adopting a config means editing
kernels/dit_moe_kernels/configs.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import dit_moe_kernels as ops
import torch
from dit_moe_kernels import configs
from torch import Tensor

from . import env
from .cases import CASES, layer_shape
from .engine import Candidate, Context, WrongResult, compare
from .problems import MoEProblem, make_problem
from .results import Row
from .timing import CudaClock, TimingOptions

_CHOICES: dict[str, tuple[Any, ...]] = {
    "block_m": (64, 128, 256),
    "block_n": (64, 128, 256),
    "block_k": (32, 64, 128),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4, 5),
    "group_m": (1, 4, 8, 16, 32),
    "persistent": (False, True),
    "use_tma": (False, True),
    "gather": (False, True),
    "max_registers": (None, 128, 168, 232),
}
# The table's entries, each with the fields that its kernels read.
_COMMON = ("block_n", "block_k", "num_warps", "num_stages", "group_m", "use_tma")
_FIELDS = {
    "swiglu": (*_COMMON, "persistent", "gather", "max_registers"),
    "store": (*_COMMON, "persistent", "max_registers"),
    "dswiglu": (*_COMMON, "persistent", "max_registers"),
    "dw": (*_COMMON, "block_m"),
}
_TABLE = configs._HOPPER  # the private table is what is being tuned


def candidates(entry: str, widely: bool = False) -> list[configs.GemmConfig]:
    """The config in use, then its neighbours.

    Args:
        entry: a key of the table.
        widely: vary two fields at once too.
    """
    current = _TABLE[entry]
    known = {field.name for field in fields(current)}
    single = [(name, value) for name in _FIELDS[entry] if name in known for value in _CHOICES[name]]
    found = [current, *(replace(current, **{name: value}) for name, value in single)]
    if widely:
        found += [replace(current, **{a[0]: a[1], b[0]: b[1]}) for a, b in product(single, single) if a[0] < b[0]]
    return list(dict.fromkeys(found))


def tune(entry: str, case: str, tokens: int, options: TimingOptions, widely: bool) -> list[dict[str, Any]]:
    """Time an entry's candidates on one shape; returns a record for each, the fastest first."""
    problem = make_problem(layer_shape(case), tokens, "balanced", torch.bfloat16, "cuda")
    call = _CALLS[entry](problem)
    right = call()
    found = {str(index): config for index, config in enumerate(candidates(entry, widely))}

    def build(config: configs.GemmConfig) -> Candidate:
        def run() -> tuple[Tensor, ...]:
            with _in_use(entry, config):
                return call()

        for got, wanted in zip(run(), right, strict=True):
            error = (got.float() - wanted.float()).norm() / wanted.float().norm()
            if not error < 1e-2:
                raise WrongResult(f"relative difference {error:.2g} from the config in use")
        return Candidate([run])

    template = Row("tune", case, tokens, None, entry, "", "bf16", "balanced", "")
    builders = {name: partial(build, config) for name, config in found.items()}
    rows = compare(Context(CudaClock(), options), template, ("eager",), builders)
    records = [
        {
            "entry": entry,
            "case": case,
            "tokens": tokens,
            "in_use": row.provider == "0",
            "median_ms": row.median_ms,
            "p20_ms": row.p20_ms,
            "p80_ms": row.p80_ms,
            "status": row.status,
            "config": asdict(found[row.provider]),
        }
        for row in rows
    ]
    return sorted(records, key=lambda record: record["median_ms"] or float("inf"))


@contextmanager
def _in_use(entry: str, config: configs.GemmConfig) -> Iterator[None]:
    """Put a config into the library's table for the duration of a call."""
    before = _TABLE[entry]
    _TABLE[entry] = config
    try:
        yield
    finally:
        _TABLE[entry] = before


def _route(problem: MoEProblem) -> tuple[Tensor, ops.RoutingPlan]:
    shape = problem.shape
    weights, ids, _ = ops.topk_softmax(ops.router_logits(problem.x.detach(), problem.gate.detach()), shape.top_k)
    return weights, ops.make_routing_plan(ids, shape.num_experts)


def _forward(problem: MoEProblem) -> Callable[[], tuple[Tensor, ...]]:
    """The fused op's forward, as training runs it: gather or copy, first product with SwiGLU, second, combine."""
    weights, plan = _route(problem)
    tensors = (problem.x.detach(), problem.w13.detach(), problem.w2.detach(), weights)
    return lambda: torch.ops.dit_moe.expert_ffn(*tensors, None, *plan[1:7], True, "triton")


def _backward(problem: MoEProblem) -> Callable[[], tuple[Tensor, ...]]:
    """The fused op's backward."""
    weights, plan = _route(problem)
    tensors = (problem.x.detach(), problem.w13.detach(), problem.w2.detach(), weights)
    _, h = torch.ops.dit_moe.expert_ffn(*tensors, None, *plan[1:7], True, "triton")
    return lambda: torch.ops.dit_moe.expert_ffn_backward(problem.dout, h, *tensors, *plan[1:7], "triton")


def _second_product(problem: MoEProblem) -> Callable[[], tuple[Tensor, ...]]:
    """The second product alone: sorted rows (N, F) to (N, D)."""
    _, plan = _route(problem)
    a = torch.randn(problem.rows, problem.shape.expert_hidden_size, device="cuda").to(problem.x.dtype)
    return lambda: (ops.grouped_gemm(a, problem.w2.detach(), plan, backend="triton"),)


def _weight_gradient(problem: MoEProblem) -> Callable[[], tuple[Tensor, ...]]:
    """The gradient of the first product's weights: (N, 2F) and (N, D) to (E, 2F, D)."""
    _, plan = _route(problem)
    dh = torch.randn(problem.rows, 2 * problem.shape.expert_hidden_size, device="cuda").to(problem.x.dtype)
    rows = ops.permute(problem.x.detach(), plan)
    return lambda: (torch.ops.dit_moe.grouped_gemm_dw(dh, rows, plan.expert_offsets, "triton"),)


_CALLS = {"swiglu": _forward, "store": _second_product, "dswiglu": _backward, "dw": _weight_gradient}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--case", default="XL/2-8E2A", help=f"comma-separated, among {', '.join(CASES)}")
    parser.add_argument("--tokens", default="32768", help="comma-separated")
    parser.add_argument("--entry", default=",".join(_FIELDS), help="comma-separated entries of the table of configs")
    parser.add_argument("--wide", action="store_true", help="vary two fields at once too: hundreds of candidates")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0):
        print("benchmarks: the table of configs is that of Hopper GPUs, and there is none here", file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    timing = TimingOptions(rounds=options.rounds, batch_ms=3.0, settle_ms=0.0)  # of hundreds of candidates
    records: list[dict[str, Any]] = []
    for case, tokens, entry in product(options.case.split(","), options.tokens.split(","), options.entry.split(",")):
        found = tune(entry, case, int(tokens), timing, options.wide)
        records += found
        for record in found[:8]:
            print(entry, case, tokens, record["median_ms"], "ms", record["config"], record["status"])
        table = {"environment": env.describe(sys.argv[1:], "cuda", "tune"), "records": records}
        (options.out / "tune.json").write_text(json.dumps(table, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
