"""The plan's formulas on cases worked out by hand, and the numbers that the documentation takes from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from dit_moe import model_config
from dit_moe.cli import app
from dit_moe.parallel import ParallelConfig
from dit_moe.parallel.plan import Machine, StateBytes, memory, step_seconds, traffic

PAGE = Path(__file__).resolve().parents[2] / "docs/parallel.md"
GIB = 2**30
FP32_PARTS = StateBytes(moments=4, averages=0)  # bf16-weights with FSDP
STOCHASTIC = StateBytes(weights=2, gradients=2, moments=4, averages=0)

# model, data_parallel, expert_parallel, ranks, images per rank, state
MEMORY = [
    ("DiT-MoE-S/2-8E2A", "ddp", 1, 8, 32, StateBytes()),
    ("DiT-MoE-XL/2-8E2A", "none", 1, 1, 32, StateBytes()),
    ("DiT-MoE-XL/2-8E2A", "ddp", 2, 2, 32, StateBytes()),
    ("DiT-MoE-XL/2-8E2A", "fsdp", 2, 2, 32, StateBytes()),
    ("DiT-MoE-XL/2-8E2A", "fsdp", 8, 8, 32, StateBytes()),
    ("DiT-MoE-G/2-16E2A", "fsdp", 2, 2, 16, StateBytes()),
    ("DiT-MoE-G/2-16E2A", "fsdp", 2, 2, 16, FP32_PARTS),
    ("DiT-MoE-G/2-16E2A", "fsdp", 2, 2, 16, STOCHASTIC),
    ("DiT-MoE-G/2-16E2A", "fsdp", 8, 8, 32, StateBytes()),
    ("DiT-MoE-G/2-16E2A", "fsdp", 8, 64, 32, StateBytes()),
]
# model, data_parallel, expert_parallel, ranks, images per rank
TIMES = [
    ("DiT-MoE-XL/2-8E2A", "ddp", 1, 2, 128),
    ("DiT-MoE-XL/2-8E2A", "ddp", 2, 2, 128),
    ("DiT-MoE-XL/2-8E2A", "fsdp", 8, 8, 128),
    ("DiT-MoE-G/2-16E2A", "fsdp", 1, 8, 32),
    ("DiT-MoE-G/2-16E2A", "fsdp", 8, 8, 32),
    ("DiT-MoE-G/2-16E2A", "fsdp", 8, 16, 32),
    ("DiT-MoE-G/2-16E2A", "fsdp", 8, 64, 32),
    ("DiT-MoE-G/2-16E2A", "fsdp", 8, 64, 128),
    ("DiT-MoE-G/2-16E2A", "fsdp", 16, 64, 32),
]


def memory_table() -> str:
    lines = [
        "| model | spread | GPUs | bytes a parameter | weights | gradients | moments | averages | gathered | sum |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, data, experts, ranks, images, state in MEMORY:
        held = memory(model_config(name), ParallelConfig(data, experts), ranks, images, state)
        sizes = (held.weights, held.gradients, held.moments, held.averages, held.gathered)
        kept = state.weights + state.gradients + state.moments + state.averages
        cells = [name, _spread(data, experts), str(ranks), str(kept)]
        lines.append(_row([*cells, *(f"{size / GIB:.1f}" for size in (*sizes, sum(sizes)))]))
    return "\n".join(lines)


def time_table() -> str:
    lines = [
        "| model | spread | GPUs | images a GPU | compute | rows | weights | gradients |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, data, experts, ranks, images in TIMES:
        seconds = step_seconds(
            model_config(name), ParallelConfig(data, experts), ranks, images, recompute="-G/" in name
        )
        cells = [name, _spread(data, experts), str(ranks), str(images)]
        lines.append(_row([*cells, *(f"{value * 1e3:.0f}" for value in seconds.values())]))
    return "\n".join(lines)


def _spread(data: str, experts: int) -> str:
    return data if experts == 1 else f"{data}, experts over {experts}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("table", [memory_table, time_table])
def test_the_page_has_the_formulas_numbers(table):
    assert table() in PAGE.read_text(), f"put this into {PAGE.name}:\n\n{table()}"


def test_memory_of_a_model_worked_out_by_hand():
    """XL/2-8E2A: 3,567,255,552 parameters in experts, 600,916,640 beside them."""
    experts, others = 28 * 8 * 3 * 1152 * 4608, 600_916_640
    config = model_config("DiT-MoE-XL/2-8E2A")
    held = memory(config, ParallelConfig("ddp", 2), 2, 1)
    assert held.weights == held.gradients == held.averages == held.moments / 2 == 4 * (experts / 2 + others)
    held = memory(config, ParallelConfig("fsdp", 2), 8, 3, StateBytes(moments=4))
    assert held.weights == held.moments == 4 * (experts + others) / 8
    assert held.gathered == pytest.approx(3 * 2 * (experts / 2 + others) / 28)
    assert held.block_inputs == 28 * 3 * 256 * 1152 * 4


def test_traffic_of_a_model_worked_out_by_hand():
    config = model_config("DiT-MoE-XL/2-8E2A")
    experts, others = 28 * 8 * 3 * 1152 * 4608, 600_916_640
    sent = traffic(config, ParallelConfig("ddp", 2), 2, 10, recompute=True)
    assert sent.rows == 6 * 28 * (10 * 256 * 2 * 1152 * 2) / 2
    assert sent.weights == 0 and sent.gradients == 2 * 4 * others / 2
    sent = traffic(config, ParallelConfig("fsdp", 4), 8, 10)
    assert sent.rows == 4 * 28 * (10 * 256 * 2 * 1152 * 2) * 3 / 4
    assert sent.gradients == pytest.approx(4 * (others * 7 / 8 + experts / 4 / 2))
    assert sent.weights == pytest.approx(2 * 2 * (others * 7 / 8 + experts / 4 / 2))


def test_times_take_the_links_that_the_ranks_have():
    config = model_config("DiT-MoE-XL/2-8E2A")
    machine = Machine(gpus_per_host=4, flops=1e12, host_bandwidth=100.0, network_bandwidth=10.0)
    for ranks, share, rows, wide in ((4, 4, 100.0, 100.0), (8, 4, 100.0, 10.0), (8, 8, 10.0, 10.0)):
        parallel = ParallelConfig("fsdp", share)
        sent = traffic(config, parallel, ranks, 2)
        seconds = step_seconds(config, parallel, ranks, 2, machine=machine)
        assert seconds["rows"] == sent.rows / rows
        assert (seconds["weights"], seconds["gradients"]) == (sent.weights / wide, sent.gradients / wide)
    # 655.93 GFLOP forward (dit_moe.flops, checked by its own tests), three times that in a step.
    assert seconds["compute"] == pytest.approx(3 * 2 * 655.93294848e9 / 1e12)


def test_command():
    arguments = ["plan", "DiT-MoE-XL/2-8E2A", "--ranks", "2", "--data-parallel", "ddp", "--expert-parallel", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "8.88" in result.output and "18.87" in result.output  # GiB of weights; MB of one all-to-all
    arguments = ["plan", "DiT-MoE-G/2-16E2A", "--ranks", "2", "--expert-parallel", "2", "--images", "16"]
    eight = ["--weights", "2", "--gradients", "2", "--moments", "4", "--averages", "0"]
    result = CliRunner().invoke(app, [*arguments, *eight])
    assert result.exit_code == 0, result.output
    assert "15.37" in result.output and "30.74" in result.output  # GiB of 16,503,948,320 / 2 parameters, at 2 and 4 B
    result = CliRunner().invoke(app, ["plan", "DiT-MoE-XL/2-8E2A", "--ranks", "6", "--expert-parallel", "4"])
    assert result.exit_code == 1 and "divisor of the 6 ranks" in result.output
