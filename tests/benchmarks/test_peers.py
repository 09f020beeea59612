"""What we wrote around the peers, without the peers: layouts, the block-sparse pattern, the extension's stand-in."""

import pytest
import torch

from benchmarks.cases import LayerShape
from benchmarks.problems import make_problem
from benchmarks.providers import layer_providers
from benchmarks.providers.megablocks import _StandIn
from benchmarks.providers.sonicmoe import _deinterleave
from benchmarks.providers.stk import BLOCK, _padded_rows, _pattern, flat_weights, stack_grads

IDS = torch.tensor([2, 0, 2, 2, 0, 2] * 50)  # expert 1 is empty; 100 and 200 rows


def test_absent_peers_say_which_package_is_missing() -> None:
    for name, package in (("sonicmoe", "sonic-moe"), ("moe-ops", "moe-ops"), ("megablocks", "megablocks")):
        reason = layer_providers()[name].availability("cuda")
        assert reason is None or package in reason


def test_padded_rows() -> None:
    slot_to_row, ends = _padded_rows(IDS, 3)
    assert ends.tolist() == [128, 128, 384]
    assert slot_to_row.unique().numel() == IDS.numel()
    starts = torch.tensor([0, 128, 128])
    for expert in (0, 2):
        rows = slot_to_row[IDS == expert]
        assert rows.tolist() == list(range(starts[expert], starts[expert] + rows.numel()))  # in order, no gap


def test_block_pattern() -> None:
    _, ends = _padded_rows(IDS, 3)
    size, _, rows, columns, offsets, columns_t, offsets_t, order = _pattern(ends, 384, 2 * BLOCK, 3, torch.float32)
    blocks = torch.zeros(size[0] // BLOCK, size[1] // BLOCK, dtype=torch.bool)
    blocks[rows.long(), columns.long()] = True
    expected = torch.tensor([[1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]], dtype=torch.bool)
    assert torch.equal(blocks, expected) and rows.numel() == expected.sum()
    assert offsets.tolist() == [0, 2, 4, 6] and offsets_t.tolist() == [0, 1, 2, 2, 2, 4, 6]
    assert columns_t.tolist() == [0, 0, 1, 2, 1, 2]
    assert torch.equal(rows[order.long()], columns_t)


@pytest.mark.parametrize("name", ["stk", "sonicmoe"])
def test_gradients_return_to_our_layout(name: str) -> None:
    """A layout and its inverse, tried on the weights themselves."""
    problem = make_problem(LayerShape(8, 16, 3, 2), 4, "balanced", torch.float32, "cpu")
    if name == "stk":
        found = stack_grads({"gate": problem.gate, **flat_weights(problem)}, 3)
    else:
        gate_half, up_half = problem.w13.chunk(2, dim=1)
        interleaved = torch.stack([gate_half, up_half], dim=2).flatten(1, 2)
        assert torch.equal(interleaved[:, 0::2], gate_half) and torch.equal(interleaved[:, 1::2], up_half)
        found = _deinterleave({"gate": problem.gate, "w13": interleaved, "w2": problem.w2})
    for key in ("gate", "w13", "w2"):
        assert torch.equal(found[key], getattr(problem, key))


def test_stand_in_for_megablocks_ops() -> None:
    ops, x = _StandIn(), IDS.int()
    values, order = torch.empty_like(x), torch.empty_like(x)
    ops.sort(x, 2, values, order)
    assert torch.equal(values, x[order.long()]) and values.tolist() == sorted(x.tolist())
    assert ops.histogram(x, 4).tolist() == [100, 0, 200, 0]
    rows, out = torch.tensor([[3, 0, 2]]), torch.empty(1, 3, dtype=torch.int64)
    ops.inclusive_cumsum(rows, 1, out)
    assert out.tolist() == [[3, 3, 5]]
    ops.exclusive_cumsum(rows, 1, out)
    assert out.tolist() == [[0, 3, 3]]
    columns = torch.empty(6, dtype=torch.int16)
    ops.indices(torch.tensor([128, 128, 384], dtype=torch.int32), 128, 3, 2, columns)
    assert columns.tolist() == [0, 1, 4, 5, 4, 5]
