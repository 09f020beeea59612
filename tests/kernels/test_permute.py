"""permute and unpermute: exact where data only moves, the 2x rule where rows are summed."""

import pytest
import torch
from dit_moe_kernels import make_routing_plan, permute, unpermute

from tests.kernels.util import (
    BF16,
    CASES,
    FP16,
    FP32,
    MODEL_CASES,
    Case,
    check_against,
    evaluate,
    gpu_targets,
    make_plan,
    make_weights,
    naive_permute,
    naive_rows,
    naive_unpermute,
    randn,
    strided,
    targets,
)

TARGETS = targets("triton", "cuda")
GPU_TARGETS = gpu_targets("triton", "cuda", dtypes=[BF16, FP32])
WIDTHS = [1, 7, 64, 130, 1000]


def check_permute(target, case) -> None:
    ids, plan = make_plan(case, target.device)
    x = randn(case.tokens, case.width, target=target)
    grad = randn(ids.numel(), case.width, target=target)
    out, _ = check_against(
        lambda x: naive_permute(x, ids, case.num_experts),
        lambda x: permute(x, plan, backend=target.backend),
        ["x"],
        [x],
        grad,
    )
    assert torch.equal(out, naive_permute(x, ids, case.num_experts))  # a copy, so not one bit may change


def check_unpermute(target, case, weighted: bool, added: bool = False) -> None:
    ids, plan = make_plan(case, target.device)
    y = randn(ids.numel(), case.width, target=target)
    y[len(naive_rows(ids, case.num_experts)) :] = torch.nan  # unused rows may hold anything
    grad = randn(case.tokens, case.width, target=target)
    inputs, names = [y], ["y"]
    if weighted:
        inputs, names = [y, make_weights(case, target.dtype, target.device)], ["y", "topk_weights"]
    if added:
        inputs, names = [randn(case.tokens, case.width, target=target), *inputs], ["addend", *names]

    def naive(*tensors):
        addend, y, *weights = tensors if added else (None, *tensors)
        summed = naive_unpermute(y, weights[0] if weights else None, ids, case.num_experts)
        return summed if addend is None else summed + addend

    def combine(*tensors):
        addend, y, *weights = tensors if added else (None, *tensors)
        return unpermute(y, plan, *weights, addend=addend, backend=target.backend)

    check_against(
        naive,
        combine,
        names,
        inputs,
        grad,
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_permute(target, case):
    check_permute(target, case)


@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_unpermute(target, case, weighted):
    check_unpermute(target, case, weighted)


@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_unpermute_with_addend(target, case, weighted):
    check_unpermute(target, case, weighted, added=True)


@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP16]))
def test_the_addend_is_added_before_the_one_rounding(target):
    """2048 + 1 + 1 in fp16: a sum rounded before the addend came would lose both ones."""
    plan = make_routing_plan(torch.tensor([[0, 1]] * 5, device=target.device), 2, validate=False)
    y = torch.cat([torch.full((5, 24), value, dtype=FP16, device=target.device) for value in (2048.0, 1.0)])
    addend = torch.ones(5, 24, dtype=FP16, device=target.device)
    for weights in (None, torch.ones(5, 2, device=target.device)):
        assert (unpermute(y, plan, weights, addend=addend, backend=target.backend) == 2050).all()


@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP32]))
def test_an_addend_of_zeros_changes_nothing(target):
    case = CASES[0]
    ids, plan = make_plan(case, target.device)
    y, weights = randn(ids.numel(), case.width, target=target), make_weights(case, target.dtype, target.device)
    zeros = torch.zeros(case.tokens, case.width, device=target.device)
    expected = unpermute(y, plan, weights, backend=target.backend)
    assert torch.equal(unpermute(y, plan, weights, addend=zeros, backend=target.backend), expected)


@pytest.mark.parametrize("weighted", [False, True], ids=["sum", "weighted"])
@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP32]))
def test_gradient_of_the_addend_alone(target, weighted):
    """Rows and weights frozen: the output's gradient comes through, and nothing else is computed."""
    case = CASES[0]
    ids, plan = make_plan(case, target.device)
    y, grad = randn(ids.numel(), case.width, target=target), randn(case.tokens, case.width, target=target)
    weights = make_weights(case, target.dtype, target.device) if weighted else None
    addend = strided(randn(case.tokens, case.width, target=target)).requires_grad_()
    out = unpermute(y, plan, weights, addend=addend, backend=target.backend)
    assert torch.equal(torch.autograd.grad(out, addend, grad)[0], grad)


@pytest.mark.parametrize("width", WIDTHS, ids="D{}".format)
@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP16]))
def test_any_width(target, width):
    case = Case("", 11, 4, 2, width, 0)
    check_permute(target, case)
    check_unpermute(target, case, weighted=True)
    check_unpermute(target, case, weighted=True, added=True)


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
@pytest.mark.parametrize("target", GPU_TARGETS)
def test_model_shapes(target, case):
    check_permute(target, case)
    check_unpermute(target, case, weighted=False)
    check_unpermute(target, case, weighted=True)
    check_unpermute(target, case, weighted=True, added=True)


@pytest.mark.parametrize("top_k", [3, 8])
@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP32]))
def test_larger_top_k(target, top_k):
    case = Case("", 13, 8, top_k, 40, 0)
    check_permute(target, case)
    check_unpermute(target, case, weighted=True)


@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP32]))
def test_strides_do_not_matter(target):
    """Inputs with gaps, and the gradient of a sum, which has stride 0."""
    case = CASES[0]
    ids, plan = make_plan(case, target.device)
    x, y = randn(case.tokens, case.width, target=target), randn(ids.numel(), case.width, target=target)
    weights = make_weights(case, target.dtype, target.device)

    def layer(x, y, weights):
        rows = permute(x, plan, backend=target.backend)
        return unpermute(rows * y, plan, weights, backend=target.backend)

    ones = torch.ones((), device=target.device).expand(case.tokens, case.width)
    expected = evaluate(layer, [x, y, weights], ones.contiguous())
    got = evaluate(layer, [strided(x), strided(y), strided(weights)], ones)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP32]))
def test_unpermute_undoes_permute(target):
    """With weights that sum to one every token comes back, bit for bit: 1/2 and 1/2 are exact."""
    case = CASES[0]
    _, plan = make_plan(case, target.device)
    x = randn(case.tokens, case.width, target=target)
    halves = torch.full((case.tokens, 2), 0.5, device=target.device)
    rows = permute(x, plan, backend=target.backend)
    assert torch.equal(unpermute(rows, plan, halves, backend=target.backend), x)


@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP32]))
def test_an_unrouted_token_becomes_zero(target):
    """Not NaN: neither weights nor rows of unrouted slots are multiplied in, and their weight's gradient is zero."""
    case = Case("", 21, 4, 2, 33, 100, "some")
    ids, plan = make_plan(case, target.device)
    y = randn(ids.numel(), case.width, target=target)
    weights = make_weights(case, target.dtype, target.device)
    alone = (ids < 0).all(dim=1)
    assert alone.any()
    grad = randn(case.tokens, case.width, target=target)
    out, _, dweights = evaluate(lambda y, w: unpermute(y, plan, w, backend=target.backend), [y, weights], grad)
    assert (out[alone] == 0).all()
    assert (dweights[ids < 0] == 0).all()
