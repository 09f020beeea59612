"""The compiled kernels: every grouped product runs on Hopper's warpgroup instruction, and nothing spills registers."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from dit_moe_kernels import cuda_impl


def find_cuobjdump() -> str | None:
    """In $CUDA_HOME/bin, on PATH, or in the package triton."""
    cuda_home = os.environ.get("CUDA_HOME")
    found = (shutil.which("cuobjdump", path=f"{cuda_home}/bin") if cuda_home else None) or shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        found = shutil.which("cuobjdump", path=str(Path(triton.origin).parent / "backends/nvidia/bin"))
    return found


@pytest.fixture(scope="module")
def kernels() -> dict[str, str]:
    """The machine code of each kernel, by its architecture and mangled name."""
    if (reason := cuda_impl.import_error()) is not None:
        pytest.skip(reason)
    if (cuobjdump := find_cuobjdump()) is None:
        pytest.skip("no cuobjdump")
    command = [cuobjdump, "-sass", str(cuda_impl.extension().__file__)]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    functions = {}
    for target in re.split(r"^\s*arch = ", listing, flags=re.M)[1:]:
        arch = target.split("\n", 1)[0]
        for part in target.split("Function : ")[1:]:
            name, code = part.split("\n", 1)
            functions[f"{arch} {name}"] = code
    return functions


@pytest.fixture(scope="module")
def products(kernels) -> dict[str, str]:
    """The grouped products among them."""
    if "sm_90a" not in cuda_impl.extension().build_info()["archs"].split():
        pytest.skip("the extension was not built for sm_90a")
    return {name: code for name, code in kernels.items() if "grouped_gemm_kernel" in name}


def test_each_product_uses_the_warpgroup_instruction(products):
    assert len(products) == 2 * 13  # two dtypes
    assert all("HGMMA" in code and "UTMALDG" in code for code in products.values())
    assert not any(re.search(r"\bHMMA\b", code) for code in products.values())


def test_attention_uses_the_warpgroup_instruction(kernels, products):
    attention = [code for name, code in kernels.items() if "attention_kernel" in name]
    assert len(attention) == 2 * 3  # two dtypes, three widths
    assert all("HGMMA" in code and "UTMALDG" in code and not re.search(r"\bHMMA\b", code) for code in attention)


def test_the_router_runs_on_the_tensor_cores(kernels):
    routers = [code for name, code in kernels.items() if "router_kernel" in name]
    assert routers and all("HMMA.16816.F32.BF16" in code for code in routers)


def test_norms_keep_a_row_in_its_group_of_lanes(kernels):
    """Forward: whole words of 16 bytes where there are any, and no barrier, since no row is shared by warps."""
    norms = {name: code for name, code in kernels.items() if re.search(r"(norm_modulate|qk_norm)_kernel", name)}
    assert norms and not [name for name, code in norms.items() if re.search(r"\bBAR\b", code)]
    of_words = [code for name, code in norms.items() if "Li1EEE" not in name]  # one element to a word
    assert len(of_words) >= 2 * 40 and all("LDG.E" in code and ".128" in code for code in of_words)


def test_nothing_spills(kernels):
    spilling = {name: sorted(set(re.findall(r"\b(?:STL|LDL)\b", code))) for name, code in kernels.items()}
    assert not {name: found for name, found in spilling.items() if found}
