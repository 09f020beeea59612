"""Exceptions of the kernel library."""


class KernelError(RuntimeError):
    """A kernel launch failed; the message names the op and the CUDA error."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for by name and cannot run; the message says why."""
