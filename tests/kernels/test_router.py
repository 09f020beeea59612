"""router_logits and topk_softmax against float64 oracles, with ties, NaN and autocast."""

import pytest
import torch
from dit_moe_kernels import router_logits, topk_softmax
from dit_moe_kernels.router import logits_gradients

from tests.kernels.util import (
    BF16,
    FP16,
    FP32,
    FP64,
    assert_2x,
    check_against,
    evaluate,
    gpu_targets,
    naive_topk_softmax,
    randn,
    strided,
    targets,
)

SHAPES = [(37, 4, 2), (20, 8, 2), (5, 1, 1), (9, 3, 3), (0, 4, 2), (1, 16, 8), (130, 6, 5)]
SOFTMAX_TARGETS = targets("triton", "cuda", dtypes=[FP64, FP32])
LOGIT_TARGETS = targets("triton", "cuda")


def check_topk_softmax(target, tokens: int, experts: int, top_k: int, scale: float) -> None:
    logits = randn(tokens, experts, target=target, scale=scale)
    if target.backend != "reference":
        logits = logits.float()
    dweights, dprobs = torch.randn_like(logits[:, :top_k]), torch.randn_like(logits)
    results = {}
    for name, function, given in [
        ("got", lambda x: topk_softmax(x, top_k, backend=target.backend), logits),
        ("exact", lambda x: naive_topk_softmax(x, top_k), logits.double()),
        ("plain", lambda x: naive_topk_softmax(x, top_k), logits),
    ]:
        leaf = given.detach().requires_grad_()
        weights, ids, probs = function(leaf)
        both = torch.autograd.grad([weights, probs], leaf, [dweights.to(given), dprobs.to(given)], retain_graph=True)
        (only_weights,) = torch.autograd.grad(weights, leaf, dweights.to(given), retain_graph=True)
        (only_probs,) = torch.autograd.grad(probs, leaf, dprobs.to(given))
        results[name] = (weights, ids, probs, *both, only_weights, only_probs)
    assert results["got"][1].dtype == torch.int32
    assert torch.equal(results["got"][1], results["exact"][1])
    names = ["weights", "ids", "probs", "dlogits", "dlogits of the weights", "dlogits of the probabilities"]
    for name, got, exact, plain in zip(names, results["got"], results["exact"], results["plain"], strict=True):
        if name != "ids":
            assert_2x(name, got.detach(), exact.detach(), plain.detach())


@pytest.mark.parametrize("shape", SHAPES, ids="T{0[0]}_E{0[1]}_K{0[2]}".format)
@pytest.mark.parametrize("target", SOFTMAX_TARGETS)
def test_topk_softmax(target, shape):
    if target.dtype not in (FP32, FP64):
        pytest.skip("logits are fp32 or fp64")
    check_topk_softmax(target, *shape, scale=2.0)


@pytest.mark.parametrize("target", gpu_targets("triton", "cuda", dtypes=[FP32]))
def test_topk_softmax_of_many_tokens(target):
    check_topk_softmax(target, 4096, 16, 2, scale=1.0)


@pytest.mark.parametrize("target", SOFTMAX_TARGETS)
def test_ties_go_to_the_lower_id(target):
    logits = torch.tensor([[0.0, 0, 0, 0, 0], [1, 2, 2, 1, 2], [3, 1, 1, 1, 0]], device=target.device)
    weights, ids, _ = topk_softmax(logits, 3, backend=target.backend)
    assert ids.tolist() == [[0, 1, 2], [1, 2, 4], [0, 1, 2]]
    assert (weights[:, 1:] <= weights[:, :-1]).all()


@pytest.mark.parametrize("target", SOFTMAX_TARGETS)
def test_extreme_logits(target):
    """Large logits do not overflow, -inf is a probability of zero."""
    logits = torch.tensor([[3e38, -3e38, 0.0], [1e4, 9.9e3, 1e4], [-torch.inf, 0.0, 1.0]], device=target.device)
    weights, ids, probs = topk_softmax(logits, 2, backend=target.backend)
    assert ids.tolist() == [[0, 1], [0, 2], [2, 1]]
    expected = logits.double().softmax(1)
    torch.testing.assert_close(probs.double(), expected, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(weights.double(), expected.gather(1, ids.long()), rtol=1e-6, atol=1e-30)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("target", SOFTMAX_TARGETS)
def test_a_bad_row_shows_and_stays_alone(target, bad):
    """NaN or +inf: NaN weights and K distinct valid ids for that token, nothing for the others."""
    logits = torch.randn(6, 5, device=target.device)
    expected = naive_topk_softmax(logits.double(), 3)
    for row, column in [(1, 0), (4, 3)]:
        logits[row, column] = bad
    weights, ids, probs = topk_softmax(logits, 3, backend=target.backend)
    for row in range(6):
        if row in (1, 4):
            assert weights[row].isnan().all() and probs[row].isnan().all()
            chosen = ids[row].tolist()
            assert len(set(chosen)) == 3 and set(chosen) <= set(range(5))
        else:
            assert torch.equal(ids[row], expected[1][row])
            torch.testing.assert_close(weights[row].double(), expected[0][row], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "shape", [(37, 4, 72), (5, 1, 33), (0, 4, 40), (1, 16, 40)], ids="T{0[0]}_E{0[1]}_D{0[2]}".format
)
@pytest.mark.parametrize("target", LOGIT_TARGETS)
def test_router_logits(target, shape):
    check_router_logits(target, *shape)


@pytest.mark.parametrize("target", gpu_targets("triton", "cuda", dtypes=[BF16, FP16, FP32]))
@pytest.mark.parametrize("shape", [(4096, 8, 1152), (20000, 16, 1408), (3001, 60, 384), (530000, 4, 24)], ids=str)
def test_router_logits_of_a_model(target, shape):
    check_router_logits(target, *shape)


@pytest.mark.parametrize("target", gpu_targets("triton", "cuda", dtypes=[BF16, FP16]))
def test_fp32_gate_of_a_16_bit_model(target):
    """The gate's digits beyond the tokens' dtype count: nothing is rounded on the way."""
    check_router_logits(target, 4096, 8, 1152, gate_dtype=FP32)


@pytest.mark.parametrize(
    "shape", [(37, 4, 72, 2), (5, 9, 33, 1), (130, 3, 40, 3), (1, 16, 264, 8), (0, 4, 40, 2), (33, 130, 40, 2)], ids=str
)
@pytest.mark.parametrize("target", LOGIT_TARGETS)
def test_rows_are_added_to_the_gradient(target, shape):
    check_rows_in_gradient(target, *shape)


@pytest.mark.parametrize("target", gpu_targets("triton", "cuda", dtypes=[BF16, FP16, FP32]))
@pytest.mark.parametrize("shape", [(4096, 8, 1152, 2), (3001, 60, 384, 4), (20000, 16, 2304, 2)], ids=str)
def test_rows_of_a_model_are_added_to_the_gradient(target, shape):
    check_rows_in_gradient(target, *shape)


def check_rows_in_gradient(target, tokens: int, experts: int, width: int, top_k: int) -> None:
    """Rows in any order; those of some slots are missing, and hold no number."""
    if target.backend == "cuda" and (width % 8 or experts > 64):
        pytest.skip("the CUDA router reads rows of whole 16 bytes and has 64 experts at most")
    slots = tokens * top_k
    x, gate = randn(tokens, width, target=target), randn(experts, width, target=target)
    grad = torch.randn(tokens, experts, device=target.device, dtype=FP64 if target.dtype == FP64 else FP32)
    rows, slot_to_row = randn(slots, width, target=target), torch.randperm(slots, device=target.device)
    missing = torch.rand(slots, device=target.device) < 0.1

    def expected(dtype):
        parts = rows.to(dtype)[slot_to_row].masked_fill(missing[:, None], 0).view(tokens, top_k, width)
        return grad.to(dtype) @ gate.to(dtype) + parts.sum(1), grad.to(dtype).T @ x.to(dtype)

    exact = expected(FP64)
    plain = [t.to(target.dtype) for t in expected(grad.dtype)]
    rows[slot_to_row[missing]] = float("nan")
    maps = torch.where(missing, -1, slot_to_row).int()
    got = logits_gradients(grad, x, gate, (True, True), target.backend, rows, maps)
    for name, *values in zip(("dx", "dgate"), got, exact, plain, strict=True):
        assert_2x(name, *values)
    only_x = logits_gradients(grad, x, gate, (True, False), target.backend, rows, maps)
    assert only_x[1] is None and torch.equal(only_x[0], got[0])


def check_router_logits(target, tokens: int, experts: int, width: int, gate_dtype: torch.dtype | None = None) -> None:
    if target.backend == "cuda" and width % 8:
        pytest.skip("the CUDA router reads rows of whole 16 bytes")
    x, gate = randn(tokens, width, target=target), randn(experts, width, target=target, scale=width**-0.5)
    if gate_dtype is not None:
        gate = (torch.randn(experts, width, device=target.device) * width**-0.5).to(gate_dtype)
    grad = torch.randn(tokens, experts, device=target.device)

    def naive(x, gate):
        wide = FP64 if x.dtype == FP64 else FP32
        return x.to(wide) @ gate.to(wide).T

    out, *_ = check_against(
        naive, lambda x, gate: router_logits(x, gate, backend=target.backend), ["x", "gate"], [x, gate], grad
    )
    assert out.dtype == (FP64 if target.dtype == FP64 else FP32)


@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP32]))
def test_router_logits_ignore_autocast(target):
    x, gate = randn(20, 40, target=target), randn(4, 40, target=target)
    grad = torch.randn(20, 4, device=target.device)
    function = lambda x, gate: router_logits(x, gate, backend=target.backend)  # noqa: E731
    expected = evaluate(function, [x, gate], grad)
    with torch.autocast(target.device, dtype=BF16):
        got = evaluate(function, [x, gate], grad)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP16]))
def test_mixed_dtypes_and_strides(target):
    """A 16-bit model with an fp32 router, and inputs with gaps."""
    x, gate = randn(20, 40, target=target), torch.randn(4, 40, device=target.device)
    expected = router_logits(x.float(), gate, backend="reference")
    got = router_logits(strided(x), strided(gate), backend=target.backend)
    assert got.dtype == FP32
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
