"""qk_norm: both outputs and all six gradients, from packed and from separate queries and keys."""

import pytest
import torch
from dit_moe_kernels import qk_norm
from dit_moe_kernels.cuda_impl.qk_norm import fitting_width, unsupported
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
    targets,
)

# Images, tokens, heads, width of a head.
SHAPES = [
    (2, 5, 3, 72),
    (1, 9, 2, 88),
    (3, 40, 4, 64),
    (2, 70, 3, 24),
    (1, 6, 2, 128),
    (1, 1, 1, 8),
    (0, 4, 2, 8),
    (2, 0, 2, 8),
]
ODD_SHAPES = [(2, 3, 1, 33), (1, 3, 2, 136)]  # which CUDA leaves to Triton
NAMES = ["qkv", "q_weight", "q_bias", "k_weight", "k_bias"]
shapes = pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}_N{0[1]}_H{0[2]}_d{0[3]}".format)


def naive(qkv: Tensor, *weights: Tensor) -> Tensor:
    """Normalised queries and keys behind one another, from a packed (B, N, 3, H, d): the formula where it is the truth.

    Elsewhere plain PyTorch is its layer_norm, whose 16-bit gradients of the weights are coarse on the CPU.
    """
    outputs = []
    for x, weight, bias in zip(qkv.unbind(2), weights[::2], weights[1::2], strict=False):
        if x.dtype == FP64:
            mean = x.mean(-1, keepdim=True)
            variance = ((x - mean) ** 2).mean(-1, keepdim=True)
            outputs.append((x - mean) / (variance + 1e-6).sqrt() * weight + bias)
        else:
            outputs.append(torch.nn.functional.layer_norm(x, x.shape[-1:], weight, bias, 1e-6))
    return torch.cat(outputs)


def fused(target: Target):
    def run(qkv: Tensor, *weights: Tensor) -> Tensor:
        q, k, _ = qkv.unbind(2)
        return torch.cat(qk_norm(q, k, *weights, backend=target.backend))

    return run


def inputs_of(target: Target, shape: tuple[int, int, int, int]) -> tuple[list[Tensor], Tensor]:
    images, tokens, heads, width = shape
    qkv = randn(images, tokens, 3, heads, width, target=target, scale=2) + 0.5
    weights = [randn(width, target=target) for _ in range(4)]
    return [qkv, *weights], randn(2 * images, tokens, heads, width, target=target)


@shapes
@pytest.mark.parametrize("target", targets("triton", "cuda"))
def test_packed(target, shape):
    inputs, grad = inputs_of(target, shape)
    check_against(naive, fused(target), NAMES, inputs, grad)


@pytest.mark.parametrize("shape", ODD_SHAPES, ids=str)
@pytest.mark.parametrize("target", targets("triton", dtypes=[FP32]))
def test_odd_widths(target, shape):
    inputs, grad = inputs_of(target, shape)
    check_against(naive, fused(target), NAMES, inputs, grad)


@pytest.mark.parametrize("shape", [(16, 256, 16, 72), (4, 256, 16, 88)], ids=str)
@pytest.mark.parametrize("target", gpu_targets("triton", "cuda", dtypes=[BF16, FP32]))
def test_model_shapes(target, shape):
    inputs, grad = inputs_of(target, shape)
    check_against(naive, fused(target), NAMES, inputs, grad)


@pytest.mark.parametrize("layout", ["separate", "heads first", "columns apart"])
@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP32]))
def test_strides_do_not_matter(target, layout):
    inputs, grad = inputs_of(target, (2, 6, 3, 40))
    expected = evaluate(fused(target), inputs, grad)

    def arranged(qkv: Tensor, *weights: Tensor) -> Tensor:
        q, k, _ = qkv.unbind(2)
        if layout == "separate":
            q, k = q.contiguous(), k.contiguous()
        elif layout == "heads first":
            q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
        else:
            q, k = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k))
        outputs = qk_norm(q, k, *weights, backend=target.backend)
        assert all(output.is_contiguous() for output in outputs)
        return torch.cat(outputs)

    for a, b in zip(evaluate(arranged, inputs, grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("width", [8, 72, 128])
@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP32]))
def test_autocast(target, width):
    """Queries and keys in autocast's dtype among fp32 weights, as in the models; gradients in each input's dtype."""
    low = FP16 if target.device == "cpu" else BF16  # the interpreter is wrong in bf16
    inputs, grad = inputs_of(target, (2, 5, 3, width))
    inputs, grad = [inputs[0].to(low), *inputs[1:]], grad.to(low)
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with torch.autocast(target.device, low):
        out = fused(target)(*leaves)
    got = [out.detach(), *torch.autograd.grad(out, leaves, grad)]
    exact = evaluate(naive, [tensor.double() for tensor in inputs], grad.double())
    with torch.autocast(target.device, low):
        plain = evaluate(naive, inputs, grad)
    for name, a, b, c, of in zip(["output", *NAMES], got, exact, plain, [inputs[0], *inputs], strict=True):
        assert_2x(name, a, b, c.to(of.dtype))


@pytest.mark.parametrize("target", targets("triton", dtypes=[FP32]))
def test_autocast_of_fp32_inputs(target):
    """Outputs in autocast's dtype, ready for attention, within one rounding; fp32 gradients of fp32 weights."""
    low = FP16 if target.device == "cpu" else BF16  # the interpreter is wrong in bf16
    inputs, grad = inputs_of(target, (2, 5, 3, 72))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with torch.autocast(target.device, low):
        out = fused(target)(*leaves)
    exact = naive(*(tensor.double() for tensor in inputs))
    assert out.dtype == low
    assert (out.double() - exact).abs().max() <= 1.01 * torch.finfo(low).eps / 2 * exact.abs().max()
    grads = torch.autograd.grad(out, leaves, grad.to(low))
    assert {g.dtype for g in grads} == {FP32} and all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP32, FP16]))
def test_two_runs_give_the_same_bits(target):
    inputs, grad = inputs_of(target, (3, 70, 2, 72))
    runs = [evaluate(fused(target), inputs, grad) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_what_cuda_does_not_take():
    """Heads of 8 to 128 columns, in one dtype with weights in the same or in fp32; the rest has a reason."""
    assert [width for width in range(1, 150) if fitting_width(width)] == list(range(8, 129, 8))
    assert "multiple of 8" in unsupported(FP32, (FP32,) * 4, FP32, False)
    for dtype, weights, result in [(FP32, FP32, FP32), (BF16, BF16, BF16), (BF16, FP32, BF16), (FP16, FP32, FP16)]:
        assert unsupported(dtype, (weights,) * 4, result, True) is None
    for dtype, weights, result in [(FP32, FP32, BF16), (FP32, BF16, FP32), (BF16, FP16, BF16)]:
        assert "expected one dtype throughout" in unsupported(dtype, (weights,) * 4, result, True)


def test_compiles_as_one_graph_with_symbolic_widths():
    inputs, _ = inputs_of(Target("auto", "cpu"), (2, 5, 3, 16))
    run = fused(Target("auto", "cpu"))
    compiled = torch.compile(run, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), run(*inputs))


def test_fp64_is_the_reference_and_passes_gradcheck():
    target = Target("auto", "cpu", FP64)
    inputs, _ = inputs_of(target, (1, 3, 2, 4))
    assert torch.autograd.gradcheck(fused(target), [tensor.requires_grad_() for tensor in inputs])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": torch.zeros(2, 4, 24)}, ValueError, r"q: got shape \(2, 4, 24\), expected 4 dimensions"),
        ({"k": torch.zeros(2, 4, 3, 7)}, ValueError, r"k: got shape \(2, 4, 3, 7\), expected \(2, 4, 3, 8\)"),
        ({"k": torch.zeros(2, 4, 3, 8).half()}, TypeError, "k: got dtype torch.float16, expected torch.float32"),
        ({"q_bias": torch.zeros(7)}, ValueError, r"q_bias: got shape \(7,\), expected \(8,\)"),
        ({"k_weight": torch.zeros(8).long()}, TypeError, "k_weight: got dtype torch.int64"),
    ],
)
def test_wrong_inputs(change, error, message):
    heads, vector = torch.zeros(2, 4, 3, 8), torch.zeros(8)
    right = {"q": heads, "k": heads, "q_weight": vector, "q_bias": vector, "k_weight": vector, "k_bias": vector}
    with pytest.raises(error, match=message):
        qk_norm(**{**right, **change})
