"""DiT as a whole: structure, initialisation, training mode, dtypes, devices and torch.compile."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from dit_moe_kernels import availability, use_backend
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dit_moe import DiT, DiT_models, DiTConfig, model_config
from dit_moe.layers import sincos_pos_embed
from tests.model.util import TINY, tiny_inputs, tiny_model

both_kinds = pytest.mark.parametrize("num_experts", [4, 0], ids=["moe", "dense"])


# ---------------------------------------------------------------- configuration and presets


def test_config_survives_json() -> None:
    assert DiTConfig.from_dict(TINY.to_dict()) == TINY
    assert DiTConfig.from_dict({"hidden_size": 384, "num_heads": 6}).depth == 28
    assert hash(TINY) == hash(DiTConfig(**TINY.to_dict()))


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"width": 8}, ValueError, r"unknown keys \['width'\]"),
        ({"depth": 0}, ValueError, "depth: got 0"),
        ({"depth": 2.0}, TypeError, "depth: got 2.0, expected int"),
        ({"depth": True}, TypeError, "depth: got True, expected int"),
        ({"learn_sigma": 1}, TypeError, "learn_sigma: got 1, expected bool"),
        ({"num_heads": 7}, ValueError, "hidden_size: got 1152, expected a multiple of num_heads 7"),
        ({"hidden_size": 18, "num_heads": 2}, ValueError, "multiple of 4"),
        ({"input_size": 33}, ValueError, "input_size: got 33"),
        ({"top_k": 9}, ValueError, "top_k: got 9, expected 1 to num_experts = 8"),
        ({"num_experts": -1}, ValueError, "num_experts: got -1"),
        ({"mlp_ratio": 0.0}, ValueError, "mlp_ratio: got 0.0"),
        ({"class_dropout_prob": 1.5}, ValueError, "class_dropout_prob: got 1.5"),
        ({"balance_alpha": -1.0}, ValueError, "balance_alpha: got -1.0"),
        ({"shared_expert": "relu"}, ValueError, "shared_expert: got 'relu', expected one of"),
        ({"shared_expert": 2}, TypeError, "shared_expert: got 2, expected str"),
    ],
)
def test_config_refuses_nonsense(values: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DiTConfig.from_dict(values)


def test_presets() -> None:
    names = {f"DiT-{size}/2" for size in ("S", "B", "L", "XL", "G")}
    names |= {f"DiT-MoE-{size}/2-{experts}E2A" for size in ("S", "B", "L", "XL", "G") for experts in (8, 16)}
    assert set(DiT_models) == names
    assert [name for name in DiT_models if model_config(name).qk_norm] == [
        n for n in DiT_models if "MoE-XL" in n or "MoE-G" in n
    ]
    model = DiT_models["DiT-MoE-S/2-8E2A"](depth=1, num_classes=10)
    assert model.config == model_config("DiT-MoE-S/2-8E2A", depth=1, num_classes=10)
    with pytest.raises(ValueError, match="model name: got 'DiT-MoE-S'"):
        model_config("DiT-MoE-S")
    with pytest.raises(ValueError, match="unknown keys"):
        model_config("DiT-S/2", width=3)


# ---------------------------------------------------------------- structure


def test_names_of_the_parameters() -> None:
    moe = set(tiny_model(qk_norm=True).state_dict())
    dense = set(tiny_model(num_experts=0, qk_norm=True).state_dict())
    routed = {"gate.weight", "experts.w13", "experts.w2", "shared_experts.w13", "shared_experts.w2"}
    assert moe - dense == {f"blocks.{i}.moe.{name}" for i in range(2) for name in routed}
    assert dense - moe == {
        f"blocks.{i}.mlp.{n}.{kind}" for i in range(2) for n in ("fc1", "fc2") for kind in ("weight", "bias")
    }
    both = {"pos_embed", "x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "y_embedder.embedding_table"}
    both |= {"final_layer.linear", "final_layer.adaLN_modulation.1"}
    for i in range(2):
        both |= {
            f"blocks.{i}.{n}" for n in ("attn.qkv", "attn.proj", "attn.q_norm", "attn.k_norm", "adaLN_modulation.1")
        }
    assert {key.removesuffix(".weight").removesuffix(".bias") for key in moe & dense} == both


def layer_norm(x: Tensor) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


@both_kinds
def test_forward_written_out(num_experts: int) -> None:
    """The modulated blocks spelled with plain expressions around the layers that test_layers.py checks."""
    model = tiny_model(num_experts=num_experts).double()
    x, t, y = tiny_inputs(dtype=torch.float64)
    c = F.silu(model.t_embedder(t) + model.y_embedder.embedding_table.weight[y])
    tokens = model.x_embedder(x) + model.pos_embed
    for block in model.blocks:
        linear = block.adaLN_modulation.linear
        shift1, scale1, gate1, shift2, scale2, gate2 = (c @ linear.weight.T + linear.bias)[:, None].split(32, dim=2)
        tokens = tokens + gate1 * block.attn(layer_norm(tokens) * (1 + scale1) + shift1)
        inside = layer_norm(tokens) * (1 + scale2) + shift2
        tokens = tokens + gate2 * (block.moe(inside).hidden if num_experts else block.mlp(inside))
    linear = model.final_layer.adaLN_modulation.linear
    shift, scale = (c @ linear.weight.T + linear.bias)[:, None].split(32, dim=2)
    patches = model.final_layer.linear(layer_norm(tokens) * (1 + scale) + shift)
    expected = torch.zeros(3, 8, 8, 8, dtype=torch.float64)
    for token in range(16):
        row, column = 2 * (token // 4), 2 * (token % 4)
        patch = patches[:, token].view(3, 2, 2, 8)  # height, width, channel
        expected[:, :, row : row + 2, column : column + 2] = patch.permute(0, 3, 1, 2)
    torch.testing.assert_close(model(x, t, y), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("learn_sigma", "channels"), [(True, 8), (False, 4)])
def test_output_channels(learn_sigma: bool, channels: int) -> None:
    assert tiny_model(learn_sigma=learn_sigma)(*tiny_inputs()).shape == (3, channels, 8, 8)


@both_kinds
def test_modulations_of_several_steps_at_once(num_experts: int) -> None:
    """What a sampler does: all steps' vectors first, then one `denoise` a step from a slice with gaps."""
    model = tiny_model(num_experts=num_experts)
    x, _, y = tiny_inputs()
    times = torch.rand(2, 3)
    vectors = model.modulations(model.condition(times.T.flatten(), y.repeat_interleave(2)))
    assert vectors.shape == (6, 6 * 2 + 2, 32)
    for step in (0, 1):
        got, aux = model.denoise(x, vectors[step::2], return_aux=True)
        expected, expected_aux = model(x, times[step], y, return_aux=True)
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
        assert torch.equal(aux.tokens_per_expert, expected_aux.tokens_per_expert)
    with pytest.raises(ValueError, match=r"modulations_BVD: got shape \(6, 14, 32\), expected \(3, 14, 32\)"):
        model.denoise(x, vectors)


def test_images_do_not_mix() -> None:
    model = tiny_model()
    x, t, y = tiny_inputs()
    torch.testing.assert_close(model(x, t, y)[1:2], model(x[1:2], t[1:2], y[1:2]), rtol=0, atol=1e-5)
    assert model(x[:0], t[:0], y[:0]).shape == (0, 8, 8, 8)


def test_aux_reports_every_layer() -> None:
    model = tiny_model(depth=3)
    seen = []
    for block in model.blocks:
        block.moe.register_forward_hook(lambda module, inputs, output: seen.append(output))
    inputs = tiny_inputs()
    out, aux = model(*inputs, return_aux=True)
    reported = list(seen)
    assert torch.equal(out, model(*inputs))
    assert aux.tokens_per_expert.shape == (3, 4) and aux.tokens_per_expert.sum(1).tolist() == [3 * 16 * 2] * 3
    assert aux.tokens_per_expert.tolist() == [layer.tokens_per_expert.tolist() for layer in reported]
    torch.testing.assert_close(aux.balance_loss, sum(layer.balance_loss for layer in reported))


def test_aux_of_a_dense_model_is_empty() -> None:
    _, aux = tiny_model(num_experts=0)(*tiny_inputs(), return_aux=True)
    assert aux.balance_loss.item() == 0 and aux.tokens_per_expert.shape == (0, 0)


# ---------------------------------------------------------------- initialisation


@both_kinds
def test_new_model_predicts_zero_through_identity_blocks(num_experts: int) -> None:
    model = DiT(DiTConfig.from_dict({**TINY.to_dict(), "num_experts": num_experts})).eval()
    assert not model(*tiny_inputs()).any()
    tokens, c = torch.randn(2, 16, 32), torch.randn(2, 32)
    residual, _ = model.blocks[0](tokens, model.blocks[0].adaLN_modulation(c).unbind(1))
    assert torch.equal(residual.total(), tokens)
    assert not model.blocks[0].attn.qkv.bias.any() and model.blocks[0].attn.qkv.weight.any()
    assert not model.pos_embed.requires_grad


@both_kinds
def test_materialised_meta_model_starts_like_a_new_one(num_experts: int) -> None:
    config = DiTConfig.from_dict({**TINY.to_dict(), "num_experts": num_experts, "qk_norm": True})
    with torch.device("meta"):
        model = DiT(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(float("nan"))
    model.reset_parameters()
    assert torch.equal(model.pos_embed, sincos_pos_embed(32, 4))
    for (name, fresh), usual in zip(model.named_parameters(), DiT(config).parameters(), strict=True):
        assert fresh.isfinite().all(), name
        assert fresh.std().item() == pytest.approx(usual.std().item(), rel=0.35), name
        assert fresh.abs().max().item() == pytest.approx(usual.abs().max().item(), rel=0.35), name


# ---------------------------------------------------------------- training


def test_class_dropout_in_training_only() -> None:
    model = tiny_model(class_dropout_prob=1.0)
    x, t, y = tiny_inputs()
    null = torch.full_like(y, 10)
    assert torch.equal(model.train()(x, t, y), model.eval()(x, t, null))
    assert not torch.equal(model(x, t, y), model(x, t, null))


@both_kinds
def test_every_parameter_learns(num_experts: int) -> None:
    model = tiny_model(num_experts=num_experts, qk_norm=True).train()
    out, aux = model(*tiny_inputs(batch=8), return_aux=True)
    (out.square().mean() + aux.balance_loss).backward()
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def test_balance_loss_does_not_touch_the_output_path() -> None:
    """It reaches the routers and what feeds them, not the last block's experts."""
    model = tiny_model()
    _, aux = model(*tiny_inputs(), return_aux=True)
    aux.balance_loss.backward()
    assert all(block.moe.gate.weight.grad.any() for block in model.blocks)
    assert model.blocks[0].moe.experts.w2.grad.any()  # feeds the second router
    assert model.blocks[1].moe.experts.w2.grad is None and model.final_layer.linear.weight.grad is None


# ---------------------------------------------------------------- dtypes, devices, graphs


@both_kinds
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pure_16_bit_model(num_experts: int, dtype: torch.dtype) -> None:
    model = tiny_model(num_experts=num_experts, qk_norm=True)
    x, t, y = tiny_inputs()
    expected = model(x, t, y)
    got = model.to(dtype)(x.to(dtype), t, y)
    assert got.dtype == dtype
    assert (got.float() - expected).norm() < (0.05 if dtype == torch.bfloat16 else 0.01) * expected.norm()


@both_kinds
def test_autocast(num_experts: int) -> None:
    model = tiny_model(num_experts=num_experts, qk_norm=True)
    inputs = tiny_inputs()
    expected = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got, aux = model(*inputs, return_aux=True)
    assert aux.balance_loss.dtype == torch.float32
    assert 0 < (got.float() - expected).norm() < 0.05 * expected.norm()
    (got.float().square().mean() + aux.balance_loss).backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters() if p.grad is not None
    )


@both_kinds
def test_forward_never_reads_a_value_back(num_experts: int) -> None:
    """Fake tensors have no values: a host sync in forward or backward would raise."""
    with FakeTensorMode():
        model = DiT(DiTConfig.from_dict({**TINY.to_dict(), "num_experts": num_experts}))
        out, aux = model(*tiny_inputs(), return_aux=True)
        (out.square().mean() + aux.balance_loss).backward()
    assert out.shape == (3, 8, 8, 8)


@both_kinds
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_into_one_graph(num_experts: int, compiler: str) -> None:
    model = tiny_model(num_experts=num_experts, qk_norm=True).double()
    inputs = tiny_inputs(dtype=torch.float64)
    out, aux = model(*inputs, return_aux=True)
    expected = torch.autograd.grad(out.square().mean() + aux.balance_loss, trainable(model))
    got_out, got_aux = torch.compile(model, backend=compiler, fullgraph=True)(*inputs, return_aux=True)
    got = torch.autograd.grad(got_out.square().mean() + got_aux.balance_loss, trainable(model))
    torch.testing.assert_close(got_out, out, rtol=0, atol=1e-12)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@both_kinds
@pytest.mark.parametrize("device", DEVICES)
def test_kernels_agree_with_the_reference(num_experts: int, device: str) -> None:
    """The whole model, forward and backward, on the Triton kernels and on plain PyTorch, in fp32."""
    if (reason := availability("triton", device)) is not None:
        pytest.skip(reason)
    model = tiny_model(num_experts=num_experts, qk_norm=True).to(device)
    x, t, y = (tensor.to(device) for tensor in tiny_inputs())
    results = []
    for backend in ("triton", "reference"):
        with use_backend(backend):
            leaf = x.clone().requires_grad_()
            out, aux = model(leaf, t, y, return_aux=True)
            loss = out.square().mean() + aux.balance_loss
            results.append([out, *torch.autograd.grad(loss, [leaf, *trainable(model)])])
    for got, expected in zip(*results, strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm() + 1e-7  # the gradient of k's bias is but roundings


@pytest.mark.gpu
@both_kinds
@pytest.mark.parametrize("autocast", [False, True])
def test_a_whole_model_on_cuda_alone(num_experts: int, autocast: bool) -> None:
    """Nothing is left to Triton, in bf16 weights or under autocast, forward and backward."""
    if availability("cuda") is not None or (num_experts and torch.cuda.get_device_capability() != (9, 0)):
        pytest.skip("needs the CUDA kernels, those of experts on Hopper")
    model = tiny_model(num_experts=num_experts, qk_norm=True).to("cuda", torch.float32 if autocast else torch.bfloat16)
    x, t, y = (tensor.cuda() for tensor in tiny_inputs())
    outputs = []
    for backend in ("cuda", "reference"):
        with use_backend(backend), torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            out, aux = model(x.to(model.pos_embed.dtype), t, y, return_aux=True)
        outputs.append(out.float())
        grads = torch.autograd.grad(outputs[-1].square().mean() + aux.balance_loss, trainable(model))
        assert all(grad.isfinite().all() for grad in grads)
    assert (outputs[0] - outputs[1]).norm() <= 0.1 * outputs[1].norm()  # a token between two experts may go to either


def trainable(model: DiT) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def test_wrong_inputs() -> None:
    model = tiny_model()
    x, t, y = tiny_inputs()
    with pytest.raises(ValueError, match=r"x: got shape \(3, 3, 8, 8\), expected \(B, 4, 8, 8\)"):
        model(x[:, :3], t, y)
    with pytest.raises(ValueError, match=r"t: got shape \(2,\), expected \(3,\)"):
        model(x, t[:2], y)
    with pytest.raises(ValueError, match=r"y: got shape \(3, 1\), expected \(3,\)"):
        model(x, t, y[:, None])


@pytest.mark.gpu
def test_no_host_sync_on_a_gpu() -> None:
    with torch.device("cuda"):
        model, inputs = tiny_model(qk_norm=True).train(), tiny_inputs()
    with use_backend("triton"):
        for mode in ("default", "error"):  # the first round compiles kernels
            torch.cuda.set_sync_debug_mode(mode)
            try:
                out, aux = model(*inputs, return_aux=True)
                (out.square().mean() + aux.balance_loss).backward()
            finally:
                torch.cuda.set_sync_debug_mode("default")
