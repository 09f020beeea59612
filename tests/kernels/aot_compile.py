"""Compile every Triton kernel for a GPU that is not there, exactly as the launchers would, and describe the results.

Run as `python -m tests.kernels.aot_compile CAPABILITY DTYPE`, e.g. `90 bf16`, without TRITON_INTERPRET. The launchers
run on CPU tensors; a stand-in for Triton's driver names the GPU, and every launch stops after compilation. Prints one
JSON line per compiled variant: kernel, constants, shared memory in bytes, and which instructions its PTX holds.
"""

from __future__ import annotations

import json
import re
import sys

import torch
import triton
from dit_moe_kernels import configs, make_routing_plan
from dit_moe_kernels.triton_impl import (
    common,
    counting,
    expert_ffn,
    grouped_gemm,
    grouped_gemm_dw,
    norm_modulate,
    permute,
    qk_norm,
    router,
    router_gradients,
    routing,
    swiglu,
    updates,
)
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
INSTRUCTIONS = {
    "wgmma": "wgmma.mma_async",
    "mma": "mma.sync",
    "tma": "cp.async.bulk.tensor",
    "cp_async": "cp.async.cg",
    "barrier": "bar.sync",
    "vector_load": "ld.global.v4.b32",
}
_case: dict[str, str] = {}  # what launch_everything is at, for the descriptions


class AbsentGPU:
    """What `JITFunction.run` asks of a driver up to the compilation."""

    def __init__(self, capability: int) -> None:
        self._target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def install(capability: int) -> None:
    """Make launchers believe in the GPU and print a description instead of launching."""
    triton.runtime.driver.set_active(AbsentGPU(capability))
    common.capability = lambda index: divmod(capability, 10)
    common.num_sms = lambda index: 132
    original = JITFunction.run
    seen = set()

    def compile_only(self: JITFunction, *args, grid, warmup: bool, **kwargs):
        compiled = original(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            print(json.dumps(describe(self, kwargs, compiled)), flush=True)
        return compiled

    JITFunction.run = compile_only


def describe(kernel: JITFunction, constants: dict, compiled) -> dict:
    """What the tests look at, of one compiled variant."""
    ptx = compiled.asm["ptx"]
    return {
        "kernel": kernel.__name__,
        **_case,
        "constants": {name: value for name, value in constants.items() if isinstance(value, (int, str))},
        "target": re.search(r"^\.target (\w+)", ptx, re.MULTILINE).group(1),
        "shared": compiled.metadata.shared,
        "cubin": len(compiled.asm["cubin"]),
        **{name: instruction in ptx for name, instruction in INSTRUCTIONS.items()},
    }


def launch_everything(dtype: torch.dtype) -> None:
    """Call each launcher on the shapes of a large aligned layer, of a small one, and on widths nothing divides."""
    for tokens, tile_rows, width, hidden in [(64, 128, 128, 256), (8, 16, 128, 256), (8, 16, 33, 50)]:
        _case["case"] = f"{tile_rows} rows, width {width}"
        ids = torch.zeros(tokens, 2, dtype=torch.int32)
        plan = make_routing_plan(ids, 4, tile_rows=tile_rows, backend="reference")
        rows = 2 * tokens
        x, y, grad = (torch.zeros(n, width, dtype=dtype) for n in (tokens, rows, tokens))
        w13, w2 = torch.zeros(4, 2 * hidden, width, dtype=dtype), torch.zeros(4, width, hidden, dtype=dtype)
        h, a = torch.zeros(rows, 2 * hidden, dtype=dtype), torch.zeros(rows, hidden, dtype=dtype)
        weights = torch.zeros(tokens, 2)
        tiles = (plan.expert_offsets, plan.tile_expert, plan.tile_row, tile_rows)
        maps = (plan.expert_offsets, plan.row_to_slot, plan.slot_to_row, plan.tile_expert, plan.tile_row, tile_rows)

        grouped_gemm.grouped_gemm(y, w13, *tiles)
        grouped_gemm.grouped_gemm_dx(h, w13, *tiles)
        grouped_gemm_dw.grouped_gemm_dw(h, y, plan.expert_offsets)
        for save_h in (True, False):
            expert_ffn.expert_ffn(x, w13, w2, weights, *maps, save_h)
        expert_ffn.expert_ffn_backward(grad, h, x, w13, w2, weights, *maps)
        routing.routing_plan(ids, 4, tile_rows)
        probs, gate = torch.zeros(tokens, 4), torch.zeros(4, width, dtype=dtype)
        router.router_logits(x, gate)
        for added, k_rows in ((None, None), (y, plan.slot_to_row)):
            router_gradients.router_gradients(probs, x, gate, added, k_rows, True, True)
        router.topk_softmax(probs, 2)
        router.topk_softmax_backward(weights, probs, ids, probs)
        by_image, by_step, by_patch = (
            torch.zeros(size, dtype=torch.int32) for size in ((9, 3, 4), (2, 3, 5, 4), (2, 3, 4, 4))
        )
        for step_patch in (None, by_step):
            counting.count_routing(ids, ids[0], by_image, by_step, by_patch, step_patch, 1, 5, 0, 1)
        permute.permute(x, plan.row_to_slot, 2)
        for addend in (None, x):
            permute.unpermute(y, weights, plan.slot_to_row, 2, addend)
        permute.unpermute(y, None, plan.slot_to_row, 2)
        permute.unpermute_backward(x, y, weights, plan.row_to_slot)
        swiglu.swiglu(h)
        swiglu.swiglu_backward(a, h)
    _case["case"] = "updates"
    state, scalars = torch.zeros(5000, dtype=dtype), torch.ones(4)
    updates.adamw_(state, state, state, state, scalars, 2**40, 1, 2, 1e-4, 0.9, 0.999, 0.0, 1e-8)
    updates.average_(state, state, 0.1, 2**40, 1, 2, 1024)
    for width, heads in [(384, 6), (1152, 16), (1408, 16), (66, 2)]:
        _case["case"] = f"norms, width {width}"
        launch_norms(torch.zeros(2, 8, width, dtype=dtype), torch.zeros(2, 8, 3, heads, width // heads, dtype=dtype))
    for tile_rows in sorted(set(configs.TILE_ROWS) - {16, 128}):
        _case["case"] = f"{tile_rows} rows, width 128"
        plan = make_routing_plan(torch.zeros(64, 1, dtype=torch.int32), 4, tile_rows=tile_rows, backend="reference")
        tiles = (plan.expert_offsets, plan.tile_expert, plan.tile_row, tile_rows)
        grouped_gemm.grouped_gemm(torch.zeros(64, 128, dtype=dtype), torch.zeros(4, 256, 128, dtype=dtype), *tiles)


def launch_norms(x: torch.Tensor, qkv: torch.Tensor) -> None:
    """The norms around attention and experts, with and without a residual."""
    vectors = torch.zeros(2, 3, x.shape[2], dtype=x.dtype)
    gate, shift, scale = vectors.unbind(1)
    residual = {"gate": gate, "y": x}
    norm_modulate.norm_modulate(x, shift, scale, 1e-6, x.dtype)
    norm_modulate.norm_modulate(x, shift, scale, 1e-6, x.dtype, **residual, total=x)
    norm_modulate.norm_modulate_backward(x, x, scale, 1e-6, x, gate, gate)
    norm_modulate.norm_modulate_backward(x, x, scale, 1e-6, x, gate, gate, **residual, dsum=x, dy=x, dgate=gate)
    q, k, _ = qkv.flatten(0, 1).unbind(1)
    weight = torch.zeros(q.shape[-1], dtype=x.dtype)
    out = q.contiguous()
    qk_norm.qk_norm(q, k, [weight] * 4, 1e-6, out, out)
    qk_norm.qk_norm_backward(out, out, q, k, weight, weight, 1e-6, out, out)


if __name__ == "__main__":
    install(int(sys.argv[1]))
    launch_everything(DTYPES[sys.argv[2]])
