"""Networks as their users take them apart: LoRA, symbolic traces, extractors of features."""

import copy

import pytest
import timm
import torch

SIZES = [(224, 256), (64, 64), (33, 47)]  # the window fits in every level, in the first, in the first across alone


def test_lora_merged_is_lora_unmerged(network):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    config = peft.LoraConfig(target_modules=["attn.qkv", "attn.proj"], lora_bias=True, init_lora_weights=False)
    model = peft.get_peft_model(network("nat_mini"), config).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        unmerged = model(x)
        merged = copy.deepcopy(model).merge_and_unload()
        assert type(merged.levels[0].blocks[0].attn.qkv) is torch.nn.Linear
        # Merging rounds weights of 36 layers: a few float32 roundings of the largest logit.
        assert (merged(x) - unmerged).abs().max() <= 1e-4 * unmerged.abs().max()
        with model.disable_adapter():
            assert (model(x) - unmerged).abs().max() > 1e-1 * unmerged.abs().max()


@pytest.mark.parametrize("train", [False, True])
def test_a_symbolic_trace_is_the_network_at_every_size_and_trains(train, network):
    model = network("nat_mini", drop_path_rate=0.0).train(train)
    graph = torch.fx.symbolic_trace(model)
    for batch, size in zip((1, 2, 3), SIZES, strict=True):
        x = torch.randn(batch, 3, *size)
        actual, expected = graph(x), model(x)
        torch.testing.assert_close(actual, expected)
    actual = torch.autograd.grad(actual.square().sum(), [*graph.parameters()])
    expected = torch.autograd.grad(expected.square().sum(), [*model.parameters()])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("train", [False, True])  # torchvision makes a graph for each
@pytest.mark.parametrize("size", SIZES)
def test_torchvision_extracts_features_that_train(size, train, network):
    extraction = pytest.importorskip("torchvision.models.feature_extraction", reason="torchvision is not installed")
    model = network("nat_mini", drop_path_rate=0.0)
    nodes = [f"levels.{i}" for i in range(4)] + ["levels.3.blocks.4.norm1"]
    extractor = extraction.create_feature_extractor(model, nodes).train(train)
    x = torch.randn(2, 3, *size)
    *features, inner = extractor(x).values()
    expected = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(features, expected)
    assert inner.shape == features[-1].shape
    features[-1].sum().backward()
    assert all(p.grad is not None for p in extractor.parameters())


@pytest.mark.parametrize("size", SIZES)
def test_timms_graph_extracts_features(size, network):
    model = network("nat_mini")
    x = torch.randn(2, 3, *size)
    expected = model.forward_intermediates(x, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(timm.models.FeatureGraphNet(model, (0, 1, 2, 3))(x), expected)
