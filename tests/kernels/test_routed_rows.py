"""routed_rows and combine_norm_modulate: the bits of routed_ffn and residual_norm_modulate one after the other."""

import pytest
import torch
from dit_moe_kernels import (
    RoutedRows,
    combine_norm_modulate,
    residual_norm_modulate,
    routed_ffn,
    routed_rows,
    takes_rows,
    unpermute,
)

from dit_moe import DiT_models, MoEFeedForward
from dit_moe.layers import moe as moe_module
from tests.kernels.test_routed_ffn import CASES, MODEL_CASES, layer_inputs
from tests.kernels.util import BF16, FP16, FP32, gpu_targets, make_plan, randn, targets

TARGETS = targets("cuda", reference_on_gpu=False)
pytestmark = pytest.mark.usefixtures("cuda_targets_on_hopper")


def check_rows(target, case) -> None:
    inputs = layer_inputs(target, case)
    addend = randn(case.tokens, case.width, target=target)
    with torch.no_grad():
        for added in (None, addend):
            rows, probs, counts = routed_rows(*inputs, case.top_k, addend=added, backend=target.backend)
            out, *expected = routed_ffn(*inputs, case.top_k, addend=added, backend=target.backend)
            if target.backend == "reference":  # which sums in another order
                torch.testing.assert_close(rows.combined(), out)
            else:
                assert torch.equal(rows.combined(), out), "rows"
            assert torch.equal(probs, expected[0]) and torch.equal(counts, expected[1])


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_rows(target, case):
    if target.backend == "cuda" and target.dtype == FP32:
        pytest.skip("the products are for 16 bits")
    check_rows(target, case)


@pytest.mark.parametrize("case", MODEL_CASES, ids=str)
@pytest.mark.parametrize("target", gpu_targets("cuda", dtypes=[BF16, FP16]))
def test_rows_of_a_model(target, case):
    check_rows(target, case)


# Images, tokens, width, choices: a row in few words of each lane, in many, in memory; odd widths word by word.
NORM_SIZES = [
    (2, 5, 72, 2),
    (3, 7, 33, 1),
    (1, 19, 384, 3),
    (2, 130, 1152, 2),
    (2, 65, 1408, 2),
    (1, 3, 2104, 4),
    (1, 1, 8, 8),
]


@pytest.mark.parametrize("size", NORM_SIZES, ids=str)
@pytest.mark.parametrize("target", targets("triton", "cuda"))
def test_norm_of_rows(target, size):
    """Rows in any order, some of them missing, with an addend and without, in one dtype and beside an fp32 stream."""
    images, tokens, width, top_k = size
    num_slots = images * tokens * top_k
    order = torch.randperm(num_slots, device=target.device).int()
    order[torch.rand(num_slots, device=target.device) < 0.1] = -1
    rows = randn(num_slots, width, target=target)
    weights = torch.rand(images * tokens, top_k, device=target.device, dtype=torch.promote_types(target.dtype, FP32))
    vectors = randn(images, 3, width, target=target).unbind(1)
    for addend in (None, randn(images * tokens, width, target=target)):
        branch = RoutedRows(rows, weights, order, addend)
        for stream in {target.dtype, torch.promote_types(target.dtype, FP32)}:
            x = torch.randn(images, tokens, width, device=target.device, dtype=stream)
            with torch.autocast(target.device, target.dtype, enabled=stream != target.dtype):
                got = combine_norm_modulate(x, vectors[0], branch, *vectors[1:], backend=target.backend)
                y = branch.combined().view(x.shape)
                expected = residual_norm_modulate(x, vectors[0], y, *vectors[1:], backend=target.backend)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_combined_is_the_combine():
    target = targets(dtypes=[FP32])[0].values[0]
    case = CASES[0]
    _, plan = make_plan(case, "cpu")
    y, weights = randn(plan.num_rows, case.width, target=target), torch.rand(case.tokens, case.top_k)
    got = RoutedRows(y, weights, plan.slot_to_row).combined()
    assert torch.equal(got, unpermute(y, plan, weights))


def test_a_model_gives_the_same_with_rows(monkeypatch):
    """On the CPU by the reference; a hook on one layer asks for its output."""
    torch.manual_seed(0)
    model = DiT_models["DiT-MoE-S/2-8E2A"](depth=3, hidden_size=48, num_heads=2, input_size=8).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    inputs = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([1, 7])
    with torch.no_grad():
        expected, aux = model(*inputs, return_aux=True)
        taken = []
        monkeypatch.setattr(moe_module, "takes_rows", lambda *_: taken.append(True) or True)
        monkeypatch.setattr(moe_module, "routed_rows", lambda *a, **k: routed_rows(*a, **{**k, "backend": "reference"}))
        got, got_aux = model(*inputs, return_aux=True)
        assert len(taken) == 3
        torch.testing.assert_close(got, expected)
        assert torch.equal(got_aux.tokens_per_expert, aux.tokens_per_expert)
        torch.testing.assert_close(got_aux.balance_loss, aux.balance_loss)
        seen = []
        model.blocks[1].moe.register_forward_hook(lambda module, args, out: seen.append(out.hidden.shape))
        torch.testing.assert_close(model(*inputs), expected)
        assert seen == [(2, 16, 48)] and len(taken) == 5
        model.blocks[0].moe.__class__ = type("Other", (MoEFeedForward,), {})
        forward = model.blocks[2].moe.forward
        monkeypatch.setattr(model.blocks[2].moe, "forward", lambda x: forward(x))
        torch.testing.assert_close(model(*inputs), expected)
        assert len(taken) == 5  # a subclass, a hook and a replaced forward


@pytest.mark.gpu
def test_a_model_on_hopper_takes_them():
    model = DiT_models["DiT-MoE-S/2-8E2A"](depth=2).to("cuda", BF16).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    inputs = (
        torch.randn(16, 4, 32, 32, device="cuda", dtype=BF16),
        torch.rand(16, device="cuda"),
        torch.arange(16, device="cuda"),
    )
    with torch.no_grad():
        moe = model.blocks[0].moe
        assert takes_rows(torch.zeros(4, 384, device="cuda", dtype=BF16), moe.gate.weight, moe.experts.w2)
        got = model(*inputs)
        handles = [block.moe.register_forward_hook(lambda module, args, out: None) for block in model.blocks]
        expected = model(*inputs)
        for handle in handles:
            handle.remove()
        assert torch.equal(got, expected)
        assert torch.equal(
            torch.compile(model, fullgraph=True)(*inputs).isfinite().all(), torch.tensor(True, device="cuda")
        )


def test_wrong_arguments():
    x, gate, w13, w2 = (torch.zeros(size) for size in [(6, 16), (4, 16), (4, 24, 16), (4, 16, 12)])
    with pytest.raises(ValueError, match="requires? gradients"):
        routed_rows(x, gate.requires_grad_(), w13, w2, 2)
    with torch.no_grad():
        rows, *_ = routed_rows(x, gate, w13, w2, 2)
        stream, vector = torch.zeros(2, 3, 16), torch.zeros(2, 16)
        with pytest.raises(ValueError, match=r"topk_weights: got shape \(6, 2\), expected \(8, 2\)"):
            combine_norm_modulate(torch.zeros(2, 4, 16), vector, rows, vector, vector)
        with pytest.raises(ValueError, match=r"rows: got shape"):
            combine_norm_modulate(stream, vector, rows._replace(rows=rows.rows[:-1]), vector, vector)
    with pytest.raises(ValueError, match="combine_norm_modulate: got tensors that require gradients"):
        combine_norm_modulate(stream.requires_grad_(), vector, rows, vector, vector)
