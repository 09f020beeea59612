"""export_state_dict: a model's tensors under the keys of the official release."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..model import DiT
from .files import written_aside
from .layout import official_parts


def export_state_dict(model: DiT) -> dict[str, Tensor]:
    """The model's tensors in official keys: what `load_checkpoint` read comes out bit for bit.

    A model with q/k normalisation gets the XL and G release's attention keys (Wqkv, out_proj, q_norm, k_norm), others
    qkv and proj; a dense model gets Meta's DiT keys. The per-expert matrices are views of the stacked ones: nothing is
    copied, and changing them in place changes the model.

    Raises:
        ValueError: the model has a GELU shared expert, for which the release has no keys; `save_model` keeps it.
    """
    if model.config.is_moe and model.config.shared_expert != "swiglu":
        raise ValueError(
            f"shared_expert: got {model.config.shared_expert!r}, expected 'swiglu', the only one that the official "
            f"layout has keys for: use the native format (save_model)"
        )
    flash = model.config.qk_norm
    return {
        part.key: tensor.detach()[part.index]
        for name, tensor in model.state_dict().items()
        for part in official_parts(name, tensor.shape, flash=flash)
    }


def save_official(model: DiT, path: str | os.PathLike) -> None:
    """Write the official keys, flat, for the official code: a torch file, or safetensors if the path ends so.

    The file is written aside and renamed, so that a crash leaves no half-written one.
    """
    from safetensors.torch import save_file

    state = export_state_dict(model)
    with written_aside(path) as aside:
        if os.fspath(path).endswith(".safetensors"):
            save_file({key: tensor.contiguous() for key, tensor in state.items()}, aside)
        else:
            torch.save(state, aside)
