"""Running a sampler's steps: one after the other, or as replays of a CUDA graph."""

from .engine import SamplingEngine
from .plan import SamplingPlan, StepHook, make_plan, run_stepwise

__all__ = ["SamplingEngine", "SamplingPlan", "StepHook", "make_plan", "run_stepwise"]
