"""torch.ops.nat_models: the contract of a PyTorch operator."""

import pytest
import torch
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from nat_models.ops import na2d, na2d_qkvpacked, use_backend
from tests.ops.conftest import gradients, make_inputs, needs_native


@pytest.mark.parametrize("with_rpb", [True, False])
def test_opcheck(with_rpb, backend):
    if backend not in ("native", "blocked"):
        pytest.skip(f"{backend} does not go through the operator")
    query, key, value, rpb = make_inputs(1, 9, 12, 2, 8, (3, 5), torch.float32, requires_grad=True)
    args = (query, key, value, rpb if with_rpb else None, (3, 5), (2, 1), 0.25)
    opcheck(torch.ops.nat_models.na2d.default, args)
    opcheck(
        torch.ops.nat_models.na2d_backward.default, [x.detach() if torch.is_tensor(x) else x for x in (query, *args)]
    )


def test_opcheck_of_the_operator_without_gradients(backend):
    if backend not in ("native", "blocked"):
        pytest.skip(f"{backend} does not go through the operator")
    qkv, rpb = torch.randn(1, 9, 12, 3, 2, 8), torch.randn(2, 5, 9)
    opcheck(torch.ops.nat_models.na2d_qkvpacked_inference.default, (qkv, rpb, 3, 5, 2, 1, 0.25))


@pytest.mark.parametrize(
    ("qkv_grad", "rpb_grad", "operator"),
    [
        (False, False, "nat_models.na2d_qkvpacked_inference"),
        (True, False, "nat_models.na2d_qkvpacked"),
        (False, True, "nat_models.na2d_qkvpacked"),
    ],
)
@needs_native
def test_only_a_call_that_wants_no_gradient_runs_without_one(qkv_grad, rpb_grad, operator):
    qkv, rpb = torch.randn(2, 9, 12, 3, 2, 8, requires_grad=qkv_grad), torch.randn(2, 5, 5, requires_grad=rpb_grad)
    with FlopCounterMode(display=False) as counter:
        output = na2d_qkvpacked(qkv, kernel_size=3, rpb=rpb)
    assert output.requires_grad is (qkv_grad or rpb_grad)
    assert [str(op) for op in counter.get_flop_counts()["Global"]] == [operator]


@pytest.mark.parametrize("grad", [False, True])
def test_packed_runs_and_counts_as_the_operator_of_its_purpose(grad):
    qkv = torch.randn(2, 9, 12, 3, 2, 8, requires_grad=True)
    rpb = torch.randn(2, 5, 9)
    with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
        output = na2d_qkvpacked(qkv, kernel_size=(3, 5), rpb=rpb)
    assert output.requires_grad is grad
    name = "nat_models.na2d_qkvpacked" if grad else "nat_models.na2d_qkvpacked_inference"
    assert {str(op): count for op, count in counter.get_flop_counts()["Global"].items()} == {
        name: 2 * 2 * (2 * 9 * 12) * (3 * 5) * (2 * 8)
    }


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    inputs = make_inputs(2, 9, 12, 2, 8, (3, 3), torch.float32, requires_grad=True)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def attend(query, key, value, rpb):
        return na2d(query, key, value, kernel_size=3, rpb=rpb)

    expected = na2d(*inputs[:3], kernel_size=3, rpb=inputs[3])
    output = attend(*inputs)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(output, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("name", "is_node"), [(None, False), ("native", True), ("blocked", True)])
def test_exports_as_tensor_operations_or_as_the_node_asked_for(name, is_node, strict):
    class Attend(torch.nn.Module):
        def forward(self, query, key, value, rpb):
            return na2d(query, key, value, kernel_size=3, rpb=rpb)

    inputs = make_inputs(2, 9, 12, 2, 8, (3, 3), torch.float32)
    with use_backend(name):
        program = torch.export.export(Attend(), tuple(inputs), strict=strict)
    assert ("nat_models" in {getattr(node.target, "namespace", "") for node in program.graph.nodes}) is is_node
    torch.testing.assert_close(program.module()(*inputs), Attend()(*inputs))


@pytest.mark.parametrize("requires_grad", [False, True])
def test_flop_counter_knows_forward_and_backward(requires_grad):
    query, key, value, _ = make_inputs(2, 9, 12, 3, 8, (3, 5), torch.float32, requires_grad=requires_grad)
    with FlopCounterMode(display=False) as counter:
        output = na2d(query, key, value, kernel_size=(3, 5))
        if requires_grad:
            output.sum().backward()
    products = 2 + 5 * requires_grad  # of 2 FLOPs for each query, key of its window and channel
    assert counter.get_total_flops() == products * 2 * (2 * 9 * 12) * (3 * 5) * (3 * 8)


def test_meta_tensors_give_shapes():
    query = torch.empty(2, 9, 12, 3, 8, device="meta", dtype=torch.float16)
    output = na2d(query, query, query, kernel_size=7)
    assert (output.shape, output.dtype, output.device.type) == (query.shape, torch.float16, "meta")
