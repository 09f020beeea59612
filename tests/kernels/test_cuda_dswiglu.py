"""The backward product with SwiGLU's gradient by hand: `grouped_dswiglu` alone, between the layer's other launches."""

import pytest
import torch
from dit_moe_kernels.cuda_impl import grouped_gemm as kernels
from torch import Tensor

from tests.kernels.test_cuda_products import ALL_CASES, SMALL_CASES, TARGETS, WIDTH_CASES, _hopper  # noqa: F401
from tests.kernels.util import FP64, Case, assert_2x, make_plan, make_weights, naive_rows, naive_swiglu, randn

# Rows of an expert: below a warp's 16, a warpgroup's 64, a tile's 128, and one beyond each; K of 1, 2 and 3; widths
# around a tile's 192 columns and a segment's 64.
EDGE_CASES = [
    *(Case(f"one_expert_{n}_rows", n, 3, 1, 64, 200, "last", tile_rows=None) for n in (1, 15, 17, 63, 65, 127, 129)),
    Case("K3", 333, 5, 3, 136, 192, tile_rows=None),
    Case("K3_some", 200, 4, 3, 72, 264, "some", tile_rows=None),
    Case("narrow", 100, 2, 2, 8, 8, tile_rows=None),
    Case("one_column_more", 300, 2, 1, 72, 200, "skewed", tile_rows=None),
    # From 4096 rows an expert on blocks work in pairs.
    Case("one_expert_in_pairs", 4200, 1, 1, 512, 200, tile_rows=None),
    Case("in_pairs", 4200, 2, 2, 512, 264, "skewed", tile_rows=None),
]
NAMES = ("dh", "weighted a", "gradient of the router weight")


def make_inputs(case: Case, target, used: int) -> list[Tensor]:
    """Gradients of the rows in use, w2, and h of those rows, at the scale of a trained layer."""
    return [
        randn(used, case.width, target=target),
        randn(case.num_experts, case.width, case.hidden, target=target, scale=case.hidden**-0.5),
        randn(used, 2 * case.hidden, target=target),
    ]


def naive_dswiglu(grad: Tensor, w2: Tensor, h: Tensor, weights: Tensor, counts: list[int]) -> tuple[Tensor, ...]:
    """The same by autograd, through the layer's outputs by row; weights: (rows in use,)."""
    h, weights = h.detach().requires_grad_(), weights.detach().requires_grad_()
    a = naive_swiglu(h)
    y = torch.cat([rows @ w.T for rows, w in zip(a.split(counts), w2.unbind(0), strict=True)])
    out = y.to(weights.dtype) * weights[:, None]
    dh, dweights = torch.autograd.grad(out, (h, weights), grad.to(out.dtype))
    return dh, (a * weights[:, None]).to(h.dtype).detach(), dweights


def run(plan, inputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    """The kernel on matrices whose unused rows hold NaN; returns the results' rows in use."""
    grad, w2, h = inputs
    used = grad.shape[0]
    padded = [torch.cat([t, t.new_full((plan.num_rows - used, t.shape[1]), torch.nan)]) for t in (grad, h)]
    offsets, row_to_slot = plan.expert_offsets, plan.row_to_slot
    results = kernels.grouped_dswiglu(padded[0], w2, padded[1], weights, row_to_slot, offsets)
    return [result[:used] for result in results]


@pytest.mark.parametrize("case", [*ALL_CASES, *EDGE_CASES], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_grouped_dswiglu(target, case):
    ids, plan = make_plan(case, target.device)
    rows = naive_rows(ids, case.num_experts)
    slots = torch.tensor([slot for _, slot in rows], dtype=torch.int64, device=target.device)
    counts = [int((ids == expert).sum()) for expert in range(case.num_experts)]
    inputs, weights = make_inputs(case, target, len(rows)), make_weights(case, target.dtype, target.device)
    weights[ids < 0] = torch.nan  # slots without a row
    got = run(plan, inputs, weights)
    again = run(plan, inputs, weights)
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "two runs differ"
    by_row = weights.flatten()[slots]
    exact = naive_dswiglu(*(tensor.to(FP64) for tensor in inputs), by_row.to(FP64), counts)
    plain = naive_dswiglu(*inputs, by_row, counts)
    for name, *results in zip(NAMES, got, exact, plain, strict=True):
        if results[0].numel() == 1:  # whose error in plain PyTorch may be nothing by luck
            check_single_dot(*results[:2], *inputs, counts)
        else:
            assert_2x(name, *results)


def check_single_dot(got: Tensor, exact: Tensor, grad: Tensor, w2: Tensor, h: Tensor, counts: list[int]) -> None:
    """One dot product: four standard deviations of what rounding both factors of each term does to it."""
    (expert,) = (index for index, count in enumerate(counts) if count)
    terms = (grad.to(FP64) @ w2[expert].to(FP64)) * naive_swiglu(h.to(FP64))
    rounding = (2 / 12) ** 0.5 * torch.finfo(h.dtype).eps
    assert (got - exact).abs() <= 4 * rounding * terms.norm()


@pytest.mark.parametrize("case", [*SMALL_CASES, *WIDTH_CASES, *EDGE_CASES], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_is_written_past_the_rows_in_use(target, case, monkeypatch):
    """Results start as a number that no product gives, and keep it from the last row in use on."""
    ids, plan = make_plan(case, target.device)
    used, mark = int((ids >= 0).sum()), 12345.0
    grad, w2, h = make_inputs(case, target, plan.num_rows)
    weights = make_weights(case, target.dtype, target.device)
    outputs = []

    def launch(op, tensors, sizes, like):
        outputs.extend(tensors[6:])
        for tensor in outputs:
            tensor.fill_(mark)
        real_launch(op, tensors, sizes, like)

    real_launch = kernels.launch
    monkeypatch.setattr(kernels, "launch", launch)
    kernels.grouped_dswiglu(grad, w2, h, weights, plan.row_to_slot, plan.expert_offsets)
    dh, weighted_a, dots = outputs
    for tensor in (dh, weighted_a, dots.T):
        rounded = torch.tensor(mark, dtype=tensor.dtype, device=tensor.device)
        assert (tensor[used:] == rounded).all() and not (tensor[:used] == rounded).any()


@pytest.mark.parametrize("target", TARGETS)
def test_pre_activations_of_any_size(target):
    """SiLU's tails: gates that saturate the sigmoid to 0 or 1, up to those whose exponential is infinite."""
    case = Case("", 256, 1, 1, 64, 192, tile_rows=None)
    _, plan = make_plan(case, target.device)
    grad, w2, h = make_inputs(case, target, 256)
    h[:, :192] = torch.linspace(-1000.0, 1000.0, 192, device=target.device).to(target.dtype)
    weights = make_weights(case, target.dtype, target.device)
    got = run(plan, [grad, w2, h], weights)
    by_row = weights.flatten()[plan.row_to_slot.long()]
    exact = naive_dswiglu(*(tensor.to(FP64) for tensor in (grad, w2, h)), by_row.to(FP64), [256])
    plain = naive_dswiglu(grad, w2, h, by_row, [256])
    for name, *results in zip(NAMES, got, exact, plain, strict=True):
        assert_2x(name, *results)
