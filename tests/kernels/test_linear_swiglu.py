"""linear_swiglu: product and activation in one op, against plain PyTorch, on every backend."""

import sys

import pytest
import torch
import torch.nn.functional as F
from dit_moe_kernels import BackendUnavailableError, backends, linear_swiglu, reference, swiglu
from dit_moe_kernels.cuda_impl import grouped_gemm as cuda_kernels
from dit_moe_kernels.cuda_impl import swiglu as cuda_activation
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
    naive_swiglu,
    randn,
    strided,
    targets,
)

# T, D, F
SHAPES = [(37, 72, 48), (5, 33, 21), (1, 8, 8), (0, 40, 48), (300, 64, 136)]
# The shared experts of the paper's models: D, F = 2 D.
WIDTHS = {"S": (384, 768), "B": (768, 1536), "XL": (1152, 2304), "G": (1408, 2816)}
ON_HOPPER = gpu_targets("cuda", dtypes=[BF16, FP16])
pytestmark = pytest.mark.usefixtures("cuda_targets_on_hopper")


@pytest.fixture
def fused_from_the_first_row(monkeypatch):
    """The fused kernel in small cases too, where it is not the faster way."""
    monkeypatch.setattr(sys.modules["dit_moe_kernels.linear_swiglu"], "_FUSED_ROWS", 0)


@pytest.mark.parametrize(("rows", "fused"), [(4095, False), (4096, True)])
def test_few_rows_are_not_fused(monkeypatch, rows, fused):
    """With stand-ins for both launches, on this machine's device; the op is not called for few rows."""
    launched = []
    monkeypatch.setattr(backends, "resolve", lambda *_, **__: "cuda")
    monkeypatch.setattr(cuda_kernels, "launch", lambda op, *_: launched.append(op))
    monkeypatch.setattr(cuda_activation, "launch", lambda op, *_: launched.append(op))
    assert linear_swiglu(torch.zeros(rows, 8), torch.zeros(16, 8)).shape == (rows, 8)
    assert launched == ["grouped_swiglu" if fused else "swiglu"]


def naive(x: Tensor, w13: Tensor) -> Tensor:
    return naive_swiglu(x @ w13.T)


def make_inputs(target: Target, tokens: int, width: int, hidden: int) -> tuple[list[Tensor], Tensor]:
    """x and w13 at the scale of a trained layer, and a gradient."""
    x, grad = randn(tokens, width, target=target), randn(tokens, hidden, target=target)
    return [x, randn(2 * hidden, width, target=target, scale=width**-0.5)], grad


def check(target: Target, tokens: int, width: int, hidden: int) -> None:
    """Output and gradients to the 2x rule; without gradients, and again, the same bits."""
    inputs, grad = make_inputs(target, tokens, width, hidden)
    function = lambda x, w13: linear_swiglu(x, w13, backend=target.backend)  # noqa: E731
    got = check_against(naive, function, ["x", "w13"], inputs, grad)
    assert torch.equal(function(*inputs), got[0]), "without gradients the result differs"
    again = evaluate(function, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True)), "two runs differ"


@pytest.mark.parametrize("shape", SHAPES, ids="T{0[0]}_D{0[1]}_F{0[2]}".format)
@pytest.mark.parametrize("target", targets("triton"))
def test_linear_swiglu(target, shape):
    check(target, *shape)


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[1] % 8 == s[2] % 8 == 0], ids=str)
@pytest.mark.parametrize("target", ON_HOPPER)
def test_fused_kernel(target, shape, fused_from_the_first_row):
    check(target, *shape)


@pytest.mark.parametrize("target", ON_HOPPER)
def test_few_rows(target):
    check(target, 300, 64, 136)


@pytest.mark.parametrize("tokens", [1, 77, 4096])
@pytest.mark.parametrize("model", WIDTHS)
@pytest.mark.parametrize("target", ON_HOPPER)
def test_shared_experts_of_the_models(target, model, tokens, fused_from_the_first_row):
    check(target, tokens, *WIDTHS[model])


@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)], ids=["both", "x", "w13"])
def test_gradcheck(wanted):
    inputs = [torch.randn(5, 6, dtype=FP64), torch.randn(14, 6, dtype=FP64)]
    leaves = [tensor.requires_grad_(flag) for tensor, flag in zip(inputs, wanted, strict=True)]
    assert torch.autograd.gradcheck(linear_swiglu, leaves)


@pytest.mark.parametrize("target", targets("triton", dtypes=[FP32]))
def test_strides_do_not_matter(target):
    """Inputs with gaps, and a gradient of stride 0."""
    inputs, _ = make_inputs(target, 20, 24, 16)
    ones = torch.ones((), device=target.device).expand(20, 16)
    function = lambda x, w13: linear_swiglu(x, w13, backend=target.backend)  # noqa: E731
    check_against(naive, function, ["x", "w13"], [strided(tensor) for tensor in inputs], ones)


@pytest.mark.parametrize("target", ON_HOPPER)
def test_fused_kernel_with_views(target, fused_from_the_first_row):
    """Inputs with gaps, and inputs that start at no multiple of 16 bytes."""
    inputs, _ = make_inputs(target, 77, 72, 48)
    expected = linear_swiglu(*inputs, backend="cuda")
    shifted = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape) for t in inputs]
    for views in ([strided(tensor) for tensor in inputs], shifted):
        assert torch.equal(linear_swiglu(*views, backend="cuda"), expected)


def test_backward_keeps_what_product_and_activation_apart_keep():
    """In bytes; and without gradients the pre-activations are not returned at all."""
    x, w13 = torch.randn(9, 8), torch.randn(12, 8, requires_grad=True)

    def saved(function) -> int:
        sizes = {}

        def pack(tensor: Tensor) -> Tensor:
            sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = function(x.requires_grad_(), w13)
        assert out.requires_grad
        return sum(sizes.values())

    assert saved(linear_swiglu) == saved(lambda x, w13: swiglu(F.linear(x, w13))) > 0
    without = torch.ops.dit_moe.linear_swiglu(x.detach(), w13.detach(), False, "reference")[1]
    assert without.shape == (0, 12)


def test_autocast():
    """The result of inputs cast beforehand, in autocast's dtype; gradients in that of the inputs."""
    inputs, grad = make_inputs(Target("reference", "cpu", FP32), 9, 16, 24)
    expected = evaluate(linear_swiglu, [tensor.to(BF16) for tensor in inputs], grad.to(BF16))
    leaves = [tensor.requires_grad_() for tensor in inputs]
    with torch.autocast("cpu", BF16):
        out = linear_swiglu(*leaves)
    got = [out, *torch.autograd.grad(out, leaves, grad.to(BF16))]
    assert [tensor.dtype for tensor in got] == [BF16, FP32, FP32]
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_compiles_as_one_graph(backend):
    """Forward and backward, with another number of tokens the second time."""
    torch._dynamo.reset()
    function = lambda x, w13: linear_swiglu(x, w13, backend=backend)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for tokens in (12, 7):
        inputs, grad = make_inputs(Target("reference", "cpu", FP32), tokens, 16, 24)
        for a, b in zip(evaluate(compiled, inputs, grad), evaluate(function, inputs, grad), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("save_h", [False, True])
def test_the_fused_kernel_is_launched_without_offsets(monkeypatch, save_h):
    """What the launch is given, with a stand-in for it: one expert, and h only where it is to be kept."""
    calls = []

    def launch(op, tensors, sizes, like):
        x, w13, offsets, out, h = tensors
        calls.append((op, offsets, sizes, h is not None))
        a, pre_activations = reference.linear_swiglu(x, w13[0])
        out.copy_(a)
        if h is not None:
            h.copy_(pre_activations)

    def launch_activation(op, tensors, sizes, like):
        grad, h, dh = tensors
        calls.append((op, sizes))
        dh.copy_(reference.swiglu_backward(grad, h))

    monkeypatch.setattr(cuda_kernels, "launch", launch)
    monkeypatch.setattr(cuda_activation, "launch", launch_activation)
    (x, w13), grad = make_inputs(Target("cuda", "cpu", FP32), 9, 16, 24)
    leaves = [x.requires_grad_(save_h), w13.requires_grad_(save_h)]
    out, h = torch.ops.dit_moe.linear_swiglu(*leaves, save_h, "cuda")
    assert calls == [("grouped_swiglu", None, (9, 16, 24, 1), save_h)]
    assert torch.equal(out, linear_swiglu(x, w13, backend="reference")) and h.shape == (9 if save_h else 0, 48)
    if save_h:
        got = torch.autograd.grad(out, leaves, grad)
        for a, b in zip(got, evaluate(naive, [x, w13], grad)[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert calls[1:] == [("swiglu_backward", (9, 24))]


@pytest.mark.parametrize(
    ("missing", "capability", "expected"),
    [
        ((), (9, 0), "cuda"),
        ((), (8, 0), "triton"),
        (("cuda",), (9, 0), "triton"),
        (("cuda", "triton"), (9, 0), "reference"),
    ],
)
def test_policy(monkeypatch, missing, capability, expected):
    """What `auto` takes, as if these backends were missing on a GPU of this capability."""
    reason = None if capability == (9, 0) else f"got compute capability {capability}"
    monkeypatch.delenv(backends.ENV_BACKEND, raising=False)
    monkeypatch.setattr(backends, "availability", lambda name, device: "it is missing" if name in missing else None)
    monkeypatch.setattr(cuda_kernels, "unsupported", lambda *_: reason)
    for cached in (backends._reason_against, backends._choose):
        cached.cache_clear()
    try:
        assert backends.resolve("auto", "linear_swiglu", "cpu", BF16) == expected
        if expected != "cuda":
            with pytest.raises(BackendUnavailableError, match=f"'cuda'.*{'missing' if missing else 'capability'}"):
                backends.resolve("cuda", "linear_swiglu", "cpu", BF16)
        # The activation's gradient behind a forward on "cuda".
        assert backends.companion("cuda", "swiglu", "cpu", BF16) == "cuda"
        assert backends.companion("reference", "swiglu", "cpu", BF16) == "reference"
    finally:
        for cached in (backends._reason_against, backends._choose):
            cached.cache_clear()


# ---------------------------------------------------------------- GPU behaviour


@pytest.mark.parametrize("target", ON_HOPPER)
def test_auto_takes_the_fused_kernel(target):
    """Also compiled; other dtypes and widths, and few rows, fall back to the product and the activation apart."""
    (x, w13), _ = make_inputs(target, 300, 384, 768)
    assert torch.equal(linear_swiglu(x, w13), swiglu(F.linear(x, w13), backend="cuda"))
    inputs, grad = make_inputs(target, 4096, 384, 768)
    expected = evaluate(lambda *t: linear_swiglu(*t, backend="cuda"), inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(evaluate(linear_swiglu, inputs, grad), expected, strict=True))
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(linear_swiglu, fullgraph=True)(*inputs), expected[0])
    for dtype, width, reason in [(FP32, 64, "float32.*expected"), (target.dtype, 36, "no multiple of 8")]:
        (x, w13), _ = make_inputs(Target("cuda", "cuda", dtype), 10, width, 48)
        with pytest.raises(BackendUnavailableError, match=f"'cuda' cannot run linear_swiglu: .*{reason}"):
            linear_swiglu(x, w13, backend="cuda")
        assert torch.equal(linear_swiglu(x, w13), swiglu(F.linear(x, w13), backend="triton"))


@pytest.mark.parametrize("target", ON_HOPPER)
def test_a_graph_on_a_side_stream_follows_its_inputs(target, fused_from_the_first_row):
    """Forward and backward, captured once without a host sync; late inputs show a kernel on the wrong stream."""
    (inputs, grad), (other, _) = (make_inputs(target, 300, 192, 256) for _ in range(2))

    def step(tensors):
        return evaluate(lambda *t: linear_swiglu(*t, backend="cuda"), tensors, grad)

    expected = step(other)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(inputs)
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles, about 60 ms
        for tensor, value in zip(inputs, other, strict=True):
            tensor.copy_(value)
        graph.replay()
        eager = step(inputs)
    side.synchronize()
    for results in (got, eager):
        assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("target", gpu_targets("cuda"))
def test_without_gradients_only_the_result_is_allocated(target):
    torch.use_deterministic_algorithms(False)  # no filling of new memory
    inputs, _ = make_inputs(target, 4096, 384, 768)
    linear_swiglu(*inputs)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = linear_swiglu(*inputs)
    assert torch.cuda.max_memory_allocated() - before == out.numel() * out.element_size()


@pytest.mark.parametrize("target", ON_HOPPER)
def test_pre_activations_of_any_size(target, fused_from_the_first_row):
    """SiLU's tails: gates from where the sigmoid is 0 to where it is 1."""
    gates = torch.linspace(-1000.0, 1000.0, 256, device=target.device).to(target.dtype)
    x = torch.zeros(130, 8, device=target.device, dtype=target.dtype)
    x[:, 0] = 1
    w13 = torch.zeros(512, 8, device=target.device, dtype=target.dtype)
    w13[:256, 0], w13[256:, 0] = gates, 0.5
    got = linear_swiglu(x, w13, backend="cuda")
    assert_2x("output", got, naive(x.double(), w13.double()), naive(x, w13))
