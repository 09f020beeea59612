"""torch's own FLOP counter agrees with dit_moe.flops, and dense twins match what they are named after."""

import dit_moe_kernels as ops
import pytest
import torch
from dit_moe_kernels.flops import register_flop_formulas
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import CASES, layer_shape
from benchmarks.models import dense_config, fresh_model, moe_config
from benchmarks.problems import make_problem
from benchmarks.providers.dense import DenseMlp
from benchmarks.providers.ours import Fused, Unfused
from dit_moe import DiT, flops


def counted(call) -> int:
    """What the counter sees."""
    register_flop_formulas()
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("num_experts", [0, 4])
@pytest.mark.parametrize("case", ["tiny", *CASES, "XL/2-8E2A@512"])
def test_whole_model(case: str, num_experts: int) -> None:
    config = moe_config(case)
    config = config if num_experts else dense_config(config, "same-name")
    size = (2, config.in_channels, config.input_size, config.input_size)
    with FakeTensorMode():  # shapes without memory
        model = DiT(config).eval()
        x, t, y = (torch.empty(shape) for shape in (size, 2, 2))

        def call() -> None:
            # the counter knows no formula of the CPU's flash attention
            with torch.no_grad(), ops.use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
                model(x, t, y.long())

        assert counted(call) == 2 * flops.flops(config)


@pytest.mark.parametrize("layer", [Fused("fused", "reference"), Unfused("unfused", "reference", "reference")])
def test_layer_with_backward(layer) -> None:
    shape, tokens = layer_shape("tiny"), 24
    problem = make_problem(shape, tokens, "balanced", torch.float32, "cpu")
    built = layer.build(problem)
    found = counted(lambda: built.forward(problem.x).backward(problem.dout))
    experts = 3 * 6 * tokens * shape.top_k * shape.hidden_size * shape.expert_hidden_size
    router = 3 * 2 * tokens * shape.hidden_size * shape.num_experts
    assert found == experts + router


def test_dense_mlp() -> None:
    shape = layer_shape("XL/2-8E2A")
    problem = make_problem(layer_shape("tiny"), 16, "balanced", torch.float32, "cpu")
    mlp = DenseMlp(problem, "flops")
    assert counted(mlp.forward) == mlp.flops("fwd") == 6 * 16 * 2 * 32 * 64
    params = DenseMlp(problem, "params")
    assert params.fc1.numel() + params.fc2.numel() == 4 * 3 * 32 * 64
    assert shape.weights_per_expert == 3 * 1152 * 4608


@pytest.mark.parametrize("case", ["S/2-8E2A", "XL/2-8E2A", "G/2-16E2A", "XL/2-8E2A@512"])
def test_dense_twins(case: str) -> None:
    config = moe_config(case)
    same_flops, same_params = dense_config(config, "flops"), dense_config(config, "params")
    assert flops.flops(same_flops) == pytest.approx(flops.flops(config), rel=2e-3)
    assert flops.count_parameters(same_params) == pytest.approx(flops.count_parameters(config), rel=2e-3)
    same_name = dense_config(config, "same-name")
    assert same_name.ffn_hidden_size == 4 * config.hidden_size
    for dense in (same_flops, same_params, same_name):
        assert not dense.is_moe and (dense.depth, dense.hidden_size) == (config.depth, config.hidden_size)
        assert dense.ffn_hidden_size % 64 == 0


def test_fresh_model_is_never_zero() -> None:
    model = fresh_model(moe_config("tiny"), "cpu", torch.float32)
    x = torch.randn(2, 4, 8, 8)
    out = model(x, torch.rand(2), torch.tensor([1, 2]))
    assert out.isfinite().all() and out.abs().mean() > 1e-4
    assert ops.availability("reference") is None
