"""fuse: the same function with less to compute."""

import pytest
import timm
import torch
from timm.layers import LayerScale
from torch._inductor.utils import run_and_get_code

import nat_models
from nat_models import NeighborhoodAttention2d
from nat_models.checkpoints import fit_state_dict
from nat_models.fuse import PointwiseBlock
from nat_models.networks.blocks import NATBlock
from tests.conftest import original_state_dict


def _random(model: torch.nn.Module) -> torch.nn.Module:
    """Biases and layer scales of a size at which a mistake in folding them shows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".gamma", ".rpb", ".bias")):
                parameter.normal_(std=0.5)
    return model.eval()


def _folded(model: torch.nn.Module) -> bool:
    """Whether neither layer scales nor scales of logits are left: a model that was not fused computes the same."""
    modules = list(model.modules())
    scales = [module.scale for module in modules if isinstance(module, NeighborhoodAttention2d)]
    return set(scales) == {1.0} and not any(isinstance(module, LayerScale) for module in modules)


@pytest.mark.parametrize("freezing", [False, True])
@pytest.mark.parametrize("name", ["nat_mini", "nat_tiny", "nat_small", "nat_base"])
def test_a_fused_network_is_the_network(name, freezing):
    model = _random(timm.create_model(name, depths=(1, 1, 2, 1)))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = nat_models.fuse(model, freezing=freezing)
    assert type(fused) is type(model)
    assert _folded(fused)
    assert not fused.training
    for size in ((224, 224), (96, 160)):  # with and without padded maps
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected, actual = model(x), fused(x)
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), f"fuse changed {key} of the model it was given"


@pytest.mark.parametrize("freezing", [False, True])
def test_a_fused_network_is_still_a_timm_model(freezing):
    model = nat_models.fuse(_random(timm.create_model("nat_mini", depths=(1, 1, 1, 1))), freezing=freezing)
    x = torch.randn(1, 3, 64, 96)
    assert model.forward_features(x).shape == (1, 2, 3, 512)
    assert [m.shape[1] for m in model.forward_intermediates(x, intermediates_only=True)] == [64, 128, 256, 512]
    model.reset_classifier(7)
    assert model(x).shape == (1, 7)


@pytest.mark.parametrize("freezing", [False, True])
def test_networks_inside_other_modules_are_fused_too(freezing):
    backbone = _random(timm.create_model("nat_small", depths=(1, 1, 1, 1), features_only=True))
    x = torch.randn(1, 3, 64, 96)
    fused = nat_models.fuse(backbone, freezing=freezing)
    for actual, expected in zip(fused(x), backbone(x), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert _folded(fused)
    assert any(isinstance(module, PointwiseBlock) for module in fused.modules()) == freezing


@pytest.mark.parametrize("freezing", [False, True])
def test_a_block_alone_is_fused(freezing):
    block = _random(NATBlock(64, 2, init_values=0.5).double())
    fused = nat_models.fuse(block, freezing=freezing)
    assert _folded(fused) and isinstance(fused, PointwiseBlock) == freezing
    for size in ((9, 11), (3, 1), (1, 1)):
        x = torch.randn(2, *size, 64, dtype=torch.float64)
        torch.testing.assert_close(fused(x), block(x))


@pytest.mark.slow
def test_frozen_the_blocks_become_packed_convolutions_with_nothing_behind_them():
    model = _random(timm.create_model("nat_small", depths=(1, 1, 2, 1)))
    compiled = torch.compile(nat_models.fuse(model, freezing=True), fullgraph=True)
    x = torch.randn(2, 3, 96, 160)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True, force_disable_caches=True):
        actual, code = run_and_get_code(compiled, x)
    assert (actual - model(x)).abs().max() <= 1e-5 * actual.abs().max()
    code = "\n".join(code)
    # Of each of the 5 blocks: qkv, fc1 with its GELU, proj and fc2 with the addition.
    assert code.count("_convolution_pointwise.default(") == 15  # five are of the stem and the downsamplers
    assert code.count("'gelu'") == 5
    assert code.count("_convolution_pointwise_.binary(") == 10


@pytest.mark.parametrize("freezing", [False, True])
def test_low_precision_loses_no_more_than_its_rounding(freezing):
    model = _random(timm.create_model("nat_small", depths=(1, 1, 1, 1)))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        plain, fused = (m(x.bfloat16()).float() for m in (model.bfloat16(), nat_models.fuse(model, freezing=freezing)))
    # Folding rounds some weights once more, so the unfused network's own error is the yardstick.
    assert (fused - expected).norm() < 1.5 * (plain - expected).norm()


def test_int8_keeps_the_direction_of_the_logits():
    quantization = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = timm.create_model("nat_tiny").eval()
    model.load_state_dict(fit_state_dict(original_state_dict("nat_tiny"), model))
    quantized = nat_models.fuse(model)
    quantization.quantize_(quantized, quantization.Int8DynamicActivationInt8WeightConfig())
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected, actual = model(x), quantized(x)
    assert not torch.equal(actual, expected)
    assert torch.nn.functional.cosine_similarity(actual, expected).min() >= 0.999


def test_a_model_without_nat_blocks_is_refused_by_name():
    with pytest.raises(ValueError, match="NAT blocks inside, got a Linear that has none"):
        nat_models.fuse(torch.nn.Linear(2, 2))
