"""CUDA C++ implementations: the Python side of csrc/, which setup.py compiles into `dit_moe_kernels._C`.

Importing this package loads nothing; the compiled module is loaded at its first use.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from types import ModuleType

MODULE = "dit_moe_kernels._C"


def import_error() -> str | None:
    """Why the compiled module cannot be used, or None if it is loaded; the answer is kept while the process lives."""
    return _load()[1]


def extension() -> ModuleType:
    """The compiled module, see `_C.pyi`.

    Raises:
        ImportError: it was not built or cannot be loaded; `import_error` says why without raising.
    """
    module, reason = _load()
    if module is None:
        raise ImportError(reason)
    return module


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    if importlib.util.find_spec(MODULE) is None:
        return None, (
            "the package was installed without its CUDA extension, because nvcc was not found or DIT_MOE_SKIP_CUDA=1 "
            "was set; install it again with nvcc on PATH or CUDA_HOME set"
        )
    try:
        return importlib.import_module(MODULE), None
    except ImportError as error:
        return None, f"the CUDA extension cannot be loaded: {error}"
