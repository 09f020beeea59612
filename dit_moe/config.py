"""DiTConfig: everything that fixes the architecture of a DiT or DiT-MoE model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

SHARED_EXPERTS = ("swiglu", "gelu")


@dataclass(frozen=True)
class DiTConfig:
    """Architecture of a diffusion transformer; the defaults are DiT-MoE-XL/2-8E2A's, without its q/k normalisation.

    Args:
        input_size: height and width of the (latent) image.
        patch_size: side of one patch; the model sees (input_size / patch_size)^2 tokens.
        in_channels: channels of the (latent) image.
        hidden_size: D, width of a token.
        depth: L, number of blocks.
        num_heads: attention heads; each is hidden_size / num_heads wide.
        mlp_ratio: hidden width of one routed expert, or of the dense MLP, in units of hidden_size.
        num_experts: E, routed experts of each block; 0 means a dense DiT.
        top_k: K, routed experts that each token visits.
        num_shared_experts: width of the SwiGLU shared expert in units of hidden_size; 0 means none.
        num_classes: class ids are 0 to num_classes - 1, and num_classes is the null class.
        class_dropout_prob: chance that training replaces a class id by the null class.
        learn_sigma: predict in_channels more channels, as the official models do.
        qk_norm: LayerNorm on each head's queries and keys, as in the official XL and G models.
        balance_alpha: factor of the balance loss; the paper says 0.005, the official code ships 0.01.
        shared_expert: "swiglu", as the official models have, or "gelu": the dense DiT's MLP, with biases and of width
            mlp_ratio * hidden_size whatever num_shared_experts says. Upcycled dense models use it to keep their MLP.

    Raises:
        TypeError, ValueError: a value has the wrong type or lies outside its range.
    """

    input_size: int = 32
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_experts: int = 8
    top_k: int = 2
    num_shared_experts: int = 2
    num_classes: int = 1000
    class_dropout_prob: float = 0.1
    learn_sigma: bool = True
    qk_norm: bool = False
    balance_alpha: float = 0.01
    shared_expert: str = "swiglu"

    def __post_init__(self) -> None:
        for field in fields(self):
            _check_type(field.name, getattr(self, field.name), str(field.type))
        for name in ("input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "num_classes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        for name in ("num_experts", "num_shared_experts", "balance_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 or more")
        if self.shared_expert not in SHARED_EXPERTS:
            raise ValueError(f"shared_expert: got {self.shared_expert!r}, expected one of {SHARED_EXPERTS}")
        if self.num_experts and not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k: got {self.top_k}, expected 1 to num_experts = {self.num_experts}")
        if self.ffn_hidden_size < 1:
            raise ValueError(f"mlp_ratio: got {self.mlp_ratio}, expected a width of at least 1 at {self.hidden_size}")
        if not 0 <= self.class_dropout_prob <= 1:
            raise ValueError(f"class_dropout_prob: got {self.class_dropout_prob}, expected 0 to 1")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size: got {self.input_size}, expected a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size: got {self.hidden_size}, expected a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size: got {self.hidden_size}, expected a multiple of 4 (2D sin-cos positions)")

    @property
    def is_moe(self) -> bool:
        """Whether the blocks hold routed experts."""
        return self.num_experts > 0

    @property
    def num_tokens(self) -> int:
        """Tokens per image."""
        return (self.input_size // self.patch_size) ** 2

    @property
    def out_channels(self) -> int:
        """Channels of the model's output."""
        return self.in_channels * 2 if self.learn_sigma else self.in_channels

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_heads

    @property
    def ffn_hidden_size(self) -> int:
        """F, hidden width of one routed expert, or of the dense MLP."""
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def shared_hidden_size(self) -> int:
        """Hidden width of the shared expert; 0 where there is none."""
        if not self.is_moe:
            return 0
        return self.ffn_hidden_size if self.shared_expert == "gelu" else self.hidden_size * self.num_shared_experts

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict that JSON can hold."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DiTConfig:
        """The configuration with these fields; absent ones take their defaults.

        Raises:
            ValueError: a key is no field.
        """
        unknown = sorted(set(values) - {field.name for field in fields(cls)})
        if unknown:
            raise ValueError(f"config: got unknown keys {unknown}, expected among {[f.name for f in fields(cls)]}")
        return cls(**values)


def _check_type(name: str, value: object, expected: str) -> None:
    """Compare with the annotation: bool is no number here, and an int may stand for a float."""
    accepted = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}[expected]
    if not isinstance(value, accepted) or (isinstance(value, bool) and expected != "bool"):
        raise TypeError(f"{name}: got {value!r}, expected {expected}")
