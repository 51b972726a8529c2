"""Promises of images with boxes: boxes, labels and masks stay in step through every augmentation."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import roi_align

from nat_models.errors import UserError
from nat_models.training.box_sets import (
    BoxSet,
    CropBoxes,
    FitSides,
    MirrorBoxes,
    Settle,
    make_box_augmentation,
    make_box_evaluation,
)
from nat_models.training.boxes import read_box_data
from nat_models.training.images import drawing_from, make_loader, read_batches
from nat_models.training.instance_masks import InstanceMasks
from nat_models.training.outlines import Outlines, encode, extent_of
from tests.training.boxed import SIZE, THINGS, Thing, put_one
from tests.training.label_maps import picture, put

SMALL = dict(short_sides=(24, 40, 60), long_side=100, crop_short_sides=(30, 50), crop_sides=(20, 40))


def blobs(seed: int, height: int, width: int) -> np.ndarray:
    """[N, H, W] bool: shapes of two rectangles each, of 4 px and more: none is lost between pixels when it is resized
    to a third."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((5, height, width), bool)
    for mask in masks:
        for _ in range(2):
            sides = [rng.integers(4, max(5, side // 2)) for side in (height, width)]
            top, left = (rng.integers(side - own + 1) for side, own in zip((height, width), sides, strict=True))
            mask[top : top + sides[0], left : left + sides[1]] = True
    return masks


def sample(seed: int, height: int, width: int) -> tuple[tv_tensors.Image, dict]:
    """An image and its target. The image's three bands are one object, the last, so that it shows what happened."""
    masks = blobs(seed, height, width)
    codes = [encode(mask) for mask in masks]
    boxes = torch.tensor([extent_of(code, height, width) for code in codes])
    count = len(codes)
    target = dict(
        boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(height, width)),
        labels=torch.arange(count),
        iscrowd=torch.arange(count) % 3 == 1,
        area=torch.from_numpy(masks.sum((1, 2)).astype(np.float64)),
        annotation_ids=torch.arange(count) + 10,
        image_id=7,
        masks=InstanceMasks(Outlines.of(codes), (height, width)),
    )
    return tv_tensors.Image(torch.from_numpy(masks[-1].astype(np.uint8) * 255).expand(3, -1, -1).clone()), target


@settings(max_examples=80, deadline=None)
@given(height=st.integers(8, 70), width=st.integers(8, 70), seed=st.integers(0, 100_000))
def test_boxes_labels_and_masks_stay_in_step(height, width, seed):
    image, target = sample(seed, height, width)
    shown = image[:1].clone()
    augmentation = make_box_augmentation(**SMALL)
    with drawing_from(seed):
        image, changed = augmentation(image, target)
    masks = changed["masks"].dense()
    assert image.shape[1:] == masks.shape[1:] == changed["boxes"].canvas_size
    count = len(changed["labels"])
    assert all(len(changed[key]) == count for key in ("boxes", "iscrowd", "area", "annotation_ids", "masks"))
    for i, label in enumerate(changed["labels"].tolist()):
        assert changed["annotation_ids"][i] == label + 10 and changed["iscrowd"][i] == (label % 3 == 1)
        assert changed["area"][i] == target["area"][label]
        extent = changed["masks"].extents()[i]
        assert (extent - changed["boxes"][i].as_subclass(Tensor)).abs().max() <= 1 + 1e-4
    if len(target["labels"]) - 1 in changed["labels"].tolist():
        mask = masks[-1].bool()
        if 20 <= mask.sum() <= mask.numel() - 20:  # of fewer, blurred pixels are the most
            assert image[0][mask].mean() > image[0][~mask].mean() + 0.2
    assert torch.equal(shown, sample(seed, height, width)[0][:1])  # what was given is as it was


@pytest.mark.parametrize("seed", range(12))
def test_lazy_masks_are_the_dense_ones_changed(seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(10, 60, 2).tolist()
    _, target = sample(seed, height, width)
    lazy, dense = target["masks"], target["masks"].dense()
    assert np.array_equal(dense.numpy(), blobs(seed, height, width))
    size = rng.integers(5, 80, 2).tolist()
    for change in rng.permutation(["resize", "crop", "mirror", "crop"]):
        high, wide = lazy.canvas
        if change == "resize":
            lazy = lazy.resized(*size)
            dense = torch.nn.functional.interpolate(dense[None].float(), size, mode="nearest-exact")[0].byte()
        elif change == "crop":
            top, left = int(rng.integers(high // 2 + 1)), int(rng.integers(wide // 2 + 1))
            lazy = lazy.cropped(top, left, high - top, wide - left)
            dense = dense[:, top:, left:]
        else:
            lazy, dense = lazy.mirrored(), dense.flip(-1)
    assert lazy.canvas == tuple(dense.shape[1:])
    # A middle on the border of two pixels belongs to either one.
    assert (lazy.dense() != dense).float().mean() < 0.03
    dense = lazy.dense()
    assert [code == encode(mask.numpy()) for code, mask in zip(lazy.codes(), dense, strict=True)] == [True] * len(dense)


@pytest.mark.parametrize("seed", range(10))
def test_a_masks_crop_is_roi_align_of_it(seed):
    rng = np.random.default_rng(seed)
    _, target = sample(seed, 50, 64)
    masks = target["masks"].resized(75, 90).mirrored().cropped(5, 7, 60, 70)
    corners = torch.from_numpy(rng.uniform(-6, 76, (40, 2, 2)))
    boxes = torch.cat([corners.amin(1), corners.amax(1) + 0.3], dim=1).float()
    indices = torch.from_numpy(rng.integers(0, len(masks), 40))
    dense = masks.dense().float()[:, None]
    rois = torch.cat([indices[:, None].float(), boxes], dim=1)
    for size in (7, 28):
        found = masks.crop(boxes, indices, size)
        expected = (roi_align(dense, rois, size, 1.0, -1, aligned=True)[:, 0] >= 0.5).float()
        assert found.shape == (40, size, size) and found.dtype == torch.float32
        # A sum that is exactly a half may be rounded to either side.
        assert (found != expected).float().mean() < 1e-3
    assert 0 < found.mean() < 1
    assert masks.crop(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), 28).shape == (0, 28, 28)


def test_a_crop_cuts_boxes_to_what_is_left_of_their_mask():
    triangle = np.tril(np.ones((40, 40), np.uint8))  # at the upper right, nothing of it
    code = encode(triangle)
    image = tv_tensors.Image(torch.zeros(3, 40, 40))
    target = dict(
        boxes=tv_tensors.BoundingBoxes(torch.tensor([[0.0, 0, 40, 40]]), format="XYXY", canvas_size=(40, 40)),
        labels=torch.tensor([3]),
        iscrowd=torch.tensor([True]),
        area=torch.tensor([820.0]),
        annotation_ids=torch.tensor([1]),
        image_id=1,
        masks=InstanceMasks(Outlines.of([code]), (40, 40)),
    )
    seen = set()
    for seed in range(40):
        with drawing_from(seed):
            _, changed = Settle()(*CropBoxes((8, 16))(image, target))
        seen.add(len(changed["labels"]))
        if len(changed["labels"]):
            assert changed["boxes"].as_subclass(Tensor).tolist() == changed["masks"].extents().tolist()
            assert changed["iscrowd"].tolist() == [True]
        else:
            assert changed["boxes"].shape == (0, 4) and changed["masks"].dense().shape[0] == 0
    assert seen == {0, 1}
    boxed = {key: value for key, value in target.items() if key != "masks"}
    with drawing_from(3):
        image, changed = Settle()(*CropBoxes((8, 16))(image, boxed))
    assert changed["boxes"].as_subclass(Tensor).tolist() == [[0, 0, image.shape[2], image.shape[1]]]


@pytest.mark.parametrize(
    ("size", "expected"), [((480, 640), (800, 1067)), ((400, 1000), (533, 1333)), ((1000, 400), (1333, 533))]
)
def test_sides_are_those_of_the_papers_recipe(size, expected):
    image, target = tv_tensors.Image(torch.zeros(3, *size)), sample(0, 20, 20)[1]
    target = dict(boxes=tv_tensors.BoundingBoxes([[0.0, 0, size[1], size[0]]], format="XYXY", canvas_size=size))
    image, target = FitSides([800], 1333)(image, target)
    assert image.shape[1:] == expected
    assert target["boxes"].as_subclass(Tensor)[0].tolist() == pytest.approx([0, 0, expected[1], expected[0]])


def test_the_papers_augmentation_has_its_sizes():
    drawn, sides = make_box_augmentation(), {"short": set(), "long": 0}
    image = tv_tensors.Image(torch.zeros(1, 60, 80, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(60, 80))
    for seed in range(120):
        with drawing_from(seed):
            changed, target = drawn(image, dict(boxes=boxes, labels=torch.zeros(0, dtype=torch.int64)))
        sides["short"].add(min(changed.shape[1:]))
        sides["long"] = max(sides["long"], *changed.shape[1:])
        assert target["boxes"].shape == (0, 4)
    assert set(range(480, 801, 32)) <= sides["short"] and sides["long"] <= 1333
    ratios = set()
    for seed in range(60):
        with drawing_from(seed):
            changed, _ = drawn(image, dict(boxes=boxes, labels=torch.zeros(0, dtype=torch.int64)))
        ratios.add(round(max(changed.shape[1:]) / min(changed.shape[1:]), 1))
    assert 1.3 in ratios and len(ratios) > 4  # half of them are crops


def test_a_mirror_image_is_mirrored_with_all_that_is_on_it():
    image, target = sample(5, 30, 44)
    changed, mirrored = MirrorBoxes(1.0)(image, target)
    assert torch.equal(mirrored["masks"].dense(), target["masks"].dense().flip(-1))
    assert torch.equal(changed.as_subclass(Tensor), image.as_subclass(Tensor).flip(-1))
    x1, y1, x2, y2 = target["boxes"].as_subclass(Tensor).unbind(1)
    assert torch.equal(mirrored["boxes"].as_subclass(Tensor), torch.stack([44 - x2, y1, 44 - x1, y2], dim=1))
    assert MirrorBoxes(0.0)(image, target)[1] is target


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return read_box_data(put_one(tmp_path_factory.mktemp("boxes")), val_fraction=None)


def test_items_are_what_torchvision_takes_and_depend_on_seed_and_epoch_alone(data):
    items = BoxSet(data.parts["val"], data.masks, make_box_augmentation(**SMALL), seed=3)
    image, target = items[2, 0]
    assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1 and type(image) is Tensor
    assert type(target["boxes"]) is Tensor and target["boxes"].dtype == torch.float32
    assert target["labels"].dtype == torch.int64 and target["iscrowd"].dtype == torch.bool
    again, other = items[2, 0], items[3, 0]
    assert torch.equal(again[0], image) and torch.equal(again[1]["boxes"], target["boxes"])
    assert other[0].shape != image.shape or not torch.equal(other[0], image)


def test_evaluation_leaves_an_image_as_it_is(data):
    items = BoxSet(data.parts["val"], data.masks, make_box_evaluation(), dense=True)
    image, target = items[0]
    assert torch.equal((image * 255).round().byte(), torch.from_numpy(np.array(picture(97, SIZE))).permute(2, 0, 1))
    assert target["boxes"].tolist() == [list(thing.box) for thing in THINGS["a"]]
    assert target["image_id"] == 1 and target["annotation_ids"].tolist() == [1, 2]
    assert target["masks"].shape == (2, *SIZE) and target["masks"][0, 6:30, 4:20].all()
    assert target["masks"].sum((1, 2)).tolist() == [24 * 16, 32 * 36]
    assert items[3][1]["boxes"].shape == (0, 4) and items[3][1]["masks"].shape == (0, *SIZE)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_lists_of_images_of_any_size(data, workers):
    items = BoxSet(data.parts["val"], data.masks, make_box_augmentation(**SMALL))
    batches = list(read_batches(make_loader(items, 3, workers)))
    assert [len(images) for images, _ in batches] == [3, 1] == [len(targets) for _, targets in batches]
    for images, targets in batches:
        assert all(image.shape[1:] == target["masks"].canvas for image, target in zip(images, targets, strict=True))
        assert all(len(target["boxes"]) == len(target["masks"].to("cpu")) for target in targets)


def test_a_worker_is_handed_arrays_and_no_python_object_per_annotation(tmp_path):
    many = {f"{i}": [Thing("cat", (1, 1, 9, 9))] * 200 for i in range(2)}
    part = read_box_data(put_one(tmp_path, things=many), val_fraction=None, allow_empty=True).parts["val"]
    buffers: list = []
    rest = pickle.dumps(part, protocol=5, buffer_callback=buffers.append)
    assert len(rest) < 3000 and sum(buffer.raw().nbytes for buffer in buffers) > 400 * 100


def test_an_image_that_changed_since_it_was_checked_is_an_error(tmp_path):
    data = read_box_data(put_one(tmp_path), val_fraction=None)
    put(tmp_path / "images/a.png", picture(0, (20, 20)))
    items = BoxSet(data.parts["val"], data.masks, make_box_evaluation())
    with pytest.raises(UserError, match=r"a\.png is \[20, 20\], and was \[48, 64\]"):
        items[0]
