"""UPerNet against golden values of the authors' code, and transformers' class as an independent oracle."""

import json
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from nat_models import fuse
from nat_models.checkpoints import CheckpointError
from nat_models.checkpoints.segmentation import convert_upernet, read_upernet
from nat_models.networks.upernet import PUBLISHED, UPerNet, upernet
from tests.conftest import FIXTURES, tensor
from tests.fixtures.deterministic import downstream_parameter

GOLDEN = load_file(FIXTURES / "upernet.safetensors")
KEYS = json.loads((FIXTURES / "upernet_keys.json").read_text())
VARIANTS = ["mini", "tiny", "small", "base"]
TINY = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))


@cache
def _mmseg(variant: str) -> dict[str, torch.Tensor]:
    shapes = KEYS[f"upernet_nat_{variant}"]
    return {key: torch.from_numpy(downstream_parameter(key, shape)) for key, shape in shapes.items()}


def _published(variant: str, **kwargs) -> UPerNet:
    return upernet(f"nat_{variant}", weights=dict(state_dict=_mmseg(variant), meta={}), **kwargs).eval()


def _tiny(name: str = "dinat_mini", **kwargs) -> UPerNet:
    return upernet(name, **{**dict(num_classes=5, channels=16), **TINY, **kwargs})


def _close(found: torch.Tensor, golden: torch.Tensor, tolerance: float) -> None:
    """Within a part of the largest magnitude."""
    torch.testing.assert_close(found, golden.to(found.dtype), rtol=0, atol=tolerance * golden.abs().max().item())


@pytest.mark.parametrize("variant", VARIANTS[:3])
def test_logits_of_the_authors_systems(variant):
    model = _published(variant)
    with torch.no_grad():
        logits = model.decode_head(model.forward_features(tensor("image_64x96", (1, 3, 64, 96))))
    _close(logits[0], GOLDEN[f"{variant}/64x96/logits"], 1e-5)


def test_features_auxiliary_and_resized_logits_of_the_authors_system():
    model = _published("mini")
    with torch.no_grad():
        maps = model.forward_features(tensor("image_64x96", (1, 3, 64, 96)))
        auxiliary = model.auxiliary_head(maps[2])
        resized = model(tensor("image_96x80", (1, 3, 96, 80)))
    for i, found in enumerate(maps):
        _close(found.mean((0, 2, 3)), GOLDEN[f"mini/64x96/feature{i}/channel_mean"], 1e-5)
        _close(found[0, :16, :3, :3], GOLDEN[f"mini/64x96/feature{i}/corner"], 1e-5)
    _close(auxiliary[0], GOLDEN["mini/64x96/auxiliary_logits"], 1e-5)
    _close(resized[0, :, ::8, ::8], GOLDEN["mini/96x80/resized_logits"], 1e-5)


def _labels() -> torch.Tensor:
    b, y, x = torch.arange(2)[:, None, None], torch.arange(64)[:, None], torch.arange(96)
    labels = (7 * (y // 8) + 3 * (x // 8) + 11 * b) % 150
    labels[:, :4] = 255
    return labels


@pytest.mark.parametrize("mode", ["batch_statistics", "running_statistics"])
@pytest.mark.parametrize("variant", ["mini", "small"])
def test_losses_and_gradients_of_the_authors_training(variant, mode):
    model = _published(variant, drop_path_rate=0.0).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout2d):
            module.p = 0.0
        if isinstance(module, torch.nn.BatchNorm2d) and mode == "running_statistics":
            module.eval()
    labels = _labels()
    outputs = model(tensor("image_64x96", (2, 3, 64, 96)).double())
    # Over all pixels, ignored ones included.
    losses = [F.cross_entropy(x, labels, ignore_index=255, reduction="sum") / labels.numel() for x in outputs]
    golden = {k.split("/", 3)[3]: v for k, v in GOLDEN.items() if k.startswith(f"{variant}/train/{mode}/")}
    total = losses[0] + 0.4 * losses[1]
    found = {"decode.loss_ce": losses[0], "aux.loss_ce": 0.4 * losses[1], "total": total}
    for name, value in found.items():
        assert value.item() == pytest.approx(golden[name].item(), rel=1e-6), name
    total.backward()
    original = convert_upernet({n: p.grad for n, p in model.named_parameters()}, "original")
    norms = {key.removeprefix("gradient_norm/"): g for key, g in golden.items() if key.startswith("gradient_norm/")}
    assert len(norms) == 7
    for key, expected in norms.items():
        assert original[key].norm().item() == pytest.approx(expected.item(), rel=1e-4), key
    if mode == "batch_statistics":
        updated = golden["updated/decode_head.bottleneck.bn.running_var"]
        _close(model.decode_head.bottleneck.bn.running_var[:16], updated, 1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_ways_through_the_layouts_lose_no_bit_and_end_in_our_networks_keys(variant):
    mmseg = _mmseg(variant)
    ours = read_upernet({"state_dict": mmseg, "meta": {"epoch": 1}})
    with torch.device("meta"):
        model = upernet(f"nat_{variant}")
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    theirs = convert_upernet(ours, "transformers")
    back = convert_upernet(read_upernet(theirs), "original")
    assert back.keys() == mmseg.keys() and all(torch.equal(back[key], mmseg[key]) for key in mmseg)


def test_transformers_class_gives_the_same_logits(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from nat_models.integrations import hf_transformers as hf

    model = _published("mini")
    backbone = hf.NatConfig(out_features=["stage1", "stage2", "stage3", "stage4"], depths=[3, 4, 6, 5])
    oracle = transformers.UperNetForSemanticSegmentation(
        transformers.UperNetConfig(backbone_config=backbone, num_labels=150)
    ).eval()
    from safetensors.torch import save_file

    save_file(convert_upernet(model.state_dict(), "transformers"), tmp_path / "model.safetensors", dict(format="pt"))
    oracle.config.save_pretrained(tmp_path)
    oracle, info = type(oracle).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    x = torch.randn(1, 3, 75, 107)
    with torch.no_grad():
        torch.testing.assert_close(oracle.eval()(x).logits, model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("variant, millions", zip(VARIANTS, (49.780, 57.697, 82.397, 123.281), strict=True))
def test_parameters_are_the_published_ones(variant, millions):
    with torch.device("meta"):
        model = upernet(f"nat_{variant}")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


@pytest.mark.parametrize("name", ["nat_mini", "dinat_mini", "dinat_s_tiny"])
@pytest.mark.parametrize("size", [(32, 32), (75, 107), (64, 130)])
def test_any_backbone_with_four_levels_at_any_size(name, size):
    model = _tiny(name)
    x = torch.randn(2, 3, *size)
    logits, auxiliary = model.train()(x)
    assert logits.shape == auxiliary.shape == (2, 5, *size)
    (logits.square().mean() + auxiliary.square().mean()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    assert model.eval()(x).shape == (2, 5, *size)


def test_eval_does_not_run_the_auxiliary_head():
    model = _tiny().eval()
    model.auxiliary_head.register_forward_hook(lambda *args: pytest.fail("it ran"))
    assert isinstance(model(torch.randn(1, 3, 64, 64)), torch.Tensor)


def test_published_systems_have_their_dilations_and_the_callers_win():
    with torch.device("meta"):
        model, own = upernet("dinat_mini"), upernet("dinat_mini", dilations=[1, 1, 1, 1], drop_path_rate=0.0)
    found = [[block.attn.dilation[0] for block in level.blocks] for level in model.backbone.levels]
    assert found == [[1, 16, 1], [1, 4, 1, 8], [1, 2, 1, 3, 1, 4], [1, 2, 1, 2, 1]]
    assert model.backbone.levels[3].blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert {block.attn.dilation for level in own.backbone.levels for block in level.blocks} == {(1, 1)}
    assert isinstance(own.backbone.levels[3].blocks[-1].drop_path1, torch.nn.Identity)


def test_large_systems_have_the_dilations_that_are_written_out():
    with torch.device("meta"):
        model = upernet("dinat_large")
    third = [block.attn.dilation[0] for block in model.backbone.levels[2].blocks]
    assert third == [1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5]
    assert len(PUBLISHED) == 13


def test_a_backbone_of_one_resolution_is_an_error():
    with pytest.raises(ValueError, match=r"maps at strides \[4, 8, 16, 32\], nat_isotropic_small has them at \[16"):
        upernet("nat_isotropic_small")


def test_other_classes_make_new_classifiers_and_all_else_is_loaded(tmp_path):
    source = _tiny()
    torch.save({"model": source.state_dict(), "epoch": 3}, tmp_path / "ours.pth")
    same = _tiny(weights=tmp_path / "ours.pth", num_classes=None)
    assert same.num_classes == 5
    assert all(torch.equal(a, b) for a, b in zip(same.state_dict().values(), source.state_dict().values(), strict=True))
    other = _tiny(weights=tmp_path / "ours.pth", num_classes=3)
    for key, value in source.state_dict().items():
        if "conv_seg" not in key:
            assert torch.equal(other.state_dict()[key], value), key
    assert other(torch.randn(2, 3, 64, 64))[0].shape[1] == 3
    gray = _tiny(weights=tmp_path / "ours.pth", in_chans=1)
    stem = "backbone.patch_embed.proj.0.weight"
    torch.testing.assert_close(gray.state_dict()[stem], source.state_dict()[stem].sum(1, keepdim=True))


def test_what_does_not_fit_is_refused_whole(tmp_path):
    state_dict = _tiny().state_dict()
    del state_dict["backbone.output_norms.1.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing: backbone\.output_norms\.1\.weight"):
        _tiny(weights=state_dict)
    with pytest.raises(CheckpointError, match="holds no UPerNet"):
        _tiny(weights=_tiny().backbone.state_dict())
    with pytest.raises(CheckpointError, match="of another shape"):
        _tiny(weights=_tiny().state_dict(), channels=8)


def test_from_an_imagenet_file_the_backbone_starts_with_new_norms(tmp_path):
    import timm

    source = timm.create_model("nat_mini", **TINY)
    torch.save(source.state_dict(), tmp_path / "imagenet.pth")
    overlay = dict(file=str(tmp_path / "imagenet.pth"))
    model = _tiny("nat_mini", pretrained=True, pretrained_cfg_overlay=overlay)
    assert torch.equal(model.backbone.levels[3].blocks[0].attn.rpb, source.levels[3].blocks[0].attn.rpb)
    assert all(norm.weight.eq(1).all() and not norm.bias.any() for norm in model.backbone.output_norms)


@pytest.mark.parametrize("freezing", [False, True])
def test_fuse_folds_batch_norm_and_the_backbone(freezing):
    model = _tiny(init_values=0.1).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
                module.weight.normal_()
                module.bias.normal_()
        x = torch.randn(1, 3, 64, 96)
        fused = fuse(model, freezing=freezing)
        torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
