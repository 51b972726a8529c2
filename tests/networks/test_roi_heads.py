"""Stages of RoI heads: what they sample, their losses by hand, and what one hands to the next."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.ops import generalized_box_iou

from nat_models.networks.cascade_rcnn import cascade_mask_rcnn
from nat_models.networks.mask_rcnn import mask_rcnn
from nat_models.networks.rcnn import BoxByBoxMatcher
from nat_models.networks.roi_heads import Sample, Stage
from tests.networks.golden_rcnn import TINY

STDS = (0.1, 0.1, 0.2, 0.2)
TRUTH = torch.tensor([[10.0, 10.0, 50.0, 50.0], [60.0, 10.0, 90.0, 40.0]])
FAR = torch.tensor([[200.0, 200.0, 230.0, 240.0]])


def _stage(**kwargs) -> Stage:
    given = dict(stds=STDS, matcher=BoxByBoxMatcher(0.5, 0.5, None))
    return Stage(nn.Flatten(), 3, False, **{**given, **kwargs})


def _target(**more) -> dict:
    return dict(boxes=TRUTH, labels=torch.tensor([2, 0]), ignored=torch.zeros(0, 4), **more)


def _sample() -> Sample:
    boxes, truth = torch.cat([TRUTH, TRUTH + 3, FAR]), torch.cat([TRUTH, TRUTH, FAR])
    return Sample(boxes, truth, torch.tensor([2, 0, 2, 0, 3]), torch.tensor([0, 1, 0, 1]), torch.zeros(5) > 0)


def test_true_boxes_come_first_as_positives_of_themselves_then_negatives_in_order():
    proposals = torch.cat([FAR, TRUTH[1:] + 2, FAR + 1, TRUTH[:1] - 1])
    found = _stage().sample(proposals, _target(), BalancedPositiveNegativeSampler(10, 0.5))
    assert torch.equal(found.boxes, torch.cat([TRUTH, proposals[[1, 3, 0, 2]]]))
    assert found.matches.tolist() == [0, 1, 1, 0] and found.labels.tolist() == [2, 0, 0, 2, 3, 3]
    assert torch.equal(found.truth, torch.cat([TRUTH[[0, 1, 1, 0]], proposals[[0, 2]]]))
    assert found.is_truth.tolist() == [True, True, False, False, False, False]
    assert torch.equal(found.positives, found.boxes[:4])
    few = _stage().sample(proposals.repeat(5, 1), _target(), BalancedPositiveNegativeSampler(8, 0.25))
    assert (few.labels < 3).tolist() == [True] * 2 + [False] * 6


def test_proposals_in_a_crowd_are_not_sampled():
    found = _stage().sample(FAR + 1, {**_target(), "ignored": FAR}, BalancedPositiveNegativeSampler(10, 0.5))
    assert torch.equal(found.boxes, TRUTH)


def test_losses_are_means_over_all_sampled_boxes():
    logits, deltas, sample = torch.randn(5, 4), torch.randn(5, 3, 4), _sample()
    stage = _stage()
    found = stage.losses(logits, deltas, [sample])
    torch.testing.assert_close(found["loss_classifier"], F.cross_entropy(logits, sample.labels))
    shift = torch.tensor([[-3 / 40, -3 / 40, 0, 0], [-3 / 30, -3 / 30, 0, 0]]) / torch.tensor(STDS)
    wanted = torch.cat([torch.zeros(2, 4), shift])
    own = deltas[torch.arange(4), sample.labels[:4]]
    torch.testing.assert_close(found["loss_box_reg"], (own - wanted).abs().sum() / 5)
    decoded = stage.box_coder.decode_single(own, sample.boxes[:4])
    giou = generalized_box_iou(decoded, sample.truth[:4]).diag()
    found = _stage(giou=True).losses(logits, deltas, [sample])
    torch.testing.assert_close(found["loss_box_reg"], 10 * (1 - giou).sum() / 5)


def test_a_box_moves_by_the_deltas_of_its_class_and_the_background_by_those_of_the_best_one():
    stage, boxes = _stage(), torch.cat([TRUTH, FAR])
    deltas = torch.zeros(3, 3, 4)
    deltas[0, 2, 0] = deltas[1, 1, 1] = deltas[2, 0, 0] = 10.0  # by a whole width or height
    logits = torch.tensor([[9.0, 0, 0, 0], [0, 5, 0, 9], [5, 0, 0, 9]])
    moved = stage.refine(logits, deltas, boxes, (100, 300), torch.tensor([2, 3, 3]))
    expected = torch.tensor([[50.0, 10, 90, 50], [60.0, 40, 90, 70], [230.0, 100, 260, 100]])
    torch.testing.assert_close(moved, expected)  # the last one is clipped


def _cascade(**kwargs):
    few = dict(box_batch_size_per_image=12, rpn_post_nms_top_n_train=20, rpn_post_nms_top_n_test=10)
    given = dict(num_classes=3, min_size=64, box_detections_per_img=4, box_score_thresh=0.0, **few, **TINY)
    return cascade_mask_rcnn("nat_mini", **{**given, **kwargs})


def test_later_stages_get_what_was_sampled_without_the_true_boxes_and_weigh_less():
    model = _cascade()
    seen = []
    for stage in model.roi_heads.stages:

        def keep(proposals, target, sampler, stage=stage, original=stage.sample):
            seen.append((proposals, original(proposals, target, sampler)))
            return seen[-1][1]

        stage.sample = keep
    target = dict(boxes=TRUTH, labels=torch.tensor([2, 0]), masks=torch.ones(2, 64, 96))
    torch.manual_seed(0)
    losses = model([torch.rand(3, 64, 96)], [target])
    assert sum(int(sample.is_truth.sum()) for _, sample in seen[:2]) > 0
    for (_, sample), (proposals, _) in pairwise(seen):
        assert len(proposals) == len(sample.boxes) - sample.is_truth.sum()
        assert not proposals.requires_grad and (proposals <= torch.tensor([96.0, 64, 96, 64])).all()
    for i, stage in enumerate(model.roi_heads.stages):
        assert stage.weight == (1, 0.5, 0.25)[i]
        stage.weight = 0.0
    torch.manual_seed(0)
    without = model([torch.rand(3, 64, 96)], [target])
    assert all(losses[key] > 0 and without[key] == 0 for key in losses if key.startswith("stage"))


def test_logits_of_the_stages_are_averaged_and_masks_as_probabilities():
    model = _cascade().eval()
    model.transform.paste = False
    logits, masks = [], []
    for stage in model.roi_heads.stages:
        stage.box_predictor.register_forward_hook(lambda m, x, out: logits.append(out[0]))
        stage.mask_predictor.mask_fcn_logits.register_forward_hook(lambda m, x, out: masks.append(out))
        nn.init.normal_(stage.box_predictor.cls_score.weight)
    (found,) = model([torch.rand(3, 64, 96)])
    scores = (sum(logits) / 3).softmax(1)[:, :-1]
    assert len(logits) == len(masks) == 3 and len(found["scores"]) == 4
    assert all((scores - score).abs().min() < 1e-6 for score in found["scores"])
    rows = torch.arange(4)
    torch.testing.assert_close(found["masks"][:, 0], sum(x[rows, found["labels"]].sigmoid() for x in masks) / 3)


def test_the_systems_have_the_authors_rules():
    with torch.device("meta"):
        mask, cascade = mask_rcnn("nat_mini"), cascade_mask_rcnn("nat_mini")
    (stage,) = mask.roi_heads.stages
    assert (stage.matcher.lower_bound, stage.giou, stage.weight) == (0.5, False, 1.0)
    assert [stage.matcher.lower_bound for stage in cascade.roi_heads.stages] == [None] * 3
    assert all(stage.giou for stage in cascade.roi_heads.stages)
    stds = [tuple(1 / weight for weight in stage.box_coder.weights) for stage in cascade.roi_heads.stages]
    for found, expected in zip(stds, (STDS, (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067)), strict=True):
        assert found == pytest.approx(expected)
    assert (mask.rpn.beta, mask.rpn.inside_only) == (0.0, False)
    assert (cascade.rpn.beta, cascade.rpn.inside_only) == (1 / 9, True)
    assert mask.rpn.proposal_matcher.lower_bound == cascade.rpn.proposal_matcher.lower_bound == 0.3
    assert (mask.rpn.post_nms_top_n(), cascade.rpn.post_nms_top_n()) == (1000, 2000)


def _proposals(**kwargs):
    return _cascade(**kwargs).rpn


def test_the_cascade_trains_with_anchors_inside_the_image_alone():
    rpn = _proposals()
    anchors = torch.tensor(
        [[0.0, 0.0, 20.0, 20.0], [-1.0, 0, 20, 20], [5, 5, 96, 20], [5, 5, 95.9, 63.9], [5, 5, 9, 64]]
    )
    target = dict(boxes=torch.zeros(0, 4), ignored=torch.zeros(0, 4), image_size=(64, 96))
    (labels,), _ = rpn.assign_targets_to_anchors([anchors], [target])
    assert labels.tolist() == [0, -1, -1, 0, -1]
    rpn.inside_only = False
    (labels,), _ = rpn.assign_targets_to_anchors([anchors], [target])
    assert labels.tolist() == [0] * 5


def test_losses_of_anchors_are_divided_by_the_sample_with_at_least_one_of_each_kind():
    rpn = _proposals()
    objectness, deltas = torch.zeros(6), torch.zeros(6, 4)
    targets = [torch.full((3, 4), 1 / 18), torch.full((3, 4), 2.0)]
    labels = [torch.tensor([0.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, 0.0])]  # no positive in the first image
    loss, box_loss = rpn.compute_loss(objectness, deltas, labels, targets)
    assert loss.item() == pytest.approx(5 * 0.693147 / 6, rel=1e-5)  # 2 + 1 and 1 + 2
    assert box_loss.item() == pytest.approx(4 * (2 - 1 / 18) / 6)  # smooth L1 with beta 1/9
    rpn.beta = 0.0
    assert rpn.compute_loss(objectness, deltas, labels, targets)[1].item() == pytest.approx(4 * 2 / 6)
