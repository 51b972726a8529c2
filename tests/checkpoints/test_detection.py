"""Checkpoints of the detectors: the way through the layouts, and loading that is never partial."""

import warnings

import pytest
import torch

from nat_models.checkpoints import CheckpointError
from nat_models.checkpoints.detection import convert_rcnn, read_rcnn
from nat_models.conversion import convert
from nat_models.networks.cascade_rcnn import cascade_mask_rcnn
from nat_models.networks.mask_rcnn import mask_rcnn
from tests.networks.golden_rcnn import KEYS, TINY

MAKE = dict(mask_rcnn=mask_rcnn, cascade_mask_rcnn=cascade_mask_rcnn)
RENEWED = ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits")


def _tiny(make=mask_rcnn, **kwargs):
    return make("nat_mini", **{**dict(num_classes=3), **TINY, **kwargs})


@pytest.mark.parametrize("system", KEYS)
def test_the_way_to_ours_and_back_loses_no_bit_and_ends_in_our_networks_keys(system):
    torch.manual_seed(1)
    mmdet = {key: torch.randn(shape) for key, shape in KEYS[system].items()}
    ours = read_rcnn({"state_dict": mmdet, "meta": {"epoch": 36}, "optimizer": {"state": {}}})
    name, backbone = system.split("_nat_")
    with torch.device("meta"):
        model = MAKE[name](f"nat_{backbone}")
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in model.state_dict().items()}
    assert convert_rcnn(ours, "nat_models").keys() == ours.keys()
    back = convert_rcnn(ours, "original")
    assert back.keys() == mmdet.keys() and all(torch.equal(back[key], mmdet[key]) for key in mmdet)
    assert convert_rcnn(mmdet, "original").keys() == mmdet.keys()


def test_an_unknown_layout_is_an_error():
    with pytest.raises(
        ValueError, match=r"layout must be one of \('nat_models', 'original'\), got layout='torchvision'"
    ):
        convert_rcnn({}, "torchvision")


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("layout", ["nat_models", "original"])
def test_a_file_is_loaded_whole_and_tells_the_classes(make, layout, tmp_path):
    source = _tiny(make)
    held = {f"module.{key}": value for key, value in convert_rcnn(source.state_dict(), layout).items()}
    torch.save({"state_dict": held, "epoch": 3}, tmp_path / "weights.pth")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same = _tiny(make, weights=tmp_path / "weights.pth", num_classes=None)
    assert same.num_classes == 3
    assert all(torch.equal(same.state_dict()[key], value) for key, value in source.state_dict().items())


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
def test_other_classes_renew_logits_and_deltas_of_every_stage_and_say_so(make):
    source = _tiny(make).state_dict()
    with pytest.warns(UserWarning, match=r"has 3 classes, the model 5: new are \d+ tensors") as caught:
        other = _tiny(make, weights=source, num_classes=5)
    assert caught[0].filename == __file__
    new = [key for key, value in other.state_dict().items() if not torch.equal(value, source[key])]
    stages = len(other.roi_heads.stages)
    assert len(new) >= 3 * stages  # weights; biases begin at 0 as they do in the source
    for key in new:
        assert any(part in key for part in RENEWED) and key.startswith("roi_heads."), key
    for key in new:
        assert key in str(caught[0].message)


def test_without_masks_the_mask_head_of_a_checkpoint_is_left_out_and_said_so():
    source = _tiny()
    with pytest.warns(UserWarning, match="its mask head is left out"):
        boxes = _tiny(weights=source.state_dict(), masks=False)
    state_dict = source.state_dict()
    assert all(torch.equal(value, state_dict[key]) for key, value in boxes.state_dict().items())
    assert not any("mask" in key for key in boxes.state_dict())
    with pytest.raises(CheckpointError, match=r"12 missing: roi_heads\.stages\.0\.mask_head"):
        _tiny(weights=boxes.state_dict())


def test_gray_images_adapt_the_stem():
    source = _tiny().state_dict()
    stem = "backbone.body.patch_embed.proj.0.weight"
    gray = _tiny(weights=source, in_chans=1).state_dict()
    torch.testing.assert_close(gray[stem], source[stem].sum(1, keepdim=True))


def test_what_does_not_fit_is_refused_whole():
    state_dict = _tiny().state_dict()
    lacking = {k: v for k, v in state_dict.items() if k != "backbone.body.output_norms.1.weight"}
    with pytest.raises(CheckpointError, match=r"1 missing: backbone\.body\.output_norms\.1\.weight"):
        _tiny(weights=lacking)
    with pytest.raises(CheckpointError, match="unexpected: odd"):
        _tiny(weights={**state_dict, "odd": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"of another shape: rpn\.head\.cls_logits"):
        _tiny(weights=state_dict, aspect_ratios=(1.0,))
    with pytest.raises(CheckpointError, match="The checkpoint holds no detector; expected one with"):
        _tiny(weights=_tiny().backbone.body.state_dict())
    with pytest.raises(CheckpointError, match="holds 2 detectors"):
        _tiny(weights={"student": state_dict, "teacher": state_dict})
    with pytest.raises(CheckpointError, match=r"lacks roi_heads\.stages\.0\.box_predictor\.cls_score\.weight"):
        _tiny(weights={k: v for k, v in state_dict.items() if "cls_score" not in k})
    with pytest.raises(CheckpointError, match=r"98 missing: roi_heads\.stages\.0\.box_head\.0\.0\.weight"):
        _tiny(cascade_mask_rcnn, weights=state_dict)


def test_from_an_imagenet_file_the_backbone_starts_with_new_norms(tmp_path):
    import timm

    source = timm.create_model("nat_mini", **TINY)
    torch.save(source.state_dict(), tmp_path / "imagenet.pth")
    overlay = dict(file=str(tmp_path / "imagenet.pth"))
    body = _tiny(pretrained=True, pretrained_cfg_overlay=overlay).backbone.body
    assert torch.equal(body.levels[3].blocks[0].attn.rpb, source.levels[3].blocks[0].attn.rpb)
    assert all(norm.weight.eq(1).all() and not norm.bias.any() for norm in body.output_norms)


@pytest.mark.parametrize("layout", ["nat_models", "original"])
def test_convert_takes_the_backbone_out_of_a_detector(layout, tmp_path):
    model = _tiny()
    torch.save({"state_dict": convert_rcnn(model.state_dict(), layout)}, tmp_path / "detector.pth")
    convert(tmp_path / "detector.pth", tmp_path / "out", to="timm", name="nat_mini", model_kwargs=TINY, check=True)
    from safetensors.torch import load_file

    found, body = load_file(tmp_path / "out" / "model.safetensors"), model.backbone.body.state_dict()
    assert found.keys() == body.keys() and all(torch.equal(found[key], body[key]) for key in body)
