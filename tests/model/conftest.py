"""Set-up of the model tests: ops run on the plain reference unless a test names a backend."""

from collections.abc import Iterator

import pytest
from dit_moe_kernels import use_backend


@pytest.fixture(autouse=True)
def _reference_backend() -> Iterator[None]:
    """Without it, `auto` would interpret Triton kernels on the CPU: the kernel tests do that, in small."""
    with use_backend("reference"):
        yield
