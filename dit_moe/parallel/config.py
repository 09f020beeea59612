"""ParallelConfig: how a model is spread over the ranks."""

from __future__ import annotations

from dataclasses import dataclass

DATA_PARALLEL = ("none", "ddp", "fsdp")


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is spread over the ranks; every rank always trains on images of its own.

    Args:
        data_parallel: "none" for one process; "ddp": every rank holds all parameters but the experts of other ranks;
            "fsdp": every rank holds its part of each parameter and gathers one block at a time (FSDP2).
        expert_parallel: ranks that share one set of experts, each holding num_experts / expert_parallel of them; the
            tokens travel to their experts and back. 1 leaves every expert with every rank. Consecutive ranks form a
            set, so choose at most the GPUs of one host where NVLink ends there.
        global_balance: balance loss and tokens_per_expert over the tokens of all ranks, which makes the training the
            same as on one device with the whole batch; false: over each rank's own, as the official code has it.
        reshard_after_forward: with "fsdp", free a block's gathered parameters after its forward and gather them again
            for its backward; false keeps them, which spares a gather and costs the memory of the whole model.

    Raises:
        ValueError: a value out of range, or experts to share without data parallelism.
    """

    data_parallel: str = "none"
    expert_parallel: int = 1
    global_balance: bool = True
    reshard_after_forward: bool = True

    def __post_init__(self) -> None:
        if self.data_parallel not in DATA_PARALLEL:
            raise ValueError(f"data_parallel: got {self.data_parallel!r}, expected one of {DATA_PARALLEL}")
        if self.expert_parallel < 1:
            raise ValueError(f"expert_parallel: got {self.expert_parallel}, expected at least 1")
        if self.expert_parallel > 1 and self.data_parallel == "none":
            raise ValueError(
                f"expert_parallel: got {self.expert_parallel} with data_parallel 'none', expected 'ddp' or 'fsdp': the "
                f"ranks see different images, so the parameters beside the experts must be kept equal"
            )

    def check_ranks(self, num_ranks: int) -> None:
        """Whether this many ranks can be arranged so.

        Raises:
            ValueError: they cannot.
        """
        if self.data_parallel == "none" and num_ranks > 1:
            raise ValueError(f"data_parallel: got 'none' for {num_ranks} ranks, expected 'ddp' or 'fsdp'")
        if num_ranks % self.expert_parallel:
            raise ValueError(
                f"expert_parallel: got {self.expert_parallel}, expected a divisor of the {num_ranks} ranks"
            )

    def check_experts(self, num_experts: int) -> None:
        """Whether this many experts can be shared out so.

        Raises:
            ValueError: they cannot.
        """
        if self.expert_parallel > 1 and (num_experts == 0 or num_experts % self.expert_parallel):
            raise ValueError(
                f"expert_parallel: got {self.expert_parallel}, expected a divisor of the model's {num_experts} experts"
            )
