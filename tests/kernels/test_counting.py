"""count_routing: exactly the counts of a loop in Python, also within a CUDA graph that serves several steps."""

import re

import pytest
import torch
from dit_moe_kernels import RoutingCounts, count_routing

from tests.kernels.util import FP32, gpu_targets, targets

TARGETS = targets("triton", dtypes=[FP32])
L, S = 3, 4  # layers, steps


def new_counts(images, tokens, experts, groups, device="cpu", step_patch=True) -> RoutingCounts:
    shapes = [(images, L, experts), (groups, L, S, experts), (groups, L, tokens, experts), (S, L, tokens, experts)]
    counts = [torch.zeros(shape, dtype=torch.int32, device=device) for shape in shapes]
    return RoutingCounts(*counts[:3], counts[3] if step_patch else None)


def naive_count(counts, ids, layer, cursor, images_per_group, parts=(0,)) -> None:
    """The same by a loop over every choice, into tensors on the CPU."""
    step, first, batch = cursor
    images, experts = counts.image_counts.shape[0], counts.image_counts.shape[2]
    tokens = counts.patch_counts.shape[2]
    for flat, choices in enumerate(ids.tolist()):
        row, token = divmod(flat, tokens)
        if not batch or row // batch not in parts:
            continue
        image = first + row % batch
        for expert in choices:
            if not (0 <= expert < experts and 0 <= image < images and 0 <= step < S):
                continue
            counts.image_counts[image, layer, expert] += 1
            counts.step_counts[image // images_per_group, layer, step, expert] += 1
            counts.patch_counts[image // images_per_group, layer, token, expert] += 1
            if counts.step_patch_counts is not None:
                counts.step_patch_counts[step, layer, token, expert] += 1


def assert_same(got: RoutingCounts, expected: RoutingCounts) -> None:
    for name, a, b in zip(RoutingCounts._fields, got, expected, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a.cpu(), b), name


def device_cursor(values, device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


# rows of a batch, tokens, experts, choices, images, groups, parts counted, step-patch
CASES = {
    "one image": (1, 9, 4, 2, 1, 1, (0,), True),
    "guided, conditional": (6, 9, 4, 2, 7, 2, (0,), True),
    "guided, unconditional": (6, 9, 4, 2, 7, 2, (1,), False),
    "guided, both": (6, 9, 4, 2, 7, 3, (0, 1), True),
    "K = 1": (4, 16, 5, 1, 9, 9, (0,), False),
    "K = E": (4, 25, 3, 3, 5, 2, (0,), True),
    "blocks of an image": (2, 300, 70, 2, 4, 2, (0,), True),
    "no rows": (0, 4, 4, 2, 3, 1, (0,), True),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("target", TARGETS)
def test_counts_equal_a_loop(target, case, dtype):
    rows, tokens, experts, top_k, images, groups, parts, step_patch = case
    batch = rows if parts == (0,) and rows < 6 else rows // 2
    per_group = -(-images // groups)
    got = new_counts(images, tokens, experts, groups, target.device, step_patch)
    expected = new_counts(images, tokens, experts, groups, step_patch=step_patch)
    for layer, step, first in [(0, 0, 0), (2, 3, images - batch), (2, 3, images - batch), (1, 1, 0)]:
        ids = torch.randint(-1, experts, (rows * tokens, top_k), dtype=dtype)
        cursor = (step, first, batch)
        count_routing(
            ids.to(target.device), layer, device_cursor(cursor, target.device), got, images_per_group=per_group,
            first_part=parts[0], num_parts=len(parts), backend=target.backend,
        )  # fmt: skip
        naive_count(expected, ids, layer, cursor, per_group, parts)
    assert_same(got, expected)
    assert rows == 0 or got.image_counts.sum() > 0


@pytest.mark.parametrize(
    "cursor", [(-1, 0, 2), (S, 0, 2), (0, 4, 2), (0, -1, 2), (0, 0, 0)], ids="step{0[0]}_first{0[1]}_batch{0[2]}".format
)
@pytest.mark.parametrize("target", TARGETS)
def test_what_lies_outside_is_left_alone(target, cursor):
    """Neither a wild cursor nor wild ids may write anywhere but into their own counters."""
    got, expected = new_counts(5, 4, 3, 2, target.device), new_counts(5, 4, 3, 2)
    ids = torch.randint(-5, 9, (8, 2), dtype=torch.int32)
    count_routing(
        ids.to(target.device), 1, device_cursor(cursor, target.device), got, images_per_group=3, backend=target.backend
    )
    naive_count(expected, ids, 1, cursor, 3)
    assert_same(got, expected)


@pytest.mark.parametrize("target", gpu_targets("triton", dtypes=[FP32]))
def test_a_model_sized_batch(target):
    images, tokens, experts = 64, 256, 8
    ids = torch.randint(0, experts, (images * tokens, 2), dtype=torch.int32)
    got = new_counts(100, tokens, experts, 20, target.device)
    for _ in range(3):
        count_routing(
            ids.cuda(), 1, device_cursor((2, 30, images), "cuda"), got, images_per_group=5, backend=target.backend
        )
    rows = torch.nn.functional.one_hot(ids.long(), experts).view(images, tokens, 2, experts).sum(2).int() * 3
    assert torch.equal(got.image_counts[30:94, 1].cpu(), rows.sum(1).int())
    assert torch.equal(got.step_counts[6:18, 1, 2].cpu(), rows.sum(1)[:60].view(12, 5, experts).sum(1).int())
    assert torch.equal(got.patch_counts.sum(0)[1].cpu(), rows.sum(0))
    assert torch.equal(got.step_patch_counts[2, 1].cpu(), rows.sum(0).int())
    assert int(got.image_counts.sum()) == ids.numel() * 3


@pytest.mark.parametrize("target", gpu_targets("triton", dtypes=[FP32]))
def test_one_graph_serves_every_step_and_batch(target):
    counts, expected = new_counts(8, 9, 4, 2, "cuda"), new_counts(8, 9, 4, 2)
    ids = torch.zeros(6 * 9, 2, dtype=torch.int32, device="cuda")
    cursor = device_cursor((0, 0, 0), "cuda")
    count_routing(ids, 0, cursor, counts, images_per_group=4, backend=target.backend)  # compile; counts nothing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        count_routing(ids, 2, cursor, counts, images_per_group=4, backend=target.backend)
    for where in [(0, 0, 3), (1, 0, 3), (3, 2, 6), (2, 7, 1)]:
        ids.copy_(torch.randint(0, 4, ids.shape))
        cursor.copy_(device_cursor(where, "cuda"))
        graph.replay()
        naive_count(expected, ids, 2, where, 4)
    assert_same(counts, expected)


IDS, CURSOR = torch.zeros(8, 2, dtype=torch.int32), torch.zeros(3, dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"topk_ids": IDS.float()}, TypeError, "topk_ids: got torch.float32, expected an int32"),
        ({"topk_ids": IDS[:7]}, ValueError, "topk_ids: got shape (7, 2), expected (whole images of 4, K)"),
        ({"layer": L}, ValueError, "layer: got 3, expected 0 to 2"),
        ({"cursor": CURSOR.long()}, TypeError, "cursor: got torch.int64"),
        ({"cursor": CURSOR[:2].clone()}, ValueError, "cursor: got shape (2,), expected (3,)"),
        ({"cursor": CURSOR.to("meta")}, ValueError, "cursor: got device meta"),
        ({"images_per_group": 2}, ValueError, "images_per_group: got 2 for 2 groups, expected room for 5 images"),
        ({"num_parts": 0}, ValueError, "first_part, num_parts: got 0, 0"),
        ({"counts": new_counts(5, 4, 3, 2)._replace(step_counts=torch.zeros(2, L, S, 9, dtype=torch.int32))},
         ValueError, "step_counts: got shape (2, 3, 4, 9), expected (2, 3, 4, 3)"),
        ({"counts": new_counts(5, 4, 3, 2)._replace(image_counts=torch.zeros(5, L, 3))}, TypeError,
         "image_counts: got torch.float32"),
    ],
)  # fmt: skip
def test_errors(changed, error, message):
    arguments = {"topk_ids": IDS, "layer": 0, "cursor": CURSOR, "counts": new_counts(5, 4, 3, 2), "images_per_group": 3}
    with pytest.raises(error, match=re.escape(message)):
        count_routing(**{**arguments, **changed})
