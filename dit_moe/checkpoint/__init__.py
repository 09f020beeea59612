"""Checkpoints: the official layouts, Meta's dense DiT and our native format, in and out."""

from .detect import detect_config
from .errors import CheckpointError
from .export import export_state_dict, save_official
from .load import load_checkpoint
from .native import load_model, save_model

__all__ = [
    "CheckpointError",
    "detect_config",
    "export_state_dict",
    "load_checkpoint",
    "load_model",
    "save_model",
    "save_official",
]
