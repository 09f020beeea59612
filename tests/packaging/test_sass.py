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
    assert len(products) == 2 * 21  # two dtypes
    assert all("HGMMA" in code and "UTMALDG" in code for code in products.values())
    assert not any(re.search(r"\bHMMA\b", code) for code in products.values())


def test_attention_uses_the_warpgroup_instruction(kernels, products):
    attention = [code for name, code in kernels.items() if "attention_kernel" in name]
    assert len(attention) == 2 * 3  # two dtypes, three widths
    assert all("HGMMA" in code and "UTMALDG" in code and not re.search(r"\bHMMA\b", code) for code in attention)


def test_attention_stores_whole_words_of_16_bytes(kernels):
    """An assignment through a pointer to uint4 had become four stores, which cost 10 % at 256 tokens."""
    attention = {name: re.findall(r"\bSTG\.\S+", code) for name, code in kernels.items() if "attention_kernel" in name}
    assert all(stores and all(".128" in store for store in stores) for stores in attention.values()), attention


def loops(code: str) -> list[list[str]]:
    """The operations between each backward branch and its target, the shortest loops first."""
    instructions = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@\S+\s+)?([A-Z][A-Z0-9_.]+)([^;]*)", code)
    addresses = [int(address, 16) for address, _, _ in instructions]
    found = []
    for i, (_, operation, operands) in enumerate(instructions):
        target = re.search(r"0x([0-9a-f]+)\s*$", operands) if operation.startswith("BRA") else None
        if target is not None and int(target[1], 16) < addresses[i]:
            first = addresses.index(int(target[1], 16))
            found.append([operation for _, operation, _ in instructions[first : i + 1]])
    return sorted(found, key=len)


def test_copies_are_started_by_one_lane_of_a_whole_warp(products):
    """No loop over a warp's lanes around a copy, and no YIELD among the copies of a step: that alone cost 10 %."""
    for name, code in products.items():
        electing = [loop for loop in loops(code) if "ELECT" in loop and any("UTMALDG" in x for x in loop)]
        assert electing and any("PHASECHK" in x for x in electing[0]), f"{name}: a loop over lanes"
        assert "YIELD" not in electing[0], name


def test_operands_stay_in_uniform_registers_beside_the_products(products):
    """At most one move into them in a loop over K; where the compiler holds a warp divided, each operand needs one."""
    for name, code in products.items():
        multiplying = [loop for loop in loops(code) if any("HGMMA" in x for x in loop)]
        assert multiplying and multiplying[0].count("R2UR") <= 1, name


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
