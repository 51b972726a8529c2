"""Promises of `nat-models export` for detectors, and of fuse."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import nat_models
from nat_models import detector_export as exporting
from nat_models.cli import main
from nat_models.commands.export import _read_images
from nat_models.export import FORMATS
from nat_models.networks.detector import Detector
from nat_models.networks.detector_graph import Detections, DetectorGraph
from nat_models.training.detectors import DetectorConfig, load_detector, save_detector
from tests.ops.conftest import needs_native

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


@pytest.mark.parametrize(
    "system, size",
    [
        ("mask_rcnn", (43, 75)),
        ("cascade_mask_rcnn", SIZE),
        pytest.param("mask_rcnn", SIZE, marks=pytest.mark.slow),
        pytest.param("cascade_mask_rcnn", (43, 75), marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_the_graph_is_the_detector_on_images_of_any_size(system, size):
    network = _network(_config(system, box_score_thresh=0.2))
    image = torch.rand(1, 3, *size)
    network.transform.min_size, network.transform.max_size, network.transform.paste = (min(size),), max(size), False
    (expected,) = network(list(image))
    found = DetectorGraph(network)((image - 0.5) / 0.2)
    assert len(found[2]) > 5
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


@pytest.mark.slow  # a minute each
@pytest.mark.parametrize("least_score", [0.45, 1.0])  # more than 1 is no score
@pytest.mark.parametrize("format", ["onnx", "pt2", "torchscript"])
@torch.no_grad()
def test_a_file_finds_what_the_detector_finds_and_nothing_where_it_finds_nothing(format, least_score, tmp_path, capsys):
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folder = _folder(tmp_path / "run", "mask_rcnn", box_score_thresh=least_score)
    path = tmp_path / f"detector{FORMATS[format][0]}"
    flags = ["--format", format, "--output", str(path), "--img-size", "64", "--check"]
    finds = least_score < 1
    assert main(["export", "--model", str(folder), *flags]) == (0 if finds else 2)
    said = capsys.readouterr()
    assert "detections of file and network agree" in said.out
    assert ("nothing was compared: give --check-images with objects" in said.err) == (not finds)
    exported = exporting.load_detections(path, format)
    assert json.loads(exported.metadata["label_names"]) == CLASSES
    assert json.loads(exported.metadata["category_ids"]) == IDS
    preprocessing = json.loads(exported.metadata["preprocessing"])
    assert (preprocessing["mean"], preprocessing["short_side"], preprocessing["input_size"]) == (
        [0.5] * 3,
        64,
        [3, 64, 64],
    )
    network, _ = load_detector(folder)
    image = 2 * torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    found, expected = exported.run(image), exporting.detect(network, image)
    _close(found, expected)
    assert (len(found[2]) > 3) == finds and (len(found[2]) == 0) == (not finds)


@pytest.mark.slow  # half a minute each
@needs_native
@pytest.mark.parametrize("system", ["mask_rcnn", "cascade_mask_rcnn"])
def test_a_detectors_backbone_calls_the_kernel_in_onnx_runtime(system, tmp_path, capsys):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folder, path = _folder(tmp_path / "run", system, box_score_thresh=0.45), tmp_path / "detector.onnx"
    flags = ["--custom-op", "--output", str(path), "--img-size", "64", "--check"]
    assert main(["export", "--model", str(folder), *flags]) == 0
    assert "detections of file and network agree" in capsys.readouterr().out
    assert [node.op_type for node in onnx.load(path).graph.node if node.domain == "nat_models"] == 4 * ["na2d"]


@torch.no_grad()
def test_a_file_is_checked_on_images_of_yours(tmp_path, capsys):
    folder = _folder(tmp_path / "run", "mask_rcnn", box_score_thresh=0.45)
    (tmp_path / "images").mkdir()
    for i, size in enumerate([(80, 70), (50, 64)]):
        pixels = torch.randint(256, (*size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        Image.fromarray(pixels.numpy()).save(tmp_path / "images" / f"{i}.png")
    flags = ["--format", "torchscript", "--output", str(tmp_path / "d.pt"), "--img-size", "64"]
    images = ["--check-images", str(tmp_path / "images")]
    assert main(["export", "--model", str(folder), *flags, *images]) == 0
    network, about = load_detector(folder)
    seen = [(exporting.detect(network, x[None])) for x in _read_images(images[1:], about, 64)]
    count = 2 * sum(len(each.scores) for each in seen)
    assert count and f"on 2 images: {count} of {count} detections" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--format", "aoti", "--output", "x.pt2"], "A detector is exported to onnx, pt2, torchscript, not aoti."),
        (["--img-size", "32"], "for images from 33 px, got 32x32"),
        (["--num-classes", "3"], "--num-classes is not for a detector"),
        (["--dtype", "float16"], "A detector is exported in float32, got --dtype float16"),
    ],
)
def test_what_cannot_be_had_is_said(flags, message, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text('{"architecture": "mask_rcnn"}')
    network = _network(_config("mask_rcnn"))
    monkeypatch.setattr("nat_models.commands.export.load_detector", lambda _: (network, _config("mask_rcnn")))
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--model", str(folder), *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_file_that_finds_something_else_fails_its_check():
    boxes = torch.tensor([[0.0, 0, 10, 10], [20, 20, 40, 40]])
    found = Detections(boxes, torch.tensor([0, 1]), torch.tensor([0.9, 0.8]), None)
    assert exporting.compare(found, found)[:2] == (4, 4)
    for other in (
        found._replace(boxes=boxes + torch.tensor([[1.0], [0]])),
        found._replace(labels=torch.tensor([1, 1])),
        found._replace(scores=torch.tensor([0.7, 0.8])),
        Detections(*(x[1:] for x in found[:3]), None),
    ):
        assert exporting.compare(found, other).matched < len(found.scores) + len(other.scores)
