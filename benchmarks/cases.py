"""The shapes that are measured: the layers of the paper's models, and small ones for a machine without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from dit_moe import model_config

MODES = ("fwd", "fwd_bwd")
ROUTINGS = ("balanced", "skewed", "one")
TIMERS = ("eager", "graph")
CASES = ("S/2-8E2A", "B/2-8E2A", "L/2-8E2A", "XL/2-8E2A", "G/2-16E2A")
TINY_CASE = "tiny"


@dataclass(frozen=True)
class LayerShape:
    """Widths of one routed layer.

    Args:
        hidden_size: D, width of a token.
        expert_hidden_size: F, hidden width of one expert.
        num_experts: E.
        top_k: K, experts per token.
    """

    hidden_size: int
    expert_hidden_size: int
    num_experts: int
    top_k: int

    @property
    def weights_per_expert(self) -> int:
        """Elements of one expert's w13 and w2."""
        return 3 * self.hidden_size * self.expert_hidden_size


def layer_shape(case: str) -> LayerShape:
    """The routed layer of a model of the paper ("XL/2-8E2A"), or the tiny one.

    Raises:
        ValueError: the name is no preset of dit_moe.
    """
    if case == TINY_CASE:
        return LayerShape(hidden_size=32, expert_hidden_size=64, num_experts=4, top_k=2)
    config = model_config(f"DiT-MoE-{case}")
    return LayerShape(config.hidden_size, config.ffn_hidden_size, config.num_experts, config.top_k)


def expert_flops(shape: LayerShape, tokens: int, mode: str) -> int:
    """Operations of the routed experts, two for a multiply-add: 6*T*K*D*F forward, three times that with backward."""
    forward = 2 * tokens * shape.top_k * shape.weights_per_expert
    return forward if mode == "fwd" else 3 * forward
