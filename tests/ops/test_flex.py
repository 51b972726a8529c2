"""flex: the order of tokens, the blocks of its mask, and what torch.compile makes of it."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nat_models import NeighborhoodAttention2d
from nat_models.ops import na2d, na2d_qkvpacked, selection, use_backend
from nat_models.ops.backends import flex, reference
from nat_models.ops.request import Request
from nat_models.ops.window import window
from tests.conftest import needs_torch

CPU = torch.device("cpu")

# (H, W), kernel_size, dilation
MAPS = [
    ((7, 7), (7, 7), (1, 1)),
    ((9, 40), (3, 7), (1, 1)),
    ((56, 28), (7, 7), (1, 1)),
    ((30, 29), (7, 5), (4, 2)),
    ((13, 61), (3, 3), (1, 8)),
]


def _tokens(size, dilation, tile):
    """Where each token of a map stands in tiled order; -1 for padding."""
    index = torch.arange(size[0] * size[1]).view(1, *size, 1, 1) + 1.0
    return flex._to_tiles(index, tile, dilation, 0).flatten().long() - 1


@pytest.mark.parametrize(("size", "kernel_size", "dilation"), MAPS)
def test_tiled_order_is_undone(size, kernel_size, dilation):
    tile = flex._plan_of(size, kernel_size, dilation, CPU).tile
    x = torch.randn(2, *size, 3, 4)
    assert torch.equal(flex._from_tiles(flex._to_tiles(x, tile, dilation, 0), size, tile, dilation), x)


@pytest.mark.parametrize(("size", "kernel_size", "dilation"), MAPS)
def test_mask_is_the_window_rule_and_every_query_has_k_times_k_keys(size, kernel_size, dilation):
    plan = flex._plan_of(size, kernel_size, dilation, CPU)
    row, col, first_row, first_col = plan.positions
    below, right = row - first_row[:, None], col - first_col[:, None]
    inside = (below >= 0) & (below < kernel_size[0]) & (right >= 0) & (right < kernel_size[1])  # [L, L]

    tokens = _tokens(size, dilation, plan.tile)
    assert len(tokens) == plan.positions.shape[1] == len(tokens) // 128 * 128
    (rows, _), (cols, _) = (window(*axis) for axis in zip(size, kernel_size, dilation, strict=True))
    for query in range(size[0] * size[1]):
        i, j = divmod(query, size[1])
        keys = rows[i][:, None] * size[1] + cols[j]
        assert sorted(tokens[inside[tokens == query][0]].tolist()) == keys.flatten().tolist()
    # A padded query has keys too: a softmax over none is not a number.
    assert (inside.sum(1) == kernel_size[0] * kernel_size[1]).all()

    blocks = inside.view(len(tokens) // 128, 128, -1, 128).any(3).any(1)
    for dense, count, indices in (
        (blocks, plan.kv_num_blocks, plan.kv_indices),
        (blocks.T, plan.q_num_blocks, plan.q_indices),
    ):
        assert torch.equal(count.long(), dense.sum(1))
        for line, n, order in zip(dense, count, indices, strict=True):
            assert sorted(order[:n].tolist()) == line.nonzero().flatten().tolist()


@pytest.mark.parametrize("size", [(128, 100), (112, 224), (224, 224)])
def test_tiles_leave_fewer_blocks_of_a_large_map_than_rows_would(size):
    plan = flex._plan_of(size, (7, 7), (1, 1), CPU)
    index = torch.arange(size[0] * size[1])
    first = (index // size[1] - 3).clamp(0, size[0] - 7) * size[1]
    last = first + 7 * size[1] - 1  # row by row, a window spans all of these
    in_rows = sum(int(last[i : i + 128].max() // 128 - first[i : i + 128].min() // 128) + 1 for i in index[::128])
    assert plan.kv_num_blocks.sum() < in_rows


@pytest.mark.parametrize("mode", [FakeTensorMode, torch.inference_mode])
def test_plans_are_cached_within_bounds_and_serve_every_mode(mode):
    assert flex._plan_of.cache_info().maxsize == 64
    flex._plan_of.cache_clear()
    with mode():
        plan = flex._plan_of((9, 12), (3, 3), (1, 1), CPU)
    assert plan is flex._plan_of((9, 12), (3, 3), (1, 1), CPU)
    assert int(plan.kv_num_blocks.sum()) > 0  # a fake one has no value
    assert not plan.positions.is_inference()  # no gradient could pass by such a one


def _attend(query, key, value, rpb):
    near = na2d(query, key, value, kernel_size=3, rpb=rpb)
    far = na2d(near, key, value, kernel_size=(3, 3), dilation=(1, 2), rpb=rpb)  # two plans in one graph
    return na2d(far, key, value, kernel_size=5)


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiles_as_one_graph_at_several_sizes(dynamic, monkeypatch):
    monkeypatch.setattr(flex, "_CPU_CODE_IS_SOUND", True)  # none is generated
    torch._dynamo.reset()
    compiled = torch.compile(_attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    rpb = torch.randn(2, 5, 5)
    for batch, height in ((2, 9), (3, 9), (2, 11)):
        query, key, value = torch.randn(3, batch, height, 14, 2, 8).unbind()
        with use_backend("flex"):
            output = compiled(query, key, value, rpb)
        torch.testing.assert_close(output, _attend(query, key, value, rpb))


def test_an_accelerator_compiles_more_kinds_than_pytorch_does_by_default(monkeypatch):
    # What runs on an accelerator outside of torch.compile, here on the CPU and without code generation.
    compiled = torch.compile(flex._attend, fullgraph=True, dynamic=False, backend="aot_eager")
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    torch._dynamo.reset()
    with torch.no_grad(), torch._dynamo.config.patch({flex._recompile_limit_name(): 8}):
        for heads in range(1, 11):
            query = torch.randn(1, 5, 6, heads, 4)
            args = (query, query, query, None, (3, 3), (1, 1), 0.5)
            torch.testing.assert_close(flex._attend_compiled(*args), reference.na2d(*args))


_needs_sound_code = needs_torch("2.13", "corrupts memory in what it compiles flex_attention to for the CPU")


def test_unsound_code_for_the_cpu_is_refused(monkeypatch):
    monkeypatch.setattr(flex, "_CPU_CODE_IS_SOUND", False)
    request = Request(CPU, torch.float32, 32, 1.0, compiling=True)
    assert "corrupts memory" in flex.why_not(request)


def _compile_and_compare(shape, dtype, with_rpb):
    torch._dynamo.reset()
    qkv = torch.randn(shape).to(dtype)
    rpb = torch.randn(shape[4], 5, 9) if with_rpb else None
    with torch.no_grad(), use_backend("flex"):
        output = torch.compile(na2d_qkvpacked, fullgraph=True)(qkv, kernel_size=(3, 5), dilation=(2, 1), rpb=rpb)
    wide = [x.double() for x in qkv.unbind(3)]
    expected = reference.na2d(*wide, rpb if rpb is None else rpb.double(), (3, 5), (2, 1), shape[-1] ** -0.5)
    error = (output - expected).abs().max() / expected.abs().max()
    assert output.dtype == dtype
    assert error < (2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps)


@_needs_sound_code
def test_generated_code_is_the_reference():
    _compile_and_compare((2, 11, 17, 3, 2, 32), torch.float32, True)


@_needs_sound_code
@pytest.mark.slow
@pytest.mark.parametrize("with_rpb", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 20])
def test_generated_code_is_the_reference_in_every_dtype(head_dim, dtype, with_rpb):
    _compile_and_compare((2, 11, 17, 3, 2, head_dim), dtype, with_rpb)


@needs_torch("2.13", "has no fake CUDA tensors where there is no driver")
def test_a_gpu_gets_flex_attention_in_one_graph(monkeypatch):
    # Fake CUDA tensors: what torch.compile would hand to Triton.
    mode = FakeTensorMode()
    monkeypatch.setattr(flex, "_why_no_triton", lambda device: None)
    nodes = []

    def capture(graph, example_inputs):
        nodes.extend(graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with mode, torch.no_grad():
        layer = NeighborhoodAttention2d(64, 2, device="cuda", dtype=torch.bfloat16)
        output = torch.compile(layer, fullgraph=True, backend=capture)(
            torch.empty(2, 56, 28, 64, device="cuda", dtype=torch.bfloat16)
        )
    assert (output.shape, output.dtype, output.device.type) == ((2, 56, 28, 64), torch.bfloat16, "cuda")
    attention = [node for node in nodes if "flex_attention" in str(node.target)]
    assert len(attention) == 1
    assert {str(node.target) for node in nodes if "nat_models" in str(node.target)} <= {"nat_models.flex_plan.default"}
    query = attention[0].args[0].meta["example_value"]
    assert (query.shape, query.device.type) == ((2, 2, 56 * 32, 32), "cuda")


def test_eager_fakes_and_lookers_on_see_the_operator(monkeypatch):
    monkeypatch.setattr(flex, "_why_no_triton", lambda device: None)
    monkeypatch.setattr(flex, "na2d", None)
    with FakeTensorMode():
        query = torch.empty(2, 9, 12, 2, 32, device="cuda")
        rpb = torch.empty(2, 5, 5, device="cuda")
    assert na2d(query, query, query, kernel_size=3, rpb=rpb).device.type == "cuda"
    request = Request(torch.device("cuda"), torch.float32, 32, 1.0)
    assert selection.select(request) == "flex"
    assert selection.select(request._replace(empty=True)) == "blocked"
    assert selection.select(request._replace(observed=True)) == "blocked"
