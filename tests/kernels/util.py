"""Helpers of the kernel tests: targets, routing cases, naive oracles, and the 2x rule.

The oracles know nothing of the library: Python lists for the routing, a loop over experts with boolean masks for the
products. They run in any float dtype; in float64 they are the truth, in the tested dtype they are "plain PyTorch".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from dit_moe_kernels import RoutingPlan, make_routing_plan
from torch import Tensor

FP16, BF16, FP32, FP64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
_SHORT = {FP16: "fp16", BF16: "bf16", FP32: "fp32", FP64: "fp64"}

# ---------------------------------------------------------------- where a test runs


@dataclass(frozen=True)
class Target:
    """A backend on a device in a dtype."""

    backend: str
    device: str
    dtype: torch.dtype = FP32

    def __str__(self) -> str:
        return f"{self.backend}-{self.device}-{_SHORT[self.dtype]}"


def targets(
    *kernel_backends: str,
    dtypes: Sequence[torch.dtype] = (FP64, FP32, FP16, BF16),
    reference_on_gpu: bool = True,
) -> list:
    """pytest parameters: the reference on the CPU, and each kernel backend wherever it can run.

    Without a GPU Triton kernels are interpreted, in fp32 and fp16 only: the interpreter is silently wrong in bf16.
    """
    chosen = [Target("reference", "cpu", dtype) for dtype in dtypes]
    if INTERPRETED and "triton" in kernel_backends:
        chosen += [Target("triton", "cpu", dtype) for dtype in dtypes if dtype in (FP32, FP16)]
    on_gpu = [Target(name, "cuda", dtype) for name in kernel_backends for dtype in dtypes if dtype != FP64]
    if reference_on_gpu:
        on_gpu.append(Target("reference", "cuda", dtypes[-1]))
    return [pytest.param(target, id=str(target)) for target in chosen] + [
        pytest.param(target, id=str(target), marks=pytest.mark.gpu) for target in on_gpu
    ]


def gpu_targets(*kernel_backends: str, dtypes: Sequence[torch.dtype] = (BF16,)) -> list:
    """pytest parameters: kernel backends on the GPU only, for shapes too large for the interpreter."""
    chosen = [Target(name, "cuda", dtype) for name in kernel_backends for dtype in dtypes]
    return [pytest.param(target, id=str(target), marks=pytest.mark.gpu) for target in chosen]


# ---------------------------------------------------------------- what is routed where


@dataclass(frozen=True)
class Case:
    """Sizes of one test: tokens T, experts E, choices K, model width D, expert width F, and the kind of routing."""

    name: str
    tokens: int
    num_experts: int
    top_k: int
    width: int
    hidden: int
    routing: str = "random"
    tile_rows: int | None = 16  # fixed, so that the GPU compiles few variants; None leaves it to the library

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("random", 37, 4, 2, 72, 48),
    Case("empty_experts", 20, 8, 2, 40, 48, "odd"),
    Case("one_expert", 40, 4, 1, 40, 48, "last"),
    Case("repeated_expert", 9, 4, 2, 40, 48, "last"),
    Case("E1_K1_odd_widths", 35, 1, 1, 33, 100),
    Case("K_equals_E", 9, 3, 3, 72, 48),
    Case("T0", 0, 4, 2, 40, 48),
    Case("T1", 1, 4, 2, 72, 48),
    Case("unrouted_slots", 21, 4, 2, 33, 100, "some"),
    Case("nothing_routed", 5, 4, 2, 40, 48, "none"),
    Case("several_tiles", 160, 2, 1, 64, 64, tile_rows=64),
]

# For Hopper's branches in the interpreter: rows of whole 16 bytes, experts with one full tile, a part, and nothing.
HOPPER_CASES = [
    Case("part_tiles", 37, 4, 2, 72, 48),
    Case("full_tiles", 300, 3, 1, 72, 136, "skewed", tile_rows=128),
    Case("T0", 0, 4, 2, 72, 48),
    Case("unrouted", 70, 4, 2, 64, 128, "some", tile_rows=64),
]

# Layer shapes of the paper; T as small as a latency run and as one 1024-token image times four.
MODEL_CASES = [
    Case("S_T512", 512, 8, 2, 384, 1536, tile_rows=None),
    Case("XL_T4096", 4096, 8, 2, 1152, 4608, "skewed", tile_rows=None),
    Case("G_T2048", 2048, 16, 2, 1408, 5632, "skewed", tile_rows=None),
]


def make_ids(case: Case, device: str = "cpu") -> Tensor:
    """(T, K) int32 expert ids of a case's kind of routing, reproducible from the global seed."""
    shape = (case.tokens, case.num_experts)
    if case.routing == "last":
        return torch.full((case.tokens, case.top_k), case.num_experts - 1, dtype=torch.int32, device=device)
    scores = torch.rand(shape)
    if case.routing == "odd":
        scores[:, ::2] = -1.0
    if case.routing == "skewed":  # expert e is as likely as 2^-e, so sizes differ by orders of magnitude
        scores = torch.rand(shape).log() * torch.arange(case.num_experts).clamp(max=6).exp2()
    ids = scores.argsort(dim=1, descending=True)[:, : case.top_k].contiguous()
    if case.routing == "some":
        ids[torch.rand(ids.shape) < 0.35] = -1
    if case.routing == "none":
        ids.fill_(-1)
    return ids.to(device, torch.int32)


def make_plan(case: Case, device: str = "cpu") -> tuple[Tensor, RoutingPlan]:
    """Expert ids and their plan, built by the reference: only test_routing.py tests the plan itself."""
    ids = make_ids(case, device)
    return ids, make_routing_plan(ids, case.num_experts, tile_rows=case.tile_rows, backend="reference")


def make_weights(case: Case, dtype: torch.dtype, device: str) -> Tensor:
    """(T, K) router weights in (0, 1): fp32, or fp64 beside fp64."""
    return torch.rand(case.tokens, case.top_k, dtype=FP64 if dtype == FP64 else FP32, device=device) * 0.98 + 0.01


def randn(*shape: int, target: Target, scale: float = 1.0) -> Tensor:
    """Normal numbers in the target's dtype and on its device."""
    return (torch.randn(shape, device=target.device, dtype=FP32) * scale).to(target.dtype)


# ---------------------------------------------------------------- naive oracles


def naive_rows(ids: Tensor, num_experts: int) -> list[tuple[int, int]]:
    """(expert, slot) of each row in use, by a plain sort of Python tuples."""
    return sorted((e, slot) for slot, e in enumerate(ids.flatten().tolist()) if 0 <= e < num_experts)


def naive_topk_softmax(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """topk_weights, topk_ids, probs; equal probabilities in the order of the expert ids."""
    exponentials = (logits - logits.max(dim=1, keepdim=True).values).exp()
    probs = exponentials / exponentials.sum(dim=1, keepdim=True)
    ranked = [sorted(range(len(row)), key=lambda e, row=row: (-row[e], e))[:top_k] for row in probs.tolist()]
    ids = torch.tensor(ranked, dtype=torch.int64, device=logits.device).view(logits.shape[0], top_k)
    return probs.gather(1, ids), ids.int(), probs


def naive_permute(x: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    """(N, D): each row in use is a copy of its token, the others are zero."""
    rows = naive_rows(ids, num_experts)
    tokens = torch.tensor([slot // ids.shape[1] for _, slot in rows], dtype=torch.int64, device=x.device)
    return torch.cat([x[tokens], x.new_zeros(ids.numel() - len(rows), x.shape[1])])


def naive_unpermute(y: Tensor, weights: Tensor | None, ids: Tensor, num_experts: int) -> Tensor:
    """(T, D): each token's rows times its weights, summed in fp32 (fp64 for fp64)."""
    wide = FP64 if y.dtype == FP64 else FP32
    rows = naive_rows(ids, num_experts)
    slots = torch.tensor([slot for _, slot in rows], dtype=torch.int64, device=y.device)
    used = y[: len(rows)].to(wide)
    if weights is not None:
        used = used * weights.flatten()[slots, None]
    out = torch.zeros(ids.shape[0], y.shape[1], dtype=wide, device=y.device)
    return out.index_add(0, slots // ids.shape[1], used).to(y.dtype)


def naive_grouped_gemm(x: Tensor, w: Tensor, ids: Tensor) -> Tensor:
    """(rows in use, O): each row times its expert's weight, expert after expert."""
    counts = [int((ids == expert).sum()) for expert in range(w.shape[0])]
    parts = [rows @ weight.T for rows, weight in zip(x.split(counts), w.unbind(0), strict=True)]
    return torch.cat(parts)


def naive_swiglu(h: Tensor) -> Tensor:
    """silu(gate) * up, the gate being the first half of the columns."""
    half = h.shape[1] // 2
    return F.silu(h[:, :half]) * h[:, half:]


def naive_expert_ffn(x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor) -> Tensor:
    """(T, D): the MoE layer as a loop over experts, each one on the tokens that chose it."""
    out = torch.zeros(x.shape, dtype=FP64 if x.dtype == FP64 else FP32, device=x.device)
    for expert, (up_and_gate, down) in enumerate(zip(w13.unbind(0), w2.unbind(0), strict=True)):
        token, choice = (ids == expert).nonzero(as_tuple=True)
        y = naive_swiglu(x[token] @ up_and_gate.T) @ down.T
        out = out.index_add(0, token, y.to(out.dtype) * weights[token, choice, None])
    return out.to(x.dtype)


# ---------------------------------------------------------------- comparison


def assert_2x(name: str, got: Tensor, exact: Tensor, plain: Tensor) -> None:
    """The error against the truth is below twice that of plain PyTorch in the same dtype, in maximum and in RMS.

    The absolute term, four fp32 roundings of the largest value, is for sums in fp32 in another order, where plain
    PyTorch may be exact by luck. Luck also decides the few worst values of a small tensor, so below 2^16 values the
    maximum may reach what plain PyTorch's RMS error makes likely (4 sigma) plus one rounding of the largest value, and
    below 64 values the factor is 4. In float64 there is no better truth: both agree to 1e-12.
    """
    assert got.shape == exact.shape, f"{name}: got shape {tuple(got.shape)}, expected {tuple(exact.shape)}"
    assert got.dtype == plain.dtype, f"{name}: got {got.dtype}, expected {plain.dtype}"
    if got.numel() == 0:
        return
    error = (got.double() - exact).abs_()
    assert error.isfinite().all(), f"{name}: {int((~got.isfinite()).sum())} of {got.numel()} values are not finite"
    worst = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    most, rms = error.max(), error.norm() / error.numel() ** 0.5
    del error  # the weight gradients of the largest layer are 2 GB each in float64
    usual = (plain.double() - exact).abs_()
    usual_most, usual_rms = usual.max(), usual.norm() / usual.numel() ** 0.5
    del usual

    largest = exact.abs().max()
    floor = 1e-12 * largest.clamp(min=1.0) if got.dtype == FP64 else 4 * 2.0**-24 * largest
    factor, bound = 4 if got.numel() < 64 else 2, usual_most
    if got.numel() < 2**16:
        bound = torch.maximum(bound, 4 * usual_rms) + torch.finfo(got.dtype).eps / 4 * largest
    assert most <= factor * bound + floor, (
        f"{name}: error {most:.3g} at {worst} (got {got[worst]:.6g}, expected {exact[worst]:.6g}), "
        f"plain PyTorch {usual_most:.3g}, largest value {largest:.3g}"
    )
    assert rms <= factor * usual_rms + floor, f"{name}: RMS error {rms:.3g}, plain PyTorch {usual_rms:.3g}"


def evaluate(function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    """The output, then the gradient of each input, which keep their strides."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def check_against(
    naive: Callable[..., Tensor],
    function: Callable[..., Tensor],
    names: Sequence[str],
    inputs: Sequence[Tensor],
    grad: Tensor,
) -> list[Tensor]:
    """Hold output and all gradients of `function` to the 2x rule; returns them.

    Args:
        naive: the oracle, run in float64 and in the inputs' dtype.
        function: what is tested, with the same arguments.
        names: of the inputs, for messages.
        inputs: floating-point tensors, all of which get a gradient.
        grad: of the output.
    """
    got = evaluate(function, inputs, grad)
    exact = evaluate(naive, [tensor.double() for tensor in inputs], grad.double())
    plain = evaluate(naive, inputs, grad)
    for name, *results in zip(["output", *(f"d{name}" for name in names)], got, exact, plain, strict=True):
        assert_2x(name, *results)
    return got


def strided(tensor: Tensor) -> Tensor:
    """The same values in a view whose rows and columns both have gaps."""
    rows, columns = tensor.shape[-2], tensor.shape[-1]
    storage = tensor.new_full((*tensor.shape[:-2], rows * 2, columns * 2 + 1), float("nan"))
    view = storage[..., ::2, 1::2]
    view.copy_(tensor)
    return view
