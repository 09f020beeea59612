"""routed_ffn: router and experts in one call, against a loop over experts in float64 and against its parts."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from dit_moe_kernels import expert_ffn, route, routed_ffn
from dit_moe_kernels.cuda_impl import permute as permute_implementation
from dit_moe_kernels.cuda_impl import routed_ffn as implementation

from dit_moe import MoEFeedForward
from tests.kernels.test_route import make_inputs, naive_route
from tests.kernels.util import BF16, FP16, Case, assert_2x, gpu_targets, naive_expert_ffn, randn, targets

CASES = [
    Case("random", 37, 4, 2, 72, 48),
    Case("E1_K1", 35, 1, 1, 40, 104),
    Case("K_equals_E", 9, 3, 3, 72, 48),
    Case("T0", 0, 4, 2, 40, 48),
    Case("T1", 1, 16, 8, 72, 48),
]
MODEL_CASES = [
    Case("S_T256", 256, 8, 2, 384, 1536),
    Case("S_T4096", 4096, 8, 2, 384, 1536),
    Case("XL_T1000", 1000, 8, 2, 1152, 4608),
    Case("G_T4096", 4096, 16, 2, 1408, 5632),
]
TARGETS = targets("triton", "cuda")
pytestmark = pytest.mark.usefixtures("cuda_targets_on_hopper")


def layer_inputs(target, case: Case):
    x, gate = make_inputs(target, case.tokens, case.num_experts, case.width)
    w13 = randn(case.num_experts, 2 * case.hidden, case.width, target=target, scale=case.width**-0.5)
    w2 = randn(case.num_experts, case.width, case.hidden, target=target, scale=case.hidden**-0.5)
    return x, gate, w13, w2


def check(target, case: Case, inputs=None) -> None:
    inputs = inputs or layer_inputs(target, case)
    x, gate, w13, w2 = inputs
    with torch.no_grad():
        out, probs, counts, _ = routed_ffn(*inputs, case.top_k, backend=target.backend)
        again = routed_ffn(*inputs, case.top_k, backend=target.backend)
        routing = route(x, gate, case.top_k, backend=target.backend)
        parts = expert_ffn(x, w13, w2, routing.topk_weights, routing.plan, backend=target.backend)
        addend = randn(case.tokens, case.width, target=target)
        added = routed_ffn(*inputs, case.top_k, addend=addend, backend=target.backend)[0]
    assert all(torch.equal(a, b) for a, b in zip((out, probs, counts), again[:3], strict=True)), "two runs differ"
    assert torch.equal(probs, routing.probs) and torch.equal(counts, routing.plan.tokens_per_expert)
    assert torch.equal(out, parts)
    ids = routing.topk_ids  # which tests/kernels/test_route.py tests
    exact = naive_route(x.double(), gate.double(), case.top_k)[2]["probs"]
    weights = exact.gather(1, ids.long())
    plain = naive_expert_ffn(x, w13, w2, weights.to(routing.topk_weights), ids)
    exact = naive_expert_ffn(x.double(), w13.double(), w2.double(), weights, ids)
    assert_2x("out", out, exact, plain)
    assert_2x("with an addend", added, exact + addend.double(), plain + addend)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_small_layers(target, case):
    check(target, case)


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
@pytest.mark.parametrize("target", gpu_targets("triton", "cuda", dtypes=[BF16, FP16]))
def test_models(target, case):
    check(target, case)


@pytest.mark.parametrize("tokens", [40, 200, 256], ids=lambda tokens: f"T{tokens}")
@pytest.mark.parametrize("target", gpu_targets("cuda", dtypes=[BF16, FP16]))
def test_few_rows_at_two_experts(target, tokens):
    """Six experts have no rows, though their weights are fetched ahead, and two have up to two tiles of them."""
    case = Case("two", tokens, 8, 2, 384, 1536)
    x, gate, w13, w2 = layer_inputs(target, case)
    x[:, 0] = 1
    gate[[3, 5], 0] = 30
    check(target, case, (x, gate, w13, w2))


@pytest.mark.parametrize("target", gpu_targets("cuda", dtypes=[BF16]))
def test_kernels_that_overlap_are_in_order(target):
    """Layer upon layer of few rows in one graph: no kernel starts on what another is still writing."""
    case = Case("chain", 256, 8, 2, 384, 1536)
    layers = [layer_inputs(target, case) for _ in range(4)]

    def run() -> list[torch.Tensor]:
        x, results = layers[0][0], []
        for _, *weights in layers:
            x = routed_ffn(x, *weights, case.top_k, addend=x, backend=target.backend)[0]
            results.append(x)
        return results

    with torch.no_grad():
        expected = []
        x = layers[0][0]
        for _, gate, w13, w2 in layers:
            routing = route(x, gate, case.top_k, backend=target.backend)
            parts = {"backend": target.backend, "addend": x}
            torch.cuda.synchronize()
            x = expert_ffn(x, w13, w2, routing.topk_weights, routing.plan, **parts)
            expected.append(x)
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = run()
        for _ in range(50):
            for tensor in found:
                tensor.fill_(float("nan"))
            graph.replay()
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP16]))
def test_gradients_take_the_parts(target):
    case = CASES[0]
    leaves = [tensor.requires_grad_() for tensor in layer_inputs(target, case)]
    addend = randn(case.tokens, case.width, target=target).requires_grad_()
    out, probs, counts, _ = routed_ffn(*leaves, case.top_k, addend=addend, backend=target.backend)
    with torch.no_grad():
        plain = routed_ffn(*leaves, case.top_k, addend=addend, backend=target.backend)
    assert torch.equal(out, plain[0]) and torch.equal(probs, plain[1]) and torch.equal(counts, plain[2])
    grads = torch.autograd.grad(out.float().square().sum() + probs.square().sum(), [*leaves, addend])
    assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("case", [MODEL_CASES[0], MODEL_CASES[-1]], ids=str)  # in one call and in two
@pytest.mark.parametrize("target", gpu_targets("cuda", dtypes=[BF16]))
def test_a_graph_follows_its_inputs(target, case):
    torch.use_deterministic_algorithms(False)  # no filling of new memory in the way
    x, *weights = layer_inputs(target, case)
    other = layer_inputs(target, case)[0]
    with torch.no_grad():
        expected = routed_ffn(other, *weights, 2, backend="cuda")
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = routed_ffn(x, *weights, 2, backend="cuda")
    x.copy_(other)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got[:3], expected[:3], strict=True))


@pytest.mark.parametrize("target", gpu_targets("cuda", dtypes=[BF16]))
def test_peak_memory(target):
    """x, weights and result included: without the activation's early end it is 1163e6 bytes."""
    inputs = layer_inputs(target, Case("XL_T32768", 32768, 8, 2, 1152, 4608))
    torch.cuda.synchronize()
    others = torch.cuda.memory_allocated() - sum(tensor.nbytes for tensor in inputs)
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        results = routed_ffn(*inputs, 2, backend="cuda")
    assert all(tensor.isfinite().all() for tensor in results[:3])
    assert torch.cuda.max_memory_allocated() - others < 1100e6


@pytest.mark.parametrize("tokens, launches", [(6, ["routed_ffn"]), (7, ["routed_ffn_products", "unpermute"])])
def test_a_large_activation_is_gone_before_the_result_comes(monkeypatch, tokens, launches):
    """What is launched with which tensors alive, by stand-ins for the compiled module."""
    seen, activations = [], []

    def launch(op, tensors, *_):
        seen.append(op)
        if op == "routed_ffn_products":
            (activation,) = (tensor for tensor in tensors if tensor.shape == (tokens * 2, 12))
            assert activation.dtype == BF16
            activations.append(weakref.ref(activation))
        else:
            assert all(activation() is None for activation in activations)

    workspace_sizes = []
    compiled = SimpleNamespace(routed_ffn_workspace=lambda *sizes: workspace_sizes.append(sizes) or 256)
    monkeypatch.setattr(implementation, "extension", lambda: compiled)
    monkeypatch.setattr(implementation, "launch", launch)
    monkeypatch.setattr(permute_implementation, "launch", launch)
    monkeypatch.setattr(implementation, "ONE_CALL_BYTES", 7 * 2 * 12 * 2)
    x, gate, w13, w2 = (torch.zeros(size, dtype=BF16) for size in [(tokens, 16), (4, 16), (4, 24, 16), (4, 16, 12)])
    out, probs, counts = implementation.routed_ffn(x, gate, w13, w2, None, 2)
    assert seen == launches and out.shape == x.shape and probs.shape == (tokens, 4) and counts.shape == (4,)
    assert workspace_sizes == [(tokens, 16, 12, 4, 2) if len(launches) == 1 else (tokens, 0, 0, 4, 2)]


def test_autocast_casts_what_the_experts_see():
    x, gate, w13, w2 = (torch.randn(size) for size in [(6, 16), (4, 16), (4, 24, 16), (4, 16, 12)])
    for tokens in (x, x.bfloat16()):
        with torch.no_grad(), torch.autocast("cpu", dtype=BF16):
            out, probs, *_ = routed_ffn(tokens, gate, w13, w2, 2)
            low = (tensor.bfloat16() for tensor in (tokens, w13, w2))
            added, *_ = routed_ffn(next(low), gate, *low, 2, addend=torch.zeros(6, 16))  # fp32, to be cast
            assert added.dtype == BF16
        assert out.dtype == BF16 and torch.equal(probs, route(tokens, gate, 2).probs)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"gate": torch.zeros(3, 16)}, r"gate: got shape \(3, 16\), expected \(4, 16\)"),
        ({"w2": torch.zeros(4, 16, 13)}, r"w2: got shape"),
        ({"w13": torch.zeros(4, 23, 16)}, r"w13: got shape"),
        ({"top_k": 5}, "top_k: got 5"),
        ({"addend": torch.zeros(6, 15)}, r"addend: got shape \(6, 15\), expected \(6, 16\)"),
    ],
)
def test_wrong_arguments(change, message):
    given = {"x": torch.zeros(6, 16), "gate": torch.zeros(4, 16), "w13": torch.zeros(4, 24, 16)}
    given |= {"w2": torch.zeros(4, 16, 12), "top_k": 2}
    with pytest.raises(ValueError, match=message):
        routed_ffn(**(given | change))


def test_the_layer_without_gradients_gives_the_same_and_tells_those_who_watch():
    layer, x = MoEFeedForward(16, 24, 4), torch.randn(2, 5, 16)
    expected = layer(x)
    with torch.no_grad():
        got = layer(x)
        assert torch.equal(got.hidden, expected.hidden) and torch.equal(got.probs, expected.probs)
        assert torch.equal(got.tokens_per_expert, expected.tokens_per_expert)
        torch.testing.assert_close(got.balance_loss, expected.balance_loss)
        seen = []
        layer.gate.observer = seen.append
        assert torch.equal(layer(x).hidden, got.hidden) and len(seen) == 1
        layer.gate.observer = None
        handle = layer.experts.register_forward_hook(lambda module, args, out: torch.zeros_like(out))
        changed = layer(x).hidden
        handle.remove()
    assert (changed == 0).all() and torch.equal(layer(x).hidden, expected.hidden)
