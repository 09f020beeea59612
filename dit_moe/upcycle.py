"""upcycle: start a DiT-MoE from a dense DiT or from a DiT-MoE with fewer experts (arXiv 2212.05055).

Notation: the source has E experts of which a token takes K, the target E' = m * E and K'. Routing weights are not
renormalised, so with every router row present m times, each copy of expert e gets p_e / m, where p_e is the source's
probability. Copies of one expert tie, hence the K' chosen rows are the copies of the best expert first, then those of
the second, and so on. The target's sum equals the source's in two cases:

    K' = m * K         all copies of the same K experts: sum of m * (p_e / m) = p_e
    K = 1, K' <= m     K' copies of the one expert: K' * (p_e / m), so w2 is multiplied by m / K'

Both are the factor s = (E' * K) / (E * K'), which without equality still keeps the routed output's size under an even
router. With one expert (p = 1) the router row does not matter and is set to zero.

Copies that are always chosen together with equal weights also get equal gradients: without noise they never part. Noise
on w2 that sums to zero over such a set leaves the sum as it is, so equality and noise go together. The sets are all
copies of an expert if K' = m * K; and, from one expert, each K' in the order of ids, in which `topk_softmax` breaks
the exact ties of a zero router.

A dense DiT's GELU MLP is no SwiGLU expert, so there equality keeps the MLP itself as the shared expert, which joins
after routing, beside routed experts with w2 = 0 that add nothing yet. Their w13 is drawn at random, another for each:
w2 gets gradients from the first step on, other ones for each expert, whatever the router, K' and E'.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from .config import DiTConfig
from .model import DiT

# gelu(z) as c * z * silu(1.702 z): the slope is that of the sigmoid form of GELU (Hendrycks & Gimpel 2016), the factor
# the least-squares one for z ~ N(0, 1), where the error is 0.40 of gelu(z) in root mean square.
GELU_SLOPE, GELU_FACTOR = 1.702, 0.2984
DEFAULT_ROUTER_STD = 0.02


def upcycle(
    model: DiT,
    num_experts: int,
    *,
    top_k: int | None = None,
    num_shared_experts: int | None = None,
    exact: bool = False,
    noise_std: float = 0.0,
    router_init_std: float | None = None,
    rescale: bool = True,
    seed: int = 0,
) -> DiT:
    """A DiT-MoE with `num_experts` experts per block that starts from another model's weights.

    Expert j is a copy of the source's expert j mod E; everything outside the routed layers is copied as it is. A dense
    DiT's GELU MLP, which no SwiGLU expert can equal, offers a choice. With `exact` it becomes the shared expert
    (`DiTConfig.shared_expert` "gelu", which the official layout does not know), and fresh routed experts with w2 = 0
    add nothing yet. Without, each expert gets gate 1.702 * fc1, up fc1 and down 0.2984 * fc2 and no biases: a rough
    start, not the same function.

    Args:
        model: the source, left as it is.
        num_experts: E', at least the source's.
        top_k: K'; None means the source's, at least 2; with `exact`, the smallest fitting number above 1.
        num_shared_experts: width of the shared expert in units of hidden_size; None means the source's. One that the
            source has not starts with a zero w2 and so adds nothing at first; an existing one keeps its width.
        exact: make the result equal the source at step 0 up to rounding, or raise. From an MoE this means E' = m * E,
            and K' = m * K, or K' <= m if K = 1, and a router without noise. From a dense DiT all E', K' and routers
            fit; num_shared_experts and noise_std have no use then and are refused.
        noise_std: Gaussian noise on every copy of an expert but the first, relative to the standard deviation of
            its weights. With `exact` it is on w2 alone and cancels in every sum; without it, copies that are always
            chosen together stay equal for ever, so give some (such as 0.1) to a model that is to be trained.
        router_init_std: Gaussian noise on the router's rows, which are copies of the source's, or zero if that had
            one expert or none; None means 0.02 as in the official recipe, and 0 with `exact` from an MoE.
        rescale: multiply w2 by (E' * K) / (E * K'), as weights of more experts are smaller. The official recipe does
            not.
        seed: of all noise, drawn on the CPU: the same on every device.

    Returns:
        DiT on the source's device, in its dtypes and its training or eval mode.

    Raises:
        ValueError: an option is out of range, or `exact` is impossible; the message says why.
    """
    source = model.config
    keep_mlp = exact and not source.is_moe
    if keep_mlp and (noise_std or num_shared_experts is not None):
        raise ValueError(
            f"exact: from a dense DiT, whose MLP is the shared expert beside fresh routed ones, expected noise_std 0 "
            f"and num_shared_experts None, got {noise_std} and {num_shared_experts}"
        )
    num_shared_experts = source.num_shared_experts if num_shared_experts is None else num_shared_experts
    if source.shared_hidden_size and source.num_shared_experts != num_shared_experts:
        raise ValueError(
            f"num_shared_experts: got {num_shared_experts}, expected {source.num_shared_experts} as the source has"
        )
    if num_experts < max(1, source.num_experts):
        raise ValueError(f"num_experts: got {num_experts}, expected at least {max(1, source.num_experts)}")
    for name, std in (("noise_std", noise_std), ("router_init_std", router_init_std or 0.0)):
        if not 0 <= std < math.inf:
            raise ValueError(f"{name}: got {std}, expected 0 or more")
    if exact and source.is_moe:
        _check_exact(source, num_experts, router_init_std, rescale)
        top_k = _exact_top_k(source, num_experts, top_k)
        if noise_std and source.num_experts > 1 and top_k < num_experts // source.num_experts:
            raise ValueError(
                f"exact: got noise_std {noise_std} with {top_k} of {num_experts // source.num_experts} copies visited, "
                f"whose noise need not cancel: expected noise_std 0 or top_k {num_experts // source.num_experts}"
            )
        router_init_std = 0.0
    elif top_k is None:
        top_k = min(num_experts, max(2, source.top_k))
    target_config = replace(source, num_experts=num_experts, top_k=top_k, num_shared_experts=num_shared_experts)
    if not source.is_moe:
        target_config = replace(target_config, shared_expert="gelu" if keep_mlp else "swiglu")
    scale = num_experts * _visited(source) / (_experts(source) * top_k) if rescale else 1.0
    router_std = DEFAULT_ROUTER_STD if router_init_std is None else router_init_std
    cancelling = top_k if exact else None
    maker = _Weights(model, scale, noise_std, router_std, cancelling, keep_mlp, seed)
    with torch.device("meta"):
        target = DiT(target_config)
    target.load_state_dict({name: maker.make(name, p.shape) for name, p in target.state_dict().items()}, assign=True)
    return target.train(model.training)


def _experts(config: DiTConfig) -> int:
    """E, where a dense MLP counts as one expert."""
    return max(1, config.num_experts)


def _visited(config: DiTConfig) -> int:
    """K, where a dense MLP counts as one expert."""
    return config.top_k if config.is_moe else 1


def _check_exact(source: DiTConfig, num_experts: int, router_init_std: float | None, rescale: bool) -> None:
    if router_init_std or not rescale:
        raise ValueError(f"exact: expected router_init_std 0 or None, and rescale, got {router_init_std} and {rescale}")
    if num_experts % source.num_experts:
        raise ValueError(f"exact: got num_experts {num_experts}, expected a multiple of {source.num_experts}")


def _exact_top_k(source: DiTConfig, num_experts: int, top_k: int | None) -> int:
    """The chosen K' if it allows equality, or the default one; see the top of this file."""
    copies = num_experts // source.num_experts
    if source.top_k == 1:
        allowed = range(1, copies + 1)
        chosen = min(2, copies) if top_k is None else top_k
    else:
        allowed = range(copies * source.top_k, copies * source.top_k + 1)
        chosen = allowed[0] if top_k is None else top_k
    if chosen not in allowed:
        raise ValueError(
            f"exact: got top_k {chosen}, expected {allowed[0]}{f' to {allowed[-1]}' if len(allowed) > 1 else ''} for "
            f"{copies} copies of each expert and a source with top_k {source.top_k}"
        )
    return chosen


class _Weights:
    """Makes the target's tensors from the source's, with noise from one generator in the order of the calls."""

    def __init__(
        self,
        model: DiT,
        scale: float,
        noise_std: float,
        router_std: float,
        cancelling: int | None,
        keep_mlp: bool,
        seed: int,
    ) -> None:
        self.source, self.config = model.state_dict(), model.config
        self.scale, self.noise_std, self.router_std = scale, noise_std, router_std
        self.cancelling = cancelling  # K' if the noise has to cancel
        self.keep_mlp = keep_mlp  # as the shared expert, so that the routed ones are fresh
        self.generator = torch.Generator().manual_seed(seed)

    def make(self, name: str, shape: torch.Size) -> Tensor:
        """The target's tensor `name`, never sharing memory with the source."""
        block, _, leaf = name.partition(".moe.")
        if leaf == "gate.weight":
            return self._router(block, shape)
        if self.keep_mlp and leaf.startswith("shared_experts."):
            return self.source[name.replace(".moe.shared_experts.", ".mlp.")].clone()
        if self.keep_mlp and leaf.startswith("experts."):
            return self._silent(block, leaf, shape)
        if leaf == "experts.w13":
            copies = _tiled(self._source_w13(block), shape[0])
            return self._noisy(copies) if self.cancelling is None else copies
        if leaf == "experts.w2":
            copies = _tiled(self._source_w2(block) * self.scale, shape[0])
            return self._noisy(copies)
        if name in self.source:
            return self.source[name].clone()
        return self._silent(block, leaf, shape)

    def _source_w13(self, block: str) -> Tensor:
        if self.config.is_moe:
            return self.source[f"{block}.moe.experts.w13"]
        fc1 = self.source[f"{block}.mlp.fc1.weight"]
        return torch.cat([GELU_SLOPE * fc1, fc1])[None]

    def _source_w2(self, block: str) -> Tensor:
        if self.config.is_moe:
            return self.source[f"{block}.moe.experts.w2"]
        return GELU_FACTOR * self.source[f"{block}.mlp.fc2.weight"][None]

    def _router(self, block: str, shape: torch.Size) -> Tensor:
        rows = self._source_w2(block).new_zeros(shape)
        if self.config.num_experts > 1:
            rows = _tiled(self.source[f"{block}.moe.gate.weight"], shape[0])
        if self.router_std:
            rows += self.router_std * self._normal(rows)
        return rows

    def _noisy(self, copies: Tensor) -> Tensor:
        """Add noise in place: to every copy but the first, or cancelling within each set."""
        if not self.noise_std:
            return copies
        if self.cancelling is None:
            for j in range(_experts(self.config), copies.shape[0]):
                copies[j] += self._noise(copies[j])
            return copies
        for chosen_together in self._sets(copies.shape[0], self.cancelling):
            noise = torch.stack([self._noise(copies[j]) for j in chosen_together])
            copies[chosen_together] += (noise - noise.mean(0)).to(copies.dtype)
        return copies

    def _sets(self, num_experts: int, top_k: int) -> list[list[int]]:
        """The copies that are always chosen together; see the top of this file."""
        if self.config.num_experts == 1:
            ids = list(range(num_experts))
            return [ids[first : first + top_k] for first in ids[::top_k]]
        return [list(range(expert, num_experts, self.config.num_experts)) for expert in range(self.config.num_experts)]

    def _noise(self, weight: Tensor) -> Tensor:
        """Noise for one expert's weight, in fp32 or the weight's wider dtype."""
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return self.noise_std * wide.std() * self._normal(wide)

    def _normal(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self.generator).to(like.device, like.dtype)

    def _silent(self, block: str, leaf: str, shape: torch.Size) -> Tensor:
        """New experts, shared or routed, that add nothing yet but learn: Xavier uniform w13 and zero w2."""
        weight = self._source_w2(block).new_zeros(shape)
        if leaf.endswith(".w13"):
            bound = math.sqrt(6 / (shape[-2] // 2 + shape[-1]))
            weight += torch.rand(shape, generator=self.generator).mul_(2 * bound).sub_(bound).to(weight)
        return weight


def _tiled(rows: Tensor, count: int) -> Tensor:
    """A new tensor whose row j is row j mod len(rows)."""
    return rows[torch.arange(count, device=rows.device) % rows.shape[0]]
