"""Losses on the routing, as pure functions."""

from __future__ import annotations

from torch import Tensor


def balance_loss(probs: Tensor, tokens_per_expert: Tensor, top_k: int, alpha: float) -> Tensor:
    """Balance loss of one layer over its batch: alpha * E / (T * K) * sum_i count_i * mean_t p_i(t).

    It equals alpha when the experts are evenly loaded and grows as the router prefers some. Only the probabilities
    carry a gradient: the counts are whole numbers (arXiv 2407.11633, section 2; Switch Transformer, equation 4).

    Args:
        probs: (T, E) fp32 or fp64, softmax of the router over all experts.
        tokens_per_expert: (E,) int, how many of the T * K choices fell on each expert.
        top_k: K, experts per token.
        alpha: factor of the loss.

    Returns:
        () in probs' dtype; 0 where T = 0.
    """
    tokens, num_experts = probs.shape
    scale = alpha * num_experts / (max(tokens, 1) ** 2 * top_k)
    return scale * (tokens_per_expert.to(probs.dtype) * probs.sum(0)).sum()


def global_balance_loss(probs: Tensor, tokens_per_expert: Tensor, top_k: int, alpha: float, num_ranks: int) -> Tensor:
    """One rank's share of `balance_loss` over the tokens of all ranks: the mean of the shares is that loss.

    So is the mean of the ranks' gradients its gradient, which is how data parallelism averages the rest of the loss
    too; hence only the counts have to be summed over the ranks, and nothing travels in the backward pass.

    Args:
        probs: (T, E) fp32 or fp64, of this rank's tokens.
        tokens_per_expert: (E,) int, summed over the ranks.
        top_k: K, experts per token.
        alpha: factor of the loss.
        num_ranks: ranks that were summed over.

    Returns:
        () in probs' dtype; 0 where no rank has a token.
    """
    counts = tokens_per_expert.to(probs.dtype)
    rows = counts.sum().clamp(min=1)  # T * K over all ranks, known to the device alone
    return (alpha * probs.shape[1] * top_k * num_ranks) * ((counts / rows) * (probs.sum(0) / rows)).sum()
