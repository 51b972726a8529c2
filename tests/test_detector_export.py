"""Promises of `nat-models export` for detectors, and of fuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import nat_models
from nat_models import detector_export as exporting
from nat_models.cli import main
from nat_models.networks.detector import Detector
from nat_models.networks.detector_graph import Detections, DetectorGraph
from nat_models.training.detectors import DetectorConfig, load_detector, save_detector

TINY = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3)
SIZE = (64, 96)
CLASSES, IDS = ["cat", "dog", "hen"], [7, 3, 12]


def _config(system: str, masks: bool = True, **settings) -> DetectorConfig:
    colours = [[0, 0, 0]] * 3
    settings = dict(rpn_pre_nms_top_n_test=40, rpn_post_nms_top_n_test=60, **settings)  # fewer take less time
    fixed = dict(mean=[0.5] * 3, std=[0.2] * 3, short_side=64, long_side=96)
    return DetectorConfig(system, "nat_mini", TINY, CLASSES, IDS, colours, masks, settings=settings, **fixed)


def _network(config: DetectorConfig) -> Detector:
    """Of weights that tell boxes apart, and BatchNorms that have seen something."""
    torch.manual_seed(0)
    network = config.make_network().eval()
    with torch.no_grad():
        for stage in network.roi_heads.stages:
            stage.box_predictor.cls_score.weight.normal_(std=0.2)
            stage.box_predictor.bbox_pred.weight.normal_(std=0.05)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.5)
                module.running_var.uniform_(0.5, 2)
    return network


def _folder(path: Path, system: str, **settings) -> Path:
    config = _config(system, **settings)
    path.mkdir()
    save_detector(_network(config), path, config)
    return path


def _close(found: Detections, expected: Detections) -> None:
    """In order: float32 sums in another order move boxes of a hundred pixels by 1e-5 of that."""
    assert torch.equal(found[1], expected[1])
    for a, b, tolerance in zip(found[::2], expected[::2], (2e-3, 1e-5), strict=False):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


@pytest.mark.parametrize("system", ["mask_rcnn", "cascade_mask_rcnn"])
@pytest.mark.parametrize("size", [SIZE, (43, 75)])
@torch.no_grad()
def test_the_graph_is_the_detector_on_images_of_any_size(system, size):
    network = _network(_config(system, box_score_thresh=0.2))
    image = torch.rand(1, 3, *size)
    network.transform.min_size, network.transform.max_size, network.transform.paste = (min(size),), max(size), False
    (expected,) = network(list(image))
    found = DetectorGraph(network)((image - 0.5) / 0.2)
    assert len(found[2]) > 10
    _close(found, [expected[key] for key in Detections._fields])


def test_a_graph_without_mask_heads_has_three_outputs():
    found = DetectorGraph(_network(_config("mask_rcnn", masks=False)))(torch.randn(1, 3, *SIZE))
    assert [x.shape[1:] for x in found] == [(4,), (), ()]


@pytest.mark.parametrize("system", ["mask_rcnn", "cascade_mask_rcnn"])
@torch.no_grad()
def test_a_fused_detector_is_the_detector(system):
    network = _network(_config(system, box_score_thresh=0.2))
    fused = nat_models.fuse(network)
    assert type(fused) is Detector
    assert any(isinstance(module, nn.BatchNorm2d) for module in network.modules()) == (system != "mask_rcnn")
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    image = torch.randn(1, 3, *SIZE)
    expected = exporting.detect(network, image)
    assert len(expected.scores) > 10
    _close(exporting.detect(fused, image), expected)
