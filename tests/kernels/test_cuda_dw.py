"""The Hopper weight gradients: each expert's rows, a ragged depth, and sums on top of gradients that are there."""

import pytest
import torch
from dit_moe_kernels import availability, grouped_gemm
from torch import Tensor

from tests.kernels.test_grouped_gemm import check_grouped_gemm
from tests.kernels.util import BF16, FP16, FP32, MODEL_CASES, Case, assert_2x, evaluate, gpu_targets, make_plan, randn

TARGETS = gpu_targets("cuda", dtypes=[BF16, FP16])
# (rows of each expert, rows behind them that belong to none)
SPLITS = {
    "even": ([256, 256, 256], 0),
    "ragged": ([300, 1, 63, 64, 65, 127, 500], 0),
    "empty_experts": ([0, 100, 0, 0, 37, 0], 0),
    "all_to_one": ([0, 0, 1111, 0], 0),
    "first_only": ([777, 0], 5),
    "unused_rows": ([70, 3, 200, 129], 300),
    "one_row": ([1], 0),
    "no_row_in_use": ([0, 0, 0], 9),
    "no_row": ([0, 0], 0),
    "many_experts": ([(7 * i) % 41 for i in range(160)], 3),
}
# With so many rows that three consumers are worth it, though they cannot store beside the next products.
MANY_ROWS = ([4300, 1, 9000, 63, 4100, 5000, 6000], 3)
# Shapes of a tile, with an H100's 66 clusters and three to seven experts: multiples of 256, 192 and 128 columns; an odd
# number of 128 rows (wide pairs); widths that no tile divides; the last three wide pairs, and turned products. Where
# rows are few, three consumers (192 columns) are taken in test_accumulation alone.
SHAPES = [
    (512, 1024), (1152, 4608), (9216, 1152), (1152, 384), (2816, 1408), (384, 1536), (384, 128), (128, 128), (8, 8),
    (136, 264), (72, 1000), (1000, 72), (1160, 200), (640, 768), (1408, 176),
    (184, 4904), (8192, 128), (2456, 360),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _hopper():
    if (reason := availability("cuda")) is not None:
        pytest.skip(reason)
    if (capability := torch.cuda.get_device_capability()) != (9, 0):
        pytest.skip(f"got compute capability {capability}, expected (9, 0)")


def make_rows(target, split: str, height: int, width: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """grad, x, offsets and counts; rows that belong to no expert hold NaN and infinity."""
    counts, unused = MANY_ROWS if split == "many_rows" else SPLITS[split]
    used = sum(counts)
    grad, x = randn(used + unused, height, target=target), randn(used + unused, width, target=target)
    grad[used:], x[used:] = torch.nan, torch.inf
    offsets = torch.tensor([0, *counts], device=target.device).cumsum(0).int()
    return grad, x, offsets, counts


def naive_dw(grad: Tensor, x: Tensor, counts: list[int]) -> Tensor:
    """(E, O, I), expert after expert."""
    used = sum(counts)
    pairs = zip(grad[:used].split(counts), x[:used].split(counts), strict=True)
    return torch.stack([rows_grad.T @ rows_x for rows_grad, rows_x in pairs])


def naive_dw_float(grad: Tensor, x: Tensor, counts: list[int]) -> Tensor:
    """The same in fp32 from 16-bit operands, as PyTorch's own product gives it."""
    parts = []
    for rows_grad, rows_x in zip(grad[: sum(counts)].split(counts), x[: sum(counts)].split(counts), strict=True):
        if len(rows_x):
            parts.append(torch.mm(rows_grad.T, rows_x, out_dtype=FP32))
        else:
            parts.append(torch.zeros(grad.shape[1], x.shape[1], device=x.device))
    return torch.stack(parts)


def dw_op(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    return torch.ops.dit_moe.grouped_gemm_dw(grad, x, offsets, "cuda")


def check_dw(target, split: str, height: int, width: int) -> None:
    grad, x, offsets, counts = make_rows(target, split, height, width)
    got = dw_op(grad, x, offsets)
    assert_2x("dw", got, naive_dw(grad.double(), x.double(), counts), naive_dw(grad, x, counts))
    assert all((got[expert] == 0).all() for expert, count in enumerate(counts) if count == 0)
    assert all(torch.equal(dw_op(grad, x, offsets), got) for _ in range(3)), "two runs differ"


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("target", TARGETS)
def test_splits(target, split):
    check_dw(target, split, 200, 328)
    check_dw(target, split, 256, 256)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("target", TARGETS)
def test_shapes(target, shape):
    check_dw(target, "ragged", *shape)
    check_dw(target, "unused_rows", *shape)


@pytest.mark.parametrize("shape", [(184, 4904), (4904, 184)], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_many_rows(target, shape):
    """192 columns, in wide and in tall pairs, stored."""
    check_dw(target, "many_rows", *shape)


@pytest.mark.parametrize("target", TARGETS)
def test_neighbours_do_not_leak(target):
    """Rows of other experts hold NaN and infinity: only those experts' gradients may show it."""
    grad, x, offsets, counts = make_rows(target, "ragged", 200, 328)
    clean = dw_op(grad, x, offsets)
    for expert in range(len(counts)):
        start, end = int(offsets[expert]), int(offsets[expert + 1])
        spoilt_grad, spoilt_x = torch.full_like(grad, torch.nan), torch.full_like(x, torch.inf)
        spoilt_grad[start:end], spoilt_x[start:end] = grad[start:end], x[start:end]
        assert torch.equal(dw_op(spoilt_grad, spoilt_x, offsets)[expert], clean[expert]), f"expert {expert}"


@pytest.mark.parametrize(
    "shape", [(512, 1024), (2816, 1408), (200, 328), (1152, 384), (128, 128), (2456, 360), (184, 4904)], ids=str
)
@pytest.mark.parametrize("split", ["ragged", "empty_experts", "unused_rows", "no_row"])
@pytest.mark.parametrize("sum_dtype", [None, FP32], ids=["same", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_accumulation(target, sum_dtype, split, shape):
    """Added to what is there, in fp32 and rounded once; and nothing beyond the gradient is touched."""
    from dit_moe_kernels.cuda_impl.grouped_gemm_dw import add_grouped_gemm_dw

    grad, x, offsets, counts = make_rows(target, split, *shape)
    num_experts, sum_dtype = len(counts), sum_dtype or target.dtype
    size = num_experts * shape[0] * shape[1]
    buffer = torch.randn(size + 512, device=target.device).to(sum_dtype) * 5
    before = buffer.clone()
    dw = buffer[256:-256].view(num_experts, *shape)
    add_grouped_gemm_dw(dw, grad, x, offsets)
    old = before[256:-256].view_as(dw)
    exact = old.double() + naive_dw(grad.double(), x.double(), counts)
    plain = (old.float() + naive_dw_float(grad, x, counts)).to(sum_dtype)
    assert_2x("dw", dw, exact, plain)
    assert torch.equal(buffer[:256], before[:256]) and torch.equal(buffer[-256:], before[-256:])
    again = old.clone()
    add_grouped_gemm_dw(again, grad, x, offsets)
    assert torch.equal(again, dw), "two runs differ"


@pytest.mark.parametrize("target", TARGETS[:1])
def test_accumulation_refuses_other_buffers(target):
    from dit_moe_kernels.cuda_impl.grouped_gemm_dw import add_grouped_gemm_dw

    grad, x, offsets, _ = make_rows(target, "even", 64, 128)
    for bad in (
        torch.zeros(3, 64, 120, dtype=BF16, device="cuda"),
        torch.zeros(3, 64, 128, dtype=FP16, device="cuda"),
        torch.zeros(3, 128, 64, dtype=BF16, device="cuda").mT,
        torch.zeros(3 * 64 * 128 + 1, dtype=BF16, device="cuda")[1:].view(3, 64, 128),
    ):
        with pytest.raises(ValueError, match="dw_EOI: got"):
            add_grouped_gemm_dw(bad, grad, x, offsets)


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_model_shapes(target, case):
    """Both products of the layer, with all their gradients."""
    check_grouped_gemm(target, case, case.width, 2 * case.hidden)
    check_grouped_gemm(target, case, case.hidden, case.width)


@pytest.mark.parametrize("target", TARGETS)
def test_a_graph_follows_its_offsets(target):
    """Captured once, replayed on rows that are split otherwise."""
    grad, x, offsets, _ = make_rows(target, "ragged", 200, 328)
    other = torch.tensor([0, 0, 5, 600, 700, 701, 900, 1120], device="cuda", dtype=torch.int32)
    expected = dw_op(grad, x, other)
    dw_op(grad, x, offsets)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = dw_op(grad, x, offsets)
    offsets.copy_(other)
    graph.replay()
    assert torch.equal(got, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_backward_takes_them(target):
    """The gradient of the unfused op has the bits of the kernel, for inputs with any strides."""
    case = Case("", 300, 4, 2, 192, 256, tile_rows=None)
    _, plan = make_plan(case, target.device)
    x, w = randn(plan.num_rows, 192, target=target), randn(4, 256, 192, target=target)
    grad = randn(plan.num_rows, 256, target=target)
    expected = dw_op(grad, x, plan.expert_offsets)
    for backend in ("cuda", "auto"):
        _, _, dw = evaluate(lambda x, w, name=backend: grouped_gemm(x, w, plan, backend=name), [x, w], grad)
        assert torch.equal(dw, expected)
    _, _, dw = evaluate(lambda x, w: grouped_gemm(x, w, plan, backend="cuda"), [x.T.contiguous().T, w], grad)
    assert torch.equal(dw, expected)
