"""Promises of features_only, whatever class of timm's takes the maps out."""

import pytest
import torch
from timm.models import create_model
from timm.models._features import FeatureGetterNet

from tests.networks.zoo import MODELS, is_isotropic, tiny

CLASSES = ["list", "dict", "hook", "fx"]
SMALL = dict(embed_dim=16, depths=(1, 1, 2, 2), num_heads=(1, 2, 4, 8), drop_path_rate=0.0)


def _extractor(**kwargs) -> torch.nn.Module:
    torch.manual_seed(0)  # the same weights in each
    return create_model("nat_mini", features_only=True, **kwargs).eval()


def _maps(output) -> list[torch.Tensor]:
    return list(output.values()) if isinstance(output, dict) else output


@pytest.mark.parametrize("name", MODELS)
def test_maps_are_nchw_and_as_announced(name):
    model = tiny(name, features_only=True).eval()
    assert model.feature_info.reduction() == ([16] * 3 if is_isotropic(name) else [4, 8, 16, 32])
    with torch.no_grad():
        features = model(torch.randn(1, 3, 96, 128))
    for feature, channels, reduction in zip(
        features, model.feature_info.channels(), model.feature_info.reduction(), strict=True
    ):
        assert feature.shape == (1, channels, 96 // reduction, 128 // reduction)


@pytest.mark.parametrize("out_indices", [(0, 2), (3,), (-2,), 2])
def test_the_levels_asked_for_are_handed_out(out_indices):
    every, some = _extractor(**SMALL), _extractor(**SMALL, out_indices=out_indices)
    x = torch.randn(1, 3, 64, 64)
    indices = range(4 - out_indices, 4) if isinstance(out_indices, int) else out_indices
    expected = [every(x)[i] for i in indices]
    torch.testing.assert_close(some(x), expected)
    assert some.feature_info.channels() == [f.shape[1] for f in expected]


@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")  # torchvision's, of the training mode
@pytest.mark.parametrize("out_indices", [(0, 1, 2, 3), (-3, 3)])
@pytest.mark.parametrize("feature_cls", CLASSES)
def test_every_class_hands_out_the_getters_maps(feature_cls, out_indices):
    expected, model = _extractor(out_indices=out_indices), _extractor(feature_cls=feature_cls, out_indices=out_indices)
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        output = model(x)
        torch.testing.assert_close([m.permute(0, 3, 1, 2) for m in _maps(output)], expected(x))
    assert isinstance(output, dict) == (feature_cls == "dict")
    assert (model.output_fmt, expected.output_fmt) == ("NHWC", "NCHW")  # a list net of timm's Swin says the same
    assert model.feature_info.channels() == [m.shape[-1] for m in _maps(output)] == expected.feature_info.channels()


@pytest.mark.parametrize("given", [dict(feature_cls="getter"), dict(feature_cls=FeatureGetterNet)])
def test_the_getter_by_name_or_class_is_the_default(given):
    x = torch.randn(1, 3, 64, 64)
    model = _extractor(**given, **SMALL)
    torch.testing.assert_close(model(x), _extractor(**SMALL)(x))
    assert isinstance(model, FeatureGetterNet)


def test_feature_cfg_says_the_same_and_an_argument_wins():
    chosen = _extractor(feature_cfg=dict(feature_cls="dict", out_indices=(0, 1)), out_indices=(2,), **SMALL)
    assert list(chosen(torch.randn(1, 3, 64, 64))) == ["2"]


def test_a_features_only_network_scripts():
    model = _extractor()
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(torch.jit.script(model)(x), model(x))


@pytest.mark.parametrize("prune", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_a_getter_around_a_network_scripts(norm, prune):
    getter = FeatureGetterNet(create_model("nat_mini", **SMALL), out_indices=[1, 3], norm=norm, prune=prune).eval()
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(torch.jit.script(getter)(x), getter(x))


@pytest.mark.parametrize("feature_cls", ["getter", "list", "dict", "hook"])
def test_grad_checkpointing_computes_blocks_again_and_changes_no_gradient(feature_cls):
    model = _extractor(feature_cls=feature_cls, **SMALL).train()
    # timm's own classes keep the first and the last of their modules, the stem and the last level.
    block = next(module for name, module in model.named_modules() if name.endswith(("levels.2", "levels_2"))).blocks[1]
    ran = []
    block.register_forward_pre_hook(lambda *args: ran.append(1))
    x = torch.randn(1, 3, 64, 64)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        ran.clear()
        sum(m.square().sum() for m in _maps(model(x))).backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients()
    assert len(ran) == 1
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(), expected)
    assert len(ran) == 2  # once more for the backward
    model.set_grad_checkpointing(False)
    gradients()
    assert len(ran) == 1
