"""Two ranks against one process: gradients in uneven and one-sided cases, starts, norms, precision, checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from benchmarks.ranks import run_on_ranks
from dit_moe import DiT
from dit_moe.layers import sincos_pos_embed
from dit_moe.parallel import ParallelConfig, clip_grad_norm_, full_state_dict, parallelize, plan

from . import scenarios

CASES = [
    scenarios.uneven_gradients,
    scenarios.one_sided_gradients,
    scenarios.idle_rank,
    scenarios.checkpointed_gradients,
    scenarios.bf16_losses,
    scenarios.local_balance,
    scenarios.starts,
    scenarios.norms,
    scenarios.saved,
    scenarios.loaded,
    scenarios.counted,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("two") / "ranks"
    path.mkdir()
    return path


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, list[Any]]:
    """Every case on two ranks."""
    return run_on_ranks(2, CASES, folder)


def assert_gradients(seen: dict[str, Tensor], expected: dict[str, Tensor], factor: float = 1.0) -> None:
    """Equal but for the order of fp32 sums, whose errors go with a tensor's largest element, not with each."""
    assert seen.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (seen[name] - tensor).abs().max()
        assert error <= 2e-6 * factor + 1e-5 * factor * tensor.abs().max(), (name, error, tensor.abs().max())


def whole_gradients(model: DiT, images: int) -> dict[str, Tensor]:
    return scenarios.gradients_of(model, scenarios.batch_of(0, images))


def test_uneven_batch(two):
    expected = whole_gradients(scenarios.fresh_model(), 8)
    assert len(two["uneven_gradients"][0]) == 4
    for seen in two["uneven_gradients"][0].values():
        assert_gradients(seen, expected)


def test_all_tokens_to_two_experts(two):
    """Of one rank, of the other, and one of each; the idle experts' gradients are zero."""
    assert len(two["one_sided_gradients"][0]) == 6
    for (_, experts), seen in two["one_sided_gradients"][0].items():
        expected = whole_gradients(scenarios.to_two_experts(scenarios.fresh_model(), experts), 4)
        assert_gradients(seen, expected)
        idle = [expert for expert in range(4) if expert not in experts]
        assert seen["blocks.0.moe.experts.w13"][idle].count_nonzero() == 0


def test_rank_without_tokens(two):
    moe = scenarios.fresh_model().blocks[0].moe
    x_TD = scenarios.layer_tokens().requires_grad_()
    out = moe(x_TD)
    # Two ranks average: the gradients of all tokens are halved, and so is the whole balance loss in the mean of shares.
    (out.hidden.square().sum() / 2 + out.balance_loss).backward()
    busy, idle = two["idle_rank"]
    assert idle["own"]["hidden"].shape == (0, 32) and idle["own"]["x"].shape == (0, 32)
    torch.testing.assert_close(busy["own"]["hidden"], out.hidden.detach())
    torch.testing.assert_close(busy["own"]["x"] / 2, x_TD.grad)
    assert torch.equal(busy["counts"], out.tokens_per_expert) and torch.equal(idle["counts"], busy["counts"])
    torch.testing.assert_close((busy["own"]["balance"] + idle["own"]["balance"]) / 2, out.balance_loss.detach())
    torch.testing.assert_close(busy["experts"], {"w13": moe.experts.w13.grad, "w2": moe.experts.w2.grad})


def test_recomputed_layers(two):
    assert_gradients(two["checkpointed_gradients"][0], whole_gradients(scenarios.fresh_model(), 8))


def test_bf16_is_as_near_to_fp32_as_on_one_device(two):
    """The 2x rule for outputs and gradients; the router's weights stay in fp32."""
    x, t, y, _ = scenarios.batch_of(0, 8)

    def run(autocast: bool) -> tuple[Tensor, dict[str, Tensor]]:
        model = scenarios.fresh_model()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x, t, y)
        out.square().mean().backward()
        return out.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (truth, true_grads), (plain, plain_grads) = run(False), run(True)
    ranks = two["bf16_losses"]
    seen = torch.cat([rank["out"] for rank in ranks])
    assert all(rank["router"] == torch.float32 for rank in ranks)
    assert (seen - truth).abs().max() <= 2 * (plain - truth).abs().max()
    for name, grad in ranks[0]["gradients"].items():
        assert grad.dtype == torch.float32
        error, plain_error = ((g - true_grads[name]).norm() for g in (grad, plain_grads[name]))
        assert error <= 2 * plain_error + 1e-6, name


def test_local_balance(two):
    for rank, seen in enumerate(two["local_balance"]):
        share, _ = scenarios.uneven_share(rank, 2, (4, 4))
        _, balance, counts = scenarios.losses_of(scenarios.fresh_model(), share)
        torch.testing.assert_close(seen["balance"], balance.detach())
        assert torch.equal(seen["counts"], counts)


def test_all_ranks_start_from_rank_0(two):
    expected = {name: tensor for name, tensor in scenarios.fresh_model(seed=0).state_dict().items()}
    for rank in two["starts"]:
        for parallel in ("ddp", "fsdp"):
            torch.testing.assert_close(rank[f"differing, {parallel}"], expected, rtol=0, atol=0)


def test_models_without_weights_get_them(two):
    for parallel in ("ddp", "fsdp"):
        first, second = (rank[f"meta, {parallel}"] for rank in two["starts"])
        torch.testing.assert_close(first, second, rtol=0, atol=0)
        torch.testing.assert_close(first["pos_embed"], sincos_pos_embed(32, 4))
        assert first["final_layer.linear.weight"].count_nonzero() == 0
        bound = (6 / (32 + 64)) ** 0.5
        for expert in first["blocks.1.moe.experts.w13"]:
            assert 0.95 * bound < expert.abs().max() <= bound


def test_norms(two):
    model = scenarios.fresh_model()
    whole_gradients(model, 4)
    expected = float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
    assert expected > 0.01 and two["norms"][0] == two["norms"][1]
    for norm, clipped in two["norms"][0].values():
        assert norm == pytest.approx(expected, rel=1e-5)
        assert clipped == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(float(clip_grad_norm_(model.parameters(), 0.01)), expected)


def test_checkpoints_are_read_whatever_way_they_were_written(two, folder):
    expected = dict(scenarios.fresh_model().state_dict())
    assert len(two["loaded"][0]) == 12
    for seen in two["loaded"][0].values():
        torch.testing.assert_close(seen, expected, rtol=0, atol=0)
    for name in ("fsdp-2", "ddp-2", "fsdp-1"):
        state = dict(scenarios.fresh_model(seed=1).state_dict())
        dcp.load({"model": state}, checkpoint_id=folder.parent / name)
        torch.testing.assert_close(state, expected, rtol=0, atol=0)


def test_plan_counts_what_runs(two):
    """Both ranks' mean, since uneven cuts and an uneven load give one more than the other."""
    for config in (scenarios.DDP, scenarios.FSDP, scenarios.DDP_EP2, scenarios.FSDP_EP2):
        seen = [rank[f"{config.data_parallel}, {config.expert_parallel}"] for rank in two["counted"]]
        weights, rows = (sum(numbers) / 2 for numbers in zip(*seen, strict=True))
        assert plan.memory(scenarios.CONFIG, config, 2, 4).weights == pytest.approx(weights, rel=1e-3)
        # The plan counts bf16 rows that leave the rank; here they are fp32, and one half stays.
        assert plan.traffic(scenarios.CONFIG, config, 2, 4).rows * 4 == rows


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("both",), "data_parallel: got 'both'"),
        (("ddp", 0), "expert_parallel: got 0"),
        (("none", 2), "expert_parallel: got 2 with data_parallel 'none'"),
    ],
)
def test_wrong_configurations(arguments, message):
    with pytest.raises(ValueError, match=message):
        ParallelConfig(*arguments)


def test_ranks_and_experts_must_divide():
    with pytest.raises(ValueError, match="a divisor of the 6 ranks"):
        ParallelConfig("fsdp", 4).check_ranks(6)
    with pytest.raises(ValueError, match="'none' for 2 ranks"):
        ParallelConfig().check_ranks(2)
    for num_experts in (0, 6):
        with pytest.raises(ValueError, match=f"the model's {num_experts} experts"):
            ParallelConfig("ddp", 4).check_experts(num_experts)


def test_one_process_needs_no_torch_distributed():
    model = scenarios.fresh_model()
    assert parallelize(model, ParallelConfig(), "cpu") is model
    torch.testing.assert_close(full_state_dict(model.state_dict()), dict(model.state_dict()))
    with pytest.raises(RuntimeError, match="init_process_group"):
        parallelize(model, ParallelConfig("fsdp"), "cpu")
    with torch.device("meta"):
        empty = DiT(scenarios.CONFIG)
    parallelize(empty, ParallelConfig(), "cpu")
    torch.testing.assert_close(empty.pos_embed.detach(), sincos_pos_embed(32, 4))
