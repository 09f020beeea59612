"""Ahead-of-time compilation of every Triton kernel, without a GPU: it compiles, fits, and uses the tensor cores."""

import functools
import json
import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton")

BUILDS = [("90", "bf16"), ("90", "fp32"), ("80", "fp16")]
# Shared memory of a block: sm_90, and the least of what runs the sm_80 code (sm_86 and sm_89 have 99 KiB).
SHARED_LIMIT = {"90": 227 * 1024, "80": 99 * 1024}
GEMMS = {"_grouped_gemm_kernel", "_grouped_gemm_dw_kernel"}


@functools.cache
def compiled(capability: str, dtype: str) -> list[dict]:
    """The variants that aot_compile.py describes, from a process of its own: here Triton may be interpreting."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    command = [sys.executable, "-m", "tests.kernels.aot_compile", capability, dtype]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def kernel_names() -> set[str]:
    """Every Triton kernel of the library, by the naming rule `_<op>_kernel`."""
    import importlib
    import pkgutil

    import dit_moe_kernels.triton_impl as package

    names = set()
    for module in pkgutil.iter_modules(package.__path__):
        members = vars(importlib.import_module(f"{package.__name__}.{module.name}"))
        names |= {name for name, value in members.items() if name.endswith("_kernel") and hasattr(value, "__getitem__")}
    return names


@pytest.mark.parametrize(("capability", "dtype"), BUILDS)
def test_every_kernel_compiles_and_fits(capability, dtype):
    variants = compiled(capability, dtype)
    assert {variant["kernel"] for variant in variants} == kernel_names()
    for variant in variants:
        assert variant["target"].startswith(f"sm_{capability}")
        assert variant["cubin"] > 0
        assert variant["shared"] <= SHARED_LIMIT[capability], variant


def test_hopper_gemms_use_wgmma_and_tma():
    """Tiles of 128 rows of an aligned 16-bit layer: each product on wgmma, its operands through TMA."""
    gemms = [v for v in compiled("90", "bf16") if v["kernel"] in GEMMS and v["case"] == "128 rows, width 128"]
    assert {variant["kernel"] for variant in gemms} == GEMMS
    assert {v["constants"]["EPILOGUE"] for v in gemms if "EPILOGUE" in v["constants"]} == {"store", "swiglu", "dswiglu"}
    for variant in gemms:
        assert variant["wgmma"] and variant["tma"], variant


def test_hopper_without_aligned_rows_needs_no_tma():
    """Rows of 33 or 50 elements cannot be described to TMA; the pointer path takes over."""
    gemms = [v for v in compiled("90", "bf16") if v["kernel"] in GEMMS and v["case"] == "16 rows, width 33"]
    assert {variant["kernel"] for variant in gemms} == GEMMS
    assert not any(variant["tma"] for variant in gemms)


def test_ampere_gemms_use_its_tensor_cores_only():
    for variant in compiled("80", "fp16"):
        assert not variant["wgmma"] and not variant["tma"], variant
        assert variant["mma"] or variant["kernel"] not in GEMMS, variant


def test_fp32_products_are_not_rounded_to_tf32():
    """With PyTorch's default precision fp32 GEMMs stay off the tensor cores, and nothing asks for one TF32 pass."""
    variants = compiled("90", "fp32")
    assert {variant["kernel"] for variant in variants} >= GEMMS
    for variant in variants:
        assert variant["constants"].get("PRECISION") != "tf32", variant
        assert variant["kernel"] not in GEMMS or not (variant["mma"] or variant["wgmma"]), variant


def test_norms_keep_a_row_in_its_warp():
    """16-bit rows of the model's widths: 16-byte loads, and forward no barrier, since no row is shared by warps."""
    forward, heads = {"_norm_modulate_kernel"}, {"_qk_norm_kernel", "_qk_norm_backward_kernel"}
    backward = {"_norm_modulate_backward_kernel", "_modulation_sums_kernel"}
    for width in (384, 1152, 1408):
        norms = [v for v in compiled("90", "bf16") if v["case"] == f"norms, width {width}"]
        assert {v["kernel"] for v in norms} == forward | backward | heads
        for variant in norms:
            assert variant["vector_load"], variant
            assert not (variant["barrier"] and variant["kernel"] in forward | {"_qk_norm_kernel"}), variant
