"""make_routing_plan: exactly the order that sorting (expert, slot) pairs in Python gives, and a tile schedule that
covers every row in use once."""

import pytest
import torch
from dit_moe_kernels import RoutingPlan, make_routing_plan

from tests.kernels.util import CASES, FP32, MODEL_CASES, Case, gpu_targets, make_ids, naive_rows, targets

PLAN_TARGETS = targets("triton", "cuda", dtypes=[FP32])

MORE_CASES = [
    Case("more_experts_than_rows", 2, 64, 3, 0, 0),
    Case("not_a_power_of_two", 67, 6, 5, 0, 0, "some"),
    Case("one_row_over_a_tile", 17, 2, 1, 0, 0, "last"),
    Case("tiles_exactly_full", 32, 4, 1, 0, 0, "last"),
]
LARGE_CASES = [
    *MODEL_CASES,
    Case("T65536", 65536, 16, 2, 0, 0, "skewed", tile_rows=None),
    Case("E256_K8", 4096, 256, 8, 0, 0, tile_rows=None),
    Case("E512", 3000, 512, 3, 0, 0, "skewed"),
    Case("all_to_one", 65536, 16, 2, 0, 0, "last", tile_rows=None),
    Case("odd_T_E7", 77777, 7, 3, 0, 0, "some"),
    Case("T300000", 300000, 16, 2, 0, 0, tile_rows=128),
    Case("half_unrouted", 30000, 8, 2, 0, 0, "some", tile_rows=128),
]


def assert_plan(plan: RoutingPlan, ids: torch.Tensor, num_experts: int) -> None:
    """Compare a plan with the naive one."""
    rows = naive_rows(ids, num_experts)
    counts = [0] * num_experts
    slot_to_row = [-1] * ids.numel()
    for row, (expert, slot) in enumerate(rows):
        counts[expert] += 1
        slot_to_row[slot] = row
    offsets = [sum(counts[:e]) for e in range(num_experts + 1)]
    row_to_slot = [slot for _, slot in rows] + [-1] * (ids.numel() - len(rows))

    assert all(tensor.dtype == torch.int32 and tensor.is_contiguous() for tensor in plan[:6])
    assert all(tensor.device == ids.device for tensor in plan[:6])
    assert plan.tokens_per_expert.tolist() == counts
    assert plan.expert_offsets.tolist() == offsets
    assert plan.row_to_slot.tolist() == row_to_slot
    assert plan.slot_to_row.tolist() == slot_to_row
    assert plan.row_to_token.tolist() == [slot // ids.shape[1] if slot >= 0 else -1 for slot in row_to_slot]
    assert (plan.num_experts, plan.num_rows, plan.top_k) == (num_experts, ids.numel(), ids.shape[1])

    # In which order the tiles are visited is the library's business; which tiles there are is not.
    tiles = [(e, row) for e, row in zip(plan.tile_expert.tolist(), plan.tile_row.tolist(), strict=True) if e != -1]
    height = plan.tile_rows
    assert sorted(tiles) == [(e, row) for e in range(num_experts) for row in range(offsets[e], offsets[e + 1], height)]


def most_tiles(num_rows: int, num_experts: int, tile_rows: int) -> int:
    """The most tiles that any routing of this size needs, by giving experts one row each, then the rest to one."""
    busy = min(num_rows, num_experts)
    return 0 if busy == 0 else busy - 1 + -(-(num_rows - busy + 1) // tile_rows)


@pytest.mark.parametrize("case", [*CASES, *MORE_CASES], ids=str)
@pytest.mark.parametrize("target", PLAN_TARGETS)
def test_plan_equals_a_python_sort(target, case):
    ids = make_ids(case, target.device)
    plan = make_routing_plan(ids, case.num_experts, tile_rows=16, backend=target.backend)
    assert_plan(plan, ids, case.num_experts)
    assert plan.tile_expert.numel() >= most_tiles(ids.numel(), case.num_experts, 16)


@pytest.mark.parametrize("case", LARGE_CASES, ids=str)
@pytest.mark.parametrize("target", gpu_targets("triton", "cuda", dtypes=[FP32]))
def test_large_plan_equals_a_python_sort(target, case):
    ids = make_ids(case, target.device)
    plan = make_routing_plan(ids, case.num_experts, tile_rows=case.tile_rows, backend=target.backend)
    assert_plan(plan, ids, case.num_experts)


@pytest.mark.parametrize("tile_rows", [32, 64, 128])
@pytest.mark.parametrize("target", PLAN_TARGETS)
def test_tile_heights(target, tile_rows):
    case = Case("", 150, 3, 2, 0, 0)
    ids = make_ids(case, target.device)
    plan = make_routing_plan(ids, 3, tile_rows=tile_rows, backend=target.backend)
    assert plan.tile_rows == tile_rows
    assert_plan(plan, ids, 3)


@pytest.mark.parametrize("target", PLAN_TARGETS)
def test_docstring_example(target):
    ids = torch.tensor([[1, 0], [1, 2]], device=target.device)
    plan = make_routing_plan(ids, 3, backend=target.backend)
    assert plan.tokens_per_expert.tolist() == [1, 2, 1]
    assert plan.expert_offsets.tolist() == [0, 1, 3, 4]
    assert plan.row_to_slot.tolist() == [1, 0, 2, 3]
    assert plan.slot_to_row.tolist() == [1, 0, 2, 3]
    assert plan.row_to_token.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("target", PLAN_TARGETS)
def test_int64_and_noncontiguous_ids(target):
    ids = torch.randint(0, 4, (2, 19), device=target.device).T
    assert not ids.is_contiguous()
    assert_plan(make_routing_plan(ids, 4, tile_rows=16, backend=target.backend), ids, 4)


@pytest.mark.parametrize("target", PLAN_TARGETS)
def test_unchecked_ids_out_of_range_are_not_routed(target):
    ids = torch.tensor([[0, 7], [-5, 1], [2**31 - 1, -(2**31)], [3, 2]], dtype=torch.int32, device=target.device)
    plan = make_routing_plan(ids, 4, tile_rows=16, validate=False, backend=target.backend)
    assert_plan(plan, ids, 4)


@pytest.mark.parametrize("target", PLAN_TARGETS)
def test_worst_case_fits_the_schedule(target):
    """One row for each of E - 1 experts and the rest to the last: the routing that needs the most tiles."""
    num_rows, num_experts = 53, 5
    ids = torch.tensor([[min(row, num_experts - 1)] for row in range(num_rows)], device=target.device)
    plan = make_routing_plan(ids, num_experts, tile_rows=16, backend=target.backend)
    assert_plan(plan, ids, num_experts)
