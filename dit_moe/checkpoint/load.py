"""load_checkpoint: official or native weights into a model, tensor by tensor."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import DiTConfig
from ..model import DiT
from .detect import detect_config
from .errors import CheckpointError, listed
from .layout import FLASH_MARK, STACKED_MARK, Part, official_parts
from .sources import Source, TensorSpec, open_source


def load_checkpoint(
    source: str | os.PathLike | Mapping[str, object],
    num_heads: int | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    *,
    top_k: int | None = None,
    verify: bool = True,
) -> DiT:
    """Load a DiT-MoE checkpoint, Meta's dense DiT or our native format into a new model in eval mode.

    Official layouts: attention as qkv/proj (S, B, L) or Wqkv/out_proj with q_norm/k_norm (XL, G); the state dict
    flat or in an entry "ema" or "model"; a .pt file (loaded with weights_only) or .safetensors. Tensors go one by one
    from the file into the model, straight to `device`, so memory stays near one copy. Nothing is returned unless every
    key and shape fits.

    Args:
        source: a path, or a mapping of official (or native) keys to tensors, which are copied.
        num_heads: attention heads, where neither the keys nor a preset of the same width and depth tell them.
        device: where the parameters go.
        dtype: of the parameters; None keeps the file's.
        top_k: experts per token; None takes the native file's, else 2. Official files do not tell it.
        verify: check the checksums of a .pt file first, which reads it once more. They are in every file that
            torch.save writes by default.

    Returns:
        DiT in eval mode; `model.config` is what was detected.

    Raises:
        CheckpointError: (a ValueError) the file is damaged or refused, keys are unknown or missing, shapes are wrong,
            or the configuration cannot be told.
        OSError: the file cannot be opened.
        TypeError: an argument has the wrong type.
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype: got {dtype!r}, expected a floating-point torch.dtype or None")
    opened = open_source(source, verify=verify)
    config = _config(opened, num_heads, top_k)
    with torch.device("meta"):
        model = DiT(config)
    parts = _parts(model, opened.specs)
    _check(model, parts, opened.specs, dtype)
    state = {name: _filled(opened, parts[name], param, device, dtype) for name, param in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model.eval()


def _config(source: Source, num_heads: int | None, top_k: int | None) -> DiTConfig:
    """The native file's own configuration, which must agree with the shapes, or the detected one."""
    if source.config is None:
        return detect_config(source.specs, num_heads, top_k=top_k)
    try:
        told = DiTConfig.from_dict(source.config if top_k is None else source.config | {"top_k": top_k})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the configuration in the file's metadata is not valid: {error}") from error
    if num_heads not in (None, told.num_heads):
        raise CheckpointError(f"num_heads={num_heads}, but the file's metadata says {told.num_heads}")
    seen = detect_config(source.specs, told.num_heads, top_k=told.top_k if told.is_moe else None)
    seen_fields, told_fields = seen.to_dict(), told.to_dict()
    # Shapes do not tell the first two, the ratio is compared as a width, and the other fields are ignored by the model.
    skip = {"class_dropout_prob", "balance_alpha", "mlp_ratio"}
    if not told.is_moe:
        skip |= {"top_k", "num_shared_experts", "shared_expert"}
    elif told.shared_expert == "gelu":
        skip.add("num_shared_experts")
    wrong = [
        f"{name} {told_fields[name]} (the tensors say {seen_fields[name]})"
        for name in told_fields
        if name not in skip and told_fields[name] != seen_fields[name]
    ]
    if told.ffn_hidden_size != seen.ffn_hidden_size:
        wrong.append(f"mlp_ratio {told.mlp_ratio} (the tensors say {seen.mlp_ratio})")
    if wrong:
        raise CheckpointError(f"the configuration in the file's metadata does not fit its tensors: {', '.join(wrong)}")
    return told


def _parts(model: DiT, specs: Mapping[str, TensorSpec]) -> dict[str, list[Part]]:
    """For each of the model's tensors, the source tensors that fill it."""
    if any(key.endswith(STACKED_MARK) for key in specs):
        return {name: [Part(name)] for name in model.state_dict()}
    flash = any(key.endswith(FLASH_MARK) for key in specs)
    return {name: official_parts(name, param.shape, flash=flash) for name, param in model.state_dict().items()}


def _check(
    model: DiT, parts: Mapping[str, list[Part]], specs: Mapping[str, TensorSpec], dtype: torch.dtype | None
) -> None:
    """Raise one error that names every unknown or missing key, wrong shape and dtype."""
    wanted = {
        part.key: tuple(param[part.index].shape) for name, param in model.state_dict().items() for part in parts[name]
    }
    present = [key for key in specs if key in wanted]
    problems = {
        "missing keys": [key for key in wanted if key not in specs],
        "unknown keys": [key for key in specs if key not in wanted],
        "wrong shapes": [
            f"{key} {specs[key].shape}, expected {wanted[key]}" for key in present if specs[key].shape != wanted[key]
        ],
        "not floating-point": [key for key in present if specs[key].dtype is None],
    }
    if dtype is None and not problems["missing keys"]:
        problems["mixed dtypes among what becomes one tensor (pass dtype)"] = [
            name for name, group in parts.items() if len({specs[part.key].dtype for part in group}) > 1
        ]
    told = [f"{problem}: {listed(keys)}" for problem, keys in problems.items() if keys]
    if told:
        raise CheckpointError(f"the checkpoint does not fit {model.config}: " + "; ".join(told))
    dtypes = {specs[key].dtype for key in wanted}
    if dtype is None and len(dtypes) > 1:
        names = ", ".join(sorted(map(str, dtypes)))
        warnings.warn(f"the checkpoint mixes {names}, and so will the model: pass dtype for one", stacklevel=3)


@torch.no_grad()
def _filled(
    source: Source, parts: list[Part], param: Tensor, device: torch.device | str, dtype: torch.dtype | None
) -> Tensor:
    """A new tensor like `param` on the device, copied from its parts."""
    tensor = torch.empty(param.shape, device=device, dtype=dtype or source.specs[parts[0].key].dtype)
    for part in parts:
        tensor[part.index].copy_(source.read(part.key))
    return tensor
