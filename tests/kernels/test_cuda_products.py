"""The hand-written Hopper products: grouped_gemm and expert_ffn, and their gradients."""

import pytest
import torch
from dit_moe_kernels import BackendUnavailableError, availability, backends, expert_ffn, grouped_gemm, make_routing_plan
from torch import Tensor

from tests.kernels.test_expert_ffn import check_expert_ffn, make_inputs
from tests.kernels.test_grouped_gemm import check_grouped_gemm
from tests.kernels.util import (
    BF16,
    CASES,
    FP16,
    FP32,
    HOPPER_CASES,
    MODEL_CASES,
    Case,
    assert_2x,
    evaluate,
    gpu_targets,
    make_plan,
    naive_expert_ffn,
    naive_grouped_gemm,
    randn,
    strided,
)


def fits(case: Case) -> bool:
    return backends.whole_chunks(BF16, case.width, case.hidden)


SMALL_CASES = [case for case in (*CASES, *HOPPER_CASES) if fits(case)]
# Odd and even numbers of columns of 128, whole and cut ones; one column alone; of 192, with many rows an expert.
WIDTH_CASES = [
    Case(f"{width}x{hidden}_T{tokens}", tokens, experts, 2, width, hidden, "skewed", tile_rows=None)
    for width, hidden, tokens, experts in [
        (512, 1024, 4000, 4), (384, 576, 5000, 4), (1408, 352, 3000, 8), (128, 1536, 900, 8), (1160, 1000, 777, 6),
        (240, 480, 9000, 2), (8, 8, 100, 3), (192, 960, 5000, 2),
    ]
]  # fmt: skip
# Where weights are what is fetched: narrow tiles of 64, 96, 128 columns, even loads, experts with several row tiles.
FEW_ROWS_CASES = [
    Case(f"{name}_T{tokens}_{routing}", tokens, experts, 2, width, 4 * width, routing, tile_rows=None)
    for name, tokens, experts, width in [
        ("S", 256, 8, 384), ("XL", 256, 8, 1152), ("XL", 512, 8, 1152), ("G", 40, 16, 1408)
    ]
    for routing in ("random", "skewed")
]  # fmt: skip
ONE_EXPERT = Case("one_expert_of_8", 1024, 8, 1, 1152, 512, "last", tile_rows=None)
ALL_CASES = [*SMALL_CASES, *WIDTH_CASES, *FEW_ROWS_CASES, ONE_EXPERT, *MODEL_CASES]
TARGETS = gpu_targets("cuda", dtypes=[BF16, FP16])


@pytest.fixture(autouse=True)
def _hopper(request):
    """GPU tests run where the kernels do."""
    if request.node.get_closest_marker("gpu") is None:
        return
    if (reason := availability("cuda")) is not None:
        pytest.skip(reason)
    if (capability := torch.cuda.get_device_capability()) != (9, 0):
        pytest.skip(f"got compute capability {capability}, expected (9, 0)")


def check(name: str, naive, function, inputs: list[Tensor]) -> Tensor:
    """Hold the output of `function` to the 2x rule; returns it."""
    with torch.no_grad():
        got = function(*inputs)
        assert_2x(name, got, naive(*(tensor.double() for tensor in inputs)), naive(*inputs))
    return got


def used_rows(plan, used: int, product):
    """`product` as a function of the rows in use alone: the others hold NaN going in and are dropped coming out."""

    def function(x, w):
        unused = x.new_full((plan.num_rows - used, x.shape[1]), torch.nan)
        return product(torch.cat([x, unused]), w)[:used]

    return function


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_grouped_gemm(target, case):
    """Both products of the layer, as y = w x."""
    ids, plan = make_plan(case, target.device)
    used = int((ids >= 0).sum())
    for width_in, width_out in ((case.width, 2 * case.hidden), (case.hidden, case.width)):
        x = randn(used, width_in, target=target)
        w = randn(case.num_experts, width_out, width_in, target=target, scale=width_in**-0.5)
        product = used_rows(plan, used, lambda x, w: grouped_gemm(x, w, plan, backend="cuda"))
        check(f"{width_in} to {width_out}", lambda x, w: naive_grouped_gemm(x, w, ids), product, [x, w])


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_gradient_for_rows(target, case):
    ids, plan = make_plan(case, target.device)
    used = int((ids >= 0).sum())
    tiles = (plan.expert_offsets, plan.tile_expert, plan.tile_row, plan.tile_rows)
    for depth, width in ((2 * case.hidden, case.width), (case.width, case.hidden)):
        grad = randn(used, depth, target=target)
        w = randn(case.num_experts, depth, width, target=target, scale=depth**-0.5)
        product = used_rows(plan, used, lambda grad, w: torch.ops.dit_moe.grouped_gemm_dx(grad, w, *tiles, "cuda"))
        check(f"{depth} to {width}", lambda grad, w: naive_grouped_gemm(grad, w.mT, ids), product, [grad, w])


@pytest.mark.parametrize("height", range(16, 257, 16))
@pytest.mark.parametrize("target", TARGETS)
def test_each_height_of_a_tile(target, height):
    """Many experts with as many rows each: few tiles are expected to be fastest, and most heights occur.

    In the forward from 129 rows an expert on; below, tiles are narrow instead.
    """
    num_experts, width_in, width_out = 64, 128, 384
    ids = (torch.arange(num_experts * height, device=target.device) % num_experts)[:, None]
    plan = make_routing_plan(ids, num_experts)
    x = randn(ids.shape[0], width_in, target=target)
    w = randn(num_experts, width_out, width_in, target=target, scale=width_in**-0.5)
    product = lambda x, w: grouped_gemm(x[plan.row_to_token.long()], w, plan, backend="cuda")  # noqa: E731
    check("rows", lambda x, w: naive_grouped_gemm(x[plan.row_to_token.long()], w, ids), product, [x, w])
    grad = randn(ids.shape[0], width_out, target=target)
    tiles = (plan.expert_offsets, plan.tile_expert, plan.tile_row, plan.tile_rows)
    product = lambda grad, w: torch.ops.dit_moe.grouped_gemm_dx(grad, w, *tiles, "cuda")  # noqa: E731
    check("dx", lambda grad, w: naive_grouped_gemm(grad, w.mT, ids), product, [grad, w])


@pytest.mark.parametrize("target", TARGETS)
def test_each_height_of_a_wide_tile(target):
    """One expert has so many rows that all have many on average, the others one tile of each height."""
    counts = [40000, *range(16, 193, 16), 7]
    width_in, width_out = 128, 384
    ids = torch.arange(len(counts), device=target.device).repeat_interleave(torch.tensor(counts).cuda())[:, None]
    plan = make_routing_plan(ids, len(counts))
    tiles = (plan.expert_offsets, plan.tile_expert, plan.tile_row, plan.tile_rows)
    w = randn(len(counts), width_out, width_in, target=target, scale=width_in**-0.5)
    x = randn(ids.shape[0], width_in, target=target)
    check(
        "rows",
        lambda x, w: naive_grouped_gemm(x, w, ids),
        lambda x, w: grouped_gemm(x, w, plan, backend="cuda"),
        [x, w],
    )
    w = randn(len(counts), width_in, width_out, target=target, scale=width_in**-0.5)
    product = lambda grad, w: torch.ops.dit_moe.grouped_gemm_dx(grad, w, *tiles, "cuda")  # noqa: E731
    check("dx", lambda grad, w: naive_grouped_gemm(grad, w.mT, ids), product, [x, w])


@pytest.mark.parametrize("case", ALL_CASES, ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_expert_ffn(target, case):
    ids, plan = make_plan(case, target.device)
    inputs = make_inputs(target, case)
    function = lambda *tensors: expert_ffn(*tensors, plan, backend="cuda")  # noqa: E731
    out = check("output", lambda *tensors: naive_expert_ffn(*tensors, ids), function, inputs)
    assert (out[(ids < 0).all(dim=1)] == 0).all()
    with torch.no_grad():
        assert torch.equal(function(*inputs), out), "two runs differ"


@pytest.mark.parametrize("case", [*SMALL_CASES, *WIDTH_CASES], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_kept_pre_activations(target, case):
    """The op also returns h when a backward will come; the output has the same bits."""
    ids, plan = make_plan(case, target.device)
    inputs, used = make_inputs(target, case), int((ids >= 0).sum())
    out, h = torch.ops.dit_moe.expert_ffn(*inputs, None, *plan[1:7], True, "cuda")
    without, nothing = torch.ops.dit_moe.expert_ffn(*inputs, None, *plan[1:7], False, "cuda")
    assert torch.equal(out, without) and nothing.shape == (0, 2 * case.hidden)
    rows = inputs[0][plan.row_to_token[:used].long()]
    exact = naive_grouped_gemm(rows.double(), inputs[1].double(), ids)
    assert_2x("h", h[:used], exact, naive_grouped_gemm(rows, inputs[1], ids))


@pytest.mark.parametrize("target", TARGETS)
def test_views_and_strides(target):
    """Inputs with gaps, and inputs that start at no multiple of 16 bytes."""
    case = SMALL_CASES[0]
    _, plan = make_plan(case, target.device)
    inputs = make_inputs(target, case)

    def shifted(tensor: Tensor) -> Tensor:
        storage = tensor.new_empty(tensor.numel() + 1)
        storage[1:] = tensor.flatten()
        return storage[1:].view(tensor.shape)

    with torch.no_grad():
        expected = expert_ffn(*inputs, plan, backend="cuda")
        for change in (strided, shifted):
            assert torch.equal(expert_ffn(*(change(tensor) for tensor in inputs), plan, backend="cuda"), expected)


@pytest.mark.parametrize("target", TARGETS)
def test_a_graph_on_a_side_stream_follows_its_inputs(target):
    """Captured once, replayed on tokens that are routed elsewhere; late inputs show a kernel on the wrong stream."""
    case = Case("", 300, 4, 2, 192, 256, tile_rows=None)
    inputs, other = make_inputs(target, case), make_inputs(target, case)
    plan, other_plan = (make_plan(case, target.device)[1] for _ in range(2))

    @torch.no_grad()
    def layer(tensors, plan):
        return expert_ffn(*tensors, plan, backend="cuda")

    expected = layer(other, other_plan)
    layer(inputs, plan)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = layer(inputs, plan)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles, about 60 ms
        for tensor, value in zip((*inputs, *plan[:6]), (*other, *other_plan[:6]), strict=True):
            tensor.copy_(value)
        graph.replay()
        eager = layer(inputs, plan)
    side.synchronize()
    assert torch.equal(got, expected) and torch.equal(eager, expected)


@pytest.mark.parametrize("target", TARGETS)
def test_auto_takes_them(target):
    case = SMALL_CASES[0]
    _, plan = make_plan(case, target.device)
    inputs = make_inputs(target, case)
    with torch.no_grad():
        expected = expert_ffn(*inputs, plan, backend="cuda")
        assert torch.equal(expert_ffn(*inputs, plan), expected)
        compiled = torch.compile(lambda *tensors: expert_ffn(*tensors, plan), fullgraph=True)
        assert torch.equal(compiled(*inputs), expected)
    ones = torch.ones_like(expected)
    by_name, by_auto = (
        evaluate(lambda *tensors, name=name: expert_ffn(*tensors, plan, backend=name), inputs, ones)
        for name in ("cuda", "auto")
    )
    assert all(torch.equal(a, b) for a, b in zip(by_name, by_auto, strict=True))


@pytest.mark.parametrize("case", [*SMALL_CASES, ONE_EXPERT, *MODEL_CASES], ids=str)
@pytest.mark.parametrize("target", TARGETS)
def test_gradients(target, case):
    """All gradients of the fused layer and of one product."""
    check_expert_ffn(target, case)
    check_grouped_gemm(target, case, case.width, case.hidden)


@pytest.mark.parametrize("target", TARGETS)
def test_a_graph_of_forward_and_backward(target):
    """Two runs and a replay on other tokens give the same bits."""
    case = Case("", 300, 4, 2, 192, 256, tile_rows=None)
    inputs, other = make_inputs(target, case), make_inputs(target, case)
    plan, other_plan = (make_plan(case, target.device)[1] for _ in range(2))
    grad = randn(case.tokens, case.width, target=target)

    def step(tensors, plan):
        return evaluate(lambda *tensors: expert_ffn(*tensors, plan, backend="cuda"), tensors, grad)

    expected = step(other, other_plan)
    assert all(torch.equal(a, b) for a, b in zip(step(other, other_plan), expected, strict=True)), "two runs differ"
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(inputs, plan)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = step(inputs, plan)
    for tensor, value in zip((*inputs, *plan[:6]), (*other, *other_plan[:6]), strict=True):
        tensor.copy_(value)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), "the replay differs"


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "width", "reason"), [(FP32, 64, "float32.*expected"), (BF16, 36, "no multiple of 8")]
)
def test_refusals_say_why(dtype, width, reason):
    plan = make_routing_plan(torch.zeros(4, 1, dtype=torch.int32, device="cuda"), 1, backend="reference")
    x, w = torch.zeros(4, width, dtype=dtype, device="cuda"), torch.zeros(1, 64, width, dtype=dtype, device="cuda")
    with pytest.raises(BackendUnavailableError, match=f"'cuda' cannot run grouped_gemm: .*{reason}"):
        grouped_gemm(x, w, plan, backend="cuda")
    assert grouped_gemm(x, w, plan).shape == (4, 64)


def test_widths_of_whole_chunks():
    assert backends.whole_chunks(BF16, 8, 1152) and not backends.whole_chunks(BF16, 1152, 12)
    assert backends.whole_chunks(FP32, 4) and not backends.whole_chunks(FP16, 0)
