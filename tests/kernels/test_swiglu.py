"""swiglu and its gradient, also where the sigmoid saturates."""

import pytest
import torch
from dit_moe_kernels import swiglu

from tests.kernels.util import BF16, FP32, check_against, gpu_targets, naive_swiglu, randn, strided, targets

SHAPES = [(37, 48), (5, 33), (1, 1), (0, 40), (3, 1025)]


def check_swiglu(target, rows: int, hidden: int) -> None:
    h, grad = randn(rows, 2 * hidden, target=target), randn(rows, hidden, target=target)
    check_against(naive_swiglu, lambda h: swiglu(h, backend=target.backend), ["h"], [h], grad)


@pytest.mark.parametrize("shape", SHAPES, ids="N{0[0]}_F{0[1]}".format)
@pytest.mark.parametrize("target", targets("triton", "cuda"))
def test_swiglu(target, shape):
    check_swiglu(target, *shape)


@pytest.mark.parametrize("target", gpu_targets("triton", "cuda", dtypes=[BF16]))
def test_model_shape(target):
    check_swiglu(target, 8192, 4608)


@pytest.mark.parametrize("target", targets("triton", "cuda"))
def test_saturated_gates(target):
    """Gates so far out that exp overflows: gate * up on the right, zero on the left, never NaN."""
    gate = torch.tensor([[-6e4, -1e4, -100.0, -20.0, 0.0, 20.0, 100.0, 6e4]])
    h = torch.cat([gate, torch.full_like(gate, 0.5)], dim=1).to(target.device, target.dtype)
    grad = torch.ones(1, 8, dtype=target.dtype, device=target.device)
    check_against(naive_swiglu, lambda h: swiglu(h, backend=target.backend), ["h"], [h], grad)


@pytest.mark.parametrize("target", targets("triton", "cuda", dtypes=[FP32]))
def test_strides_do_not_matter(target):
    """An input with gaps, and a gradient of stride 0."""
    h = strided(randn(20, 96, target=target))
    ones = torch.ones((), device=target.device).expand(20, 48)
    check_against(naive_swiglu, lambda h: swiglu(h, backend=target.backend), ["h"], [h], ones)
