"""Small cases of every op on a GPU, for NVIDIA's memory and race checkers.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python tests/run_sanitizer.py
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/run_sanitizer.py

Without PyTorch's caching allocator every tensor is an allocation of its own, so that an access outside it is seen.
Runs both kernel backends, forward and backward, on sizes that leave every tile partly empty. Takes no arguments; the
results themselves are checked by pytest.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "kernels")]

import torch  # noqa: E402
from dit_moe_kernels import (  # noqa: E402
    availability,
    expert_ffn,
    grouped_gemm,
    make_routing_plan,
    norm_modulate,
    permute,
    qk_norm,
    residual_norm_modulate,
    routed_ffn,
    router_logits,
    self_attention,
    swiglu,
    topk_softmax,
    unpermute,
)
from dit_moe_kernels.cuda_impl.grouped_gemm_dw import add_grouped_gemm_dw  # noqa: E402

# tokens, experts, choices, model width, expert width, tile height
SIZES = [(37, 4, 2, 72, 48, 16), (9, 3, 3, 33, 50, 16), (1, 8, 2, 40, 48, 16), (150, 2, 1, 64, 136, 128)]
# images, tokens, width: in registers, narrow and wide, and in memory, by words and by elements
NORM_SIZES = [(2, 5, 72), (3, 7, 33), (1, 19, 384), (2, 3, 1152), (1, 2, 2104)]
# images, tokens, heads, width; the last in pairs of blocks
ATTENTION_SIZES = [(1, 128, 1, 72), (140, 256, 1, 64), (2, 384, 3, 88), (35, 512, 2, 72)]
# tokens, experts, choices, widths: several tiles for each block of a product, alone and, where the width is large, in
# pairs, some of whose tiles are split or half empty; in the third the gradient of SwiGLU too; in the fourth products
# have three consumers. The last three have few rows an expert, so that without gradients tiles are narrow; in the last
# kernels start while others are running.
MANY_TILES = [
    (1200, 4, 2, 64, 1216),
    (1200, 8, 2, 512, 1216),
    (4200, 1, 1, 512, 1216),
    (2200, 1, 1, 2304, 192),
    (400, 8, 2, 64, 1216),
    (400, 8, 2, 2304, 96),
    (200, 8, 2, 512, 1216),
]
# height and width: stored beside the next tile's products, added to with three consumers, and turned; several tiles for
# each block
WEIGHT_SIZES = [(184, 4904), (2456, 360)]
HEAD_SIZES = [(2, 5, 3, 72), (1, 3, 2, 24), (1, 9, 5, 128)]  # images, tokens, heads, width


def run_layer(size: tuple[int, ...], dtype: torch.dtype, permute_backend: str) -> None:
    """One forward and backward of the fused and of the unfused layer; every third slot is not routed."""
    tokens, experts, top_k, width, hidden, tile_rows = size
    x = torch.randn(tokens, width, device="cuda", dtype=dtype, requires_grad=True)
    gate = torch.randn(experts, width, device="cuda", requires_grad=True)
    w13 = torch.randn(experts, 2 * hidden, width, device="cuda", dtype=dtype, requires_grad=True)
    w2 = torch.randn(experts, width, hidden, device="cuda", dtype=dtype, requires_grad=True)
    weights, ids, probs = topk_softmax(router_logits(x, gate, backend="triton"), top_k, backend="triton")
    ids = ids.clone()  # the softmax keeps its own for the backward
    ids.view(-1)[::3] = -1
    plan = make_routing_plan(ids, experts, tile_rows=tile_rows, backend="triton")
    fused = expert_ffn(x, w13, w2, weights, plan, backend="triton")
    h = grouped_gemm(permute(x, plan, backend=permute_backend), w13, plan, backend="triton")
    y = grouped_gemm(swiglu(h, backend=permute_backend), w2, plan, backend="triton")
    unfused = unpermute(y, plan, weights, backend=permute_backend)
    summed = unpermute(y, plan, addend=x, backend=permute_backend)
    (fused.float().sum() + unfused.float().sum() + summed.float().sum() + probs.square().sum()).backward()
    if permute_backend == "cuda" and dtype != torch.float32 and width % 8 == hidden % 8 == 0:
        # The CUDA products and their gradients, and the whole layer in one call, on Hopper.
        leaf = weights.detach().requires_grad_()  # the graph behind the weights is spent
        expert_ffn(x, w13, w2, leaf, plan, backend="cuda").sum().backward()
        torch.ops.dit_moe.linear_swiglu(x, w13[0], True, "cuda")[0].sum().backward()
        with torch.no_grad():
            routed_ffn(x, gate, w13, w2, top_k, addend=x, backend="cuda")
            torch.ops.dit_moe.linear_swiglu(x, w13[0], False, "cuda")
            torch.ops.dit_moe.grouped_gemm_dx(h, w13, *plan[1:2], *plan[4:7], "cuda")
    torch.cuda.synchronize()


def run_many_tiles(dtype: torch.dtype) -> None:
    """The routed layer in CUDA and its gradients where a block of a product goes from tile to tile, on Hopper."""
    for tokens, experts, top_k, width, hidden in MANY_TILES:
        x = torch.randn(tokens, width, device="cuda", dtype=dtype, requires_grad=True)
        gate = torch.randn(experts, width, device="cuda", dtype=dtype, requires_grad=True)
        w13 = torch.randn(experts, 2 * hidden, width, device="cuda", dtype=dtype, requires_grad=True)
        w2 = torch.randn(experts, width, hidden, device="cuda", dtype=dtype, requires_grad=True)
        routed = routed_ffn(x, gate, w13, w2, top_k, addend=x, balance_alpha=1.0, backend="cuda")
        assert routed.balance_loss is not None
        (routed.out.float().sum() + routed.balance_loss).backward()
        with torch.no_grad():
            routed_ffn(x, gate, w13, w2, top_k, backend="cuda")
        torch.cuda.synchronize()


def run_weight_gradients(dtype: torch.dtype) -> None:
    """Those that no layer above takes, of seven experts."""
    offsets = torch.tensor([0, 100, 100, 163, 164, 300, 370, 400], device="cuda", dtype=torch.int32)
    for height, width in WEIGHT_SIZES:
        grad = torch.randn(410, height, device="cuda", dtype=dtype)
        x = torch.randn(410, width, device="cuda", dtype=dtype)
        dw = torch.ops.dit_moe.grouped_gemm_dw(grad, x, offsets, "cuda")
        add_grouped_gemm_dw(dw, grad, x, offsets)
    torch.cuda.synchronize()


def run_norms(dtype: torch.dtype, backend: str) -> None:
    """Forward and backward of the norms in one dtype, and as under autocast: an fp32 stream, fp32 weights of heads."""
    for images, tokens, width in NORM_SIZES:
        for stream in {dtype, torch.float32}:
            x = torch.randn(images, tokens, width, device="cuda", dtype=stream, requires_grad=True)
            y = torch.randn(images, tokens, width, device="cuda", dtype=dtype, requires_grad=True)
            vectors = torch.randn(images, 3, width, device="cuda", dtype=dtype, requires_grad=True)
            gate, shift, scale = vectors.unbind(1)
            with torch.autocast("cuda", dtype, enabled=dtype != stream):
                total, out = residual_norm_modulate(x, gate, y, shift, scale, backend=backend)
                alone = norm_modulate(x, shift, scale, backend=backend)
            (total.float().sum() + out.float().sum() + alone.float().sum()).backward()
    for images, tokens, heads, width in HEAD_SIZES:
        for weight_dtype in {dtype, torch.float32}:
            qkv = torch.randn(images, tokens, 3, heads, width, device="cuda", dtype=dtype, requires_grad=True)
            weights = torch.randn(4, width, device="cuda", dtype=weight_dtype, requires_grad=True)
            q, k = qk_norm(*qkv.unbind(2)[:2], *weights.unbind(), backend=backend)
            (q.float().sum() + k.float().sum()).backward()
    torch.cuda.synchronize()


def run_attention(dtype: torch.dtype) -> None:
    """The kernel that normalises queries and keys too, with more heads than multiprocessors and with fewer."""
    for images, tokens, heads, width in ATTENTION_SIZES:
        qkv = torch.randn(images, tokens, 3, heads, width, device="cuda", dtype=dtype)
        for weight_dtype, scale in ((dtype, 1.0), (torch.float32, 0.3)):  # scores without a bound, and with one
            weights = scale * torch.randn(4, width, device="cuda", dtype=weight_dtype)
            self_attention(qkv, weights.unbind(), backend="cuda")
    torch.cuda.synchronize()


def main() -> int:
    """Run every size in every dtype on each backend that can run; 1 if a backend is missing."""
    missing = 0
    for backend in ("triton", "cuda"):
        reason = availability(backend)
        if reason is not None:
            print(f"{backend}: not run: {reason}")
            missing = 1
            continue
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for size in SIZES:
                run_layer(size, dtype, backend)
            run_norms(dtype, backend)
            if backend == "cuda" and dtype != torch.float32:
                run_attention(dtype)
                run_many_tiles(dtype)
                run_weight_gradients(dtype)
        print(f"{backend}: {len(SIZES)} layers and {len(NORM_SIZES) + len(HEAD_SIZES)} norms in 3 dtypes")
    return missing


if __name__ == "__main__":
    sys.exit(main())
