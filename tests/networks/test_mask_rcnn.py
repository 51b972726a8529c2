"""Mask R-CNN against golden values of the authors' code."""

import pytest
import torch

from nat_models.networks.mask_rcnn import PUBLISHED, mask_rcnn
from nat_models.networks.rcnn import AlignedRoIPool
from tests.networks import golden_rcnn as g

FILE = "mask_rcnn"
LOSSES = dict(loss_cls="loss_classifier", loss_bbox="loss_box_reg", loss_mask="loss_mask")


@pytest.fixture(scope="module")
def model():
    return g.authors("mask_rcnn_nat_mini").double().eval()


@pytest.fixture(scope="module")
def trunk(model):
    return g.trunk(model, g.image(torch.float64))


@pytest.fixture(scope="module")
def trained(model):
    found = g.train(model.train(), g.image(torch.float64))
    model.zero_grad()
    model.eval()
    return found


def test_pyramid_proposal_network_and_anchors_of_the_authors(trunk):
    g.assert_pyramid(trunk, g.golden(FILE, "mini/"), 1e-7)


def test_detections_of_the_authors(model, trunk):
    found = g.detect(model, trunk["features"], g.image(torch.float64))
    g.assert_detections(found, g.golden(FILE, "mini/detections/"), pixels=1e-5, score=1e-7, area=0)


def test_padding_and_the_size_before_resizing_as_the_authors_have_them(model, trunk):
    found = g.detect(model, trunk["features"], g.image(torch.float64), (120, 150), (96, 120))
    g.assert_detections(found, g.golden(FILE, "mini/padded/"), pixels=1e-5, score=1e-7, area=0)
    assert found["masks"].shape == (100, 1, 96, 120)


def test_heads_of_the_authors_on_boxes_in_and_beyond_the_image(model, trunk):
    expected = g.golden(FILE, "mini/fixed/")
    boxes, maps = expected["proposals"].double(), list(trunk["features"].values())
    heads = model.roi_heads
    (stage,) = heads.stages
    with torch.no_grad():
        cut, cut_for_masks = (pool(maps, [boxes]) for pool in (heads.box_roi_pool, heads.mask_roi_pool))
        logits, deltas = stage.predict_boxes(cut)
        masks = stage.predict_masks(cut_for_masks)
    assert AlignedRoIPool.levels_of(boxes).tolist() == expected["levels"].tolist()
    g.close(cut[:, ::16], expected["roi_features"], 1e-7)
    g.close(cut_for_masks[:, ::32, ::2, ::2], expected["mask_roi_features"], 1e-7)
    g.close(logits, expected["class_logits"], 1e-7)
    g.close(deltas.flatten(1), expected["deltas"], 1e-7)
    g.close(masks[:, ::20, ::2, ::2], expected["mask_logits"], 1e-7)


def test_losses_and_samples_of_the_authors(trained):
    g.assert_training(trained, g.golden(FILE, "mini/train/losses/"), LOSSES, rel=1e-6)


def test_gradients_of_the_authors(trained):
    g.assert_gradients(trained, g.golden(FILE, "mini/train/losses/"), 10, rel=1e-5)


def test_detections_of_the_authors_in_float32():
    model = g.authors("mask_rcnn_nat_mini").eval()
    x = g.image(torch.float32)
    trunk = g.trunk(model, x)
    found = g.detect(model, trunk["features"], x)
    g.assert_pyramid(trunk, g.golden(FILE, "mini/"), 1e-5)
    g.assert_detections(found, g.golden(FILE, "mini/detections/"), pixels=1e-2, score=1e-4, area=1)
    with torch.no_grad():  # the same through the interface
        (whole,) = model(list(x))
    assert all(torch.equal(whole[key], found[key]) for key in ("boxes", "labels", "scores", "masks"))


@pytest.mark.parametrize("variant, millions", [("mini", 39.623), ("tiny", 47.541), ("small", 70.250)])
def test_parameters_are_the_published_ones(variant, millions):
    with torch.device("meta"):
        model = mask_rcnn(f"nat_{variant}")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


def test_published_systems_have_their_dilations_and_the_callers_win():
    with torch.device("meta"):
        model, own = mask_rcnn("dinat_mini"), mask_rcnn("dinat_mini", dilations=[1, 1, 1, 1], drop_path_rate=0.0)
        large, patches = mask_rcnn("dinat_large"), mask_rcnn("dinat_s_small")

    def dilations(model):
        return [[block.attn.dilation[0] for block in level.blocks] for level in model.backbone.body.levels]

    assert dilations(model) == [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]]
    assert dilations(large)[2] == [1, 3, 1, 5, 1, 7] * 3
    assert dilations(patches) == [[1, 28], [1, 14], [1, 3, 1, 5, 1, 7] * 3, [1, 3]]
    assert model.backbone.body.levels[3].blocks[-1].drop_path1.drop_prob == pytest.approx(0.2)
    assert dilations(own) == [[1] * 3, [1] * 4, [1] * 6, [1] * 5]
    assert isinstance(own.backbone.body.levels[3].blocks[-1].drop_path1, torch.nn.Identity)
    assert len(PUBLISHED) == 8


def test_a_backbone_of_one_resolution_is_an_error():
    with pytest.raises(ValueError, match=r"Mask R-CNN takes a backbone with maps at strides \[4, 8, 16, 32\]"):
        mask_rcnn("dinat_isotropic_small")
