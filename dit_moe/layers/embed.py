"""What enters the transformer: patches, their positions, the time and the class."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .init import normal_, zero_

NUM_TIME_FEATURES = 256  # sinusoidal features of the time in every official model


class PatchEmbed(nn.Module):
    """Cut an image into patches and project each to a token.

    Args:
        patch_size: side of a patch.
        in_channels: channels of the image.
        hidden_size: D, width of a token.
    """

    def __init__(self, patch_size: int, in_channels: int, hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier uniform for the convolution seen as a linear map of a flat patch, zero bias."""
        zero_(self.proj)
        nn.init.xavier_uniform_(self.proj.weight.view(self.proj.out_channels, -1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, N, D), tokens in raster order."""
        # The convolution's stride is its kernel's size: as a product with the flat patches its output lies as wanted.
        size = self.proj.kernel_size[0]
        grid_BCGpGp = x_BCHW.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        patches_BNP = grid_BCGpGp.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        return F.linear(patches_BNP, self.proj.weight.flatten(1), self.proj.bias)


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the time, through a two-layer MLP.

    Args:
        hidden_size: D, width of the embedding.
        num_features: sinusoidal features, half cosines and half sines.
        max_period: longest period of the features.
    """

    def __init__(self, hidden_size: int, num_features: int = NUM_TIME_FEATURES, max_period: float = 10_000.0) -> None:
        super().__init__()
        self.num_features, self.max_period = num_features, max_period
        self.mlp = nn.Sequential(nn.Linear(num_features, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal weights of standard deviation 0.02, zero biases."""
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, t_B: Tensor) -> Tensor:
        """Embed times of any real dtype: (B,) -> (B, D) in the parameters' dtype."""
        features = timestep_features(t_B, self.num_features, self.max_period)
        return self.mlp(features.to(next(self.mlp.parameters()).dtype))


def timestep_features(t: Tensor, num_features: int, max_period: float = 10_000.0) -> Tensor:
    """Cosines and sines of t at geometrically spaced frequencies, in fp32 whatever the dtype of t.

    Args:
        t: (B,) int or float, times.
        num_features: even number of features.
        max_period: 2 pi times this is the longest period.

    Returns:
        (B, num_features) fp32, all cosines first.
    """
    half = num_features // 2
    steps = torch.arange(half, device=t.device, dtype=torch.float32)
    frequencies = torch.exp(-math.log(max_period) * steps / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class LabelEmbedder(nn.Module):
    """A table of class embeddings with one more row for the null class, which training mode draws at random.

    Args:
        num_classes: classes; the null class has this id.
        hidden_size: D, width of an embedding.
        dropout_prob: chance that a class id becomes the null class, in training mode only.
    """

    def __init__(self, num_classes: int, hidden_size: int, dropout_prob: float) -> None:
        super().__init__()
        self.num_classes, self.dropout_prob = num_classes, dropout_prob
        weight = torch.empty(num_classes + 1, hidden_size)
        # A given weight is not drawn first: none on the meta device, see `normal_`; elsewhere seeds keep their models.
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size, _weight=weight if weight.is_meta else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal of standard deviation 0.02."""
        normal_(self.embedding_table.weight, std=0.02)

    def forward(self, class_ids_B: Tensor) -> Tensor:
        """(B,) int -> (B, D)."""
        if self.training and self.dropout_prob > 0:
            dropped_B = torch.rand(class_ids_B.shape, device=class_ids_B.device) < self.dropout_prob
            class_ids_B = class_ids_B.masked_fill(dropped_B, self.num_classes)
        return self.embedding_table(class_ids_B)


def sincos_pos_embed(hidden_size: int, grid_size: int) -> Tensor:
    """Fixed 2D sin-cos position embeddings (MAE, arXiv 2111.06377): one half for the column, one for the row.

    Args:
        hidden_size: D, a multiple of 4.
        grid_size: patches along each side.

    Returns:
        (1, grid_size^2, D) fp32 in raster order; each half holds its sines, then its cosines.
    """
    quarter = hidden_size // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * frequencies
    features_GH = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = features_GH[None, :, :].expand(grid_size, -1, -1)
    rows = features_GH[:, None, :].expand(-1, grid_size, -1)
    return torch.cat([columns, rows], dim=2).view(1, grid_size**2, hidden_size).float()
