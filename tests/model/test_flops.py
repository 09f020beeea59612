"""Sizes and costs: the closed forms against the paper, against the model itself and against torch's FLOP counter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dit_moe import DiT, DiT_models, model_config
from dit_moe.flops import count_activated_parameters, count_parameters, flops, macs, macs_by_part, parameters_by_part
from dit_moe.layers import GroupedExperts, PatchEmbed, SwiGLU, TopKRouter
from tests.model.util import tiny_inputs, tiny_model

# name: parameters of the official model, activated ones in millions, GMACs without and with attention products (256 px)
PAPER = {
    "DiT-MoE-S/2-8E2A": (199_307_552, 71.91, 15.43, 16.03),
    "DiT-MoE-S/2-16E2A": (369_213_728, 71.94, 15.44, 16.04),
    "DiT-MoE-B/2-8E2A": (795_861_536, 286.25, 61.68, 62.89),
    "DiT-MoE-L/2-8E2A": (2_823_764_000, 1011.82, 219.26, 222.48),
    "DiT-MoE-XL/2-8E2A": (4_168_172_192, 1492.73, 323.74, 327.97),
    "DiT-MoE-G/2-16E2A": (16_503_731_232, 3181.57, 690.94, 698.33),
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_match_the_paper_and_the_official_models(name: str) -> None:
    config = model_config(name)
    parameters, activated, bare, full = PAPER[name]
    assert count_parameters(config) == parameters
    assert round(count_activated_parameters(config) / 1e6, 2) == activated
    assert round(macs(config, attention=False) / 1e9, 2) == bare
    assert round(macs(config) / 1e9, 2) == full
    assert flops(config) == 2 * macs(config)


def test_cost_at_512_pixels() -> None:
    assert round(macs(model_config("DiT-MoE-XL/2-8E2A", input_size=64)) / 1e9, 1) == 1361.9
    assert round(macs(model_config("DiT-MoE-G/2-16E2A", input_size=64)) / 1e9, 1) == 2880.4


@pytest.mark.parametrize(
    ("name", "gmacs"), [("DiT-S/2", 6.06), ("DiT-B/2", 23.01), ("DiT-L/2", 80.7), ("DiT-XL/2", 118.6)]
)
def test_dense_presets_match_the_dit_paper(name: str, gmacs: float) -> None:
    assert macs(model_config(name)) / 1e9 == pytest.approx(gmacs, abs=0.05 if gmacs > 50 else 0.005)


@pytest.mark.parametrize("name", DiT_models)
def test_parameters_of_the_built_model(name: str) -> None:
    with torch.device("meta"):
        model = DiT_models[name]()
    config = model.config
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(config)
    parts = parameters_by_part(config)
    assert sum(p.numel() for key, p in model.named_parameters() if ".moe.experts." in key) == parts["experts"]
    assert sum(p.numel() for key, p in model.named_parameters() if ".attn." in key) == parts["attention"]


@pytest.mark.parametrize("num_experts", [4, 0])
def test_parameters_with_a_gelu_shared_expert(num_experts: int) -> None:
    model = tiny_model(num_experts=num_experts, shared_expert="gelu", mlp_ratio=2.5)
    parts = parameters_by_part(model.config)
    assert sum(parameter.numel() for parameter in model.parameters()) == count_parameters(model.config)
    shared = sum(p.numel() for key, p in model.named_parameters() if ".moe.shared_experts." in key)
    assert shared == parts["shared_expert"] == (2 * (2 * 32 * 80 + 80 + 32) if num_experts else 0)
    idle = 2 * sum(p[0].numel() for p in model.blocks[0].moe.experts.parameters()) if num_experts else 0
    assert count_activated_parameters(model.config) == count_parameters(model.config) - 2 * idle


def linear_macs(model: DiT) -> int:
    """Multiply-accumulates of all products with weights, counted while the model runs."""
    counted = []

    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: object) -> None:
        rows = inputs[0].numel() // inputs[0].shape[-1]
        if isinstance(module, PatchEmbed):
            counted.append(output[..., 0].numel() * module.proj.weight.numel())
        elif isinstance(module, GroupedExperts):
            chosen = inputs[1].numel()  # topk_weights: one row of work per choice
            counted.append(chosen * (module.w13[0].numel() + module.w2[0].numel()))
        else:
            counted.append(rows * sum(p.numel() for name, p in module.named_parameters() if name != "bias"))

    for module in model.modules():
        if isinstance(module, (nn.Linear, PatchEmbed, GroupedExperts, SwiGLU, TopKRouter)):
            module.register_forward_hook(hook)
    with torch.no_grad():
        model(*tiny_inputs(batch=1))
    return sum(counted)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"num_experts": 0},
        {"top_k": 3, "mlp_ratio": 2.5, "num_shared_experts": 1, "learn_sigma": False},
        {"shared_expert": "gelu", "mlp_ratio": 2.5},
        {"shared_expert": "gelu", "num_experts": 0},
    ],
)
def test_macs_of_a_running_model(overrides: dict) -> None:
    model = tiny_model(**overrides)
    assert linear_macs(model) == macs(model.config, attention=False)


def test_dense_flops_match_torchs_counter() -> None:
    """Attention as two plain products: the counter of some torch releases does not know the fused CPU kernel."""
    model = tiny_model(num_experts=0, qk_norm=True)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(*tiny_inputs(batch=1))
    assert counter.get_total_flops() == flops(model.config)
    assert macs_by_part(model.config)["attention_products"] == 2 * 16 * 16 * 32 * 2
