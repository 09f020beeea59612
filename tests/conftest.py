"""Shared test setup: without a GPU, Triton kernels run in Triton's interpreter and gpu-marked tests are skipped."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read by Triton when a kernel is first defined


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip gpu-marked tests where there is no GPU."""
    if HAS_GPU:
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
