"""Training: settings, the step, precision, averaged weights, and what a run must keep to go on."""

from .reports import TrainingDivergedError, TrainingReport
from .settings import TrainingSettings
from .trainer import Trainer

__all__ = ["Trainer", "TrainingDivergedError", "TrainingReport", "TrainingSettings"]
