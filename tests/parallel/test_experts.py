"""The layer with its experts behind exchanges, on one rank: the kernels of each device, and their gradients."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from dit_moe import MoEFeedForward
from dit_moe.parallel import local_tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A device, with a group of this process alone."""
    backend = "gloo" if request.param == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield request.param
    dist.destroy_process_group()


def sharded(moe: MoEFeedForward, device: str) -> MoEFeedForward:
    """A copy with its experts behind all-to-alls."""
    from torch.distributed.device_mesh import init_device_mesh

    from dit_moe.parallel.experts import ShardedExperts

    twin = copy.deepcopy(moe)
    mesh = init_device_mesh(device, (1,), mesh_dim_names=("expert",))
    twin.experts = ShardedExperts(twin.experts, mesh, grad_scale=1.0)
    twin.count_group = mesh.get_group()
    return twin


def run(moe: MoEFeedForward, x: Tensor, autocast: bool = False) -> dict[str, Tensor]:
    """Output and all gradients."""
    x = x.detach().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
        out = moe(x)
    (out.hidden.float().square().mean() * 100 + out.balance_loss).backward()
    gradients = {name: local_tensor(parameter.grad) for name, parameter in moe.named_parameters()}
    return {"hidden": out.hidden.detach(), "balance": out.balance_loss.detach(), "x": x.grad, **gradients}


@pytest.mark.parametrize("autocast", [False, True])
def test_exchanges_change_nothing(device, autocast):
    """The 2x rule against the plain layer in fp64, with the plain layer under the same autocast as the measure."""
    moe = MoEFeedForward(64, 128, num_experts=8, top_k=2, device=device)
    x = torch.randn(3, 50, 64, device=device)
    wide = run(copy.deepcopy(moe).double(), x.double())
    plain, seen = run(copy.deepcopy(moe), x, autocast), run(sharded(moe, device), x, autocast)
    assert seen.keys() == plain.keys() == wide.keys()
    for name, truth in wide.items():
        assert seen[name].dtype == plain[name].dtype and seen[name].shape == truth.shape
        error, measure = ((found[name].double() - truth).abs().max() for found in (seen, plain))
        assert error <= 2 * measure + 1e-6 * truth.abs().max(), name


def test_no_tokens_and_no_gradient(device):
    moe = MoEFeedForward(64, 128, num_experts=4, device=device)
    with torch.no_grad():
        x = torch.randn(5, 64, device=device)
        torch.testing.assert_close(sharded(moe, device)(x).hidden, moe(x).hidden)
    found = run(sharded(moe, device), torch.empty(0, 64, device=device))
    assert found["hidden"].shape == (0, 64) and found["experts.w13"].count_nonzero() == 0


def test_two_backward_passes(device):
    """The gradients of a kept graph travel anew each time."""
    moe = sharded(MoEFeedForward(64, 128, num_experts=4, device=device), device)
    x = torch.randn(5, 64, device=device, requires_grad=True)
    loss = moe(x).hidden.square().sum()
    (first,) = torch.autograd.grad(loss, x, retain_graph=True)
    (second,) = torch.autograd.grad(loss, x)
    assert first.count_nonzero() > 0 and torch.equal(first, second)
