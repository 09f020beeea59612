"""Training on many devices: data parallelism by DDP or FSDP2, and experts spread over ranks, over torch.distributed."""

from .apply import parallelize, unwrap
from .config import ParallelConfig
from .optim import clip_grad_norm_, optimizer_groups
from .state import full_state_dict, local_tensor, num_shards

__all__ = [
    "ParallelConfig",
    "clip_grad_norm_",
    "full_state_dict",
    "local_tensor",
    "num_shards",
    "optimizer_groups",
    "parallelize",
    "unwrap",
]
