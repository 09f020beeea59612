"""Stochastic rounding, and the optimiser against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dit_moe.training.optimizer import AdamW
from dit_moe.training.rounding import round_stochastically_


@pytest.mark.parametrize("value", [1.001, -1.001, 3.14159, 1e-20, -6.1e4, 0.0, 1.0, -0.5])
def test_rounding_hits_both_neighbours_as_often_as_it_should(value: float) -> None:
    x = torch.full((20_000,), value)
    out = torch.empty_like(x, dtype=torch.bfloat16)
    round_stochastically_(out, x, torch.Generator().manual_seed(0))
    nearest = x.bfloat16()
    if float(nearest[0]) == value:
        assert torch.equal(out, nearest)
        return
    found = out.float().unique().tolist()
    assert len(found) == 2 and found[0] < x[0] < found[1]
    share = (float(x[0]) - found[0]) / (found[1] - found[0])
    assert (out.float() == found[1]).float().mean().item() == pytest.approx(share, abs=0.02)


def test_rounding_keeps_what_is_not_finite() -> None:
    x = torch.tensor([float("nan"), float("inf"), float("-inf")]).repeat(1000)
    out = torch.zeros_like(x, dtype=torch.bfloat16)
    round_stochastically_(out, x)
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out[~x.isnan()].float(), x[~x.isnan()])


def test_same_steps_as_pytorchs() -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Linear(7, 5), nn.Linear(7, 5))
    theirs.load_state_dict(ours.state_dict())
    optimizer = AdamW(dict(ours.named_parameters()), (0.8, 0.95), weight_decay=0.1)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.8, 0.95), weight_decay=0.1)
    for step in range(5):
        gradients = [torch.randn_like(param) for param in ours.parameters()]
        for mine, other, gradient in zip(ours.parameters(), theirs.parameters(), gradients, strict=True):
            mine.grad, other.grad = gradient * (step + 1), gradient.clone()
        optimizer.step(1e-2, divisor=torch.tensor(step + 1.0), skip=torch.tensor(0.0))
        reference.step()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_small_buckets_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for elements in (1, 10**6):
        monkeypatch.setattr("dit_moe.training.optimizer._BUCKET_ELEMENTS", elements)
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).bfloat16()
        optimizer = AdamW(dict(model.named_parameters()))
        model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
        optimizer.step(0.1)
        results.append(torch.cat([param.detach().flatten() for param in model.parameters()]))
    assert torch.equal(*results)


def test_refuses_other_dtypes() -> None:
    with pytest.raises(TypeError, match="weight: got dtype torch.float16, expected float32 or bfloat16"):
        AdamW(dict(nn.Linear(2, 2).half().named_parameters()))
