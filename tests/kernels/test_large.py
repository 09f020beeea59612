"""More than 2^31 elements: every offset must be computed in 64 bits.

Values are small integers, exact in bf16, and the routing is a cycle, so that the expected rows follow from arithmetic
and only a few of them need to be compared. One file, for `--dist loadfile`: about 14 GB at once.
"""

import pytest
import torch
from dit_moe_kernels import RoutingPlan, grouped_gemm, make_routing_plan, permute, swiglu, unpermute

from tests.kernels.util import BF16, gpu_targets

pytestmark = [pytest.mark.gpu, pytest.mark.slow]
GIB = 2**30


@pytest.fixture(autouse=True)
def _memory(monkeypatch):
    """Skip on a GPU without 16 GiB to spare; filling new memory would cost more than the tests."""
    torch.use_deterministic_algorithms(False)
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < 16 * GIB:
        pytest.skip(f"got {free / GIB:.0f} GiB of free GPU memory, expected 16")
    yield
    torch.cuda.empty_cache()


def cyclic_plan(tokens: int, top_k: int, num_experts: int) -> RoutingPlan:
    """Token t chooses experts t, t + 1, ... modulo E."""
    first = torch.arange(tokens, device="cuda")[:, None]
    ids = (first + torch.arange(top_k, device="cuda")) % num_experts
    return make_routing_plan(ids.int(), num_experts, backend="reference")


def probe(num_rows: int) -> torch.Tensor:
    """Rows to compare: the first, the last, and some in between."""
    return torch.cat(
        [torch.linspace(0, num_rows - 1, 1000, device="cuda").long(), torch.arange(num_rows - 64, num_rows).cuda()]
    )


def small_integers(*shape: int) -> torch.Tensor:
    return torch.randint(-4, 5, shape, dtype=torch.int8, device="cuda").to(BF16)


@pytest.mark.parametrize("target", gpu_targets("triton", "cuda"))
def test_permute_and_back(target):
    tokens, top_k, width = 270_000, 8, 1024
    plan = cyclic_plan(tokens, top_k, 16)
    assert plan.num_rows * width > 2**31
    x = small_integers(tokens, width).requires_grad_()
    rows = permute(x, plan, backend=target.backend)
    at = probe(plan.num_rows)
    assert torch.equal(rows[at], x[plan.row_to_token[at].long()])
    weights = torch.full((tokens, top_k), 0.25, device="cuda", requires_grad=True)
    out = unpermute(rows, plan, weights, backend=target.backend)
    assert torch.equal(out, 2 * x)
    out.backward(torch.ones_like(out))
    assert (x.grad == 2).all()
    torch.testing.assert_close(weights.grad, x.detach().float().sum(1, keepdim=True).expand(-1, top_k))


@pytest.mark.parametrize("target", gpu_targets("triton"))
def test_rows_of_a_grouped_gemm(target):
    """x and dx small, out and its gradient beyond 2^31 elements."""
    tokens, width_in, width_out, num_experts = 2_200_000, 16, 1024, 4
    plan = cyclic_plan(tokens, 1, num_experts)
    assert plan.num_rows * width_out > 2**31
    x, w = small_integers(tokens, width_in).requires_grad_(), small_integers(num_experts, width_out, width_in)
    out = grouped_gemm(x, w, plan, backend=target.backend)
    at = probe(plan.num_rows)
    expert = torch.searchsorted(plan.expert_offsets, at.int(), right=True) - 1
    expected = torch.einsum("ri,roi->ro", x.detach()[at].float(), w[expert].float())
    torch.testing.assert_close(out[at].float(), expected, rtol=2**-8, atol=0)
    (dx,) = torch.autograd.grad(out, x, torch.ones((), device="cuda", dtype=BF16).expand_as(out))
    torch.testing.assert_close(dx[at].float(), w.float().sum(1)[expert], rtol=2**-8, atol=0)


@pytest.mark.parametrize("target", gpu_targets("triton"))
def test_weights_of_a_grouped_gemm(target):
    """An expert stack beyond 2^31 elements, and its gradient."""
    num_experts, width_out, width_in = 64, 8192, 4224
    assert num_experts * width_out * width_in > 2**31
    plan = cyclic_plan(128, 1, num_experts)
    x, w = small_integers(128, width_in), small_integers(num_experts, width_out, width_in).requires_grad_()
    out = grouped_gemm(x, w, plan, backend=target.backend)
    for row in (0, 1, 126, 127):
        expected = w[row // 2].detach().float() @ x[row].float()
        torch.testing.assert_close(out[row].float(), expected, rtol=2**-8, atol=0)
    grad = small_integers(128, width_out)
    (dw,) = torch.autograd.grad(out, w, grad)
    for expert in (0, 63):
        rows = slice(2 * expert, 2 * expert + 2)
        assert torch.equal(dw[expert].float(), grad[rows].float().T @ x[rows].float())


@pytest.mark.parametrize("target", gpu_targets("triton"))
def test_swiglu(target):
    num_rows, hidden = 1_100_000, 1024
    h = small_integers(num_rows, 2 * hidden).requires_grad_()
    assert h.numel() > 2**31
    out = swiglu(h, backend=target.backend)
    at = probe(num_rows)
    leaf = h.detach()[at].requires_grad_()
    expected = swiglu(leaf, backend="reference")
    torch.testing.assert_close(out[at], expected, rtol=2**-7, atol=0)
    (dh,) = torch.autograd.grad(out.sum(), h)
    torch.testing.assert_close(dh[at], torch.autograd.grad(expected.sum(), leaf)[0], rtol=2**-7, atol=2**-9)
