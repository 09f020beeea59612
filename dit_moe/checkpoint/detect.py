"""The configuration of a checkpoint, from its keys and shapes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from ..config import DiTConfig
from ..presets import DiT_models, model_config
from .errors import CheckpointError, listed
from .layout import FLASH_MARK, STACKED_MARK


class HasShape(Protocol):
    """Anything with a shape: a tensor, an array, a record of a file's header."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def detect_config(
    mapping: Mapping[str, HasShape], num_heads: int | None = None, *, top_k: int | None = None
) -> DiTConfig:
    """The configuration that the keys and shapes of a flat state dict tell.

    Understood are the official DiT-MoE layouts, Meta's dense DiT and our own stacked keys. The keys do not tell top_k
    (2 unless given), the class dropout probability and the balance factor (our defaults), and in the timm layout the
    number of heads: it comes from `num_heads`, else from the preset of the same width and depth.

    Args:
        mapping: key -> anything with a shape.
        num_heads: attention heads, where the keys do not tell them; a value that contradicts them is an error.
        top_k: experts per token.

    Raises:
        CheckpointError: keys are missing or shapes make no DiT.
    """
    keys = _Keys(mapping)
    width, channels, patch, patch_w = keys.shape("x_embedder.proj.weight", 4)
    _, tokens, _ = keys.shape("pos_embed", 3)
    table_rows, _ = keys.shape("y_embedder.embedding_table.weight", 2)
    out_rows, _ = keys.shape("final_layer.linear.weight", 2)
    depth = keys.depth()
    side = math.isqrt(tokens)
    if min(width, channels, patch, tokens, table_rows) < 1 or patch != patch_w or side * side != tokens:
        raise CheckpointError(
            f"expected square patches and a square grid of them, got x_embedder.proj.weight of shape "
            f"{keys.shape('x_embedder.proj.weight', 4)} and pos_embed of shape {keys.shape('pos_embed', 3)}"
        )
    channels_out, rest = divmod(out_rows, patch * patch)
    if rest or channels_out not in (channels, 2 * channels):
        raise CheckpointError(
            f"final_layer.linear.weight has {out_rows} rows, expected patch^2 * channels = {patch * patch * channels} "
            f"or twice that"
        )
    heads, qk_norm = _heads(keys, width, depth, num_heads)
    fields: dict[str, Any] = dict(
        input_size=side * patch, patch_size=patch, in_channels=channels, hidden_size=width, depth=depth,
        num_heads=heads, qk_norm=qk_norm, num_classes=table_rows - 1, learn_sigma=channels_out == 2 * channels,
    )  # fmt: skip
    fields |= _dense_fields(keys, width) if keys.first(".mlp.fc1.weight") else _expert_fields(keys, width, top_k)
    try:
        return DiTConfig(**fields)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the checkpoint's shapes make no valid configuration: {error}") from error


class _Keys:
    """Keys and shapes, with errors that name the key."""

    def __init__(self, mapping: Mapping[str, HasShape]) -> None:
        self.mapping = mapping
        self._by_ending: dict[str, str] = {}  # ending after "blocks.i" -> the key in the lowest block that has it
        self.blocks: set[int] = set()
        for block, ending, key in sorted(_block_keys(mapping)):
            self.blocks.add(block)
            self._by_ending.setdefault(ending, key)

    def first(self, ending: str) -> str | None:
        """The key of the lowest block with this ending."""
        return self._by_ending.get(ending)

    def shape(self, key: str, ndim: int) -> tuple[int, ...]:
        if key not in self.mapping:
            some = listed(sorted(map(str, self.mapping))) or "none"
            raise CheckpointError(f"not a DiT or DiT-MoE checkpoint: key {key!r} is missing; keys: {some}")
        shape = tuple(self.mapping[key].shape)
        if len(shape) != ndim:
            raise CheckpointError(f"{key} has shape {shape}, expected {ndim} dimensions")
        return shape

    def block_shape(self, ending: str, ndim: int) -> tuple[int, ...]:
        key = self.first(ending)
        if key is None:
            raise CheckpointError(f"not a DiT or DiT-MoE checkpoint: no key blocks.*{ending}")
        return self.shape(key, ndim)

    def depth(self) -> int:
        missing = [f"blocks.{i}.*" for i in range(len(self.blocks)) if i not in self.blocks]
        if missing or not self.blocks:
            raise CheckpointError(
                f"blocks must be numbered from 0 without gaps: missing {listed(missing) or 'blocks.0.*'}, "
                f"highest is {max(self.blocks, default=None)}"
            )
        return len(self.blocks)


def _block_keys(keys: Iterable[str]) -> Iterable[tuple[int, str, str]]:
    pattern = re.compile(r"blocks\.(0|[1-9]\d{0,5})(\..+)")
    for key in keys:
        if match := pattern.fullmatch(key):
            yield int(match[1]), match[2], key


def _heads(keys: _Keys, width: int, depth: int, num_heads: int | None) -> tuple[int, bool]:
    """(number of heads, whether q and k are normalised)."""
    if keys.first(".attn.q_norm.weight") or keys.first(FLASH_MARK):
        (head_dim,) = keys.block_shape(".attn.q_norm.weight", 1)
        if head_dim < 1 or width % head_dim:
            raise CheckpointError(f"q_norm has {head_dim} entries, which do not divide the model width {width}")
        if num_heads not in (None, width // head_dim):
            raise CheckpointError(f"num_heads={num_heads}, but q_norm of {head_dim} entries means {width // head_dim}")
        return width // head_dim, True
    if num_heads is not None:
        return num_heads, False
    presets = (model_config(name) for name in DiT_models)
    known = {preset.num_heads for preset in presets if (preset.hidden_size, preset.depth) == (width, depth)}
    if len(known) != 1:
        raise CheckpointError(
            f"the keys do not tell the number of heads, and no preset has hidden_size {width} and depth {depth}: "
            f"pass num_heads"
        )
    return known.pop(), False


def _dense_fields(keys: _Keys, width: int) -> dict[str, object]:
    hidden, _ = keys.block_shape(".mlp.fc1.weight", 2)
    return dict(num_experts=0, mlp_ratio=_ratio(hidden, width))


def _expert_fields(keys: _Keys, width: int, top_k: int | None) -> dict[str, object]:
    num_experts, _ = keys.block_shape(".moe.gate.weight", 2)
    if keys.first(STACKED_MARK):
        hidden = keys.block_shape(STACKED_MARK, 3)[1] // 2
    else:
        hidden, _ = keys.block_shape(".moe.experts.0.gate_proj.weight", 2)
        if num_experts > len(keys.mapping):
            raise CheckpointError(f"{keys.first('.moe.gate.weight')} has {num_experts} rows, more than there are keys")
    shared_rows = 0
    if keys.first(".moe.shared_experts.w13"):
        shared_rows = keys.block_shape(".moe.shared_experts.w13", 2)[0] // 2
    elif keys.first(".moe.shared_experts.gate_proj.weight"):
        shared_rows, _ = keys.block_shape(".moe.shared_experts.gate_proj.weight", 2)
    num_shared_experts, rest = divmod(shared_rows, width)
    if rest:
        raise CheckpointError(f"the shared expert has width {shared_rows}, expected a multiple of the model's {width}")
    return dict(
        num_experts=num_experts,
        top_k=min(2, num_experts) if top_k is None else top_k,
        num_shared_experts=num_shared_experts,
        shared_expert="gelu" if keys.first(".moe.shared_experts.fc1.weight") else "swiglu",
        mlp_ratio=_ratio(hidden, width),
    )


def _ratio(hidden: int, width: int) -> float:
    """The mlp_ratio whose product with width, rounded down, is hidden, although floats are inexact."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
