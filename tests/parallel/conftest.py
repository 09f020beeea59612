"""What one process gives, for all tests of several ranks to be compared with."""

from __future__ import annotations

from typing import Any

import pytest
from dit_moe_kernels import use_backend

from . import scenarios


@pytest.fixture(autouse=True)
def _reference():
    with use_backend("reference"):
        yield


@pytest.fixture(scope="package")
def one() -> dict[str, Any]:
    """50 steps with the whole batch, without torch.distributed."""
    with use_backend("reference"):
        return scenarios.train(scenarios.fresh_model(), 0, 1)
