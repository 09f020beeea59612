"""Build of the optional CUDA extension `dit_moe_kernels._C`; all other metadata is in pyproject.toml.

nvcc is looked for in $CUDA_HOME/bin and on PATH. Without it the install is pure Python and says so. With it, a compile
error fails the build. PyTorch is not needed, a GPU is not needed, and nothing is downloaded.

Environment:
    DIT_MOE_SKIP_CUDA=1      install without the extension even where nvcc is found.
    DIT_MOE_REQUIRE_CUDA=1   make a missing nvcc an error.
    DIT_MOE_CUDA_ARCHS       GPU architectures, separated by ";" (default "80;90"); PTX of the newest is added. 90 (or
                             90a) also compiles the grouped products, which exist for sm_90a alone.
    MAX_JOBS                 upper bound on parallel nvcc processes.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, PlatformError

CSRC = "csrc"
SOURCES = (
    "router.cu",
    "router_gradients.cu",
    "routing_plan.cu",
    "topk_softmax.cu",
    "norm_modulate.cu",
    "norm_modulate_backward.cu",
    "qk_norm.cu",
    "permute.cu",
    "swiglu.cu",
    "unpermute.cu",
    "python_module.cpp",
)
SM90A_SOURCES = (
    "sm90/attention.cu",
    "sm90/grouped_dswiglu.cu",
    "sm90/grouped_gemm.cu",
    "sm90/grouped_gemm_dw.cu",
    "sm90/grouped_gemm_dx.cu",
    "sm90/grouped_swiglu.cu",
    "sm90/routed_ffn.cu",
)
DEFAULT_ARCHS = "80;90"
MEMORY_PER_JOB = 2 << 30  # bytes; one nvcc process stays below this
NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "--compiler-options=-fPIC,-fvisibility=hidden,-Wall,-Wextra",
)


def env_flag(name: str) -> bool:
    """An on/off environment variable: unset, empty and 0 are off, 1 is on."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise PlatformError(f"environment variable {name}: got {value!r}, expected 0 or 1")
    return value == "1"


def find_nvcc() -> str | None:
    """Path of nvcc in $CUDA_HOME/bin, else on PATH, else None."""
    cuda_home = os.environ.get("CUDA_HOME")
    in_cuda_home = shutil.which("nvcc", path=os.path.join(cuda_home, "bin")) if cuda_home else None
    return in_cuda_home or shutil.which("nvcc")


def parse_archs(text: str) -> list[str]:
    """ "80;90a" -> ["80", "90a"], in ascending order."""
    archs = {arch.strip() for arch in text.split(";") if arch.strip()}
    if not archs or any(not re.fullmatch(r"\d{2,3}[af]?", arch) for arch in archs):
        raise PlatformError(f"DIT_MOE_CUDA_ARCHS: got {text!r}, expected numbers like '80;90' or '90a'")
    return sorted(archs, key=lambda arch: (int(arch.rstrip("af")), arch))


def gencode_flags(archs: list[str]) -> tuple[list[str], str]:
    """nvcc's target flags and their description: machine code for each arch, PTX for the newest that is portable."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    described = [f"sm_{arch}" for arch in archs]
    portable = [arch for arch in archs if arch.isdigit()]  # PTX for "90a" runs nowhere but on sm_90
    if portable:
        flags.append(f"-gencode=arch=compute_{portable[-1]},code=compute_{portable[-1]}")
        described.append(f"compute_{portable[-1]}")
    return flags, " ".join(described)


def for_hopper(archs: list[str]) -> bool:
    """Whether the sources that need sm_90a are part of the build."""
    return "90" in archs or "90a" in archs


def max_jobs(num_sources: int) -> int:
    """Parallel nvcc processes: no more than sources, processors, MAX_JOBS and what memory allows."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    return max(1, min(num_sources, limit, memory // MEMORY_PER_JOB))


class BuildCuda(build_ext):
    """Compiles each source with nvcc and links them with the static CUDA runtime."""

    def build_extension(self, ext: Extension) -> None:
        """Build `ext` into the place that setuptools wants (in the source tree for an editable install)."""
        nvcc = find_nvcc()
        assert nvcc is not None, "the extension is only declared where nvcc is found"
        output = Path(self.get_ext_fullpath(ext.name))
        objects_dir = Path(self.build_temp)
        for folder in (output.parent, objects_dir):
            folder.mkdir(parents=True, exist_ok=True)
        archs = parse_archs(os.environ.get("DIT_MOE_CUDA_ARCHS") or DEFAULT_ARCHS)
        gencode, described = gencode_flags(archs)
        sm90a: dict[str, list[str]] = {}
        if for_hopper(archs):
            flags, name = gencode_flags(["90a"])
            sm90a = {f"{CSRC}/{source}": flags for source in SM90A_SOURCES}
            described = " ".join(dict.fromkeys([*described.split(), name]))
        defines = [f'-DDIT_MOE_BUILD_ARCHS="{described}"', f"-DDIT_MOE_SM90A={bool(sm90a):d}"]
        common = [nvcc, *NVCC_FLAGS, *defines, *(f"-I{folder}" for folder in ext.include_dirs)]
        sources = [*sm90a, *ext.sources]  # the long compiles first, so that none is left for the end
        objects = [str(objects_dir / f"{Path(source).stem}.o") for source in sources]
        compiles = [
            [*common, *sm90a.get(source, gencode), "-c", source, "-o", target]
            for source, target in zip(sources, objects, strict=True)
        ]
        with ThreadPoolExecutor(max_jobs(len(compiles))) as pool:
            list(pool.map(self._run, compiles))
        # The runtime's symbols stay private: PyTorch brings its own copy of the library into the same process.
        self._run([nvcc, "-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL", *objects, "-o", str(output)])

    def _run(self, command: list[str]) -> None:
        print(shlex.join(command), flush=True)
        try:
            subprocess.run(command, check=True)
        except subprocess.CalledProcessError as error:
            raise CompileError(
                f"nvcc failed with exit status {error.returncode}; DIT_MOE_SKIP_CUDA=1 installs without the extension"
            ) from error


def cuda_extensions() -> list[Extension]:
    """The extension where it can be built; otherwise nothing, or an error where it is required."""
    skip, require = env_flag("DIT_MOE_SKIP_CUDA"), env_flag("DIT_MOE_REQUIRE_CUDA")
    if skip and require:
        raise PlatformError("DIT_MOE_SKIP_CUDA=1 and DIT_MOE_REQUIRE_CUDA=1 contradict each other")
    if skip or find_nvcc() is None:
        reason = "DIT_MOE_SKIP_CUDA=1" if skip else "no nvcc in $CUDA_HOME/bin or on PATH"
        if require:
            raise PlatformError(f"DIT_MOE_REQUIRE_CUDA=1, but {reason}")
        print(f"dit-moe: {reason}: installing without the CUDA extension", file=sys.stderr, flush=True)
        return []
    import pybind11  # a build requirement only where the extension is built

    return [
        Extension(
            "dit_moe_kernels._C",
            sources=[f"{CSRC}/{name}" for name in SOURCES],
            depends=[str(path) for path in sorted(Path(CSRC).rglob("*")) if path.is_file()],
            include_dirs=[f"{CSRC}/include", pybind11.get_include(), *python_include_dirs()],
        )
    ]


def python_include_dirs() -> list[str]:
    """The folders of Python.h."""
    import sysconfig

    paths = sysconfig.get_paths()
    return sorted({paths["include"], paths["platinclude"]})


setup(
    packages=find_packages(include=["dit_moe", "dit_moe.*"]) + find_packages("kernels"),
    package_dir={"dit_moe_kernels": "kernels/dit_moe_kernels"},
    package_data={"dit_moe": ["py.typed", "analysis/*.j2", "recipes/*.yaml"], "dit_moe_kernels": ["py.typed", "*.pyi"]},
    ext_modules=cuda_extensions(),
    cmdclass={"build_ext": BuildCuda},
)
