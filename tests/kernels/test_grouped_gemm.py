"""grouped_gemm and its gradients for rows and weights, with NaN in every row that is not in use."""

import pytest
import torch
from dit_moe_kernels import grouped_gemm

from tests.kernels.util import (
    BF16,
    CASES,
    FP16,
    FP32,
    HOPPER_CASES,
    INTERPRETED,
    MODEL_CASES,
    Case,
    Target,
    check_against,
    evaluate,
    gpu_targets,
    make_plan,
    naive_grouped_gemm,
    randn,
    strided,
    targets,
)


def op_on_used_rows(plan, used: int, backend: str):
    """grouped_gemm as a function of the rows in use alone: the others hold NaN going in and are dropped coming out."""

    def function(x, w):
        unused = x.new_full((plan.num_rows - used, x.shape[1]), torch.nan)
        return grouped_gemm(torch.cat([x, unused]), w, plan, backend=backend)[:used]

    return function


def check_grouped_gemm(target, case, width_in: int, width_out: int) -> None:
    ids, plan = make_plan(case, target.device)
    used = int((ids >= 0).sum())
    x = randn(used, width_in, target=target)
    w = randn(case.num_experts, width_out, width_in, target=target, scale=width_in**-0.5)
    grad = randn(used, width_out, target=target)
    _, _, dw = check_against(
        lambda x, w: naive_grouped_gemm(x, w, ids),
        op_on_used_rows(plan, used, target.backend),
        ["x", "w"],
        [x, w],
        grad,
    )
    for expert in range(case.num_experts):
        if not (ids == expert).any():
            assert (dw[expert] == 0).all(), f"expert {expert} has no rows, its gradient must be zero"


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", targets("triton"))
def test_grouped_gemm(target, case):
    check_grouped_gemm(target, case, case.width, case.hidden)


@pytest.mark.skipif(not INTERPRETED, reason="a Hopper GPU takes these branches by itself")
@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_hopper_branches(case, as_on_hopper):
    check_grouped_gemm(Target("triton", "cpu", FP16), case, case.width, case.hidden)


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
@pytest.mark.parametrize("target", gpu_targets("triton", dtypes=[BF16]))
def test_model_shapes(target, case):
    check_grouped_gemm(target, case, case.width, 2 * case.hidden)


@pytest.mark.parametrize("target", gpu_targets("triton", dtypes=[FP32, FP16]))
def test_model_shape_in_other_dtypes(target):
    check_grouped_gemm(target, MODEL_CASES[0], 384, 1536)


@pytest.mark.parametrize("tile_rows", [32, 128])
@pytest.mark.parametrize("target", targets("triton", dtypes=[FP16]))
def test_tile_heights(target, tile_rows):
    """Experts with less than a tile of rows, and with a full tile and a bit."""
    case = Case("", 150, 2, 1, 0, 0, "skewed", tile_rows=tile_rows)
    check_grouped_gemm(target, case, 40, 96)


@pytest.mark.parametrize("target", targets("triton", dtypes=[FP32]))
def test_strides_do_not_matter(target):
    """Rows and weights with gaps, a transposed weight, and a gradient of stride 0."""
    case = Case("", 20, 3, 2, 40, 48)
    ids, plan = make_plan(case, target.device)
    x = randn(ids.numel(), 40, target=target)
    w = randn(3, 48, 40, target=target)
    function = lambda x, w: grouped_gemm(x, w, plan, backend=target.backend)  # noqa: E731
    ones = torch.ones((), device=target.device).expand(ids.numel(), 48)
    expected = evaluate(function, [x, w], ones.contiguous())
    for x_view, w_view in [(strided(x), strided(w)), (x.T.contiguous().T, w.mT.contiguous().mT)]:
        got = evaluate(function, [x_view, w_view], ones)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", targets("triton", dtypes=[FP32]))
def test_autocast_decides_the_dtype(target):
    """Products run in autocast's dtype, exactly as if the inputs had been cast; gradients come back in fp32."""
    low = FP16 if target.device == "cpu" else BF16
    case = Case("", 20, 3, 2, 40, 48)
    ids, plan = make_plan(case, target.device)
    x, w = randn(ids.numel(), 40, target=target), randn(3, 48, 40, target=target)
    grad = randn(ids.numel(), 48, target=target)
    function = lambda x, w: grouped_gemm(x, w, plan, backend=target.backend)  # noqa: E731
    with torch.autocast(target.device, dtype=low):
        got = evaluate(function, [x, w], grad)
    expected = evaluate(function, [x.to(low), w.to(low)], grad)
    assert [tensor.dtype for tensor in got] == [low, FP32, FP32]
    assert all(torch.equal(a.to(low), b) for a, b in zip(got, expected, strict=True))
