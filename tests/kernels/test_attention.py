"""self_attention: against plain PyTorch on every backend, and the one kernel that also normalises, on Hopper."""

import pytest
import torch
import torch.nn.functional as F
from dit_moe_kernels import attention, self_attention, use_backend
from dit_moe_kernels.flops import register_flop_formulas
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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
SHAPES = [(2, 5, 3, 72), (1, 9, 2, 24), (2, 128, 1, 64), (0, 4, 2, 8)]
# For the one kernel: one to eight blocks of 128 queries, and fewer and more heads than a GPU has multiprocessors.
FUSED_SHAPES = [
    (1, 128, 1, 72), (3, 128, 5, 88), (2, 256, 3, 64), (70, 256, 2, 72), (40, 256, 16, 88), (9, 256, 16, 64),
    (2, 384, 4, 72), (1, 512, 3, 88), (2, 512, 3, 64), (24, 512, 16, 88), (2, 1024, 16, 72), (0, 256, 2, 72),
    (2, 0, 2, 72),
]  # fmt: skip
NAMES = ["qkv", "q_weight", "q_bias", "k_weight"]
ON_HOPPER = gpu_targets("cuda", dtypes=[BF16, FP16])
pytestmark = pytest.mark.usefixtures("cuda_targets_on_hopper")


def naive(qkv: Tensor, *weights: Tensor) -> Tensor:
    """A softmax over all scores; outside fp64 PyTorch's own attention, as the library where it has no kernel."""
    q, k, v = qkv.unbind(2)
    if weights:
        q = F.layer_norm(q, q.shape[-1:], weights[0].to(q.dtype), weights[1].to(q.dtype), 1e-6)
        k = F.layer_norm(k, k.shape[-1:], weights[2].to(q.dtype), weights[3].to(q.dtype), 1e-6)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.dtype != FP64 and q.numel():  # it cannot take nothing
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def inputs_of(target: Target, shape: tuple[int, int, int, int], scale: float = 1.5) -> list[Tensor]:
    """Packed tokens and the norm's weights, about one, and biases."""
    images, tokens, heads, width = shape
    qkv = randn(images, tokens, 3, heads, width, target=target, scale=scale) + 0.2
    return [qkv, *(randn(width, target=target, scale=0.3) + (1 - i % 2) for i in range(4))]


def run(target: Target):
    return lambda qkv, *norm: self_attention(qkv, norm or None, backend=target.backend)


def check_all(target: Target, inputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Output and gradients to the 2x rule, but that of k's bias: the softmax cancels it, what is left is rounding."""
    leaves, fixed = inputs[:4], [bias.double() for bias in inputs[4:]]

    def with_bias(function):
        return lambda *tensors: function(*tensors, *(bias.to(tensors[0].dtype) for bias in fixed))

    return check_against(with_bias(naive), with_bias(run(target)), NAMES[: len(leaves)], leaves, grad)


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "bare"])
@pytest.mark.parametrize("shape", SHAPES, ids="B{0[0]}_N{0[1]}_H{0[2]}_d{0[3]}".format)
@pytest.mark.parametrize("target", targets("triton", dtypes=[FP64, FP32, FP16, BF16]))
def test_self_attention(target, shape, norm):
    inputs = inputs_of(target, shape)[: 5 if norm else 1]
    images, tokens, heads, width = shape
    check_all(target, inputs, randn(images, tokens, heads * width, target=target))


@pytest.mark.parametrize("fp32_weights", [False, True], ids=["same", "fp32"])
@pytest.mark.parametrize("shape", FUSED_SHAPES, ids="B{0[0]}_N{0[1]}_H{0[2]}_d{0[3]}".format)
@pytest.mark.parametrize("target", ON_HOPPER)
def test_one_kernel(target, shape, fp32_weights):
    inputs = inputs_of(target, shape)
    given = [inputs[0], *(weight.float() if fp32_weights else weight for weight in inputs[1:])]
    got, again = run(target)(*given), run(target)(*given)
    assert_2x("output", got, naive(*(tensor.double() for tensor in inputs)), naive(*inputs))
    assert torch.equal(got, again)


@pytest.mark.parametrize("target", ON_HOPPER)
def test_scores_far_apart(target):
    """Weights of the norm that make scores of some hundreds: the largest of each row decides, and nothing overflows."""
    inputs = inputs_of(target, (4, 384, 2, 72))
    inputs[1], inputs[3] = inputs[1] * 8, inputs[3] * 8
    assert_2x("output", run(target)(*inputs), naive(*(tensor.double() for tensor in inputs)), naive(*inputs))


@pytest.mark.parametrize("weight", [2.2, 2.3])
@pytest.mark.parametrize("target", ON_HOPPER)
def test_scores_at_their_bound(target, weight):
    """Keys along a query or against it: scores of 59, to the base of 2, need no maximum, those of 65 do."""
    one = randn(72, target=target)
    qkv = randn(2, 1024, 3, 2, 72, target=target)
    qkv[:, :, :2] = torch.sign(qkv[:, :, :2, :, :1]) * one
    norm = [torch.full_like(one, weight), torch.zeros_like(one)] * 2
    assert_2x("output", run(target)(qkv, *norm), naive(qkv.double(), *(x.double() for x in norm)), naive(qkv, *norm))


@pytest.mark.parametrize("target", gpu_targets("cuda"))
def test_a_slice_of_a_larger_tensor(target):
    inputs = inputs_of(target, (2, 256, 2, 72))
    larger = torch.cat([inputs[0], inputs[0]], dim=-1)
    assert torch.equal(run(target)(larger[..., 72:], *inputs[1:]), run(target)(*inputs))


@pytest.mark.parametrize("target", gpu_targets("cuda"))
def test_gradients_go_another_way(target):
    """With a gradient wanted it is qk_norm and PyTorch's attention; their output is the kernel's within rounding."""
    inputs = inputs_of(target, (2, 256, 3, 72))
    grad = randn(2, 256, 3 * 72, target=target)
    outputs = check_all(target, inputs, grad)
    alone = run(target)(*inputs)
    assert (outputs[0] - alone).abs().max() <= 2 * torch.finfo(BF16).eps * alone.abs().max()


@pytest.mark.parametrize("target", gpu_targets("cuda"))
def test_auto_takes_the_kernel_in_a_cuda_graph(target):
    inputs = inputs_of(target, (2, 256, 3, 72))
    expected = run(target)(*inputs)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        assert torch.equal(self_attention(inputs[0], tuple(inputs[1:])), expected)
    assert any("attention_kernel" in event.key for event in profile.key_averages())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = self_attention(inputs[0], tuple(inputs[1:]))
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("target", gpu_targets("cuda"))
def test_compiles(target):
    inputs = inputs_of(target, (2, 256, 3, 72))
    compiled = torch.compile(lambda qkv, *norm: self_attention(qkv, norm), fullgraph=True)
    assert torch.equal(compiled(*inputs), run(target)(*inputs))


def test_what_the_kernel_cannot_take_goes_another_way() -> None:
    """Odd sizes, other dtypes, mixed dtypes of weights, gradients: none of them reaches the op."""
    target = Target("reference", "cpu", BF16)
    qkv, *norm = inputs_of(target, (1, 128, 1, 64))
    norm = tuple(norm)
    assert attention._fits(qkv, norm)
    assert not attention._fits(qkv[:, :100], norm)
    assert not attention._fits(qkv[..., :56], tuple(weight[:56] for weight in norm))
    assert not attention._fits(qkv.float(), tuple(weight.float() for weight in norm))
    assert not attention._fits(qkv, (norm[0].float(), *norm[1:]))
    assert not attention._fits(qkv, tuple(weight.half() for weight in norm))
    assert not attention._fits(qkv.clone().requires_grad_(), norm)
    with torch.no_grad():
        assert attention._fits(qkv.clone().requires_grad_(), norm)
    with torch.autocast("cpu", BF16):
        assert attention._fits(qkv, norm)


def test_the_ops_reference_is_attention() -> None:
    inputs = inputs_of(Target("reference", "cpu", FP64), (2, 7, 3, 24))
    got = torch.ops.dit_moe.qk_norm_attention(*inputs, 1e-6, "reference").flatten(2)
    torch.testing.assert_close(got, naive(*inputs), rtol=0, atol=1e-12)


def test_backends_agree_on_the_cpu() -> None:
    inputs = inputs_of(Target("reference", "cpu", FP32), (2, 7, 3, 24))
    with use_backend("reference"):
        expected = evaluate(run(Target("auto", "cpu")), inputs, torch.ones(2, 7, 72))
    for a, b in zip(evaluate(naive, inputs, torch.ones(2, 7, 72)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_flops() -> None:
    register_flop_formulas()
    inputs = [torch.empty(2, 128, 3, 4, 72, dtype=BF16), *(torch.empty(72, dtype=BF16) for _ in range(4))]
    with FlopCounterMode(display=False) as counter:
        torch.ops.dit_moe.qk_norm_attention(*inputs, 1e-6, "reference")
    counts = counter.get_flop_counts()["Global"]
    assert counts[torch.ops.dit_moe.qk_norm_attention] == 2 * (2 * 2 * 4 * 128 * 128 * 72)


def test_wrong_inputs() -> None:
    qkv, norm = torch.zeros(1, 128, 3, 2, 64, dtype=BF16), tuple(torch.zeros(64, dtype=BF16) for _ in range(4))
    with pytest.raises(ValueError, match="qkv"):
        self_attention(qkv[:, :, :2], norm)
    with pytest.raises(TypeError, match="qkv"):
        self_attention(qkv.int(), norm)
    with pytest.raises(ValueError, match="k_weight"):
        self_attention(qkv, (norm[0], norm[1], norm[2][:8], norm[3]))
    with pytest.raises(ValueError, match="backend"):
        self_attention(qkv, norm, backend="fastest")
