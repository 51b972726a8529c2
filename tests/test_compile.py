"""Promises of torch.compile for the networks."""

import pytest
import torch

import nat_models  # noqa: F401  registers the models
from tests.conftest import assert_same_logits

NETWORKS = ["nat_mini", "nat_tiny", "nat_small", "nat_base"]


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compile_as_one_graph(name, train, network):
    model = network(name, depths=(1, 1, 2, 1), drop_path_rate=0.0).train(train)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    image = torch.randn(2, 3, 96, 128)
    expected, actual = model(image), compiled(image)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    if train:
        inputs = list(model.parameters())
        gradients = (torch.autograd.grad(x.square().sum(), inputs) for x in (actual, expected))
        for x, y in zip(*gradients, strict=True):
            assert (x - y).norm() <= 1e-4 * y.norm()


@pytest.mark.parametrize(("train", "operator"), [(False, "na2d_qkvpacked_inference"), (True, "na2d_qkvpacked")])
def test_compiled_networks_run_on_the_operator(train, operator, network):
    # Not on the tensor operations of an exported graph, which compute the same, slower.
    model, found = network("nat_mini", depths=(1, 1, 1, 1), drop_path_rate=0.0).train(train), []

    def capture(graph, example_inputs):
        found.extend(node.target for node in graph.graph.nodes if "nat_models" in str(node.target))
        return graph.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(train):
        torch.compile(model, fullgraph=True, backend=capture)(torch.randn(1, 3, 96, 128))
    assert found == 4 * [getattr(torch.ops.nat_models, operator).default]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_networks_are_the_networks(name, network):
    model = network(name)
    with torch.no_grad():
        model.head.fc.weight.div_(model(torch.randn(1, 3, 224, 224)).std())
    torch._dynamo.reset()
    with torch.no_grad():
        assert_same_logits(torch.compile(model, fullgraph=True), model)


def test_another_batch_or_size_compiles_no_graph_of_its_own(network):
    model = network("nat_mini", depths=(1, 1, 1, 1))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        compiled(torch.randn(2, 3, 224, 256))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch, *size in ((3, 224, 256), (7, 224, 256), (2, 256, 320)):
                image = torch.randn(batch, 3, *size)
                torch.testing.assert_close(compiled(image), model(image))


def test_attention_dropout_compiles(network):
    model = network("nat_mini", depths=(1, 1, 1, 1), attn_drop_rate=0.5, drop_path_rate=0.0).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    image = torch.randn(2, 3, 96, 96)
    first, second = compiled(image), compiled(image)
    assert not torch.equal(first, second)
    model.eval()
    torch.testing.assert_close(compiled(image), model(image), atol=1e-4, rtol=1e-4)
    second.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
