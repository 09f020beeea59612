"""Wheels with and without nvcc, the source distribution, and the build's own errors. No network is used."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INPUTS = ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md")
BUILD = "import sys; from setuptools import build_meta as b; print(getattr(b, 'build_' + sys.argv[1])(sys.argv[2]))"


def find_nvcc() -> str | None:
    cuda_home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=f"{cuda_home}/bin") if cuda_home else None) or shutil.which("nvcc")


needs_nvcc = pytest.mark.skipif(find_nvcc() is None, reason="no nvcc in $CUDA_HOME/bin or on PATH")
needs_pybind11 = pytest.mark.skipif(importlib.util.find_spec("pybind11") is None, reason="pybind11 is not installed")
pytestmark = pytest.mark.skipif(importlib.util.find_spec("setuptools") is None, reason="setuptools is not installed")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the build reads, so that nothing is written into the checkout."""
    tree = tmp_path / "tree"
    tree.mkdir()
    for name in INPUTS:
        shutil.copy(ROOT / name, tree)
    for name in ("csrc", "kernels", "dit_moe"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return tree


def build(tree: Path, kind: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the build backend on `tree` for a "wheel" or an "sdist"; the result lies in tree/dist."""
    ours = ("CUDA_HOME", "DIT_MOE_SKIP_CUDA", "DIT_MOE_REQUIRE_CUDA", "DIT_MOE_CUDA_ARCHS")
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    return subprocess.run(
        [sys.executable, "-c", BUILD, kind, str(tree / "dist")],
        cwd=tree,
        env={**clean, **environment},
        capture_output=True,
        text=True,
    )


def built(tree: Path, kind: str, **environment: str) -> tuple[Path, str]:
    """The file that the build made, and what it said on standard error."""
    result = build(tree, kind, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return tree / "dist" / result.stdout.splitlines()[-1], result.stderr


def expected_modules() -> set[str]:
    files = [path.relative_to(ROOT) for path in (ROOT / "dit_moe").rglob("*.py")]
    files += [path.relative_to(ROOT / "kernels") for path in (ROOT / "kernels").rglob("*.py")]
    return {path.as_posix() for path in files}


def test_wheel_without_nvcc_is_pure_python_and_says_so(tree):
    wheel, messages = built(tree, "wheel", PATH="")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "no nvcc" in messages and "without the CUDA extension" in messages
    assert expected_modules() | {"dit_moe/py.typed", "dit_moe_kernels/py.typed", "dit_moe_kernels/_C.pyi"} <= names
    assert not {name.split("/")[0] for name in names if ".dist-info" not in name} - {"dit_moe", "dit_moe_kernels"}


@needs_nvcc
@needs_pybind11
def test_wheel_with_nvcc_holds_the_extension_for_both_architectures(tree, tmp_path):
    wheel, _ = built(tree, "wheel", CUDA_HOME=str(Path(find_nvcc() or "").parent.parent))
    archive = zipfile.ZipFile(wheel)
    (extension,) = (
        name for name in archive.namelist() if name.startswith("dit_moe_kernels/_C.") and name[-4:] != ".pyi"
    )
    assert expected_modules() <= set(archive.namelist())
    # Imported by itself: it needs neither PyTorch nor a driver nor a GPU.
    archive.extract(extension, tmp_path)
    script = "import _C, sys; print(_C.build_info()['archs']); assert 'torch' not in sys.modules"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=(tmp_path / extension).parent, capture_output=True, text=True
    )
    assert result.stdout.split() == ["sm_80", "sm_90", "compute_90", "sm_90a"], result.stderr


@needs_nvcc
@needs_pybind11
def test_without_hopper_there_are_no_grouped_products(tree, tmp_path):
    cuda_home = str(Path(find_nvcc() or "").parent.parent)
    wheel, messages = built(tree, "wheel", CUDA_HOME=cuda_home, DIT_MOE_CUDA_ARCHS="80")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    script = """
import torch
from dit_moe_kernels import cuda_impl
from dit_moe_kernels.cuda_impl import grouped_gemm
assert not hasattr(cuda_impl.extension(), "grouped_gemm")
print(grouped_gemm.unsupported(torch.device("cuda", 0), torch.bfloat16, True))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert "built for sm_80 compute_80, expected sm_90a" in result.stdout, result.stderr


@needs_nvcc
@needs_pybind11
def test_compile_error_fails_the_build(tree):
    for source in [*(tree / "csrc").rglob("*.cu"), *(tree / "csrc").glob("*.cpp")]:
        source.write_text("not C++\n")
    result = build(tree, "wheel", CUDA_HOME=str(Path(find_nvcc() or "").parent.parent), DIT_MOE_CUDA_ARCHS="90")
    assert result.returncode != 0
    assert "nvcc failed" in result.stderr and "DIT_MOE_SKIP_CUDA=1" in result.stderr


def test_sdist_holds_what_a_build_needs(tree):
    sdist, _ = built(tree, "sdist", PATH="")
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    sources = [path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert {*sources, "setup.py", "LICENSE", "kernels/dit_moe_kernels/_C.pyi", "dit_moe/py.typed"} <= names


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"PATH": "", "DIT_MOE_REQUIRE_CUDA": "1"}, "DIT_MOE_REQUIRE_CUDA=1, but no nvcc"),
        ({"DIT_MOE_SKIP_CUDA": "1", "DIT_MOE_REQUIRE_CUDA": "1"}, "contradict"),
        ({"DIT_MOE_SKIP_CUDA": "yes"}, "got 'yes', expected 0 or 1"),
    ],
)
def test_build_errors(tree, environment, message):
    result = build(tree, "wheel", **environment)
    assert result.returncode != 0
    assert message in result.stderr


@needs_nvcc
@needs_pybind11
def test_wrong_architecture_is_named(tree):
    result = build(tree, "wheel", CUDA_HOME=str(Path(find_nvcc() or "").parent.parent), DIT_MOE_CUDA_ARCHS="hopper")
    assert result.returncode != 0
    assert "got 'hopper', expected numbers like '80;90'" in result.stderr
