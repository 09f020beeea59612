"""The balance loss against its definition."""

import pytest
import torch

from dit_moe.losses import balance_loss


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_matches_the_definition_term_by_term(top_k: int) -> None:
    tokens, num_experts, alpha = 13, 4, 0.03
    probs = torch.rand(tokens, num_experts, dtype=torch.float64).softmax(1)
    chosen = probs.topk(top_k).indices
    counts = torch.tensor([int((chosen == expert).sum()) for expert in range(num_experts)], dtype=torch.int32)
    expected = 0.0
    for expert in range(num_experts):
        fraction = num_experts * counts[expert].item() / (tokens * top_k)
        expected += alpha * fraction * sum(row[expert] for row in probs.tolist()) / tokens
    assert balance_loss(probs, counts, top_k, alpha).item() == pytest.approx(expected, rel=1e-13)


def test_is_alpha_when_the_load_is_even_and_rises_when_it_is_not() -> None:
    even = balance_loss(torch.full((8, 4), 0.25), torch.full((4,), 4), top_k=2, alpha=0.01)
    assert even.item() == pytest.approx(0.01)
    probs = torch.tensor([0.7, 0.2, 0.05, 0.05]).expand(8, 4)
    assert balance_loss(probs, torch.tensor([8, 8, 0, 0]), top_k=2, alpha=0.01).item() == pytest.approx(0.018)


def test_gradient_goes_through_the_probabilities_alone() -> None:
    probs = torch.rand(6, 3, requires_grad=True)
    counts = torch.tensor([5, 1, 0], dtype=torch.int32)
    balance_loss(probs, counts, top_k=1, alpha=0.1).backward()
    expected = 0.1 * 3 / (6 * 6) * counts.float().expand(6, 3)
    torch.testing.assert_close(probs.grad, expected)


def test_is_zero_without_tokens() -> None:
    loss = balance_loss(torch.zeros(0, 4), torch.zeros(4, dtype=torch.int32), top_k=2, alpha=0.01)
    assert loss.dtype == torch.float32 and loss.item() == 0
