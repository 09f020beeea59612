"""The compiled module by itself: its signatures, the errors it reports, and why it may be missing."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from dit_moe_kernels import cuda_impl

KERNELS = Path(cuda_impl.__file__).parents[1]
ROW_OPS = {"permute": 4, "unpermute": 5, "unpermute_backward": 6}  # and how many addresses they take
ACTIVATIONS = {"swiglu": 2, "swiglu_backward": 3}
PRODUCTS = {"grouped_gemm": 4, "grouped_gemm_dx": 4, "grouped_gemm_dw": 4, "grouped_swiglu": 5, "grouped_dswiglu": 9}
LAYER = "routed_ffn"
LAYER_FUNCTIONS = {LAYER, "routed_ffn_products", "routed_ffn_workspace"}
ROUTING_OPS = {"router_logits": 3, "topk_softmax": 4, "topk_softmax_backward": 5, "routing_plan": 8, "route": 13}
NORMS = {"norm_modulate": 10, "norm_modulate_backward": 13}
HEAD_NORMS = {"qk_norm": 8, "qk_norm_backward": 9}
ATTENTION = "qk_norm_attention"
NUM_ADDRESSES = {**ROW_OPS, **ACTIVATIONS, **PRODUCTS, **ROUTING_OPS, **NORMS, **HEAD_NORMS}
BAD_DTYPE = 7
FLOAT32, BFLOAT16 = 0, 2
needs_extension = pytest.mark.skipif(cuda_impl.import_error() is not None, reason=str(cuda_impl.import_error()))


def has_products() -> bool:
    return cuda_impl.import_error() is None and "sm_90a" in cuda_impl.extension().build_info()["archs"].split()


needs_products = pytest.mark.skipif(not has_products(), reason="the extension was not built for sm_90a")


def compiled_ops() -> list[str]:
    return [op for op in NUM_ADDRESSES if op not in PRODUCTS or has_products()]


def arguments(
    op: str,
    rows: int = 1,
    width: int = 8,
    top_k: int = 1,
    depth: int = 8,
    experts: int = 1,
    dtype: int | None = None,
    gate_dtype: int = FLOAT32,
    tile_rows: int = 16,
    id_bytes: int = 4,
    tokens: int = 1,
    parts: int = 1,
    heads: int = 1,
    stride: int = 8,
    branch_dtype: int | None = None,
) -> list[float]:
    if op in NORMS:
        dtype = FLOAT32 if dtype is None else dtype
        rest = {
            "norm_modulate": [rows, tokens, width, top_k, 0, 0, 0, 1e-6],
            "norm_modulate_backward": [rows, tokens, width, 0, 0, parts, 1e-6],
        }
        return [0] * NORMS[op] + [*rest[op], dtype, dtype if branch_dtype is None else branch_dtype, 0]
    if op in HEAD_NORMS:
        sizes = [rows, heads, width, stride, width, stride, width, *([parts] if op == "qk_norm_backward" else [])]
        dtype = FLOAT32 if dtype is None else dtype
        return [0] * HEAD_NORMS[op] + [*sizes, 1e-6, dtype, FLOAT32 if branch_dtype is None else branch_dtype, 0]
    if op in ROUTING_OPS:
        dtypes = [FLOAT32 if dtype is None else dtype, gate_dtype]
        rest = {
            "router_logits": [rows, depth, experts, *dtypes],
            "topk_softmax": [rows, experts, top_k],
            "topk_softmax_backward": [rows, experts, top_k],
            "routing_plan": [id_bytes, rows, experts, tile_rows],
            "route": [rows, depth, experts, top_k, tile_rows, 0.5, *dtypes],
        }
        return [0] * ROUTING_OPS[op] + [*rest[op], 0]
    sizes = [rows, width] if op in ACTIVATIONS else [rows, width, top_k, *([0] if op == "permute" else [])]
    if op in PRODUCTS:
        sizes = [rows, depth, width, experts]
    if dtype is None:
        dtype = BFLOAT16 if op in PRODUCTS else FLOAT32
    if op == "grouped_gemm_dw":
        sizes += [1, BFLOAT16]  # added to what is there, which is of that dtype
    return [0] * NUM_ADDRESSES[op] + [*sizes, dtype, 0]


@needs_extension
def test_stub_matches_the_module():
    module = cuda_impl.extension()
    functions = [node for node in ast.parse((KERNELS / "_C.pyi").read_text()).body if isinstance(node, ast.FunctionDef)]
    compiled = {name for name in dir(module) if callable(getattr(module, name))}
    assert {function.name for function in functions} - compiled <= (
        set() if has_products() else {*PRODUCTS, *LAYER_FUNCTIONS, ATTENTION}
    )
    assert compiled <= {function.name for function in functions}
    for function in (function for function in functions if function.name in compiled):
        signature = re.match(rf"{function.name}\((.*)\) -> ", getattr(module, function.name).__doc__)
        assert signature is not None
        names = [part.split(":")[0].strip() for part in signature[1].split(",") if part]
        assert [argument.arg for argument in function.args.args] == names


@needs_extension
@pytest.mark.parametrize("op", ROW_OPS)
@pytest.mark.parametrize(
    "wrong", [{"dtype": BAD_DTYPE}, {"dtype": -1}, {"rows": -1}, {"width": -8}, {"top_k": 0}, {"rows": 2**31}]
)
def test_wrong_arguments_are_refused(op, wrong):
    with pytest.raises(RuntimeError, match=rf"^{op}: CUDA error 1 \(cudaErrorInvalidValue\)"):
        getattr(cuda_impl.extension(), op)(*arguments(op, **wrong))


@needs_extension
@pytest.mark.parametrize("op", ACTIVATIONS)
@pytest.mark.parametrize(
    "wrong", [{"dtype": BAD_DTYPE}, {"rows": -1}, {"rows": 2**31}, {"width": -8}, {"width": 2**31}]
)
def test_wrong_arguments_of_the_activation_are_refused(op, wrong):
    with pytest.raises(RuntimeError, match=rf"^{op}: CUDA error 1 \(cudaErrorInvalidValue\)"):
        getattr(cuda_impl.extension(), op)(*arguments(op, **wrong))


@needs_extension
@pytest.mark.parametrize("op", NORMS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": BAD_DTYPE}, {"dtype": BFLOAT16, "branch_dtype": FLOAT32}, {"dtype": 1, "branch_dtype": BFLOAT16},
        {"rows": -1}, {"rows": 2**31}, {"rows": 2**16, "tokens": 2**16}, {"width": -8}, {"width": 2**31},
    ],
)  # fmt: skip
def test_wrong_arguments_of_the_norms_are_refused(op, wrong):
    with pytest.raises(RuntimeError, match=rf"^{op}: CUDA error 1 \(cudaErrorInvalidValue\)"):
        getattr(cuda_impl.extension(), op)(*arguments(op, **wrong))


@needs_extension
@pytest.mark.parametrize("wrong", [{"top_k": 0}, {"rows": 2**20, "tokens": 2**5, "top_k": 2**6}])
def test_wrong_numbers_of_routed_rows_are_refused(wrong):
    given = arguments("norm_modulate", **wrong)
    given[5] = 16  # slot_to_row
    with pytest.raises(RuntimeError, match=r"^norm_modulate: CUDA error 1 \(cudaErrorInvalidValue\)"):
        cuda_impl.extension().norm_modulate(*given)


@needs_extension
@pytest.mark.parametrize("wrong", [{"parts": 0}, {"parts": 5}, {"tokens": 0}])
def test_an_images_tokens_are_summed_in_one_to_as_many_parts(wrong):
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        cuda_impl.extension().norm_modulate_backward(*arguments("norm_modulate_backward", **{"tokens": 4, **wrong}))


@needs_extension
@pytest.mark.parametrize("op", HEAD_NORMS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": BAD_DTYPE}, {"branch_dtype": BFLOAT16}, {"branch_dtype": BAD_DTYPE}, {"rows": -1}, {"rows": 2**31},
        {"rows": 2**16, "heads": 2**16}, {"heads": -1}, {"width": -8}, {"width": 12}, {"width": 136}, {"stride": 9},
    ],
)  # fmt: skip
def test_wrong_arguments_of_the_norms_of_heads_are_refused(op, wrong):
    with pytest.raises(RuntimeError, match=rf"^{op}: CUDA error 1 \(cudaErrorInvalidValue\)"):
        getattr(cuda_impl.extension(), op)(*arguments(op, **wrong))


@needs_extension
@pytest.mark.parametrize("op", HEAD_NORMS)
def test_addresses_of_heads_must_be_aligned(op):
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        getattr(cuda_impl.extension(), op)(8, *arguments(op)[1:])


@needs_extension
def test_no_head_is_launched_without_rows():
    for empty in ({"rows": 0}, {"heads": 0}, {"width": 0}):
        cuda_impl.extension().qk_norm(*arguments("qk_norm", **empty))
    cuda_impl.extension().qk_norm_backward(*arguments("qk_norm_backward", rows=0, parts=0))


@needs_products
@pytest.mark.parametrize("op", PRODUCTS)
@pytest.mark.parametrize(
    "wrong",
    [
        {"dtype": FLOAT32}, {"dtype": BAD_DTYPE}, {"rows": -1}, {"rows": 2**31}, {"experts": 0}, {"experts": 2**31},
        {"width": 12}, {"width": 0}, {"depth": 12}, {"depth": -8}, {"depth": 2**31},
    ],
)  # fmt: skip
def test_wrong_arguments_of_products_are_refused(op, wrong):
    with pytest.raises(RuntimeError, match=rf"^{op}: CUDA error 1 \(cudaErrorInvalidValue\)"):
        getattr(cuda_impl.extension(), op)(*arguments(op, **wrong))


@needs_products
@pytest.mark.parametrize("op", PRODUCTS)
def test_addresses_of_products_must_be_aligned(op):
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        getattr(cuda_impl.extension(), op)(8, *arguments(op)[1:])


@needs_products
@pytest.mark.parametrize("op", [op for op in PRODUCTS if op != "grouped_gemm_dw"])
def test_rows_of_several_experts_need_offsets(op):
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        getattr(cuda_impl.extension(), op)(*arguments(op, experts=2))


@needs_products
@pytest.mark.parametrize(
    "place, value",
    [
        *((place, -1) for place in range(6, 10)), *((place, 2**31) for place in range(6, 10)),
        (0, 8), (5, 8), (7, 100), (9, 48), (9, 128), (11, FLOAT32), (11, BAD_DTYPE), (12, 1), (12, BAD_DTYPE),
    ],
)  # fmt: skip
def test_wrong_arguments_of_attention_are_refused(place, value):
    given = [0] * 6 + [1, 128, 2, 64, 1e-6, BFLOAT16, FLOAT32, 0]
    given[place] = value
    with pytest.raises(RuntimeError, match=rf"^{ATTENTION}: CUDA error 1 \(cudaErrorInvalidValue\)"):
        getattr(cuda_impl.extension(), ATTENTION)(*given)


@needs_products
@pytest.mark.parametrize("place", [6, 7, 8])
def test_no_attention_is_launched_without_tokens(place):
    given = [0] * 6 + [1, 128, 2, 64, 1e-6, BFLOAT16, FLOAT32, 0]
    given[place] = 0
    getattr(cuda_impl.extension(), ATTENTION)(*given)


@needs_products
@pytest.mark.parametrize("op", PRODUCTS)
def test_no_product_is_launched_without_rows(op):
    getattr(cuda_impl.extension(), op)(*arguments(op, rows=0))


@needs_products
@pytest.mark.parametrize(
    ("dtype", "sum_dtype"), [(1, BFLOAT16), (BFLOAT16, 1), (BFLOAT16, BAD_DTYPE), (FLOAT32, FLOAT32)]
)
def test_sums_of_weight_gradients_are_fp32_or_of_the_same_dtype(dtype, sum_dtype):
    *sizes, _, _, _ = arguments("grouped_gemm_dw")
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        cuda_impl.extension().grouped_gemm_dw(*sizes, sum_dtype, dtype, 0)


@needs_products
@pytest.mark.parametrize("dtype", [FLOAT32, BAD_DTYPE])
def test_weight_gradients_of_other_dtypes_are_refused_without_rows_too(dtype):
    *sizes, _, _, _ = arguments("grouped_gemm_dw", rows=0)
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        cuda_impl.extension().grouped_gemm_dw(*sizes, FLOAT32, dtype, 0)


@needs_extension
@pytest.mark.parametrize(
    "op, wrong",
    [
        *((op, {"rows": rows}) for op in ROUTING_OPS for rows in (-1, 2**31)),
        *((op, {"experts": experts}) for op in ROUTING_OPS for experts in (0, 65 if op != "routing_plan" else 513)),
        *((op, {"depth": depth}) for op in ("router_logits", "route") for depth in (0, 6, -8, 2**31)),
        *((op, {"dtype": BFLOAT16, "depth": 12}) for op in ("router_logits", "route")),
        *((op, {"dtype": dtype}) for op in ("router_logits", "route") for dtype in (-1, BAD_DTYPE)),
        *((op, {"gate_dtype": dtype}) for op in ("router_logits", "route") for dtype in (-1, BFLOAT16, BAD_DTYPE)),
        *((op, {"top_k": top_k}) for op in ("topk_softmax", "topk_softmax_backward", "route") for top_k in (0, 2)),
        *((op, {"tile_rows": 0}) for op in ("routing_plan", "route")),
        ("routing_plan", {"id_bytes": 2}),
    ],
)
def test_wrong_arguments_of_the_routing_are_refused(op, wrong):
    with pytest.raises(RuntimeError, match=rf"^{op}: CUDA error 1 \(cudaErrorInvalidValue\)"):
        getattr(cuda_impl.extension(), op)(*arguments(op, **wrong))


@needs_extension
@pytest.mark.parametrize(
    "wrong",
    [
        {8: -1}, {8: 2**31}, {9: 0}, {9: 6}, {9: 2**27}, {10: 0}, {10: 65}, {11: 0}, {11: 5}, {8: 2**30, 11: 4},
        {13: BAD_DTYPE}, {14: BFLOAT16}, {1: 8}, {2: 8}, {3: 8}, {4: 0}, {5: 8}, {7: 8},
    ],
    ids=str,
)  # fmt: skip
def test_wrong_arguments_of_the_routers_gradients_are_refused(wrong):
    """By their places; with rows of up to as many choices as there are experts, 4."""
    given = [0, 0, 0, 16, 16, 0, 0, 0, 0, 8, 4, 1, 0, FLOAT32, FLOAT32, 0]
    cuda_impl.extension().router_gradients(*given)
    for place, value in wrong.items():
        given[place] = value
    with pytest.raises(RuntimeError, match=r"^router_gradients: CUDA error 1 \(cudaErrorInvalidValue\)"):
        cuda_impl.extension().router_gradients(*given)


@needs_extension
@pytest.mark.parametrize("op", ["router_logits", "route"])
@pytest.mark.parametrize("place", [0, 1])
def test_tokens_and_gate_of_the_router_must_be_aligned(op, place):
    given = arguments(op)
    given[place] = 8
    with pytest.raises(RuntimeError, match="cudaErrorInvalidValue"):
        getattr(cuda_impl.extension(), op)(*given)


@needs_extension
@pytest.mark.parametrize("op", ["router_logits", "topk_softmax", "topk_softmax_backward"])
def test_no_router_is_launched_without_tokens(op):
    getattr(cuda_impl.extension(), op)(*arguments(op, rows=0))


@needs_extension
@pytest.mark.parametrize("op", [*ROW_OPS, *ACTIVATIONS, *NORMS])
@pytest.mark.parametrize("empty", [{"rows": 0}, {"width": 0}])
def test_nothing_is_launched_without_output(op, empty):
    getattr(cuda_impl.extension(), op)(*arguments(op, **empty))  # would fail here without a GPU, and crash with one


LAUNCH_WITHOUT_GPU = """
import json, sys
from dit_moe_kernels import cuda_impl
module, messages = cuda_impl.extension(), {}
for op, arguments in json.loads(sys.argv[1]).items():
    try:
        getattr(module, op)(*arguments)
    except RuntimeError as error:
        messages[op] = str(error)
print(json.dumps(messages))
"""


@needs_extension
def test_a_failed_launch_names_the_op_and_the_error():
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(KERNELS.parent)}
    calls = json.dumps({op: arguments(op) for op in compiled_ops()})
    result = subprocess.run(
        [sys.executable, "-c", LAUNCH_WITHOUT_GPU, calls], env=environment, capture_output=True, text=True
    )
    messages = json.loads(result.stdout)
    assert set(messages) == set(compiled_ops()), result.stderr
    for op, message in messages.items():
        assert re.match(rf"{op}: CUDA error \d+ \(cudaError(NoDevice|InsufficientDriver)\): \w+", message), message


@needs_extension
def test_build_info_names_the_toolkit_and_the_targets():
    info = cuda_impl.extension().build_info()
    assert re.fullmatch(r"\d+\.\d", info["cuda_version"])
    assert all(re.fullmatch(r"(sm|compute)_\d+[af]?", target) for target in info["archs"].split())


@pytest.fixture
def _fresh_load():
    cuda_impl._load.cache_clear()
    yield
    cuda_impl._load.cache_clear()


@pytest.mark.usefixtures("_fresh_load")
def test_missing_extension_has_a_reason(monkeypatch):
    monkeypatch.setattr(cuda_impl, "MODULE", "dit_moe_kernels._not_built")
    assert "nvcc" in cuda_impl.import_error()
    with pytest.raises(ImportError, match="nvcc"):
        cuda_impl.extension()


@pytest.mark.usefixtures("_fresh_load")
def test_unloadable_extension_has_a_reason(monkeypatch, tmp_path):
    (tmp_path / "broken_extension.so").write_bytes(b"not an ELF file")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    monkeypatch.setattr(cuda_impl, "MODULE", "broken_extension")
    assert re.match("the CUDA extension cannot be loaded: .*broken_extension", cuda_impl.import_error())


def layer_arguments(
    rows: int = 4, depth: int = 16, hidden: int = 8, experts: int = 4, top_k: int = 2, dtype: int = BFLOAT16
) -> list[int]:
    return [0] * 9 + [rows, depth, hidden, experts, top_k, dtype, FLOAT32, 0]


@needs_products
@pytest.mark.parametrize(
    "wrong",
    [
        {"rows": -1}, {"rows": 2**30}, {"depth": 12}, {"depth": 2**40}, {"hidden": -8}, {"experts": 65},
        {"top_k": 5}, {"top_k": 0}, {"dtype": BAD_DTYPE},
    ],
)  # fmt: skip
def test_wrong_arguments_of_the_layer_are_refused(wrong):
    given = layer_arguments(**wrong)
    for op, arguments in [(LAYER, given), ("routed_ffn_products", [0, 0, *given])]:  # two addresses more
        with pytest.raises(RuntimeError, match=rf"^{op}: CUDA error 1 \(cudaErrorInvalidValue\)"):
            getattr(cuda_impl.extension(), op)(*arguments)


@needs_products
def test_workspace_of_the_layer_holds_its_parts():
    module = cuda_impl.extension()
    for rows, depth, hidden, experts, top_k in [(0, 16, 8, 4, 2), (1, 8, 8, 1, 1), (4096, 384, 1536, 8, 2)]:
        slots = rows * top_k
        tiles = -(-slots // 128) + min(experts, slots)
        parts = 2 * slots * (depth + hidden) + 4 * (4 * slots + experts + 1 + 2 * tiles) + module.ROUTING_WORKSPACE
        size = module.routed_ffn_workspace(rows, depth, hidden, experts, top_k)
        assert parts <= size <= parts + 256 * 10
        activation = -(-2 * slots * hidden // 256) * 256
        assert module.routed_ffn_workspace(rows, depth, 0, experts, top_k) == size - activation
    with pytest.raises(RuntimeError, match="routed_ffn_workspace"):
        module.routed_ffn_workspace(-1, 8, 8, 1, 1)
