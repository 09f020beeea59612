"""Each layer against its formula, and its initialisation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dit_moe.layers import (
    Attention,
    GroupedExperts,
    LabelEmbedder,
    Mlp,
    PatchEmbed,
    SwiGLU,
    TimestepEmbedder,
    TopKRouter,
    sincos_pos_embed,
    timestep_features,
)
from tests.model.util import naive_swiglu, randomize

FP64 = torch.float64


def close(got: torch.Tensor, expected: torch.Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=atol)


# ---------------------------------------------------------------- router


@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 1), (4, 2), (4, 4), (1, 1), (16, 2)])
def test_router_takes_the_largest_probabilities_as_they_are(num_experts: int, top_k: int) -> None:
    router = TopKRouter(24, num_experts, top_k, dtype=FP64)
    x = torch.randn(19, 24, dtype=FP64)
    routing = router(x)
    probs = (x @ router.weight.T).softmax(1)
    weights, ids = probs.topk(top_k)
    close(routing.probs, probs)
    close(routing.topk_weights, weights)
    assert routing.topk_ids.dtype == torch.int32 and torch.equal(routing.topk_ids.long(), ids)
    assert routing.plan.tokens_per_expert.tolist() == torch.bincount(ids.flatten(), minlength=num_experts).tolist()


def test_router_computes_in_fp32_under_autocast() -> None:
    router = TopKRouter(64, 8, 2)
    x = torch.randn(50, 64)
    expected = router(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = router(x)
    assert got.probs.dtype == got.topk_weights.dtype == torch.float32
    assert torch.equal(got.probs, expected.probs) and torch.equal(got.topk_ids, expected.topk_ids)


def test_router_initialisation() -> None:
    router = TopKRouter(256, 64, 2)
    bound = 1 / math.sqrt(256)
    assert 0.99 * bound < router.weight.abs().max() <= bound
    assert "num_experts=64" in repr(router)


@pytest.mark.parametrize("top_k", [0, 5])
def test_router_refuses_an_impossible_top_k(top_k: int) -> None:
    with pytest.raises(ValueError, match=f"top_k: got {top_k}, expected 1 to num_experts = 4"):
        TopKRouter(8, 4, top_k)


# ---------------------------------------------------------------- feed-forward layers


def test_stacked_weights_start_like_separate_linears() -> None:
    """Xavier's bound is that of one (F, D) matrix, not of the stack."""
    bound = math.sqrt(6 / (48 + 192))
    experts, shared = GroupedExperts(48, 192, 3), SwiGLU(48, 192)
    for weight in (*experts.w13, *experts.w2, shared.w13, shared.w2):
        assert 0.99 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)


def test_shared_expert_is_a_swiglu_network() -> None:
    mlp = SwiGLU(16, 40, dtype=FP64)
    x = torch.randn(7, 16, dtype=FP64)
    close(mlp(x), torch.stack([naive_swiglu(row, mlp.w13, mlp.w2) for row in x]))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "triton", "reference"])
def test_shared_expert_on_a_gpu(backend: str) -> None:
    """In bf16, with and without gradients, to twice the error of plain PyTorch."""
    mlp = SwiGLU(64, 160, backend=backend, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(4173, 64, device="cuda", dtype=torch.bfloat16)

    def plain(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor) -> torch.Tensor:
        gate, up = (x @ w13.T).chunk(2, dim=1)
        return (F.silu(gate) * up) @ w2.T

    exact = plain(x.double(), mlp.w13.double(), mlp.w2.double())
    bound = 2 * (plain(x, mlp.w13, mlp.w2) - exact).abs().max()
    with torch.no_grad():
        assert (mlp(x) - exact).abs().max() <= bound
    assert (mlp(x) - exact).abs().max() <= bound


def test_dense_mlp_uses_the_tanh_gelu() -> None:
    mlp = randomize(Mlp(16, 64)).double()
    x = torch.randn(2, 5, 16, dtype=FP64)
    h = x @ mlp.fc1.weight.T + mlp.fc1.bias
    h = 0.5 * h * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    close(mlp(x), h @ mlp.fc2.weight.T + mlp.fc2.bias)


# ---------------------------------------------------------------- attention


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_head_by_head(qk_norm: bool) -> None:
    attention = randomize(Attention(24, 3, qk_norm)).double()
    x = torch.randn(2, 5, 24, dtype=FP64)
    q, k, v = (x @ attention.qkv.weight.T + attention.qkv.bias).split(24, dim=2)
    heads = []
    for head in range(3):
        columns = slice(8 * head, 8 * head + 8)
        q_h, k_h = q[..., columns], k[..., columns]
        if qk_norm:
            q_h = F.layer_norm(q_h, (8,), attention.q_norm.weight, attention.q_norm.bias, 1e-6)
            k_h = F.layer_norm(k_h, (8,), attention.k_norm.weight, attention.k_norm.bias, 1e-6)
        heads.append((q_h @ k_h.transpose(1, 2) / math.sqrt(8)).softmax(2) @ v[..., columns])
    close(attention(x), torch.cat(heads, dim=2) @ attention.proj.weight.T + attention.proj.bias)


def test_attention_names_and_errors() -> None:
    names = {name for name, _ in Attention(24, 3, qk_norm=True).named_parameters()}
    assert names == {f"{part}.{kind}" for part in ("qkv", "proj", "q_norm", "k_norm") for kind in ("weight", "bias")}
    with pytest.raises(ValueError, match="got 24, expected a multiple of num_heads 5"):
        Attention(24, 5)


# ---------------------------------------------------------------- embeddings


def test_patches_in_raster_order() -> None:
    embed = randomize(PatchEmbed(2, 3, 8)).double()
    x = torch.randn(2, 3, 4, 6, dtype=FP64)
    tokens = []
    for row in range(0, 4, 2):
        for column in range(0, 6, 2):
            patch = x[:, :, row : row + 2, column : column + 2].reshape(2, -1)
            tokens.append(patch @ embed.proj.weight.view(8, -1).T + embed.proj.bias)
    close(embed(x), torch.stack(tokens, dim=1))


def test_patch_embedding_initialisation() -> None:
    embed = PatchEmbed(4, 16, 256)
    bound = math.sqrt(6 / (16 * 4 * 4 + 256))
    assert 0.99 * bound < embed.proj.weight.abs().max() <= bound and not embed.proj.bias.any()


@pytest.mark.parametrize(
    "t", [torch.tensor([0, 7, 999]), torch.tensor([0.02, 0.5, 1.0], dtype=FP64)], ids=["int", "fp64"]
)
def test_time_features_are_fp32(t: torch.Tensor) -> None:
    got = timestep_features(t, 256)
    assert got.dtype == torch.float32
    frequencies = np.exp(-np.log(10_000) * np.arange(128) / 128)
    angles = t.double().numpy()[:, None] * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    # one rounding of a frequency, times t: the error that the official fp32 features have too
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=0, atol=3e-7 * max(1.0, t.max().item()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_time_embedding_has_the_parameters_dtype(dtype: torch.dtype) -> None:
    embedder = TimestepEmbedder(32).to(dtype)
    t = torch.tensor([0.25, 1.0])
    features = timestep_features(t, 256).to(dtype)
    expected = F.linear(F.silu(F.linear(features, *embedder.mlp[0].parameters())), *embedder.mlp[2].parameters())
    got = embedder(t)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


def test_class_dropout_only_in_training() -> None:
    embedder = LabelEmbedder(10, 4, dropout_prob=0.3)
    ids = torch.full((4000,), 3)
    null = embedder.embedding_table.weight[10]
    rows = embedder.train()(ids)
    dropped = (rows == null).all(1)
    assert 0.26 < dropped.float().mean() < 0.34  # 5.5 standard deviations
    assert (rows[~dropped] == embedder.embedding_table.weight[3]).all()
    assert torch.equal(embedder.eval()(ids), embedder.embedding_table.weight[ids])
    assert torch.equal(embedder(torch.tensor([10])), null[None])


def test_embeddings_start_normal() -> None:
    table = LabelEmbedder(1000, 64, 0.1).embedding_table.weight
    assert table.shape == (1001, 64) and table.std().item() == pytest.approx(0.02, rel=0.05)
    embedder = TimestepEmbedder(64)
    for linear in (embedder.mlp[0], embedder.mlp[2]):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1) and not linear.bias.any()


def test_position_embeddings_point_by_point() -> None:
    got = sincos_pos_embed(16, 3)
    assert got.shape == (1, 9, 16) and got.dtype == torch.float32
    for row in range(3):
        for column in range(3):
            expected = []
            for coordinate in (column, row):
                angles = [coordinate / 10_000 ** (i / 4) for i in range(4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            close(got[0, 3 * row + column].double(), torch.tensor(expected, dtype=FP64), atol=1e-7)
