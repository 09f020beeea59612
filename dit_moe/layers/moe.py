"""MoEFeedForward: the mixture-of-experts layer, ready to stand in any transformer block."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from dit_moe_kernels import RoutedRows, routed_ffn, routed_rows, takes_rows
from torch import Tensor, nn

from ..config import SHARED_EXPERTS
from ..losses import balance_loss, global_balance_loss
from .experts import GroupedExperts
from .mlp import Mlp, SwiGLU
from .router import TopKRouter


class MoEOutput(NamedTuple):
    """What `MoEFeedForward` returns.

    hidden: (..., D), the layer's output.
    tokens_per_expert: (E,) int32, how many of the T * K choices fell on each expert; over all ranks of a `count_group`.
    probs: (T, E) fp32 (fp64 for fp64 inputs), the router's probabilities of all experts.
    top_k, balance_alpha, ranks: what `balance_loss` needs beside them; ranks is None without a `count_group`.
    balance: the balance loss without its factor, where the router has computed it on the way, else None.
    """

    hidden: Tensor
    tokens_per_expert: Tensor
    probs: Tensor
    top_k: int
    balance_alpha: float
    ranks: int | None = None
    balance: Tensor | None = None

    @property
    def balance_loss(self) -> Tensor:
        """The balance loss () in probs' dtype over the tokens of this call, to be added to the training loss.

        With a `count_group`, this rank's share of the loss over the tokens of all its ranks: their mean is that loss.
        Where no gradient is recorded it is computed when asked for, so that sampling does not pay for it.
        """
        if self.balance is not None and self.ranks is None:
            return self.balance_alpha * self.balance
        routing = self.probs, self.tokens_per_expert, self.top_k, self.balance_alpha
        return balance_loss(*routing) if self.ranks is None else global_balance_loss(*routing, self.ranks)


class MoEFeedForward(nn.Module):
    """Dropless mixture of SwiGLU experts with a shared expert: the feed-forward layer of DiT-MoE.

    hidden = sum_k topk_weights[k] * expert[topk_ids[k]](x) + shared_expert(x), where the weights are the top_k largest
    of the softmax over all experts, not renormalised (arXiv 2407.11633, section 2). No token is dropped whatever the
    load, and nothing waits for the GPU.

    The balance loss is returned, never injected into the backward pass, so it survives loss scaling and gradient
    accumulation like any other term:

        out = moe(x)
        loss = task_loss(x + out.hidden) + out.balance_loss

    Args:
        hidden_size: D, width of a token.
        expert_hidden_size: F, hidden width of one routed expert (4 * D in the paper's models).
        num_experts: E, routed experts.
        top_k: K, routed experts that each token visits.
        num_shared_experts: the shared expert is one SwiGLU of width num_shared_experts * D; 0 means none.
        shared_expert: "swiglu", or "gelu": the shared expert is the dense DiT's MLP instead, fc2(gelu(fc1(x))) with
            biases, of width F whatever num_shared_experts says; `dit_moe.upcycle` keeps a dense model's MLP in it.
        shared_hidden_size: another width of the shared expert; 0 means none.
        balance_alpha: factor of the balance loss; the paper says 0.005, the official code ships 0.01.
        backend: "auto", "triton", "cuda" or "reference", see `dit_moe_kernels.use_backend`.
        device, dtype: of the weights.

    Raises:
        ValueError: a size is out of range.
    """

    def __init__(
        self,
        hidden_size: int,
        expert_hidden_size: int,
        num_experts: int,
        top_k: int = 2,
        num_shared_experts: int = 2,
        *,
        shared_expert: str = "swiglu",
        shared_hidden_size: int | None = None,
        balance_alpha: float = 0.01,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if shared_expert not in SHARED_EXPERTS:
            raise ValueError(f"shared_expert: got {shared_expert!r}, expected one of {SHARED_EXPERTS}")
        if shared_hidden_size is None:
            shared_hidden_size = expert_hidden_size if shared_expert == "gelu" else num_shared_experts * hidden_size
        for name, width in (("hidden_size", hidden_size), ("expert_hidden_size", expert_hidden_size)):
            if width < 1:
                raise ValueError(f"{name}: got {width}, expected at least 1")
        for name, value in (("shared expert's width", shared_hidden_size), ("balance_alpha", balance_alpha)):
            if value < 0:
                raise ValueError(f"{name}: got {value}, expected 0 or more")
        options: dict[str, Any] = {"backend": backend, "device": device, "dtype": dtype}
        self.hidden_size, self.balance_alpha = hidden_size, balance_alpha
        self.count_group: dist.ProcessGroup | None = None
        """Ranks over whose tokens the balance loss is taken; None: this rank's own. `dit_moe.parallel` sets it."""
        self.gate = TopKRouter(hidden_size, num_experts, top_k, **options)
        self.experts = GroupedExperts(hidden_size, expert_hidden_size, num_experts, **options)
        self.shared_experts: SwiGLU | Mlp | None = None
        if shared_hidden_size and shared_expert == "gelu":
            self.shared_experts = Mlp(hidden_size, shared_hidden_size, device=device, dtype=dtype)
        elif shared_hidden_size:
            self.shared_experts = SwiGLU(hidden_size, shared_hidden_size, **options)

    def forward(self, x: Tensor, router_x: Tensor | None = None) -> MoEOutput:
        """Apply the layer to every token.

        Args:
            x: (..., D) float, tokens; zero tokens are fine.
            router_x: (..., D) float, what the router sees instead of x, for instance features before modulation.

        Returns:
            MoEOutput; hidden has x's shape, and x's dtype or autocast's.

        Raises:
            TypeError, ValueError: wrong dtype, width or shape, or tensors on different devices.
        """
        x_TD = self._tokens("x", x)
        if router_x is None and self._plain():
            gate, experts = self.gate, self.experts
            addend_TD = None if self.shared_experts is None else self.shared_experts(x_TD)
            routed = routed_ffn(
                x_TD,
                gate.weight,
                experts.w13,
                experts.w2,
                gate.top_k,
                addend=addend_TD,
                balance_alpha=1.0 if torch.is_grad_enabled() else None,
                backend=gate.backend,
            )
            return MoEOutput(
                routed.out.view(x.shape),
                routed.tokens_per_expert,
                routed.probs,
                gate.top_k,
                self.balance_alpha,
                balance=routed.balance_loss,
            )
        router_x_TD = x_TD if router_x is None else self._tokens("router_x", router_x, like=x)
        routing = self.gate(router_x_TD)
        counts = _Counts(routing.plan.tokens_per_expert, self.count_group)
        beside = None if self.shared_experts is None else partial(self.shared_experts, x_TD)
        hidden_TD = self.experts(x_TD, routing.topk_weights, routing.plan, beside)
        tokens_per_expert_E = counts.total()
        ranks = None if self.count_group is None else self.count_group.size()
        return MoEOutput(
            hidden_TD.view(x.shape),
            tokens_per_expert_E,
            routing.probs,
            self.gate.top_k,
            self.balance_alpha,
            ranks,
            routing.balance_loss,
        )

    def uncombined(self, x: Tensor) -> tuple[RoutedRows, MoEOutput] | None:
        """The layer without its combine, where the norm behind it does that faster and nothing asks for `forward`.

        Args:
            x: (..., D), as in `forward`.

        Returns:
            Rows of the tokens in x's order, and an output whose hidden has no rows; or None, and the layer is to be
            called: it has hooks, a subclass or another `forward`, or this would not be faster.
        """
        replaced = type(self) is not MoEFeedForward or getattr(self.forward, "__func__", None) is not type(self).forward
        if torch.is_grad_enabled() or replaced or _watched(self) or not self._plain():
            return None
        x_TD, gate, experts = self._tokens("x", x), self.gate, self.experts
        if not takes_rows(x_TD, gate.weight, experts.w2, gate.backend):
            return None
        addend_TD = None if self.shared_experts is None else self.shared_experts(x_TD)
        weights = gate.weight, experts.w13, experts.w2
        rows, probs_TE, counts_E = routed_rows(x_TD, *weights, gate.top_k, addend=addend_TD, backend=gate.backend)
        return rows, MoEOutput(rows.rows[:0], counts_E, probs_TE, gate.top_k, self.balance_alpha)

    def _plain(self) -> bool:
        """Whether one op may do all: nobody watches or has replaced the router or the experts."""
        gate, experts = self.gate, self.experts
        return (
            self.count_group is None
            and type(gate) is TopKRouter
            and type(experts) is GroupedExperts
            and gate.observer is None
            and gate.backend == experts.backend
            and not any(_watched(module) for module in (gate, experts))
        )

    def _tokens(self, name: str, x: Tensor, like: Tensor | None = None) -> Tensor:
        """Check an input and flatten it to (T, D)."""
        if not x.is_floating_point():
            raise TypeError(f"{name}: got dtype {x.dtype}, expected a floating-point dtype")
        if x.ndim == 0 or x.shape[-1] != self.hidden_size:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected (..., {self.hidden_size})")
        if like is not None and x.shape != like.shape:
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {tuple(like.shape)} as x has")
        return x.reshape(-1, self.hidden_size)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, balance_alpha={self.balance_alpha}"


def _watched(module: nn.Module) -> bool:
    """Whether the module has hooks, which ask for a call of its own."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


class _Counts:
    """tokens_per_expert summed over a group's ranks, on its way while the experts run; without a group, as it is."""

    def __init__(self, tokens_per_expert_E: Tensor, group: dist.ProcessGroup | None) -> None:
        self._counts, self._work = tokens_per_expert_E, None
        if group is not None:
            self._counts = tokens_per_expert_E.clone()
            self._work = dist.all_reduce(self._counts, group=group, async_op=True)

    def total(self) -> Tensor:
        """(E,) int32; on a GPU the stream waits for it, not the host."""
        if self._work is not None:
            self._work.wait()
        return self._counts
