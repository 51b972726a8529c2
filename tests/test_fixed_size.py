"""fix_size: the same function on maps of one size."""

import pytest
import timm
import torch
from torch import nn

import nat_models.export as exporting
from nat_models.fixed_size import _TiledBlocks, fix_size
from nat_models.networks.nat import NAT
from nat_models.networks.upernet import upernet

TINY = dict(embed_dim=16, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8), num_classes=10)
DILATED = dict(TINY, dilations=((1, 8), (1, 4), (1, 2), (1, 1)))
SWIN_LIKE = dict(TINY, patch_size=4, downsample="merge", dilations=((2, (1, 3)), (1, 4), (1, 2), (1, 1)))
# Networks, sizes of images, and what is special in them
CASES = {
    "square": (TINY, (224, 224)),
    "maps smaller than the window": (TINY, (64, 64)),
    "maps that tiles do not divide": (TINY, (75, 330)),
    "dilated, tiles that are whole groups": (DILATED, (224, 224)),
    "dilated, groups of two lengths, padded": (DILATED, (100, 330)),
    "other windows, patches, bands": (dict(SWIN_LIKE, kernel_size=(11, 3), in_chans=5), (140, 60)),
    "a window of one token": (dict(TINY, kernel_size=1), (32, 40)),
    "layer scale": (dict(TINY, init_values=0.3), (96, 130)),
    "no bias of qkv": (dict(TINY, qkv_bias=False), (96, 130)),
}


def _random(model: nn.Module) -> nn.Module:
    """Parameters of a size at which a mistake shows; the classifier's input is their sum over tokens."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith((".gamma", ".rpb", ".bias")):
                parameter.normal_(std=0.5)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def _assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def _tiled(model: nn.Module) -> list[bool]:
    return [isinstance(level.blocks, _TiledBlocks) for level in model.levels]


@pytest.mark.parametrize("case", CASES)
def test_a_network_of_fixed_size_is_the_network(case):
    kwargs, size = CASES[case]
    model = _random(NAT(**kwargs))
    image = torch.randn(2, model.in_chans, *size)
    fixed = fix_size(model, image)
    assert _tiled(fixed) == [True] * 4
    assert not any(_tiled(model)), "the model given was changed"
    with torch.no_grad():
        _assert_same(fixed.forward_features(image), model.forward_features(image))
        _assert_same(fixed(image), model(image))


def test_without_a_position_bias_there_is_none():
    model = _random(NAT(**TINY))
    for level in model.levels:
        for block in level.blocks:
            block.attn.rpb = None
    image = torch.randn(2, 3, 96, 64)
    with torch.no_grad():
        _assert_same(fix_size(model, image)(image), model(image))


class _Adapted(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.adapter = linear, nn.Linear(linear.in_features, linear.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.adapter(x)


def test_blocks_with_other_layers_or_hooks_in_them_run_as_they_are():
    model = NAT(**TINY)
    model.levels[0].blocks[0].attn.qkv = _Adapted(model.levels[0].blocks[0].attn.qkv)
    model.levels[1].blocks[1].mlp.fc1 = _Adapted(model.levels[1].blocks[1].mlp.fc1)
    model.levels[2].blocks[0].norm1.register_forward_hook(lambda module, args, output: 2 * output)
    for block in model.levels[3].blocks:
        block.attn.proj = _Adapted(block.attn.proj)
    model = _random(model)
    image = torch.randn(2, 3, 120, 160)
    fixed = fix_size(model, image)
    assert _tiled(fixed) == [True, True, True, False]
    with torch.no_grad():
        _assert_same(fixed(image), model(image))


def test_global_attention_stays():
    model = _random(NAT(**dict(TINY, global_size=7)))
    image = torch.randn(2, 3, 64, 96)
    fixed = fix_size(model, image)
    assert not any(_tiled(fixed))
    with torch.no_grad():
        assert torch.equal(fixed(image), model(image))


def test_a_segmenters_backbone_takes_the_form():
    model = _random(upernet("nat_mini", 3, channels=16, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8)))
    image = torch.randn(2, 3, 96, 130)
    fixed = fix_size(model, image)
    assert any(isinstance(module, _TiledBlocks) for module in fixed.modules())
    with torch.no_grad():
        _assert_same(fixed(image), model(image))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_onnx_file_of_one_size_is_the_network_in_that_form(dtype, tmp_path, capsys):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    kwargs = dict(DILATED, depths=(1, 2, 1, 1), dilations=(1, (1, 4), 1, 1))
    model, path = _random(timm.create_model("nat_mini", **kwargs)), tmp_path / "a.onnx"
    with torch.no_grad():  # logits of size 1, for which the check's 1e-4 says something
        model.head.fc.weight.div_(model(torch.randn(1, 3, 100, 100)).std())
    exporting.export(model, path, format="onnx", name="tiny", img_size=100, dtype=dtype, check=True)
    assert "largest difference at 100x100" in capsys.readouterr().out
    graph = onnx.load(path).graph
    assert {node.domain for node in graph.node} == {""}
    assert graph.input[0].type.tensor_type.shape.dim[0].dim_param, "the batch is no symbol"
