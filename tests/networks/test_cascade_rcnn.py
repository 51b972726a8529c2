"""Cascade Mask R-CNN against golden values of the authors' code."""

import pytest
import torch

from nat_models.networks.cascade_rcnn import PUBLISHED, cascade_mask_rcnn
from nat_models.networks.rcnn import AlignedRoIPool
from tests.networks import golden_rcnn as g

FILE = "cascade_mask_rcnn"
LOSSES = {
    f"s{i}.{theirs}": f"stage{i}.{ours}"
    for i in range(3)
    for theirs, ours in dict(loss_cls="loss_classifier", loss_bbox="loss_box_reg", loss_mask="loss_mask").items()
}


@pytest.fixture(scope="module", params=["mini", "small"])
def authors(request):
    """Variant, its network in float64 and evaluation, and its maps. A test that trains it puts its statistics back."""
    model = g.authors(f"cascade_mask_rcnn_nat_{request.param}").double().eval()
    return request.param, model, g.trunk(model, g.image(torch.float64))


def test_pyramid_proposal_network_and_anchors_of_the_authors(authors):
    variant, _, trunk = authors
    g.assert_pyramid(trunk, g.golden(FILE, f"{variant}/"), 1e-7)


@torch.no_grad()
def test_stages_of_the_authors_on_boxes_in_and_beyond_the_image(authors):
    variant, model, trunk = authors
    expected = g.golden(FILE, f"{variant}/fixed/")
    maps, heads = list(trunk["features"].values()), model.roi_heads
    boxes = expected["proposals"].double()
    assert AlignedRoIPool.levels_of(boxes).tolist() == expected["levels"].tolist()
    cut_for_masks = heads.mask_roi_pool(maps, [boxes])
    g.close(cut_for_masks[:, ::32, ::2, ::2], expected["mask_roi_features"], 1e-7)
    g.close(heads.box_roi_pool(maps, [boxes])[:, ::16], expected["roi_features"], 1e-7)
    assert len(heads.stages) == 3
    for i, stage in enumerate(heads.stages):
        g.close(boxes, expected[f"stage{i}/rois"], 1e-7)
        logits, deltas = stage.predict_boxes(heads.box_roi_pool(maps, [boxes]))
        g.close(logits, expected[f"stage{i}/class_logits"], 1e-7)
        g.close(deltas.flatten(1), expected[f"stage{i}/deltas"], 1e-7)
        masks = stage.predict_masks(cut_for_masks)
        g.close(masks[:, ::20, ::2, ::2], expected[f"stage{i}/mask_logits"], 1e-7)
        boxes = stage.refine(logits, deltas, boxes, g.SIZE, torch.full((8,), 80))


def test_detections_of_the_authors_in_float32():
    model = g.authors("cascade_mask_rcnn_nat_mini").eval()
    x = g.image(torch.float32)
    found = g.detect(model, model.backbone(x), x)
    g.assert_detections(found, g.golden(FILE, "mini/detections/"), pixels=1e-2, score=1e-4, area=1)


@pytest.mark.slow
@pytest.mark.parametrize("authors", ["mini"], indirect=True)
def test_detections_of_the_authors(authors):
    _, model, trunk = authors
    found = g.detect(model, trunk["features"], g.image(torch.float64))
    g.assert_detections(found, g.golden(FILE, "mini/detections/"), pixels=2e-5, score=1e-6, area=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("authors", "mode"),
    [("mini", "batch_statistics"), ("mini", "running_statistics"), ("small", "batch_statistics")],
    indirect=["authors"],
)
def test_losses_samples_and_gradients_of_the_authors(authors, mode):
    variant, model, _ = authors
    state = {key: value.clone() for key, value in model.state_dict().items()}
    model.train()
    if mode == "running_statistics":
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
    try:
        found = g.train(model, g.image(torch.float64))
    finally:
        model.zero_grad()
        model.load_state_dict(state)
        model.eval()
    expected = g.golden(FILE, f"{variant}/train/{mode}/")
    g.assert_training(found, expected, LOSSES, rel=1e-6)
    g.assert_gradients(found, expected, 19, rel=1e-5)


@pytest.mark.parametrize(
    "variant, millions", [("mini", 77.458), ("tiny", 85.376), ("small", 108.085), ("base", 146.978)]
)
def test_parameters_are_the_published_ones(variant, millions):
    with torch.device("meta"):
        model = cascade_mask_rcnn(f"nat_{variant}")
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 3) == millions


def test_published_systems_have_their_stochastic_depth():
    with torch.device("meta"):
        model = cascade_mask_rcnn("dinat_base")
    assert model.backbone.body.levels[3].blocks[-1].drop_path1.drop_prob == pytest.approx(0.6)
    assert model.backbone.body.levels[0].blocks[1].attn.dilation == (28, 28)
    assert len(PUBLISHED) == 13


def test_each_stage_has_its_thresholds():
    with torch.device("meta"):
        model = cascade_mask_rcnn("nat_mini")
        own = cascade_mask_rcnn("nat_mini", box_fg_iou_thresh=0.5, box_bg_iou_thresh=(0.5, 0.4, 0.3))
    found = [(stage.matcher.high_threshold, stage.matcher.low_threshold) for stage in model.roi_heads.stages]
    assert found == [(0.5, 0.5), (0.6, 0.6), (0.7, 0.7)]
    found = [(stage.matcher.high_threshold, stage.matcher.low_threshold) for stage in own.roi_heads.stages]
    assert found == [(0.5, 0.5), (0.5, 0.4), (0.5, 0.3)]
    with pytest.raises(ValueError, match=r"a number for each stage.* got \[0.5, 0.6\] and \[0.5, 0.6\] for 3 stages"):
        cascade_mask_rcnn("nat_mini", box_fg_iou_thresh=(0.5, 0.6))
