"""Inputs of a routed layer with a chosen load, and the check of a provider's results against a reference.

The load is steered through the router itself, so that every provider runs its own: feature 0 of every token is 1, and
the gate's weight for it is a bias. "balanced" has none, so random tokens choose uniformly; "skewed" draws every token
to expert 0, which thus gets 1/K of all rows (half for top-2); "one" draws every token to the first K experts and leaves
the others empty, the worst that a top-K router can do. The gap between a token's last chosen and first rejected expert
is at least MARGIN, so that a provider that computes its logits in bf16 still chooses the same experts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .cases import LayerShape

MARGIN = 0.03
_GATE_SCALE = 0.5  # spread of the random logits, about that of an untrained gate on normalised tokens
_PULL = 3.0  # bias of a favoured expert: six times the spread, yet the other choices keep a few percent of the weight


@dataclass(frozen=True)
class MoEProblem:
    """One layer's inputs; leaves require grad.

    Args:
        shape: widths.
        routing: "balanced", "skewed" or "one".
        x: (T, D), tokens.
        gate: (E, D), router weight.
        w13: (E, 2F, D), gate and up projections.
        w2: (E, D, F), down projections.
        dout: (T, D), gradient of the output.
    """

    shape: LayerShape
    routing: str
    x: Tensor
    gate: Tensor
    w13: Tensor
    w2: Tensor
    dout: Tensor

    @property
    def tokens(self) -> int:
        """T."""
        return self.x.shape[0]

    @property
    def rows(self) -> int:
        """N = T * K."""
        return self.tokens * self.shape.top_k


def make_problem(
    shape: LayerShape,
    tokens: int,
    routing: str,
    dtype: torch.dtype,
    device: str,
    seed: int = 0,
    with_margin: bool = True,
) -> MoEProblem:
    """Random inputs at the scale of a trained layer: unit tokens, pre-activations and gradients near unit variance.

    Args:
        shape, tokens, routing, dtype, device, seed: what to draw.
        with_margin: draw tokens whose choice is not clear again; needless where nobody compares results.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        values = torch.empty(size, device=device, dtype=dtype)
        return values.normal_(generator=generator).mul_(scale)

    width, hidden, experts = shape.hidden_size, shape.expert_hidden_size, shape.num_experts
    gate = normal(experts, width, scale=_GATE_SCALE * width**-0.5)
    gate[:, 0] = _bias(shape, routing).to(gate)
    draw = partial(normal, tokens, width)
    return MoEProblem(
        shape,
        routing,
        (_tokens_with_margin(draw, gate, shape.top_k) if with_margin else draw()).requires_grad_(),
        gate.requires_grad_(),
        normal(experts, 2 * hidden, width, scale=width**-0.5).requires_grad_(),
        normal(experts, width, hidden, scale=hidden**-0.5).requires_grad_(),
        normal(tokens, width),
    )


def make_topk_ids(shape: LayerShape, tokens: int, routing: str, device: str, seed: int = 0) -> Tensor:
    """(T, K) int32 expert ids for the suites that need no router; here "one" truly sends every row to expert 0."""
    generator = torch.Generator(device).manual_seed(seed)
    scores = torch.rand(tokens, shape.num_experts, generator=generator, device=device)
    if routing == "skewed":
        scores[:, 0] = 2.0
    ids = scores.topk(shape.top_k, dim=1).indices.int()
    return torch.zeros_like(ids) if routing == "one" else ids


def _bias(shape: LayerShape, routing: str) -> Tensor:
    favoured = {"balanced": 0, "skewed": 1, "one": shape.top_k}[routing]
    bias = torch.zeros(shape.num_experts)
    bias[:favoured] = _PULL
    return bias


def _tokens_with_margin(draw: Callable[[], Tensor], gate: Tensor, top_k: int) -> Tensor:
    """Draw tokens until each one's choice of experts is clear by MARGIN."""
    x = draw()
    x[:, 0] = 1
    for _ in range(20):
        close = _margin(x, gate, top_k) < MARGIN
        if not close.any():
            break
        fresh = draw()
        fresh[:, 0] = 1
        x = torch.where(close[:, None], fresh, x)
    return x


def _margin(x: Tensor, gate: Tensor, top_k: int) -> Tensor:
    logits = F.linear(x.float(), gate.float())
    if top_k >= logits.shape[1]:
        return torch.full_like(logits[:, 0], torch.inf)
    best = logits.topk(top_k + 1, dim=1).values
    return best[:, -2] - best[:, -1]


def plain_layer(x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor, top_k: int) -> Tensor:
    """The routed layer in plain PyTorch, one expert after the other, every product in the dtype of its inputs.

    That holds for the router too, as in the official code and in some peers; only the softmax is wider.
    """
    probs = F.linear(x, gate).to(torch.promote_types(x.dtype, torch.float32)).softmax(dim=-1)
    weights, ids = probs.topk(top_k, dim=-1)
    out = torch.zeros_like(x)
    for expert in range(gate.shape[0]):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        gate_half, up_half = F.linear(x[token], w13[expert]).chunk(2, dim=-1)
        y = F.linear(F.silu(gate_half) * up_half, w2[expert])
        out = out.index_add(0, token, y * weights[token, choice, None].to(y.dtype))
    return out


class Expected:
    """The right results and how far off each may be: twice the error of plain PyTorch in the dtype under test.

    Args:
        wanted: results of plain PyTorch in a wider dtype, by name: "out" and the names of gradients.
        plain: the same in the dtype under test.
    """

    def __init__(self, wanted: Mapping[str, Tensor], plain: Mapping[str, Tensor]) -> None:
        self._wanted = wanted
        self._allowed = {
            name: 2 * _error(plain[name], value) + 1e-5 * value.abs().max().item() for name, value in wanted.items()
        }

    def complaint(self, results: dict[str, Tensor]) -> str | None:
        """None if every result is right, else what is wrong with the first that is not.

        Args:
            results: "out", and with gradients also "x", "gate", "w13" and "w2".
        """
        return self._first_wrong(results, list(self._wanted))

    def output_complaint(self, out: Tensor) -> str | None:
        """The same for the output alone, before a backward is tried."""
        return self._first_wrong({"out": out}, ["out"])

    def _first_wrong(self, results: dict[str, Tensor], names: Sequence[str]) -> str | None:
        for name in names:
            wanted = self._wanted[name]
            got = results[name]
            if got.shape != wanted.shape:
                return f"{name}: got shape {tuple(got.shape)}, expected {tuple(wanted.shape)}"
            error, allowed = _error(got, wanted), self._allowed[name]
            if not error <= allowed:  # also catches NaN
                scale = wanted.abs().max().item()
                return f"{_label(name)}: error {error:.3g}, allowed {allowed:.3g} (largest value {scale:.3g})"
        return None


def _label(name: str) -> str:
    return "output" if name == "out" else f"gradient of {name}"


def _error(got: Tensor, wanted: Tensor) -> float:
    """Largest absolute error; in parts, because a widened copy of a large weight gradient need not fit twice."""
    if not got.numel():
        return 0.0
    parts = zip(got.detach().flatten(0, -2).split(8192), wanted.flatten(0, -2).split(8192), strict=True)
    return torch.stack([(a.to(b.dtype) - b).abs().max() for a, b in parts]).max().item()


def expected_layer(problem: MoEProblem, mode: str) -> Expected:
    """What a provider of the routed layer must return: "out", and for fwd_bwd also "x", "gate", "w13" and "w2"."""
    leaves = (problem.x, problem.gate, problem.w13, problem.w2)

    def results(x: Tensor, gate: Tensor, w13: Tensor, w2: Tensor) -> dict[str, Tensor]:
        out = plain_layer(x, gate, w13, w2, problem.shape.top_k)
        return with_gradients(out, {"x": x, "gate": gate, "w13": w13, "w2": w2}, problem.dout, mode)

    return expected_from(results, leaves, mode)


def expected_from(results: Callable[..., dict[str, Tensor]], leaves: Sequence[Tensor], mode: str) -> Expected:
    """Evaluate plain PyTorch twice: in fp32 (fp64 for fp32 leaves) and in the leaves' own dtype.

    Args:
        results: leaves -> named results.
        leaves: inputs.
        mode: "fwd" or "fwd_bwd"; only the latter needs gradients.
    """
    wide = torch.float64 if leaves[0].dtype == torch.float32 else torch.float32
    with torch.set_grad_enabled(mode == "fwd_bwd"):
        wanted = results(*(leaf.detach().to(wide).requires_grad_(mode == "fwd_bwd") for leaf in leaves))
        plain = results(*(leaf.detach().requires_grad_(mode == "fwd_bwd") for leaf in leaves))
    return Expected(wanted, plain)


def with_gradients(out: Tensor, leaves: Mapping[str, Tensor], dout: Tensor, mode: str) -> dict[str, Tensor]:
    """{"out": out} and, for fwd_bwd, the gradients of the leaves under their names."""
    if mode == "fwd":
        return {"out": out}
    grads = torch.autograd.grad(out, tuple(leaves.values()), dout.to(out.dtype))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}
