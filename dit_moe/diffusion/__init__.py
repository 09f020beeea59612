"""Diffusion processes as plain tensor math: rectified flow and Gaussian diffusion (DDPM, DDIM)."""

from .gaussian import GaussianDiffusion, linear_betas, make_diffusion, respaced_timesteps
from .noise import Generators, draw_noise
from .rectified_flow import (
    FlowPair,
    euler_step,
    euler_times,
    logit_normal_times,
    make_flow_pair,
    rectified_flow_loss,
)
from .trajectory import DDIMTrajectory, DDPMTrajectory, RectifiedFlowTrajectory, Trajectory

__all__ = [
    "DDIMTrajectory",
    "DDPMTrajectory",
    "FlowPair",
    "GaussianDiffusion",
    "Generators",
    "RectifiedFlowTrajectory",
    "Trajectory",
    "draw_noise",
    "euler_step",
    "euler_times",
    "linear_betas",
    "logit_normal_times",
    "make_diffusion",
    "make_flow_pair",
    "rectified_flow_loss",
    "respaced_timesteps",
]
