"""Meshes: the ranks as the two kinds of parameters see them."""

from __future__ import annotations

from typing import NamedTuple

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from .config import ParallelConfig


class Meshes(NamedTuple):
    """The same ranks, arranged for the parameters of all ranks and for the experts.

    all: ("all",), every rank: over these, parameters beside the experts are averaged or sharded.
    data: ("data",), the ranks that hold the same experts as this one.
    expert: ("expert",), the ranks that share one set of experts; their numbers are consecutive.
    """

    all: DeviceMesh
    data: DeviceMesh
    expert: DeviceMesh


def make_meshes(config: ParallelConfig, device_type: str, num_ranks: int) -> Meshes:
    """Arrange the ranks; a collective call, since process groups are made.

    Raises:
        ValueError: the ranks cannot be arranged so.
    """
    config.check_ranks(num_ranks)
    grid = (num_ranks // config.expert_parallel, config.expert_parallel)
    both = init_device_mesh(device_type, grid, mesh_dim_names=("data", "expert"))
    return Meshes(init_device_mesh(device_type, (num_ranks,), mesh_dim_names=("all",)), both["data"], both["expert"])
