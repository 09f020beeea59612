"""DiT: the diffusion transformer, with a mixture of experts in every block or dense."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import DiTConfig
from .layers import (
    Attention,
    LabelEmbedder,
    Mlp,
    Modulation,
    MoEFeedForward,
    MoEOutput,
    PatchEmbed,
    Residual,
    TimestepEmbedder,
    modulated_norm,
    sincos_pos_embed,
)
from .layers.init import reset_all_parameters, zero_


class MoEAux(NamedTuple):
    """What the routed layers report beside the model's output.

    balance_loss: () fp32 (fp64 for fp64 models), sum over the layers; 0 for a dense model.
    tokens_per_expert: (L, E) int32, how the choices of each layer fell on its experts; (0, 0) for a dense model.
    """

    balance_loss: Tensor
    tokens_per_expert: Tensor


class DiTBlock(nn.Module):
    """Attention and a feed-forward layer, each modulated and gated by the condition (adaLN-Zero, DiT section 3.2).

    The feed-forward layer is `moe` where the configuration has experts, `mlp` where it has none; nothing else differs.

    Args:
        config: the model's configuration.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.attn = Attention(config.hidden_size, config.num_heads, config.qk_norm)
        if config.is_moe:
            self.moe = MoEFeedForward(
                config.hidden_size,
                config.ffn_hidden_size,
                config.num_experts,
                config.top_k,
                config.num_shared_experts,
                shared_expert=config.shared_expert,
                balance_alpha=config.balance_alpha,
            )
        else:
            self.mlp = Mlp(config.hidden_size, config.ffn_hidden_size)
        self.is_moe = config.is_moe
        self.adaLN_modulation = Modulation(config.hidden_size, 6)

    def forward(self, tokens: Tensor | Residual, modulation: Sequence[Tensor]) -> tuple[Residual, MoEOutput | None]:
        """Transform tokens under the six vectors (B, D) of `adaLN_modulation`.

        Args:
            tokens: (B, N, D) float, or what the block before returned.
            modulation: shift, scale and gate of the attention, then those of the feed-forward layer.

        Returns:
            The tokens, their last branch still to be added, and the routed layer's output or None.
        """
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        x_BND, normed_BND = modulated_norm(tokens, shift_msa, scale_msa)
        tokens = Residual(x_BND, gate_msa, self.attn(normed_BND))
        x_BND, normed_BND = modulated_norm(tokens, shift_mlp, scale_mlp)
        if not self.is_moe:
            return Residual(x_BND, gate_mlp, self.mlp(normed_BND)), None
        if isinstance(self.moe, MoEFeedForward) and (uncombined := self.moe.uncombined(normed_BND)) is not None:
            rows, routed = uncombined
            return Residual(x_BND, gate_mlp, rows), routed
        routed = self.moe(normed_BND)
        return Residual(x_BND, gate_mlp, routed.hidden), routed


class FinalLayer(nn.Module):
    """Modulated LayerNorm and projection of each token to its patch of the output.

    Args:
        hidden_size: D, width of a token.
        patch_size: side of a patch.
        out_channels: channels of the output.
    """

    def __init__(self, hidden_size: int, patch_size: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, patch_size**2 * out_channels)
        self.adaLN_modulation = Modulation(hidden_size, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Zero, so that a new model predicts zero."""
        zero_(self)

    def forward(self, tokens: Tensor | Residual, modulation: Sequence[Tensor]) -> Tensor:
        """Tokens of width D under a shift and a scale (B, D) -> (B, N, patch_size^2 * out_channels)."""
        _, normed_BND = modulated_norm(tokens, *modulation)
        return self.linear(normed_BND)


class DiT(nn.Module):
    """Diffusion transformer over (latent) images, conditioned on time and class (DiT, arXiv 2212.09748).

    With `config.num_experts` > 0 it is DiT-MoE (arXiv 2407.11633), a mixture of experts in every block; with 0 it is
    the dense DiT. Parameter names are the official ones, except that a block's experts are stacked in
    moe.experts.{w13,w2} and moe.shared_experts.{w13,w2}; `dit_moe.checkpoint` converts. With `config.shared_expert`
    "gelu", which the official models do not know, moe.shared_experts has the dense MLP's names {fc1,fc2}.{weight,bias}.

    Args:
        config: the architecture.
    """

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = PatchEmbed(config.patch_size, config.in_channels, config.hidden_size)
        self.t_embedder = TimestepEmbedder(config.hidden_size)
        self.y_embedder = LabelEmbedder(config.num_classes, config.hidden_size, config.class_dropout_prob)
        self.pos_embed = nn.Parameter(torch.empty(1, config.num_tokens, config.hidden_size), requires_grad=False)
        self.blocks = nn.ModuleList(DiTBlock(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config.hidden_size, config.patch_size, config.out_channels)
        self.reset_pos_embed()

    def reset_parameters(self) -> None:
        """Give every parameter a fresh value, for instance after `to_empty` of a model built on the meta device."""
        for child in self.children():
            reset_all_parameters(child)
        self.reset_pos_embed()

    def reset_pos_embed(self) -> None:
        """Give the fixed position embeddings, which no layer owns, their values; on the meta device there are none."""
        if self.pos_embed.is_meta:
            return
        with torch.no_grad():
            pos_embed = sincos_pos_embed(self.config.hidden_size, self.config.input_size // self.config.patch_size)
            self.pos_embed.copy_(pos_embed)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, *, return_aux: bool = False) -> Tensor | tuple[Tensor, MoEAux]:
        """Predict the velocity or the noise (and, with learn_sigma, the variance's channels) of noisy images.

        Args:
            x: (B, C, input_size, input_size) in the parameters' dtype, or any float under autocast.
            t: (B,) int or float, times as the objective defines them: 0 to 1 for rectified flow, steps for DDPM.
            y: (B,) int, class ids; config.num_classes is the null class. In training mode some become it at random.
            return_aux: also return what the routed layers report.

        Returns:
            (B, config.out_channels, input_size, input_size), with return_aux in a pair with `MoEAux`.

        Raises:
            ValueError: a shape is wrong.
        """
        self._check_images(x)
        for name, tensor in (("t", t), ("y", y)):
            if tensor.shape != x.shape[:1]:
                raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, expected {tuple(x.shape[:1])} as x has")
        return self.denoise(x, self.modulations(self.condition(t, y)), return_aux=return_aux)

    # What `forward` is made of. The condition does not depend on the images, so a sampler may compute the modulations
    # of all its steps at once and leave only `denoise` to each step.

    def condition(self, t: Tensor, y: Tensor) -> Tensor:
        """Embed times (B,) and class ids (B,), as `forward` takes them, to (B, D)."""
        return self.t_embedder(t) + self.y_embedder(y)

    def modulations(self, c_BD: Tensor) -> Tensor:
        """Turn conditions into all vectors that shift, scale and gate the model's layers.

        Args:
            c_BD: (B, D) float, from `condition`; B may count the images of several steps.

        Returns:
            (B, V, D) with V = 6 * depth + 2: each block's shift, scale and gate of the attention, then of the
            feed-forward layer; in the end the shift and the scale of the final layer.
        """
        activated_BD = F.silu(c_BD)
        layers = [*self.blocks, self.final_layer]
        return torch.cat([layer.adaLN_modulation(activated_BD) for layer in layers], dim=1)

    def denoise(
        self, x: Tensor, modulations_BVD: Tensor, *, return_aux: bool = False
    ) -> Tensor | tuple[Tensor, MoEAux]:
        """Predict as `forward` does, from modulations in place of times and classes.

        Args:
            x: (B, C, input_size, input_size), as in `forward`.
            modulations_BVD: (B, V, D), from `modulations`; any strides.
            return_aux: also return what the routed layers report.

        Raises:
            ValueError: a shape is wrong.
        """
        self._check_images(x)
        expected = (x.shape[0], 6 * len(self.blocks) + 2, self.config.hidden_size)
        if modulations_BVD.shape != expected:
            raise ValueError(f"modulations_BVD: got shape {tuple(modulations_BVD.shape)}, expected {expected}")
        vectors = modulations_BVD.unbind(1)
        tokens: Tensor | Residual = self.x_embedder(x) + self.pos_embed
        routed: list[MoEOutput] = []
        for i, block in enumerate(self.blocks):
            tokens, moe_output = block(tokens, vectors[6 * i : 6 * i + 6])
            if moe_output is not None:
                routed.append(moe_output)
        out = self._unpatchify(self.final_layer(tokens, vectors[-2:]))
        return (out, self._aux(routed, x.device)) if return_aux else out

    def _check_images(self, x: Tensor) -> None:
        image = (self.config.in_channels, self.config.input_size, self.config.input_size)
        if x.ndim != 4 or x.shape[1:] != image:
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, {', '.join(map(str, image))})")

    def _unpatchify(self, patches_BNP: Tensor) -> Tensor:
        """(B, N, p * p * C) -> (B, C, H, W)."""
        patch, channels = self.config.patch_size, self.config.out_channels
        grid = self.config.input_size // patch
        patches = patches_BNP.unflatten(2, (patch, patch, channels)).unflatten(1, (grid, grid))
        return patches.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def _aux(self, routed: list[MoEOutput], device: torch.device) -> MoEAux:
        if not routed:
            return MoEAux(
                torch.zeros((), dtype=torch.float32, device=device), torch.zeros(0, 0, dtype=torch.int32, device=device)
            )
        return MoEAux(
            torch.stack([layer.balance_loss for layer in routed]).sum(),
            torch.stack([layer.tokens_per_expert for layer in routed]),
        )
