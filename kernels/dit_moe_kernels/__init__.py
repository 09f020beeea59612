"""dit_moe_kernels: dropless mixture-of-experts ops for PyTorch, as Triton and CUDA kernels with a plain reference.

Ops, in the order of a layer: route, or router_logits, topk_softmax and make_routing_plan; then the fused expert_ffn,
or permute, grouped_gemm, swiglu, grouped_gemm, unpermute. For a shared expert: linear_swiglu. Around attention and
experts: norm_modulate, residual_norm_modulate, qk_norm and self_attention. All are torch.library ops with autograd.
count_routing keeps histograms of which experts were chosen where, for analysis. adamw_ and average_ update training
state in one pass, rounded stochastically where it is kept in bf16.
"""

from .activation import swiglu
from .attention import self_attention
from .backends import BACKENDS, availability, cuda_build_info, current_backend, op_families, use_backend
from .counting import RoutingCounts, count_routing
from .errors import BackendUnavailableError, KernelError
from .expert_ffn import expert_ffn
from .grouped_gemm import grouped_gemm
from .linear_swiglu import linear_swiglu
from .norm_modulate import norm_modulate, residual_norm_modulate
from .permute import permute, unpermute
from .qk_norm import qk_norm
from .route import Routing, route
from .routed_ffn import RoutedFFN, routed_ffn
from .routed_rows import RoutedRows, combine_norm_modulate, routed_rows, takes_rows
from .router import router_logits, topk_softmax
from .routing import RoutingPlan, make_routing_plan
from .updates import AVERAGE_PIECE, RandomBits, adamw_, average_, next_random_bits

__all__ = [
    "AVERAGE_PIECE",
    "BACKENDS",
    "BackendUnavailableError",
    "KernelError",
    "RandomBits",
    "RoutedFFN",
    "RoutedRows",
    "RoutingCounts",
    "Routing",
    "RoutingPlan",
    "adamw_",
    "availability",
    "average_",
    "combine_norm_modulate",
    "count_routing",
    "cuda_build_info",
    "current_backend",
    "expert_ffn",
    "grouped_gemm",
    "linear_swiglu",
    "make_routing_plan",
    "next_random_bits",
    "norm_modulate",
    "op_families",
    "permute",
    "qk_norm",
    "residual_norm_modulate",
    "route",
    "routed_ffn",
    "routed_rows",
    "router_logits",
    "self_attention",
    "swiglu",
    "takes_rows",
    "topk_softmax",
    "unpermute",
    "use_backend",
]
