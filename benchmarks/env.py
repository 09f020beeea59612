"""Everything about the machine that somebody needs to repeat or to doubt a figure."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_PACKAGES = (
    "torch triton numpy dit-moe megablocks stanford-stk sonic-moe quack-kernels nvidia-cutlass-dsl moe-ops".split()
)

_SETTINGS = (
    "DIT_MOE_BACKEND TRITON_INTERPRET QUACK_COMPILE_WORKERS PYTORCH_CUDA_ALLOC_CONF OMP_NUM_THREADS "
    "NCCL_NVLS_ENABLE TORCH_SYMM_MEM_DISABLE_MULTICAST NVSHMEM_DISABLE_NVLS"
).split()
_ROOT = Path(__file__).resolve().parent.parent


def describe(arguments: list[str], device: str, module: str = "run") -> dict[str, Any]:
    """Command, time, versions, GPU and commit of this run, as JSON can hold it.

    Args:
        arguments: command line after `python -m benchmarks.MODULE`.
        device: "cuda" or "cpu".
        module: of this package, the one that runs.
    """
    return {
        "command": ["python", "-m", f"benchmarks.{module}", *arguments],
        "time_utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git": _git(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "torch_cuda": torch.version.cuda,
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
        "source_sha256": _source_hash(),
        "gpu": _gpu() if device == "cuda" else None,
    }


def child_environment(**extra: str) -> dict[str, str]:
    """Environment in which a child process imports what this one can, installed or not."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **extra}


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    fields = "driver_version,power.limit,clocks.max.sm,clocks.max.mem,temperature.gpu"
    values = _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "-i", "0"]) or ""
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_mib": properties.total_memory // 2**20,
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": properties.L2_cache_size / 2**20,
        **dict(zip(fields.split(","), (value.strip() for value in values.split(",")), strict=False)),
    }


def _git() -> dict[str, Any]:
    commit = _output(["git", "-C", str(_ROOT), "rev-parse", "HEAD"])
    changes = _output(["git", "-C", str(_ROOT), "status", "--porcelain"]) if commit else None
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _source_hash() -> str:
    """Hash of the library's Python sources, which names them where there is no git."""
    digest = hashlib.sha256()
    for folder in ("kernels/dit_moe_kernels", "dit_moe"):
        for path in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        print(f"env: {command[0]} gave no answer ({type(error).__name__})", file=sys.stderr)
        return None
