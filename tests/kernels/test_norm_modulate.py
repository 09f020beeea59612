"""norm_modulate and residual_norm_modulate: outputs and all gradients, in every dtype and mixture of dtypes."""

import pytest
import torch
from dit_moe_kernels import norm_modulate, residual_norm_modulate
from dit_moe_kernels.cuda_impl.norm_modulate import num_parts, unsupported
from torch import Tensor

from tests.kernels.util import (
    BF16,
    FP16,
    FP32,
    FP64,
    Target,
    assert_2x,
    check_against,
    evaluate,
    gpu_targets,
    randn,
    strided,
    targets,
)

# Images, tokens of an image, width: the model's widths, part tiles, one token, wide rows, nothing at all.
SHAPES = [
    (3, 5, 72),
    (2, 7, 33),
    (2, 1, 8),
    (1, 40, 200),
    (2, 9, 384),
    (1, 3, 1152),
    (1, 2, 2100),
    (0, 4, 8),
    (2, 0, 8),
]
MODEL_SHAPES = [(16, 256, 384), (16, 256, 1152), (2, 1024, 1408)]
TARGETS = targets("triton", "cuda")
shapes = pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}_N{0[1]}_D{0[2]}".format)


def naive_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * (1 + scale[:, None]) + shift[:, None]


def naive_residual(x: Tensor, gate: Tensor, y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Both outputs side by side, for one gradient of both."""
    total = x + gate[:, None] * y
    return torch.cat([total, naive_norm_modulate(total, shift, scale)])


def fused_residual(target: Target):
    return lambda *inputs: torch.cat(residual_norm_modulate(*inputs, backend=target.backend))


def inputs_of(target: Target, shape: tuple[int, int, int], residual: bool) -> tuple[list[str], list[Tensor], Tensor]:
    """Names, inputs and an output gradient: a residual stream of spread 4 and mean 1, as inside a trained model."""
    images, tokens, width = shape
    x, y = randn(*shape, target=target, scale=4) + 1, randn(*shape, target=target)
    shift, scale, gate = (randn(images, width, target=target, scale=0.5) for _ in range(3))
    if not residual:
        return ["x", "shift", "scale"], [x, shift, scale], randn(*shape, target=target)
    return (
        ["x", "gate", "y", "shift", "scale"],
        [x, gate, y, shift, scale],
        randn(2 * images, *shape[1:], target=target),
    )


def check_norm(target: Target, shape: tuple[int, int, int]) -> None:
    names, inputs, grad = inputs_of(target, shape, residual=False)
    check_against(naive_norm_modulate, lambda *a: norm_modulate(*a, backend=target.backend), names, inputs, grad)


def check_residual(target: Target, shape: tuple[int, int, int]) -> None:
    names, inputs, grad = inputs_of(target, shape, residual=True)
    check_against(naive_residual, fused_residual(target), names, inputs, grad)


@shapes
@pytest.mark.parametrize("target", TARGETS)
def test_norm_modulate(target, shape):
    check_norm(target, shape)


@shapes
@pytest.mark.parametrize("target", TARGETS)
def test_residual_norm_modulate(target, shape):
    check_residual(target, shape)


@pytest.mark.parametrize("shape", MODEL_SHAPES, ids=str)
@pytest.mark.parametrize("target", gpu_targets("triton", "cuda", dtypes=[BF16, FP32]))
def test_model_shapes(target, shape):
    check_norm(target, shape)
    check_residual(target, shape)


@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP32]))
def test_strides_do_not_matter(target):
    """Tokens with gaps, vectors that are slices of one packed tensor or have gaps, gradients of stride 0."""
    x, y = (strided(randn(2, 6, 40, target=target)) for _ in range(2))
    packed = randn(2, 3, 40, target=target)
    ones = torch.ones((), device=target.device)
    for gate, shift, scale in (packed.unbind(1), [strided(vector) for vector in packed.unbind(1)]):
        check_against(
            naive_norm_modulate,
            lambda *a: norm_modulate(*a, backend=target.backend),
            ["x", "shift", "scale"],
            [x, shift, scale],
            ones.expand(2, 6, 40),
        )
        inputs = [x, gate, y, shift, scale]
        names = ["x", "gate", "y", "shift", "scale"]
        check_against(naive_residual, fused_residual(target), names, inputs, ones.expand(4, 6, 40))


@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP32]))
def test_a_large_mean_does_not_swamp_the_variance(target):
    """Rows around 1000 with a spread of 1: a one-pass variance E[x^2] - E[x]^2 would keep no digit."""
    x = randn(1, 8, 384, target=target) + 1000
    zero = torch.zeros(1, 384, device=target.device)
    got = norm_modulate(x, zero, zero, backend=target.backend)
    exact = naive_norm_modulate(x.double(), zero.double(), zero.double())
    plain = torch.nn.functional.layer_norm(x, (384,), eps=1e-6)
    assert_2x("output", got, exact, plain)


@pytest.mark.parametrize("target", targets("triton", dtypes=[FP16, FP32]))
def test_unequal_dtypes_promote_as_plain_operations_do(target):
    """An fp32 residual stream between 16-bit branches, as autocast keeps it; gradients in each input's dtype."""
    names, inputs, grad = inputs_of(target, (2, 5, 72), residual=True)
    inputs[0] = inputs[0].float()
    total, out = residual_norm_modulate(*inputs, backend=target.backend)
    assert total.dtype == out.dtype == FP32
    got = evaluate(fused_residual(target), inputs, grad)
    exact = evaluate(naive_residual, [tensor.double() for tensor in inputs], grad.double())
    plain = evaluate(naive_residual, inputs, grad)
    for name, *results in zip(["output", *names], got, exact, plain, strict=True):
        assert_2x(name, *results)


@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP32]))
@pytest.mark.parametrize("width", [33, 72, 384, 1152, 2104])
def test_autocast(target, width):
    """An fp32 residual stream among numbers in autocast's dtype, as in the models; gradients in each input's dtype."""
    low = FP16 if target.device == "cpu" else BF16  # the interpreter is wrong in bf16
    _, inputs, grad = inputs_of(target, (2, 5, width), residual=True)
    inputs = [inputs[0], *(tensor.to(low) for tensor in inputs[1:])]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with torch.autocast(target.device, low):
        total, out = residual_norm_modulate(*leaves, backend=target.backend)
        alone = norm_modulate(leaves[0], *leaves[3:], backend=target.backend)
    assert total.dtype == FP32 and out.dtype == alone.dtype == low
    got = torch.autograd.grad([total, out], leaves, [grad[:2], grad[2:].to(low)])
    grad = torch.cat([grad[:2], grad[2:].to(low).float()])
    exact = evaluate(naive_residual, [tensor.double() for tensor in inputs], grad.double())
    plain = evaluate(naive_residual, inputs, grad)
    assert_2x("total", total, exact[0][:2], plain[0][:2])
    assert_2x("out", out, exact[0][2:], plain[0][2:].to(low))
    of_x = [inputs[0], *inputs[3:]]
    exact_alone = naive_norm_modulate(*(tensor.double() for tensor in of_x))
    assert_2x("out alone", alone, exact_alone, naive_norm_modulate(*of_x).to(low))
    for name, *results in zip(["x", "gate", "y", "shift", "scale"], got, exact[1:], plain[1:], strict=True):
        assert_2x(f"d{name}", *results)


@pytest.mark.parametrize("target", targets("triton", dtypes=[FP32]))
def test_autocast_of_fp32_inputs(target):
    """The residual stream keeps its fp32, the input of the next products is in autocast's dtype; gradients are fp32."""
    low = FP16 if target.device == "cpu" else BF16
    _, inputs, grad = inputs_of(target, (2, 5, 72), residual=True)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with torch.autocast(target.device, low):
        total, out = residual_norm_modulate(*leaves, backend=target.backend)
    exact_total, exact_out = naive_residual(*(tensor.double() for tensor in inputs)).chunk(2)
    torch.testing.assert_close(total.double(), exact_total, rtol=0, atol=1e-5)
    assert (out.double() - exact_out).abs().max() <= 1.01 * torch.finfo(low).eps / 2 * exact_out.abs().max()
    grads = torch.autograd.grad([total, out], leaves, [grad[:2], grad[2:].to(low)])
    assert {g.dtype for g in grads} == {FP32} and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("shape", [*SHAPES, *MODEL_SHAPES, (64, 256, 1152), (1, 4097, 8)], ids=str)
def test_no_part_of_an_image_is_empty(shape):
    """CUDA sums an image's tokens in parts of equal length, but for the last."""
    tokens, parts = shape[1], num_parts(*shape)
    assert parts == (-(-tokens // -(-tokens // parts)) if tokens else 0)


def test_what_cuda_does_not_mix():
    """One dtype, or an fp32 stream among 16-bit numbers; the rest has a reason."""
    for mixture in [(FP32, FP32), (BF16, BF16, BF16), (FP32, BF16, BF16), (FP32, FP16)]:
        assert unsupported(mixture[0], mixture[1:]) is None
    for mixture in [(BF16, FP32), (FP32, BF16, FP32), (FP16, BF16), (FP32, FP16, BF16)]:
        assert "expected one dtype throughout" in unsupported(mixture[0], mixture[1:])


@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP32, FP16]))
def test_two_runs_give_the_same_bits(target):
    _, inputs, grad = inputs_of(target, (3, 70, 200), residual=True)
    runs = [evaluate(fused_residual(target), inputs, grad) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_fp64_is_the_reference_and_passes_gradcheck():
    target = Target("auto", "cpu", FP64)
    _, inputs, _ = inputs_of(target, (2, 3, 6), residual=True)
    assert torch.autograd.gradcheck(residual_norm_modulate, [tensor.requires_grad_() for tensor in inputs])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(4, 8)}, ValueError, r"x: got shape \(4, 8\), expected 3 dimensions"),
        ({"x": torch.zeros(2, 4, 8).long()}, TypeError, "x: got dtype torch.int64"),
        ({"y": torch.zeros(2, 4, 7)}, ValueError, r"y: got shape \(2, 4, 7\), expected \(2, 4, 8\)"),
        ({"gate": torch.zeros(2, 1, 8)}, ValueError, "gate: got shape"),
        ({"shift": torch.zeros(3, 8)}, ValueError, r"shift: got shape \(3, 8\), expected \(2, 8\)"),
        ({"scale": torch.zeros(2, 8, device="meta")}, ValueError, "scale: got device meta, expected cpu as x has"),
    ],
)
def test_wrong_inputs(change, error, message):
    tokens, vector = torch.zeros(2, 4, 8), torch.zeros(2, 8)
    right = {"x": tokens, "gate": vector, "y": tokens, "shift": vector, "scale": vector}
    with pytest.raises(error, match=message):
        residual_norm_modulate(**{**right, **change})
    if not {"y", "gate"} & set(change):
        del right["gate"], right["y"]
        with pytest.raises(error, match=message):
            norm_modulate(**{**right, **change})
