"""The native format: one safetensors file with our keys and the configuration as JSON in its metadata.

The configuration lies in the file itself rather than in a second one beside it, so that the two cannot be parted or
disagree, and one rename replaces both at once.
"""

from __future__ import annotations

import json
import os

import torch

from ..model import DiT
from .errors import CheckpointError
from .files import written_aside
from .load import load_checkpoint
from .sources import CONFIG_ENTRY, open_source


def save_model(model: DiT, path: str | os.PathLike) -> None:
    """Write weights and configuration to one safetensors file, whatever its name ends with.

    The file is written aside, flushed to the disk and renamed: at any time the path holds the old file or the whole
    new one.
    """
    from safetensors.torch import save_file

    metadata = {"format": "pt", CONFIG_ENTRY: json.dumps(model.config.to_dict())}
    tensors = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    with written_aside(path) as aside:
        save_file(tensors, aside, metadata=metadata)


def load_model(path: str | os.PathLike, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> DiT:
    """Load what `save_model` wrote, in eval mode; `load_checkpoint` does it too, and reads official files besides.

    Args:
        path: the file.
        device: where the parameters go.
        dtype: of the parameters; None keeps the file's.

    Raises:
        CheckpointError: not a native file, damaged, or its configuration does not fit its tensors.
        OSError: the file cannot be opened.
    """
    if open_source(path, verify=False).config is None:
        raise CheckpointError(f"{os.fspath(path)} holds no configuration: load it with load_checkpoint")
    return load_checkpoint(path, device=device, dtype=dtype)
