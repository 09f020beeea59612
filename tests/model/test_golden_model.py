"""Model and MoE block against arrays computed with the official code (tests/data/golden)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from dit_moe_kernels import use_backend
from torch import Tensor

from dit_moe import DiT, DiTConfig
from dit_moe.layers import sincos_pos_embed
from tests.kernels.util import FP32, FP64, Target, targets

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
TOLERANCE = {FP64: 1e-10, FP32: 1e-5}


class Golden(NamedTuple):
    """One golden file and a model in eval mode with its weights."""

    arrays: dict[str, Tensor]
    model: DiT
    target: Target

    def input(self, name: str) -> Tensor:
        """An array on the target's device, floats in its dtype."""
        array = self.arrays[name].to(self.target.device)
        return array.to(self.target.dtype) if array.is_floating_point() else array

    def check(self, got: Tensor, name: str) -> None:
        """Compare with an array, relative to its largest value if that is above one."""
        self.check_values(got, self.arrays[name], name)

    def check_values(self, got: Tensor, expected: Tensor, name: str) -> None:
        tolerance = TOLERANCE[self.target.dtype] * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(
            got.detach().cpu().double(), expected, rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}"
        )


@pytest.fixture(params=["tiny_timm", "tiny_flash"])
def golden(request: pytest.FixtureRequest, target: Target) -> Golden:
    with np.load(GOLDEN / f"{request.param}.npz") as file:
        meta = json.loads(str(file["meta"]))
        arrays = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta"}
    config = DiTConfig.from_dict({"qk_norm": meta.pop("flash_layout"), **meta})
    official = {name.removeprefix("state/"): array for name, array in arrays.items() if name.startswith("state/")}
    model = DiT(config)
    model.load_state_dict(native_layout(official, config))
    return Golden(arrays, model.to(target.device, target.dtype).eval(), target)


def native_layout(official: dict[str, Tensor], config: DiTConfig) -> dict[str, Tensor]:
    """Rename the attention of the XL/G layout and stack the experts."""
    state = {
        key.replace("attn.Wqkv.", "attn.qkv.").replace("attn.out_proj.", "attn.proj."): value
        for key, value in official.items()
        if "experts." not in key
    }
    for block in range(config.depth):
        moe = f"blocks.{block}.moe."
        experts = [stack_swiglu(official, f"{moe}experts.{expert}.") for expert in range(config.num_experts)]
        for name, parts in zip(("w13", "w2"), zip(*experts, strict=True), strict=True):
            state[f"{moe}experts.{name}"] = torch.stack(parts)
        shared = stack_swiglu(official, f"{moe}shared_experts.")
        state |= {f"{moe}shared_experts.w13": shared[0], f"{moe}shared_experts.w2": shared[1]}
    return state


def stack_swiglu(arrays: dict[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
    """w13 and w2 of one SwiGLU network from the official three matrices (or their gradients)."""
    gate, up, down = (arrays[f"{prefix}{name}_proj.weight"] for name in ("gate", "up", "down"))
    return torch.cat([gate, up]), down


all_targets = pytest.mark.parametrize("target", targets("triton", dtypes=(FP64, FP32)))
reference_only = pytest.mark.parametrize("target", [Target("reference", "cpu", FP64)], ids=str)


@all_targets
def test_eval_output(golden: Golden) -> None:
    with torch.no_grad(), use_backend(golden.target.backend):
        out = golden.model(golden.input("x"), golden.input("t"), golden.input("y"))
    assert out.dtype == golden.target.dtype
    golden.check(out, "eval_out")


@all_targets
def test_moe_block_routing(golden: Golden) -> None:
    moe = golden.model.blocks[0].moe
    with use_backend(golden.target.backend):
        routing = moe.gate(golden.input("moe_in").flatten(0, 1))
    ids, order = routing.topk_ids.cpu().sort(dim=1)
    expected_ids, expected_order = golden.arrays["moe_topk_idx"].sort(dim=1)
    assert torch.equal(ids, expected_ids)
    weights = routing.topk_weights.cpu().gather(1, order)
    expected_weights = golden.arrays["moe_topk_weight"].gather(1, expected_order)
    golden.check_values(weights, expected_weights, "moe_topk_weight")
    counts = torch.bincount(expected_ids.flatten(), minlength=golden.model.config.num_experts)
    assert routing.plan.tokens_per_expert.tolist() == counts.tolist()


@all_targets
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_moe_block_forward_and_gradients(golden: Golden, training: bool) -> None:
    moe = golden.model.blocks[0].moe.train(training)
    x = golden.input("moe_in").requires_grad_()
    with use_backend(golden.target.backend):
        out = moe(x)
    golden.check(out.hidden, "moe_train_out" if training else "moe_eval_out")
    golden.check(out.balance_loss.reshape(1), "moe_aux_loss_alpha0.01")

    ((out.hidden * golden.input("moe_grad_out")).sum() + out.balance_loss).backward()
    golden.check(x.grad, "moe_grad_in")
    golden.check(moe.gate.weight.grad, "moe_grad/gate.weight")
    for expert in range(golden.model.config.num_experts):
        w13, w2 = stack_swiglu(golden.arrays, f"moe_grad/experts.{expert}.")
        golden.check_values(moe.experts.w13.grad[expert], w13, f"experts.{expert}.w13")
        golden.check_values(moe.experts.w2.grad[expert], w2, f"experts.{expert}.w2")
    w13, w2 = stack_swiglu(golden.arrays, "moe_grad/shared_experts.")
    golden.check_values(moe.shared_experts.w13.grad, w13, "shared_experts.w13")
    golden.check_values(moe.shared_experts.w2.grad, w2, "shared_experts.w2")


@reference_only
def test_fixed_position_embeddings(golden: Golden) -> None:
    config = golden.model.config
    fresh = sincos_pos_embed(config.hidden_size, config.input_size // config.patch_size)
    torch.testing.assert_close(fresh, golden.arrays["state/pos_embed"], rtol=0, atol=1e-7)


@reference_only
def test_every_block_trains_through_the_model(golden: Golden) -> None:
    """A whole-model backward in training mode gives finite gradients to every trainable parameter, routers included."""
    out, aux = golden.model.train()(golden.input("x"), golden.input("t"), golden.input("y"), return_aux=True)
    (out.square().mean() + aux.balance_loss).backward()
    for name, parameter in golden.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().max() > 0, name
