"""The detectors' interface: torchvision's, on batches of any content."""

import pytest
import torch
from torch import nn

from nat_models.networks.cascade_rcnn import cascade_mask_rcnn
from nat_models.networks.detector import COCO_IDS, Detector
from nat_models.networks.mask_rcnn import mask_rcnn
from nat_models.networks.rcnn import TensorMasks, lies_in_crowd
from tests.networks.golden_rcnn import TINY

MAKE = dict(mask_rcnn=mask_rcnn, cascade_mask_rcnn=cascade_mask_rcnn)
FEW = dict(
    rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=20, box_batch_size_per_image=12, box_detections_per_img=6
)


def _tiny(name: str = "mask_rcnn", backbone: str = "nat_mini", **kwargs) -> Detector:
    given = dict(num_classes=3, min_size=64, max_size=128, box_score_thresh=0.0, drop_path_rate=0.0)
    return MAKE[name](backbone, **{**given, **FEW, **TINY, **kwargs})


def _target(height: int = 64, width: int = 96, **more) -> dict:
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[0, 10:50, 10:60] = 1
    masks[1, 20:40, 30:70] = 1
    boxes = torch.tensor([[10.0, 10.0, 60.0, 50.0], [30.0, 20.0, 70.0, 40.0]])
    return dict(boxes=boxes, labels=torch.tensor([0, 2]), masks=masks, **more)


def _empty(height: int = 64, width: int = 96) -> dict:
    return dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), masks=torch.zeros(0, height, width))


@pytest.mark.parametrize("backbone", ["nat_mini", "dinat_mini", "dinat_s_tiny"])
@pytest.mark.parametrize("name", MAKE)
def test_any_backbone_with_four_levels_trains_and_detects_on_images_of_any_size(name, backbone):
    model = _tiny(name, backbone)
    images = [torch.rand(3, 64, 96), torch.rand(3, 75, 50)]
    losses = model(images, [_target(), _target(75, 50)])
    prefixes = ["stage0.", "stage1.", "stage2."] if name == "cascade_mask_rcnn" else [""]
    parts = ("loss_classifier", "loss_box_reg", "loss_mask")
    assert set(losses) == {"loss_objectness", "loss_rpn_box_reg", *(f"{a}{b}" for a in prefixes for b in parts)}
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    for image, found in zip(images, model.eval()(images), strict=True):
        height, width = image.shape[1:]
        count = len(found["boxes"])
        assert 0 < count <= 6 and found["scores"].shape == found["labels"].shape == (count,)
        assert found["masks"].shape == (count, 1, height, width)
        assert (found["scores"].diff() <= 0).all() and set(found["labels"].tolist()) <= {0, 1, 2}
        assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([width, height] * 2) + 1e-3).all()
        assert found["masks"].min() >= 0 and found["masks"].max() <= 1


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("crowd", [False, True])
@pytest.mark.parametrize("name", MAKE)
def test_a_batch_of_negatives_gives_every_parameter_a_gradient(name, crowd, masks):
    """Else processes would wait for one another."""
    model = _tiny(name, masks=masks)
    target = _empty()
    if crowd:  # of all there is, so that no box is sampled at all
        everywhere = torch.tensor([[-500.0, -500.0, 600.0, 600.0]])
        target = dict(boxes=everywhere, labels=torch.tensor([0]), iscrowd=torch.tensor([1]))
    losses = model([torch.rand(3, 64, 96)] * 2, [target] * 2)
    assert all(loss.isfinite() for loss in losses.values())
    for name, loss in losses.items():
        assert (loss > 0) == (not crowd and ("classifier" in name or "objectness" in name)), name
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(buffer.isfinite().all() for buffer in model.buffers())
    assert any("mask" in n for n, _ in model.named_parameters()) == masks


def test_a_negative_beside_a_positive_counts_as_one():
    model = _tiny()
    losses = model([torch.rand(3, 64, 96)] * 2, [_target(), _empty()])
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values()) and losses["loss_mask"] > 0


def test_a_crowd_is_neither_an_object_nor_background():
    torch.manual_seed(3)
    model = _tiny(rpn_batch_size_per_image=4000, box_batch_size_per_image=4000, rpn_post_nms_top_n_train=1000)
    seen = {}

    def watch(name, module, method):
        original = getattr(module, method)

        def wrapped(*args):
            seen[name] = (args, original(*args))
            return seen[name][1]

        setattr(module, method, wrapped)

    watch("anchors", model.rpn, "assign_targets_to_anchors")
    watch("samples", model.roi_heads.stages[0], "sample")
    target = _target(iscrowd=torch.tensor([0, 1]))
    target["labels"][1] = 99  # a crowd's label is not read
    model([torch.rand(3, 64, 96)], [target])
    (anchors, targets), (labels, matched) = seen["anchors"]
    assert targets[0]["boxes"].tolist() == [[10, 10, 60, 50]] and targets[0]["ignored"].tolist() == [[30, 20, 70, 40]]
    inside = lies_in_crowd(anchors[0], target["boxes"][1:])
    assert inside.any() and (labels[0][inside] == -1).all() and (labels[0] == 0).any()
    assert (matched[0] == target["boxes"][0]).all()
    (proposals, *_), sample = seen["samples"]
    assert sample.boxes[0].tolist() == [10, 10, 60, 50]
    assert not lies_in_crowd(sample.boxes[1:], target["boxes"][1:]).any()
    assert lies_in_crowd(proposals, target["boxes"][1:]).any()  # else it would show nothing


def test_the_mask_of_an_object_after_a_crowd_is_its_own():
    asked = []

    class Lazy:
        def crop(self, boxes, indices, size):
            asked.append((boxes, indices, size))
            return torch.ones(len(boxes), size, size, dtype=torch.bool)

    target = {**_target(iscrowd=torch.tensor([True, False])), "masks": Lazy()}
    _tiny()([torch.rand(3, 64, 96)], [target])
    ((boxes, indices, size),) = asked
    assert size == 28 and len(boxes) == len(indices) > 0 and set(indices.tolist()) == {1}


@pytest.mark.parametrize("resized", [False, True])
def test_lazy_masks_train_as_tensors_do(resized):
    model = _tiny(min_size=96 if resized else 64)
    image, target = torch.rand(3, 64, 96), _target()
    losses = []
    for masks in (target["masks"], TensorMasks(target["masks"])):
        torch.manual_seed(0)
        losses.append(model([image], [{**target, "masks": masks}]))
    assert all(torch.equal(losses[0][key], losses[1][key]) for key in losses[0])


def test_training_is_deterministic_given_the_seed_and_draws_with_it():
    model, found = _tiny(), []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(sum(model([torch.ones(3, 64, 96)], [_target()]).values()))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


@pytest.mark.parametrize("name", MAKE)
def test_an_image_does_not_depend_on_others_that_pad_it_no_further(name):
    few = dict(rpn_post_nms_top_n_test=6, box_detections_per_img=2)
    model = _tiny(name, **few).double().eval()
    images = [torch.rand(3, *size, dtype=torch.float64) for size in ((64, 96), (64, 96), (64, 70))]
    together = model(images)
    for image, found in zip(images, together, strict=True):  # all are padded to 64 x 96, alone too
        (alone,) = model([image])
        for key in alone:
            torch.testing.assert_close(alone[key], found[key], msg=key)
    assert together[2]["masks"].shape[2:] == (64, 70) and not torch.equal(together[0]["boxes"], together[1]["boxes"])


def test_anchors_of_the_batchs_padding_do_not_train():
    model = _tiny(rpn_batch_size_per_image=10**6)
    labels = []
    original = model.rpn.assign_targets_to_anchors

    def keep(*args):
        labels.append((args[0], original(*args)[0]))
        return original(*args)

    model.rpn.assign_targets_to_anchors = keep
    model([torch.rand(3, 64, 128), torch.rand(3, 64, 64)], [_target(64, 128), _target(64, 64)])
    (anchors, (wide, narrow)) = labels[0]
    beyond = (anchors[0][:, 0] + anchors[0][:, 2]) / 2 >= 64
    assert beyond.any() and (narrow[beyond] == -1).all() and (wide[beyond] == 0).any() and (narrow == 0).any()


@pytest.mark.parametrize("name", MAKE)
def test_no_detections_are_empty_tensors(name):
    model = _tiny(name, box_score_thresh=1.0).eval()
    some, none = model([torch.rand(3, 64, 96), torch.rand(3, 80, 64)])
    assert some["boxes"].shape == none["boxes"].shape == (0, 4)
    assert some["scores"].shape == some["labels"].shape == (0,) and some["labels"].dtype == torch.int64
    assert some["masks"].shape == (0, 1, 64, 96) and none["masks"].shape == (0, 1, 80, 64)


def test_masks_may_be_left_on_their_boxes():
    model = _tiny().eval()
    model.transform.paste = False
    (found,) = model([torch.rand(3, 64, 96)])
    assert found["masks"].shape == (6, 1, 28, 28)


def test_without_masks_boxes_alone_train_and_are_found():
    model = _tiny(masks=False)
    target = _target()
    del target["masks"]
    losses = model([torch.rand(3, 64, 96)], [target])
    assert "loss_mask" not in losses
    (found,) = model.eval()([torch.rand(3, 64, 96)])
    assert set(found) == {"boxes", "labels", "scores"}


def test_cocos_labels_in_targets_and_results():
    assert len(COCO_IDS) == 80 and COCO_IDS[:12] == (*range(1, 12), 13) and COCO_IDS[-1] == 90
    torch.manual_seed(0)
    plain = _tiny(num_classes=80)
    torch.manual_seed(0)
    coco = _tiny(num_classes=80, coco_labels=True)
    assert coco.state_dict().keys() == plain.state_dict().keys()
    image, losses = torch.rand(3, 64, 96), []
    for model, labels in ((plain, [11, 79]), (coco, [13, 90])):
        torch.manual_seed(0)
        losses.append(model([image], [{**_target(), "labels": torch.tensor(labels)}]))
    assert losses[0] == losses[1]
    (a,), (b,) = (model.eval()([image]) for model in (plain, coco))
    assert b["labels"].tolist() == [COCO_IDS[i] for i in a["labels"].tolist()]
    with pytest.raises(ValueError, match="labels are one of 80 from 1 to 90, got 12"):
        coco.train()([image], [{**_target(), "labels": torch.tensor([1, 12])}])
    with pytest.raises(ValueError, match=r"COCO's 80 classes, got num_classes=3\."):
        _tiny(coco_labels=True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(boxes=torch.zeros(4)), r"Target 1: boxes are \[N, 4\] and labels \[N\], got \[4\] and \[2\]"),
        (dict(labels=torch.tensor([0])), r"got \[2, 4\] and \[1\]"),
        (dict(labels=torch.tensor([0, 3])), "Target 1: labels are one of 3 from 0 to 2, got 3"),
        (dict(labels=torch.tensor([-1, 0])), "got -1"),
        (dict(boxes=torch.tensor([[0.0, 0, 5, 5], [7, 7, 7, 9]])), r"above 0, got \[7.0, 7.0, 7.0, 9.0\]"),
        (dict(boxes=torch.tensor([[0.0, 0, 5, 5], [0, 0, torch.nan, 9]])), r"above 0, got \[0.0, 0.0, nan, 9.0\]"),
        (dict(masks=None), "Target 1 has no masks. A detector made with masks=False trains on boxes alone"),
        (dict(masks=torch.zeros(3, 64, 96)), r"masks are \[N, H, W\] for 2 boxes, got \[3, 64, 96\]"),
    ],
)
def test_a_target_that_breaks_a_rule_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        _tiny()([torch.rand(3, 64, 96)] * 2, [_target(), {**_target(), **wrong}])


def test_training_takes_a_target_for_each_image():
    model = _tiny()
    with pytest.raises(ValueError, match="got None for 1 images"):
        model([torch.rand(3, 64, 96)])
    with pytest.raises(ValueError, match="got 1 for 2 images"):
        model([torch.rand(3, 64, 96)] * 2, [_target()])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(image_mean=(0.5,)), r"image_mean is for 3 channels, got \(0.5,\)"),
        (dict(anchor_sizes=(16, 32)), r"an entry for each of 5 strides, got \(16, 32\)"),
        (dict(box_bg_iou_thresh=0.6), r"got \[0.5\] and \[0.6\] for 1 stages"),
    ],
)
def test_a_setting_that_breaks_a_rule_is_an_error(kwargs, message):
    with pytest.raises(ValueError, match=message):
        _tiny(**kwargs)


def test_settings_reach_their_parts_and_the_rest_the_backbone():
    model = _tiny(
        anchor_sizes=(8, 16, 32, 64, (128, 256)[:1]),
        aspect_ratios=(1.0, 2.0),
        rpn_nms_thresh=0.6,
        rpn_pre_nms_top_n_test=50,
        box_nms_thresh=0.4,
        box_score_thresh=0.2,
        in_chans=1,
    )
    assert model.rpn.head.cls_logits.out_channels == 2 and model.rpn.nms_thresh == 0.6
    assert model.rpn.eval().pre_nms_top_n() == 50 and model.rpn.train().pre_nms_top_n() == 2000
    assert (model.roi_heads.nms_thresh, model.roi_heads.score_thresh) == (0.4, 0.2)
    assert model.backbone.body.in_chans == 1 and len(model.transform.image_mean) == 1
    assert model([torch.rand(1, 64, 96)], [_target()])["loss_objectness"].isfinite()
    with pytest.raises(TypeError, match="box_treshold"):
        _tiny(box_treshold=0.1)


def test_autocast_computes_boxes_and_losses_in_float32():
    model = _tiny("cascade_mask_rcnn")
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([torch.rand(3, 64, 96)], [_target()])
        (found,) = model.eval()([torch.rand(3, 64, 96)])
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_heads_begin_as_mmdetections():
    model = _tiny("cascade_mask_rcnn", num_classes=20)
    stage = model.roi_heads.stages[2]
    fc = stage.box_head[5]
    assert stage.box_predictor.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert stage.box_predictor.bbox_pred.weight.std().item() == pytest.approx(0.001, rel=0.1)
    assert fc.weight.std().item() == pytest.approx((2 / (fc.in_features + fc.out_features)) ** 0.5, rel=0.05)
    assert model.rpn.head.cls_logits.weight.std().item() == pytest.approx(0.01, rel=0.2)
    lateral = model.backbone.fpn.inner_blocks[3][0]
    assert lateral.weight.std().item() == pytest.approx((2 / (lateral.in_channels + 256)) ** 0.5, rel=0.1)
    assert stage.mask_predictor.conv5_mask.weight.std().item() == pytest.approx((2 / (256 * 4)) ** 0.5, rel=0.1)
    heads = [model.backbone.fpn, model.rpn, model.roi_heads]
    layers = [m for head in heads for m in head.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.ConvTranspose2d)]
    assert not any(layer.bias.any() for layer in layers if layer.bias is not None)


def test_what_trainers_ask_of_a_model():
    model = _tiny(depths=(1, 1, 2, 1))
    names = dict(model.named_parameters())
    assert model.no_weight_decay() <= set(names) and len(model.no_weight_decay()) == 5
    heads = {id(p) for p in model.get_classifier().parameters()}
    assert {name for name, p in names.items() if id(p) not in heads} == {n for n in names if ".body." in n}
    assert model.group_matcher()["stem"].startswith(r"^backbone\.body\.patch_embed")
    model.set_grad_checkpointing()
    sum(model([torch.rand(3, 64, 96)], [_target()]).values()).backward()
    assert model.backbone.body.patch_embed.proj[0].weight.grad.any()
