"""What a way of spreading costs each rank, in closed form: bytes of state, bytes that travel, least times."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from ..config import DiTConfig
from ..flops import count_parameters, flops, parameters_by_part
from .config import ParallelConfig


@dataclass(frozen=True)
class StateBytes:
    """Bytes that training keeps for each parameter; the defaults are fp32 for everything.

    The least are 8: "bf16-stochastic" weights without masters (2), their gradients (2), bf16 moments (4), and averages
    in the host's memory.

    Args:
        weights: 4 in fp32, also under bf16 autocast; 6 for bf16 weights with fp32 master weights, but 4 with FSDP,
            whose fp32 parts are the masters; 2 for bf16 weights without masters.
        gradients: of the weights' dtype.
        moments: AdamW's two, 8 in fp32 and 4 in bf16.
        averages: of the weights; 0 where they lie in the host's memory.
        gathered: of a weight in use: 2 in bf16, and 4 in fp32.
    """

    weights: int = 4
    gradients: int = 4
    moments: int = 8
    averages: int = 4
    gathered: int = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, activations beside the blocks' inputs not among them.

    Args:
        weights, gradients, moments, averages: this rank's parts.
        gathered: weights in the dtype of the products. With FSDP, of the block at work and the next, with the gradients
            of one; with DDP, of the whole model, since autocast's copies live until the backward pass.
        block_inputs: the fp32 tokens at the start of each block, all that recomputation keeps.
    """

    weights: float
    gradients: float
    moments: float
    averages: float
    gathered: float
    block_inputs: float

    @property
    def total(self) -> float:
        """Sum of all."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class Traffic:
    """Bytes that one rank sends in one step.

    Args:
        rows: tokens on their way to their experts and back, and their gradients.
        weights: gathered by FSDP for the forward and again for the backward pass.
        gradients: reduced, in fp32.
    """

    rows: float
    weights: float
    gradients: float


@dataclass(frozen=True)
class Machine:
    """What a time estimate assumes; the defaults are assumptions about H100 hosts, not measurements.

    Args:
        gpus_per_host: ranks within this number talk over the fast links.
        flops: of one GPU in the model's products, per second.
        host_bandwidth: bytes per second that a GPU sends to others of its host.
        network_bandwidth: bytes per second that a GPU sends to other hosts.
    """

    gpus_per_host: int = 8
    flops: float = 400e12
    host_bandwidth: float = 300e9
    network_bandwidth: float = 40e9


def memory(
    config: DiTConfig, parallel: ParallelConfig, num_ranks: int, images_per_rank: int, state: StateBytes | None = None
) -> Memory:
    """Bytes that one rank holds.

    Args:
        config: the model.
        parallel: how it is spread.
        num_ranks: over how many ranks.
        images_per_rank: images that go through the model at once.
        state: bytes for each parameter.

    Raises:
        ValueError: ranks or experts cannot be shared out so.
    """
    state = state or StateBytes()
    held = _held(config, parallel, num_ranks)
    experts, others = _experts_and_others(config)
    used = others + experts / parallel.expert_parallel
    if parallel.data_parallel == "fsdp":
        used = 3 * used / config.depth if parallel.reshard_after_forward else used * (1 + 1 / config.depth)
    inputs = config.depth * images_per_rank * config.num_tokens * config.hidden_size * 4
    return Memory(
        weights=held * state.weights,
        gradients=held * state.gradients,
        moments=held * state.moments,
        averages=held * state.averages,
        gathered=used * state.gathered,
        block_inputs=inputs,
    )


def traffic(
    config: DiTConfig,
    parallel: ParallelConfig,
    num_ranks: int,
    images_per_rank: int,
    *,
    recompute: bool = False,
    state: StateBytes | None = None,
) -> Traffic:
    """Bytes that one rank sends in a step with bf16 rows, as ring and pairwise algorithms do.

    Args:
        config, parallel, num_ranks, images_per_rank, state: as in `memory`.
        recompute: every block runs again in the backward pass, exchanges included.

    Raises:
        ValueError: ranks or experts cannot be shared out so.
    """
    state = state or StateBytes()
    parallel.check_ranks(num_ranks)
    parallel.check_experts(config.num_experts)
    share = parallel.expert_parallel
    exchanges = 6 if recompute else 4  # there and back: forward, forward again, backward
    rows = exchanges * config.depth * rows_bytes(config, parallel, images_per_rank)
    experts, others = _experts_and_others(config)
    # Of what n ranks gather or reduce, each sends (n - 1) / n.
    travelling = others * _remote(num_ranks) + experts / share * _remote(num_ranks // share)
    if parallel.data_parallel == "fsdp":
        gathers = 2 if parallel.reshard_after_forward else 1
        return Traffic(rows, gathers * travelling * state.gathered, travelling * 4)
    return Traffic(rows, 0.0, 2 * travelling * 4)


def rows_bytes(config: DiTConfig, parallel: ParallelConfig, images_per_rank: int) -> float:
    """Bytes that one rank sends in one all-to-all of one layer, in bf16 and evenly loaded."""
    if not config.is_moe:
        return 0.0
    rows = images_per_rank * config.num_tokens * config.top_k
    return rows * config.hidden_size * 2 * _remote(parallel.expert_parallel)


def step_seconds(
    config: DiTConfig,
    parallel: ParallelConfig,
    num_ranks: int,
    images_per_rank: int,
    *,
    recompute: bool = False,
    state: StateBytes | None = None,
    machine: Machine | None = None,
) -> dict[str, float]:
    """Lower bounds of a step's parts; nothing in them overlaps, waits or is unevenly loaded.

    Returns:
        "compute", "rows", "weights" and "gradients" -> seconds. Weights and gradients may travel beside the compute;
        of the rows' time only what the shared expert's takes.
    """
    machine = machine or Machine()
    sent = traffic(config, parallel, num_ranks, images_per_rank, recompute=recompute, state=state)

    def bandwidth(ranks: int) -> float:
        return machine.host_bandwidth if ranks <= machine.gpus_per_host else machine.network_bandwidth

    passes = 4 if recompute else 3  # the backward pass has two products for each of the forward's
    wide = bandwidth(num_ranks)
    return {
        "compute": passes * flops(config) * images_per_rank / machine.flops,
        "rows": sent.rows / bandwidth(parallel.expert_parallel),
        "weights": sent.weights / wide,
        "gradients": sent.gradients / wide,
    }


def _held(config: DiTConfig, parallel: ParallelConfig, num_ranks: int) -> float:
    """Parameters whose state one rank keeps."""
    parallel.check_ranks(num_ranks)
    parallel.check_experts(config.num_experts)
    experts, others = _experts_and_others(config)
    if parallel.data_parallel == "fsdp":
        return (experts + others) / num_ranks
    return experts / parallel.expert_parallel + others


def _experts_and_others(config: DiTConfig) -> tuple[int, int]:
    experts = parameters_by_part(config)["experts"]
    return experts, count_parameters(config) - experts


def _remote(ranks: int) -> float:
    """The part that is another rank's of what lies evenly with this many."""
    return (ranks - 1) / ranks
