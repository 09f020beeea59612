"""Set-up of the kernel tests: memory that an op allocates holds NaN until the op writes it."""

import warnings
from collections.abc import Iterator

import pytest
import torch
from dit_moe_kernels import availability
from dit_moe_kernels.cuda_impl import grouped_gemm


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """Make torch.empty return NaN (the largest integer for ints), so that an output row left unwritten is seen."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*determinis.*")  # only the filling is wanted here
        yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(autouse=True)
def _shared_gpu() -> Iterator[None]:
    """Hand large blocks back after a test, since several pytest workers share one GPU."""
    yield
    if torch.cuda.is_initialized() and torch.cuda.memory_reserved() > 2**31:
        torch.cuda.empty_cache()


@pytest.fixture
def cuda_targets_on_hopper(request: pytest.FixtureRequest) -> None:
    """Skip a test whose `target` is the CUDA backend's where its products do not run."""
    target = request.node.callspec.params.get("target") if hasattr(request.node, "callspec") else None
    if target is None or (target.backend, target.device) != ("cuda", "cuda"):
        return
    reason = availability("cuda") or grouped_gemm.unsupported(torch.device("cuda", 0), target.dtype, True)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def as_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Interpret the tile choices and TMA branches of compute capability 9.0."""
    from dit_moe_kernels.triton_impl import common

    monkeypatch.setattr(common, "capability", lambda device_index: (9, 0))
