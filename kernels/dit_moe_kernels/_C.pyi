"""The compiled module, see csrc/python_module.cpp and csrc/include/launch.h.

Tensors are given as addresses (`Tensor.data_ptr()`), the stream as its handle. Nothing is checked but sizes and dtype.
Every launch raises RuntimeError with the op's name and the CUDA error if it fails.
"""

FLOAT32: int
FLOAT16: int
BFLOAT16: int
ROUTING_WORKSPACE: int  # bytes

def permute(
    x: int,
    row_to_slot: int,
    slot_to_row: int,
    out: int,
    num_tokens: int,
    width: int,
    top_k: int,
    dtype: int,
    stream: int,
) -> None: ...
def unpermute(
    y: int,
    weights: int,
    addend: int,
    slot_to_row: int,
    out: int,
    num_tokens: int,
    width: int,
    top_k: int,
    dtype: int,
    stream: int,
) -> None: ...
def unpermute_backward(
    dout: int,
    y: int,
    weights: int,
    row_to_slot: int,
    dy: int,
    dweights: int,
    num_rows: int,
    width: int,
    top_k: int,
    dtype: int,
    stream: int,
) -> None: ...
def swiglu(h: int, out: int, num_rows: int, width: int, dtype: int, stream: int) -> None: ...
def swiglu_backward(dout: int, h: int, dh: int, num_rows: int, width: int, dtype: int, stream: int) -> None: ...
def norm_modulate(
    x: int,
    gate: int,
    y: int,
    shift: int,
    scale: int,
    total: int,
    out: int,
    num_images: int,
    num_tokens: int,
    width: int,
    gate_stride: int,
    shift_stride: int,
    scale_stride: int,
    eps: float,
    dtype: int,
    branch_dtype: int,
    stream: int,
) -> None: ...
def norm_modulate_backward(
    dout: int,
    dsum: int,
    x: int,
    gate: int,
    y: int,
    scale: int,
    dx: int,
    dy: int,
    dshift: int,
    dscale: int,
    dgate: int,
    statistics: int,
    partials: int,
    num_images: int,
    num_tokens: int,
    width: int,
    gate_stride: int,
    scale_stride: int,
    num_parts: int,
    eps: float,
    dtype: int,
    branch_dtype: int,
    stream: int,
) -> None: ...
def router_logits(
    x: int,
    gate: int,
    logits: int,
    num_tokens: int,
    depth: int,
    num_experts: int,
    dtype: int,
    gate_dtype: int,
    stream: int,
) -> None: ...
def topk_softmax(
    logits: int, weights: int, ids: int, probs: int, num_tokens: int, num_experts: int, top_k: int, stream: int
) -> None: ...
def topk_softmax_backward(
    dweights: int,
    dprobs: int,
    ids: int,
    probs: int,
    dlogits: int,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    stream: int,
) -> None: ...
def routing_plan(
    ids: int,
    tokens_per_expert: int,
    expert_offsets: int,
    row_to_slot: int,
    slot_to_row: int,
    tile_expert: int,
    tile_row: int,
    workspace: int,
    id_bytes: int,
    num_slots: int,
    num_experts: int,
    tile_rows: int,
    stream: int,
) -> None: ...
def route(
    x: int,
    gate: int,
    weights: int,
    ids: int,
    probs: int,
    balance: int,
    tokens_per_expert: int,
    expert_offsets: int,
    row_to_slot: int,
    slot_to_row: int,
    tile_expert: int,
    tile_row: int,
    workspace: int,
    num_tokens: int,
    depth: int,
    num_experts: int,
    top_k: int,
    tile_rows: int,
    balance_scale: float,
    dtype: int,
    gate_dtype: int,
    stream: int,
) -> None: ...

# The grouped products are there only if build_info()["archs"] has sm_90a.
def grouped_gemm(
    x: int,
    w: int,
    expert_offsets: int,
    out: int,
    num_rows: int,
    depth: int,
    width: int,
    num_experts: int,
    dtype: int,
    stream: int,
) -> None: ...
def grouped_gemm_dx(
    grad: int,
    w: int,
    expert_offsets: int,
    dx: int,
    num_rows: int,
    depth: int,
    width: int,
    num_experts: int,
    dtype: int,
    stream: int,
) -> None: ...
def grouped_gemm_dw(
    grad: int,
    x: int,
    expert_offsets: int,
    dw: int,
    num_rows: int,
    height: int,
    width: int,
    num_experts: int,
    accumulate: int,
    dw_dtype: int,
    dtype: int,
    stream: int,
) -> None: ...
def grouped_swiglu(
    x: int,
    w13: int,
    expert_offsets: int,
    out: int,
    h: int,
    num_rows: int,
    depth: int,
    width: int,
    num_experts: int,
    dtype: int,
    stream: int,
) -> None: ...
def grouped_dswiglu(
    grad: int,
    w2: int,
    expert_offsets: int,
    h: int,
    topk_weights: int,
    row_to_slot: int,
    dh: int,
    weighted_a: int,
    dots: int,
    num_rows: int,
    depth: int,
    width: int,
    num_experts: int,
    dtype: int,
    stream: int,
) -> None: ...

DSWIGLU_COLUMNS: int  # of a column tile of `dots`

def routed_ffn(
    x: int,
    gate: int,
    w13: int,
    w2: int,
    addend: int,
    out: int,
    probs: int,
    tokens_per_expert: int,
    workspace: int,
    num_tokens: int,
    depth: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    dtype: int,
    gate_dtype: int,
    stream: int,
) -> None: ...
def routed_ffn_products(
    x: int,
    gate: int,
    w13: int,
    w2: int,
    probs: int,
    tokens_per_expert: int,
    activation: int,
    workspace: int,
    num_tokens: int,
    depth: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    dtype: int,
    gate_dtype: int,
    stream: int,
) -> None: ...
def routed_ffn_combine(
    addend: int,
    out: int,
    workspace: int,
    num_tokens: int,
    depth: int,
    num_experts: int,
    top_k: int,
    dtype: int,
    stream: int,
) -> None: ...
def routed_ffn_workspace(num_tokens: int, depth: int, hidden: int, num_experts: int, top_k: int) -> int: ...
def build_info() -> dict[str, str]: ...
