"""expert_ffn, the fused layer, against a loop over experts, and against the unfused ops."""

import pytest
import torch
from dit_moe_kernels import expert_ffn, grouped_gemm, make_routing_plan, permute, swiglu, unpermute

from tests.kernels.util import (
    BF16,
    CASES,
    FP16,
    FP32,
    FP64,
    HOPPER_CASES,
    INTERPRETED,
    MODEL_CASES,
    Case,
    Target,
    check_against,
    evaluate,
    gpu_targets,
    make_plan,
    make_weights,
    naive_expert_ffn,
    randn,
    strided,
    targets,
)

NAMES = ["x", "w13", "w2", "topk_weights"]


def make_inputs(target, case) -> list[torch.Tensor]:
    """x, w13, w2, topk_weights at the scale of a trained layer: tokens ~ N(0, 1), weights ~ 1 / sqrt(fan-in)."""
    return [
        randn(case.tokens, case.width, target=target),
        randn(case.num_experts, 2 * case.hidden, case.width, target=target, scale=case.width**-0.5),
        randn(case.num_experts, case.width, case.hidden, target=target, scale=case.hidden**-0.5),
        make_weights(case, target.dtype, target.device),
    ]


def check_expert_ffn(target, case, inputs=None) -> None:
    ids, plan = make_plan(case, target.device)
    grad = randn(case.tokens, case.width, target=target)
    results = check_against(
        lambda *tensors: naive_expert_ffn(*tensors, ids),
        lambda *tensors: expert_ffn(*tensors, plan, backend=target.backend),
        NAMES,
        inputs or make_inputs(target, case),
        grad,
    )
    out, dx, dw13, dw2, dweights = results
    for expert in range(case.num_experts):
        if not (ids == expert).any():
            assert (dw13[expert] == 0).all() and (dw2[expert] == 0).all()
    alone = (ids < 0).all(dim=1)
    assert (out[alone] == 0).all() and (dx[alone] == 0).all() and (dweights[ids < 0] == 0).all()


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", targets("triton"))
def test_expert_ffn(target, case):
    check_expert_ffn(target, case)


@pytest.mark.parametrize("target", targets("triton"))
def test_saturated_gates(target):
    """Pre-activations in the hundreds: sigmoids of 0 and 1, nothing overflows, and the gradients keep their digits."""
    case = CASES[0]
    inputs = make_inputs(target, case)
    inputs[1][:, : case.hidden] *= 128
    check_expert_ffn(target, case, inputs)


def check_addend(target, case) -> None:
    """With an addend, all gradients to the 2x rule; it is added before the rounding."""
    ids, plan = make_plan(case, target.device)
    check_against(
        lambda *tensors: naive_expert_ffn(*tensors[:4], ids) + tensors[4],
        lambda *tensors: expert_ffn(*tensors[:4], plan, addend=tensors[4], backend=target.backend),
        [*NAMES, "addend"],
        [*make_inputs(target, case), randn(case.tokens, case.width, target=target)],
        randn(case.tokens, case.width, target=target),
    )


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", targets("triton"))
def test_addend(target, case):
    check_addend(target, case)


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
@pytest.mark.parametrize("target", gpu_targets("cuda", "triton", dtypes=[BF16]))
def test_addend_at_model_shapes(target, case):
    check_addend(target, case)


@pytest.mark.parametrize("target", targets("triton", dtypes=[FP32]))
def test_gradient_of_the_addend_alone(target):
    """Frozen experts and router: the output's gradient comes through, though no pre-activations were kept."""
    case = CASES[0]
    _, plan = make_plan(case, target.device)
    inputs, grad = make_inputs(target, case), randn(case.tokens, case.width, target=target)
    addend = randn(case.tokens, case.width, target=target).requires_grad_()
    out = expert_ffn(*inputs, plan, addend=addend, backend=target.backend)
    assert torch.equal(torch.autograd.grad(out, addend, grad)[0], grad)


@pytest.mark.skipif(not INTERPRETED, reason="a Hopper GPU takes these branches by itself")
@pytest.mark.parametrize("case", HOPPER_CASES, ids=str)
def test_hopper_branches(case, as_on_hopper):
    check_expert_ffn(Target("triton", "cpu", FP16), case)


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
@pytest.mark.parametrize("target", gpu_targets("triton", dtypes=[BF16]))
def test_model_shapes(target, case):
    check_expert_ffn(target, case)


@pytest.mark.parametrize("target", gpu_targets("triton", dtypes=[FP32, FP16]))
def test_model_shape_in_other_dtypes(target):
    check_expert_ffn(target, MODEL_CASES[0])


@pytest.mark.parametrize("target", targets("triton", dtypes=[FP64, FP32]))
def test_equals_the_unfused_ops(target):
    """To the last bit in float64; in fp32 to the rounding of a sum in another order."""
    case = CASES[0]
    _, plan = make_plan(case, target.device)
    backend = target.backend
    inputs, grad = make_inputs(target, case), randn(case.tokens, case.width, target=target)

    def unfused(x, w13, w2, weights):
        h = grouped_gemm(permute(x, plan, backend=backend), w13, plan, backend=backend)
        y = grouped_gemm(swiglu(h, backend=backend), w2, plan, backend=backend)
        return unpermute(y, plan, weights, backend=backend)

    got = evaluate(lambda *tensors: expert_ffn(*tensors, plan, backend=backend), inputs, grad)
    expected = evaluate(unfused, inputs, grad)
    tolerance = 1e-12 if target.dtype == FP64 else 1e-5
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("target", targets("triton", dtypes=[FP32]))
def test_strides_do_not_matter(target):
    case = CASES[0]
    _, plan = make_plan(case, target.device)
    inputs = make_inputs(target, case)
    function = lambda *tensors: expert_ffn(*tensors, plan, backend=target.backend)  # noqa: E731
    ones = torch.ones((), device=target.device).expand(case.tokens, case.width)
    expected = evaluate(function, inputs, ones.contiguous())
    got = evaluate(function, [strided(tensor) for tensor in inputs], ones)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("target", targets("triton", dtypes=[FP32]))
def test_inference_gives_the_same_bits(target):
    """Without a backward to come the pre-activations are not kept; the result does not change."""
    case = CASES[0]
    _, plan = make_plan(case, target.device)
    inputs = make_inputs(target, case)
    trained, *_ = evaluate(
        lambda *tensors: expert_ffn(*tensors, plan, backend=target.backend),
        inputs,
        torch.ones(case.tokens, case.width, device=target.device),
    )
    with torch.no_grad():
        assert torch.equal(expert_ffn(*inputs, plan, backend=target.backend), trained)


@pytest.mark.parametrize("target", targets("triton", dtypes=[FP32]))
@pytest.mark.parametrize("wanted", NAMES)
def test_gradient_of_one_input_alone(target, wanted):
    """Frozen inputs change nothing about the other's gradient: fine-tuning of experts only, or of the router only."""
    case = Case("", 20, 3, 2, 40, 48)
    _, plan = make_plan(case, target.device)
    inputs, grad = make_inputs(target, case), randn(case.tokens, case.width, target=target)
    _, *expected = evaluate(lambda *tensors: expert_ffn(*tensors, plan, backend=target.backend), inputs, grad)
    index = NAMES.index(wanted)
    leaf = inputs[index].detach().requires_grad_()
    given = [leaf if i == index else tensor for i, tensor in enumerate(inputs)]
    (got,) = torch.autograd.grad(expert_ffn(*given, plan, backend=target.backend), leaf, grad)
    assert torch.equal(got, expected[index])


@pytest.mark.parametrize("target", targets("triton", dtypes=[FP32]))
def test_autocast_decides_the_dtype(target):
    low = FP16 if target.device == "cpu" else BF16
    case = Case("", 20, 3, 2, 40, 48)
    _, plan = make_plan(case, target.device)
    inputs, grad = make_inputs(target, case), randn(case.tokens, case.width, target=target)
    addend = randn(case.tokens, case.width, target=target)

    def function(*tensors):
        return expert_ffn(*tensors[:4], plan, addend=tensors[4], backend=target.backend)

    with torch.autocast(target.device, dtype=low):
        got = evaluate(function, [*inputs, addend], grad)
    expected = evaluate(function, [*(tensor.to(low) for tensor in inputs[:3]), inputs[3], addend.to(low)], grad)
    assert [tensor.dtype for tensor in got] == [low, *[FP32] * 5]
    assert all(torch.equal(a.to(b.dtype), b) for a, b in zip(got, expected, strict=True))


def test_gradcheck():
    """The backward formulas against finite differences, in float64 on the reference backend."""
    case = Case("", 5, 3, 2, 4, 3)
    ids = torch.tensor([[0, 2], [2, 0], [-1, 2], [0, -1], [2, 2]])  # expert 1 empty, two slots unrouted
    plan = make_routing_plan(ids, 3, backend="reference")
    leaves = [
        tensor.double().requires_grad_()
        for tensor in (torch.randn(5, 4), torch.randn(3, 6, 4), torch.randn(3, 4, 3), make_weights(case, FP64, "cpu"))
    ]
    assert torch.autograd.gradcheck(lambda *tensors: expert_ffn(*tensors, plan, backend="reference"), leaves)
    leaves.append(torch.randn(5, 4, dtype=FP64, requires_grad=True))

    def with_addend(*tensors):
        *others, addend = tensors
        return expert_ffn(*others, plan, addend=addend, backend="reference")

    assert torch.autograd.gradcheck(with_addend, leaves)
