"""Choosing a backend: by argument, by context manager, by environment variable, or by what can run."""

import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from dit_moe_kernels import (
    BACKENDS,
    BackendUnavailableError,
    availability,
    backends,
    expert_ffn,
    grouped_gemm,
    make_routing_plan,
    norm_modulate,
    permute,
    swiglu,
    use_backend,
)

from tests.kernels.util import BF16, FP32, FP64, INTERPRETED


def resolved(
    backend: str = "auto", family: str = "swiglu", device: str = "cpu", dtype: torch.dtype = FP32, **traits: bool
) -> str:
    return backends.resolve(backend, family, device, dtype, **traits)


def test_the_reference_always_runs():
    assert "reference" in BACKENDS
    assert availability("reference", "cpu") is None
    assert availability("reference", "cuda") is None


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_missing_backend_says_why(backend):
    reason = availability(backend, "cpu")
    if reason is None:
        assert backend == "triton" and INTERPRETED
    else:
        assert isinstance(reason, str) and len(reason) > 10
    if not torch.cuda.is_available():
        assert isinstance(availability(backend, "cuda"), str)


@pytest.mark.parametrize(
    "call", [lambda: availability("fast"), lambda: resolved("fast"), lambda: use_backend("fast").__enter__()]
)
def test_an_unknown_name_is_an_error(call):
    with pytest.raises(ValueError, match="'fast'.*expected.*reference"):
        call()


def test_a_backend_asked_for_by_name_never_falls_back():
    x = torch.randn(4, 6)
    vectors = torch.randn(4, 6)
    with pytest.raises(BackendUnavailableError, match="cuda.*norm"):
        norm_modulate(x[:, None], vectors, vectors, backend="cuda")  # the tensors are on the CPU, as below
    plan = make_routing_plan(torch.zeros(4, 1, dtype=torch.int32), 1, backend="reference")
    with pytest.raises(BackendUnavailableError, match="cuda"):
        permute(x, plan, backend="cuda")


def test_kernels_refuse_float64_and_auto_takes_the_reference():
    x = torch.randn(4, 6, dtype=FP64)
    with pytest.raises(BackendUnavailableError, match="float64"):
        swiglu(x, backend="triton")
    assert swiglu(x).dtype == FP64
    assert resolved(dtype=FP64) == "reference"


def test_the_context_manager_nests_and_ends():
    before = resolved()
    with use_backend("reference"):
        assert resolved() == "reference"
        with pytest.raises(KeyError), use_backend("auto"):
            assert resolved() == before
            raise KeyError
        assert resolved() == "reference"
    assert resolved() == before


def test_an_argument_wins_over_the_context():
    with use_backend("reference"), pytest.raises(BackendUnavailableError):
        swiglu(torch.randn(4, 6), backend="cuda")


def test_the_context_belongs_to_its_thread():
    seen = []
    default = resolved()
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(resolved()))
        thread.start()
        thread.join()
    assert seen == [default]


def test_the_environment_variable(monkeypatch):
    monkeypatch.setenv("DIT_MOE_BACKEND", "reference")
    assert resolved() == "reference"
    monkeypatch.setenv("DIT_MOE_BACKEND", "fast")
    with pytest.raises(ValueError, match="DIT_MOE_BACKEND.*'fast'"):
        resolved()
    with use_backend("reference"):
        assert resolved() == "reference"


@pytest.mark.skipif(not INTERPRETED, reason="needs two backends on the CPU")
def test_the_backward_runs_on_the_backend_of_the_forward(monkeypatch):
    """Also outside the context manager, and on autograd's own thread."""
    from dit_moe_kernels.triton_impl import swiglu as kernels

    calls = []
    original = kernels.swiglu_backward
    monkeypatch.setattr(kernels, "swiglu_backward", lambda *args: calls.append(1) or original(*args))
    x = torch.randn(3, 8, requires_grad=True)
    with use_backend("triton"):
        out = swiglu(x)
    with use_backend("reference"):
        out.sum().backward()
    assert calls == [1]


def test_auto_says_once_what_it_chose(caplog):
    backends._choose.cache_clear()
    with caplog.at_level(logging.INFO, logger="dit_moe_kernels"):
        swiglu(torch.randn(4, 6))
        swiglu(torch.randn(4, 6))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1
    assert "swiglu" in messages[0] and resolved() in messages[0]


@pytest.mark.gpu
def test_auto_prefers_kernels_on_a_gpu():
    assert resolved(family="updates", device="cuda") == "triton"
    expected = "cuda" if availability("cuda") is None else "triton"
    for family in ("router", "routing", "permute", "swiglu", "norm"):
        assert resolved(family=family, device="cuda") == expected
    assert resolved(family="router", device="cuda", num_experts=65) == "triton"
    assert resolved(family="norm", device="cuda", refusal="mixed") == "triton"
    hopper = torch.cuda.get_device_capability() == (9, 0)
    for family in ("grouped_gemm", "linear_swiglu", "attention", "expert_ffn"):
        assert resolved(family=family, device="cuda", dtype=BF16) == (expected if hopper else "triton")
        assert resolved(family=family, device="cuda", dtype=FP32) == "triton"
        assert resolved(family=family, device="cuda", dtype=BF16, whole_chunks=False) == "triton"


def test_what_only_the_op_knows_refuses_cuda_alone(monkeypatch):
    """As if the extension and Triton were there, on this machine's device."""
    monkeypatch.setattr(backends, "availability", lambda backend, device: None)
    caches = backends._reason_against, backends._choose
    try:
        for cache in caches:
            cache.cache_clear()
        assert resolved(family="norm") == "cuda"
        assert (
            resolved(family="norm", refusal="mixed dtypes") == resolved("triton", "norm", refusal="mixed") == "triton"
        )
        with pytest.raises(BackendUnavailableError, match="'cuda' cannot run norm: mixed dtypes"):
            resolved("cuda", "norm", refusal="mixed dtypes")
    finally:
        for cache in caches:
            cache.cache_clear()


def test_products_of_other_widths_are_refused_with_the_reason(monkeypatch):
    """As if the extension were there, on this machine's device, and Triton were not."""
    from dit_moe_kernels.cuda_impl import grouped_gemm as kernels

    reasons = {"triton": "no Triton"}
    monkeypatch.setattr(backends, "availability", lambda backend, device: reasons.get(backend))
    monkeypatch.setattr(kernels, "unsupported", lambda device, dtype, whole_chunks: None if whole_chunks else "widths")
    backends._reason_against.cache_clear()
    try:
        for family in ("grouped_gemm", "linear_swiglu", "attention", "expert_ffn"):
            assert resolved("cuda", family, dtype=BF16) == "cuda"
            with pytest.raises(BackendUnavailableError, match=f"'cuda' cannot run {family}: widths"):
                resolved("cuda", family, dtype=BF16, whole_chunks=False)
    finally:
        backends._reason_against.cache_clear()


def test_a_whole_layer_without_triton():
    """With Triton not importable the library imports and `auto` runs the layer, forward and backward."""
    script = """
import sys
sys.modules["triton"] = None
import torch
import dit_moe_kernels as k
assert not any(name.startswith("triton.") for name in sys.modules)
x = torch.randn(6, 8, requires_grad=True)
w, ids, _ = k.topk_softmax(k.router_logits(x, torch.randn(3, 8)), 2)
plan = k.make_routing_plan(ids, 3)
k.expert_ffn(x, torch.randn(3, 8, 8), torch.randn(3, 8, 4), w, plan).sum().backward()
assert x.grad.isfinite().all()
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=_environment(), timeout=120)


def _environment() -> dict[str, str]:
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    env.pop("TRITON_INTERPRET", None)
    return env


def test_importing_the_library_imports_no_triton_and_touches_no_gpu():
    script = """
import sys, torch
import dit_moe_kernels
assert not any(name.startswith("dit_moe_kernels.triton_impl.") for name in sys.modules)
assert not torch.cuda.is_initialized()
"""
    subprocess.run([sys.executable, "-c", script], check=True, env=_environment(), timeout=120)


@pytest.mark.parametrize("op", [grouped_gemm, expert_ffn], ids=["grouped_gemm", "expert_ffn"])
def test_float64_layers_run_on_the_reference(op):
    plan = make_routing_plan(torch.zeros(4, 1, dtype=torch.int32), 1)
    x, w13, w2 = (torch.randn(size, dtype=FP64) for size in [(4, 6), (1, 10, 6), (1, 6, 5)])
    args = (w13,) if op is grouped_gemm else (w13, w2, torch.ones(4, 1, dtype=FP64))
    assert op(x, *args, plan).dtype == FP64
