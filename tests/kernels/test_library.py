"""The ops as citizens of torch: opcheck, torch.compile, CUDA graphs, streams, no host sync, repeatable bits."""

import pytest
import torch
from dit_moe_kernels import (
    availability,
    expert_ffn,
    grouped_gemm,
    make_routing_plan,
    permute,
    router_logits,
    swiglu,
    topk_softmax,
    unpermute,
)

from tests.kernels.util import BF16, FP32, Case, Target, gpu_targets, make_ids, make_weights, randn, targets

CASE = Case("", 21, 4, 2, 40, 48, "some")
NAMESPACE = "dit_moe::"

# ---------------------------------------------------------------- opcheck


def op_samples(target) -> dict[str, tuple]:
    """Arguments of every op of the namespace, by the op's name."""
    t, k, e, d, f = CASE.tokens, CASE.top_k, CASE.num_experts, CASE.width, CASE.hidden
    ids = make_ids(CASE, target.device)
    plan = make_routing_plan(ids, e, tile_rows=16, backend="reference")
    offsets, row_to_slot, slot_to_row, tile_expert, tile_row = plan[1:6]
    tiles, maps, name = (offsets, tile_expert, tile_row, 16), (row_to_slot, slot_to_row), target.backend
    whole_plan = (offsets, row_to_slot, slot_to_row, tile_expert, tile_row, 16)

    def rand(*shape: int, grad: bool = False):
        return randn(*shape, target=target).requires_grad_(grad)

    def router(*shape: int, grad: bool = False):
        return torch.rand(shape, device=target.device).requires_grad_(grad)

    def counter(*shape: int):
        return torch.zeros(shape, dtype=torch.int32, device=target.device)

    def vectors(*shape: int, grad: bool = False):
        return [rand(*shape, grad=grad) for _ in range(4)]

    n = t * k
    weights = make_weights(CASE, target.dtype, target.device)
    return {
        "routing_plan": (ids, e, 16, name),
        "count_routing": (
            ids, counter(3) + 1, counter(5, 2, e), counter(1, 2, 4, e), counter(1, 2, 7, e), counter(4, 2, 7, e),
            1, 5, 0, 1, name,
        ),
        "route": (rand(t, d, grad=True), rand(e, d, grad=True), k, 16, 0.1, name),
        "routed_ffn": (rand(t, d), rand(e, d), rand(e, 2 * f, d), rand(e, d, f), rand(t, d), k, name),
        "routed_ffn_train": (
            rand(t, d, grad=True), rand(e, d, grad=True), rand(e, 2 * f, d, grad=True), rand(e, d, f, grad=True),
            rand(t, d, grad=True), k, 0.1, True, name,
        ),
        "routed_ffn_backward": (
            rand(t, d), router(t, e), rand(n, 2 * f), rand(t, d), rand(e, d), rand(e, 2 * f, d), rand(e, d, f),
            router(t, k), ids.clamp(min=0).int(), router(t, e).softmax(1), *whole_plan, True, True, name,
        ),
        "routed_rows": (
            rand(t, d), rand(e, d), rand(e, 2 * f, d), rand(e, d, f), k, "cuda" if name == "cuda" else "reference",
        ),
        "router_logits": (rand(t, d, grad=True), rand(e, d, grad=True), name),
        "router_gradients": (router(t, e), rand(t, d), rand(e, d), rand(n, d), slot_to_row, True, True, name),
        "topk_softmax": (router(t, e, grad=True), k, name),
        "topk_softmax_backward": (router(t, k), router(t, e), ids.clamp(min=0), router(t, e).softmax(1), name),
        "permute": (rand(t, d, grad=True), *maps, k, name),
        "unpermute": (rand(n, d, grad=True), rand(t, d, grad=True), *maps, k, name),
        "unpermute_weighted": (
            rand(n, d, grad=True), weights.clone().requires_grad_(), rand(t, d, grad=True), *maps, name,
        ),
        "unpermute_weighted_backward": (rand(t, d), rand(n, d), weights, row_to_slot, name),
        "grouped_gemm": (rand(n, d, grad=True), rand(e, f, d, grad=True), *tiles, name),
        "grouped_gemm_dx": (rand(n, f), rand(e, f, d), *tiles, name),
        "grouped_gemm_dw": (rand(n, f), rand(n, d), offsets, name),
        "linear_swiglu": (rand(t, d, grad=True), rand(2 * f, d, grad=True), True, name),
        "swiglu": (rand(n, 2 * f, grad=True), name),
        "swiglu_backward": (rand(n, f), rand(n, 2 * f), name),
        "norm_modulate": (rand(2, 5, d, grad=True), *vectors(2, d, grad=True)[:2], 1e-6, target.dtype, name),
        "norm_modulate_backward": (rand(2, 5, d), rand(2, 5, d), rand(2, d), 1e-6, target.dtype, name),
        "residual_norm_modulate": (
            rand(2, 5, d, grad=True), rand(2, d, grad=True), rand(2, 5, d, grad=True), *vectors(2, d, grad=True)[:2],
            1e-6, target.dtype, name,
        ),
        "combine_norm_modulate": (
            rand(2, 5, d), rand(2, d), rand(10 * k, d), router(10, k),
            torch.randperm(10 * k, dtype=torch.int32, device=target.device), rand(10, d), rand(2, d), rand(2, d),
            1e-6, target.dtype, "cuda" if name == "cuda" else "reference",
        ),
        "residual_norm_modulate_backward": (
            rand(2, 5, d), rand(2, 5, d), rand(2, 5, d), rand(2, d), rand(2, 5, d), rand(2, d),
            1e-6, target.dtype, target.dtype, name,
        ),
        "qk_norm": (
            rand(2, 5, 3, 8, grad=True), rand(2, 5, 3, 8, grad=True), *vectors(8, grad=True), 1e-6, target.dtype, name,
        ),
        "qk_norm_attention": (rand(2, 5, 3, 2, 8), *vectors(8), 1e-6, "reference"),  # the kernel: test_attention.py
        "qk_norm_backward": (*vectors(2, 5, 3, 8), rand(8), rand(8), 1e-6, name),
        "expert_ffn": (
            rand(t, d, grad=True), rand(e, 2 * f, d, grad=True), rand(e, d, f, grad=True),
            weights.clone().requires_grad_(), rand(t, d, grad=True), *whole_plan, True, name,
        ),
        "expert_ffn_backward": (
            rand(t, d), rand(n, 2 * f), rand(t, d), rand(e, 2 * f, d), rand(e, d, f), weights, *whole_plan, name,
        ),
        "adamw_": (
            rand(t, d), rand(t, d), rand(t, d), rand(t, d).square(), torch.eye(4, device=target.device)[:3].sum(0),
            2**40, 1, 2, 0.1, 0.9, 0.99, 0.1, 1e-8, name,
        ),
        "average_": (rand(t, d), rand(t, d), 0.5, 2**40, 1, 2, 1024, name),
    }  # fmt: skip


REFERENCE_CPU = targets(dtypes=[FP32])[0].values[0]
OP_NAMES = sorted(op_samples(REFERENCE_CPU))


def test_every_op_of_the_namespace_is_checked():
    declared = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(NAMESPACE)]
    assert sorted(name.removeprefix(NAMESPACE) for name in declared) == OP_NAMES


@pytest.mark.parametrize("name", OP_NAMES)
@pytest.mark.parametrize("target", targets("triton", dtypes=[FP32], reference_on_gpu=False))
def test_opcheck(target, name, monkeypatch):
    """Schema, fake outputs, autograd registration, and autograd through AOT with dynamic shapes."""
    # Rows that are not in use may hold anything, which opcheck would report as two runs that differ.
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    sample = op_samples(target)[name]
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if target.backend == "reference":  # the dispatch to a backend is below AOT: once is enough
        tests.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(torch.ops.dit_moe, name).default, sample, test_utils=tests)


ROUTER_OPS = ["route", "router_logits", "router_gradients", "routing_plan", "topk_softmax", "topk_softmax_backward"]
NORM_OPS = [name for name in OP_NAMES if "norm" in name]


@pytest.mark.parametrize("name", [*ROUTER_OPS, *NORM_OPS])
@pytest.mark.parametrize("target", gpu_targets("cuda", dtypes=[FP32]))
def test_opcheck_of_the_cuda_router_and_norms(target, name, monkeypatch):
    test_opcheck(target, name, monkeypatch)


@pytest.mark.parametrize(
    ("name", "place"),
    [("unpermute", 1), ("unpermute_weighted", 2), ("expert_ffn", 4), ("routed_ffn", 4), ("router_gradients", 3)],
)
def test_opcheck_without_addend(name, place, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    sample = list(op_samples(REFERENCE_CPU)[name])
    sample[place] = None
    torch.library.opcheck(getattr(torch.ops.dit_moe, name).default, tuple(sample))


@pytest.mark.parametrize("target", targets("triton", dtypes=[FP32], reference_on_gpu=False))
def test_opcheck_of_inference(target):
    """Without a backward to come, these ops return pre-activations without rows; their fakes must say so."""
    for op in (torch.ops.dit_moe.expert_ffn.default, torch.ops.dit_moe.linear_swiglu.default):
        *tensors, _save_h, name = op_samples(target)[op.name().removeprefix(NAMESPACE)]
        sample = (*(value.detach() if isinstance(value, torch.Tensor) else value for value in tensors), False, name)
        torch.library.opcheck(op, sample, test_utils=["test_schema", "test_faketensor"])


# ---------------------------------------------------------------- the whole layer


def fused_layer(x, gate, w13, w2, top_k: int, backend: str):
    """Router and experts as a model calls them."""
    weights, ids, probs = topk_softmax(router_logits(x, gate, backend=backend), top_k, backend=backend)
    plan = make_routing_plan(ids, gate.shape[0], validate=False, backend=backend)
    return expert_ffn(x, w13, w2, weights, plan, backend=backend), probs


def unfused_layer(x, gate, w13, w2, top_k: int, backend: str):
    """The same from the unfused ops."""
    weights, ids, probs = topk_softmax(router_logits(x, gate, backend=backend), top_k, backend=backend)
    plan = make_routing_plan(ids, gate.shape[0], validate=False, backend=backend)
    h = grouped_gemm(permute(x, plan, backend=backend), w13, plan, backend=backend)
    y = grouped_gemm(swiglu(h, backend=backend), w2, plan, backend=backend)
    return unpermute(y, plan, weights, backend=backend), probs


LAYERS = pytest.mark.parametrize("layer", [fused_layer, unfused_layer], ids=["fused", "unfused"])
SMALL = Case("", 40, 4, 2, 64, 48)
LARGE = Case("", 2048, 8, 2, 384, 1536)


def layer_inputs(target, case) -> list[torch.Tensor]:
    return [
        randn(case.tokens, case.width, target=target),
        randn(case.num_experts, case.width, target=target, scale=case.width**-0.5),
        randn(case.num_experts, 2 * case.hidden, case.width, target=target, scale=case.width**-0.5),
        randn(case.num_experts, case.width, case.hidden, target=target, scale=case.hidden**-0.5),
    ]


def step(layer, inputs, top_k: int, backend: str) -> list[torch.Tensor]:
    """Output, probabilities and all gradients of one forward and backward."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out, probs = layer(*leaves, top_k, backend)
    loss = (out.float() ** 2).sum() + (probs**2).sum()
    return [out.detach(), probs.detach(), *torch.autograd.grad(loss, leaves)]


def assert_same_bits(got, expected) -> None:
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(a, b), f"tensor {index}: {int((a != b).sum())} of {a.numel()} values differ"
        assert a.isfinite().all(), f"tensor {index} is not finite"


@LAYERS
@pytest.mark.parametrize("target", targets("triton", dtypes=[FP32]))
def test_two_runs_give_the_same_bits(target, layer):
    inputs = layer_inputs(target, SMALL)
    assert_same_bits(step(layer, inputs, 2, target.backend), step(layer, inputs, 2, target.backend))


@LAYERS
@pytest.mark.parametrize("target", gpu_targets("triton"))
def test_many_runs_of_a_large_layer_give_the_same_bits(target, layer):
    inputs = layer_inputs(target, LARGE)
    expected = step(layer, inputs, 2, target.backend)
    for _ in range(5):
        assert_same_bits(step(layer, inputs, 2, target.backend), expected)


@LAYERS
@pytest.mark.parametrize("target", targets("triton", dtypes=[FP32], reference_on_gpu=False))
def test_compiles_as_one_graph(target, layer):
    """torch.compile(fullgraph=True), forward and backward, with another number of tokens the second time."""
    torch._dynamo.reset()
    # Without a GPU only the graph capture is at stake, and inductor would need a C++ compiler.
    compiled = torch.compile(layer, fullgraph=True, backend="inductor" if target.device == "cuda" else "aot_eager")
    for tokens in (SMALL.tokens, SMALL.tokens - 7):
        inputs = layer_inputs(target, SMALL)
        inputs[0] = inputs[0][:tokens]
        got = step(compiled, inputs, 2, target.backend)
        for a, b in zip(got, step(layer, inputs, 2, target.backend), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", targets(dtypes=[FP32]))
def test_the_default_backend_compiles_as_one_graph(target):
    """backend="auto", which looks up what can run, must not break the graph either."""
    torch._dynamo.reset()
    inputs = layer_inputs(target, SMALL)
    compiled = torch.compile(fused_layer, fullgraph=True, backend="aot_eager")
    got = step(compiled, inputs, 2, "auto")
    assert_same_bits(got, step(fused_layer, inputs, 2, "auto"))


# ---------------------------------------------------------------- GPU behaviour


@pytest.fixture
def unpoisoned():
    """No filling of new memory: its kernels would be in the way of what is observed."""
    torch.use_deterministic_algorithms(False)


@LAYERS
@pytest.mark.parametrize("target", gpu_targets("triton"))
def test_no_host_sync(target, layer, unpoisoned):
    inputs = layer_inputs(target, SMALL)
    step(layer, inputs, 2, target.backend)  # compile first
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, inputs, 2, target.backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@LAYERS
@pytest.mark.parametrize("target", gpu_targets("triton"))
def test_a_captured_graph_follows_the_routing(target, layer):
    """One CUDA graph of a forward and backward, replayed on tokens that are routed elsewhere."""
    first, second = layer_inputs(target, SMALL), layer_inputs(target, SMALL)
    expected = step(layer, second, 2, target.backend)
    static = [tensor.clone() for tensor in first]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(layer, static, 2, target.backend)  # warm-up on a side stream, as capture asks for
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(layer, static, 2, target.backend)
    for tensor, value in zip(static, second, strict=True):
        tensor.copy_(value)
    graph.replay()
    assert_same_bits(results, expected)


@LAYERS
@pytest.mark.parametrize("target", gpu_targets("triton"))
def test_runs_on_the_current_stream(target, layer):
    """Inputs that a side stream writes late: a kernel on any other stream would read NaN."""
    inputs = layer_inputs(target, SMALL)
    expected = step(layer, inputs, 2, target.backend)
    late = [torch.full_like(tensor, torch.nan) for tensor in inputs]
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles, about 60 ms
        for tensor, value in zip(late, inputs, strict=True):
            tensor.copy_(value)
        got = step(layer, late, 2, target.backend)
    side.synchronize()
    assert_same_bits(got, expected)


@pytest.mark.parametrize("target", gpu_targets("cuda"))
def test_cuda_permute_runs_on_the_current_stream_and_in_a_graph(target, unpoisoned):
    if (reason := availability("cuda")) is not None:
        pytest.skip(reason)
    plan = make_routing_plan(make_ids(CASE, "cuda"), CASE.num_experts)
    x, weights = randn(CASE.tokens, CASE.width, target=target), make_weights(CASE, FP32, "cuda")

    def both(x):
        leaf = x.detach().requires_grad_()
        out = unpermute(permute(leaf, plan, backend="cuda"), plan, weights, backend="cuda")
        return [out.detach(), *torch.autograd.grad(out.sum(), leaf)]

    expected = both(x)
    late = torch.full_like(x, torch.nan)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)
        late.copy_(x)
        got = both(late)
    side.synchronize()
    assert_same_bits(got, expected)

    graph = torch.cuda.CUDAGraph()
    late.fill_(torch.nan)
    with torch.cuda.graph(graph):
        got = both(late)
    late.copy_(x)
    graph.replay()
    assert_same_bits(got, expected)


@pytest.mark.gpu
@LAYERS
def test_a_gpu_that_is_not_the_current_one(layer):
    """Kernels run where their tensors are, whatever torch.cuda.current_device() says."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    inputs = [tensor.to("cuda:1") for tensor in layer_inputs(Target("auto", "cuda", BF16), SMALL)]
    with torch.cuda.device(1):
        expected = step(layer, inputs, 2, "auto")
    with torch.cuda.device(0):
        assert_same_bits(step(layer, inputs, 2, "auto"), expected)


@pytest.mark.parametrize("target", gpu_targets("triton", dtypes=[BF16]))
def test_memory_saved_for_backward(target, unpoisoned):
    """A forward keeps x, the pre-activations, weights and the plan: no row-sized copy of x or of the output."""
    case = LARGE
    x, gate, w13, w2 = layer_inputs(target, case)
    weights, ids, _ = topk_softmax(router_logits(x, gate, backend="triton"), 2, backend="triton")
    plan = make_routing_plan(ids, case.num_experts, backend="triton")
    leaves = [tensor.requires_grad_() for tensor in (x, w13, w2)]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    out = expert_ffn(*leaves, weights, plan, backend="triton")
    kept = torch.cuda.memory_allocated() - before
    rows = case.tokens * case.top_k
    assert kept <= out.numel() * 2 + rows * 2 * case.hidden * 2 + 2**20


def test_meta_tensors_get_shapes_without_data() -> None:
    x, w13, w2 = (torch.empty(*size, device="meta") for size in ((6, 16), (4, 24, 16), (4, 16, 12)))
    weights, ids, _ = topk_softmax(router_logits(x, torch.empty(4, 16, device="meta")), 2)
    out = expert_ffn(x, w13, w2, weights, make_routing_plan(ids, 4, validate=False))
    assert out.shape == (6, 16) and out.device.type == "meta"
