"""What the detectors do otherwise than torchvision's, each difference where it shows."""

import math

import pytest
import torch
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import roi_align

from nat_models.networks.rcnn import (
    AlignedRoIPool,
    BackgroundLastPredictor,
    BoxByBoxMatcher,
    ClampingBoxCoder,
    CornerAnchors,
    DetectionTransform,
    ResizedMasks,
    TensorMasks,
    lies_in_crowd,
    paste_masks,
)

STDS = (0.1, 0.1, 0.2, 0.2)


def _boxes(count: int, side: float = 100.0) -> torch.Tensor:
    corners = torch.rand(count, 2, 2, dtype=torch.float64) * side
    return torch.cat([corners.amin(1), corners.amax(1) + 1], 1)


def _maps(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    return [torch.randn(1, 2, *size, dtype=torch.float64) for size in sizes]


def test_anchors_stand_on_the_corners_of_cells_at_fixed_strides():
    maps = _maps((13, 7), (7, 4), (4, 2), (2, 1), (1, 1))
    images = ImageList(torch.zeros(2, 3, 55, 29), [(55, 29), (40, 20)])
    first, second = CornerAnchors([[32], [64], [128], [256], [512]], (0.5, 1.0, 2.0))(images, maps)
    assert first.dtype == torch.float64 and torch.equal(first, second)
    assert len(first) == 3 * sum(x.shape[2] * x.shape[3] for x in maps)
    half, root = 16.0, math.sqrt(2)
    expected = [[-half * root, -half / root, half * root, half / root], [-16, -16, 16, 16]]
    torch.testing.assert_close(first[:2], torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0)
    assert first[3 * 8 + 1].tolist() == [4 - 16, 4 - 16, 4 + 16, 4 + 16]  # row 1, column 1 of 7
    assert first[-2].tolist() == [-256, -256, 256, 256]


def test_several_sizes_of_anchors_at_a_stride():
    images = ImageList(torch.zeros(1, 3, 8, 8), [(8, 8)])
    (anchors,) = CornerAnchors([[8, 16]] * 5, (1.0,))(images, _maps((1, 1)) * 5)
    assert anchors[:2].tolist() == [[-4, -4, 4, 4], [-8, -8, 8, 8]]


def test_encoding_and_decoding_are_inverse_and_decoding_is_clamped_on_both_sides():
    coder, boxes, truth = ClampingBoxCoder(STDS), _boxes(20), _boxes(20)
    deltas = coder.encode_single(truth, boxes)
    torch.testing.assert_close(coder.decode_single(deltas, boxes), truth)
    # By hand: half a width to the right, twice as high.
    box, delta = torch.tensor([[10.0, 10.0, 30.0, 20.0]]), torch.tensor([[5.0, 0.0, 0.0, math.log(2) / 0.2]])
    torch.testing.assert_close(coder.decode_single(delta, box), torch.tensor([[20.0, 5.0, 40.0, 25.0]]))
    extreme = torch.tensor([[0.0, 0.0, -1e3, 1e3]])
    x1, y1, x2, y2 = coder.decode_single(extreme, box)[0].tolist()
    assert x2 - x1 == pytest.approx(20 * 16 / 1000, rel=1e-4) and y2 - y1 == pytest.approx(10 * 1000 / 16, rel=1e-5)


def test_decoding_takes_the_deltas_of_several_classes():
    coder, boxes, deltas = ClampingBoxCoder(STDS), _boxes(5), torch.randn(5, 3, 4, dtype=torch.float64)
    all_classes = coder.decode_single(deltas.flatten(1), boxes).view(5, 3, 4)
    for i in range(3):
        torch.testing.assert_close(all_classes[:, i], coder.decode_single(deltas[:, i], boxes))


def test_each_true_box_in_turn_takes_its_best_candidates_above_the_bound():
    matcher = BoxByBoxMatcher(0.7, 0.3, 0.3)
    quality = torch.tensor(
        [
            [0.6, 0.6, 0.1, 0.75, 0.0, 0.5],  # best: 0.75
            [0.0, 0.65, 0.2, 0.8, 0.0, 0.5],  # best: 0.8, taken from the first
            [0.4, 0.4, 0.1, 0.0, 0.0, 0.0],  # both tied, against the better IoU of others
            [0.0, 0.0, 0.29, 0.0, 0.1, 0.0],  # below the bound
        ]
    )
    assert matcher(quality).tolist() == [2, 2, -1, 1, -1, -2]
    assert BoxByBoxMatcher(0.7, 0.3, None)(quality).tolist() == [-2, -2, -1, 1, -1, -2]
    assert matcher.labels(torch.tensor([2, 0, -1, -2])).tolist() == [1, 1, 0, -1]


def test_what_is_left_out_is_neither_and_takes_no_part_in_the_choice():
    truth = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    candidates = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 16.0], [50.0, 50.0, 60.0, 60.0]])
    matcher = BoxByBoxMatcher(0.7, 0.3, 0.3)
    nothing = torch.zeros(3, dtype=torch.bool)
    assert matcher.match(candidates, truth, nothing).tolist() == [0, -2, -1]
    # Without the best one the second is the true box's best.
    assert matcher.match(candidates, truth, torch.tensor([True, False, True])).tolist() == [-2, 0, -2]
    assert matcher.match(candidates, truth[:0], torch.tensor([True, False, False])).tolist() == [-2, -1, -1]
    assert matcher.match(candidates[:0], truth, nothing[:0]).tolist() == []


def test_a_box_lies_in_a_crowd_by_more_than_half_of_its_own_area():
    crowds = torch.tensor([[0.0, 0.0, 100.0, 100.0], [200.0, 0.0, 210.0, 10.0]])
    boxes = torch.tensor(
        [
            [10.0, 10.0, 20.0, 20.0],  # inside, though its IoU is small
            [95.0, 0.0, 105.0, 10.0],  # exactly half
            [94.0, 0.0, 104.0, 10.0],
            [150.0, 0.0, 260.0, 10.0],  # holds a crowd
            [0.0, 150.0, 10.0, 160.0],
            [150.0, 150.0, 150.0, 150.0],
        ]
    )
    assert lies_in_crowd(boxes, crowds).tolist() == [True, False, True, False, False, False]
    assert lies_in_crowd(boxes, crowds[:0]).tolist() == [False] * 6


def test_regions_are_cut_out_of_the_map_of_their_size_and_image():
    pool = AlignedRoIPool(7)
    maps = [torch.randn(2, 3, 128 // s, 128 // s, dtype=torch.float64) for s in (1, 2, 4, 8)]
    sides = [50.0, 111.0, 112.1, 223.0, 224.1, 447.0, 448.1, 900.0]
    boxes = torch.tensor([[8.0, 8.0, 8.0 + side, 8.0 + side] for side in sides], dtype=torch.float64)
    levels = AlignedRoIPool.levels_of(boxes)
    assert levels.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    found = pool(maps, [boxes[:3], boxes[3:]])
    for i, (box, level) in enumerate(zip(boxes, levels.tolist(), strict=True)):
        of_image = maps[level][: 1 if i < 3 else 2][-1:]
        expected = roi_align(of_image, [box[None]], 7, 1 / 2 ** (level + 2), sampling_ratio=-1, aligned=True)
        torch.testing.assert_close(found[i : i + 1], expected, rtol=0, atol=0)
    assert pool(maps, [boxes[:0], boxes[:0]]).shape == (0, 3, 7, 7)


def test_aligned_pooling_of_a_ramp_is_the_ramp_itself():
    """RoIAlign of a linear map is exact where it is aligned; a half pixel off shows at once."""
    ramp = torch.arange(32.0).expand(1, 1, 32, 32)  # value of a cell is its column: (4 * column + 2) px from the left
    cut = AlignedRoIPool(7)([ramp] * 4, [torch.tensor([[20.0, 20.0, 48.0, 48.0]])])
    centres = (20 + 28 * (torch.arange(7) + 0.5) / 7 - 2) / 4
    torch.testing.assert_close(cut[0, 0], centres.expand(7, 7))


def test_boxes_are_not_rounded_to_the_16_bits_of_maps():
    maps = [torch.randn(1, 3, 128 // s, 128 // s, dtype=torch.bfloat16) for s in (1, 2, 4, 8)]
    boxes = [torch.tensor([[301.3, 205.7, 420.9, 333.1]])]
    found, exact = AlignedRoIPool(7)(maps, boxes), AlignedRoIPool(7)([x.float() for x in maps], boxes)
    assert found.dtype == torch.bfloat16 and torch.equal(found, exact.bfloat16())


def test_the_background_is_last_and_has_no_deltas():
    predictor = BackgroundLastPredictor(8, 5)
    logits, deltas = predictor(torch.randn(3, 8))
    assert logits.shape == (3, 6) and deltas.shape == (3, 5, 4)
    torch.testing.assert_close(predictor.bbox_pred.bias, torch.zeros(20))
    rows = predictor.bbox_pred(torch.ones(1, 8))
    torch.testing.assert_close(predictor(torch.ones(1, 8))[1][0, 2], rows[0, 8:12])


def test_pasting_samples_at_pixel_centres_and_is_zero_outside():
    mask = torch.rand(1, 1, 28, 28)
    pasted = paste_masks(mask, torch.tensor([[3.0, 5.0, 31.0, 33.0]]), (50, 40))
    assert pasted.shape == (1, 1, 50, 40)
    torch.testing.assert_close(pasted[0, 0, 5:33, 3:31], mask[0, 0])
    outside = pasted.clone()
    outside[0, 0, 5:33, 3:31] = 0
    assert outside.max() < 1e-5  # float32 puts the box's edge a little beyond the last cell
    # A box of half the size shows the means of two cells per axis.
    half = paste_masks(mask, torch.tensor([[3.0, 5.0, 17.0, 19.0]]), (50, 40))[0, 0, 5:19, 3:17]
    torch.testing.assert_close(half, torch.nn.functional.avg_pool2d(mask, 2)[0, 0])


def test_pasting_beyond_the_image_and_of_boxes_without_area():
    mask = torch.ones(4, 1, 28, 28)
    boxes = torch.tensor([[-10.0, -10, 20, 20], [30, 40, 90, 95], [5, 5, 5, 9], [200, 200, 230, 240]])
    pasted = paste_masks(mask, boxes, (60, 50)) >= 0.5
    assert pasted.flatten(1).sum(1).tolist() == [20 * 20, 20 * 20, 0, 0]
    assert paste_masks(mask[:0], boxes[:0], (60, 50)).shape == (0, 1, 60, 50)


def test_torchvisions_pasting_is_another():
    mask, box = torch.rand(1, 1, 28, 28), torch.tensor([[3.3, 5.2, 31.7, 40.4]])
    assert not torch.equal(paste_masks(mask, box, (50, 40)) >= 0.5, paste_masks_in_image(mask, box, (50, 40)) >= 0.5)


def test_crops_of_masks_are_shares_of_cells_of_the_object_that_is_asked_for():
    masks = torch.zeros(3, 40, 60, dtype=torch.uint8)
    masks[2, 10:20, 20:40] = 1
    boxes = torch.tensor([[20.0, 10.0, 40.0, 20.0], [10.0, 10.0, 30.0, 20.0], [20.0, 10.0, 40.0, 20.0]])
    found = TensorMasks(masks).crop(boxes, torch.tensor([2, 2, 0]), 28)
    assert found[0].min() >= 0.5 and found[2].max() == 0
    assert found[1, :, :13].max() == 0 and found[1, :, 14:].min() >= 0.5


def test_masks_of_a_resized_image_are_cut_out_of_the_image_before():
    masks = torch.zeros(1, 40, 60, dtype=torch.uint8)
    masks[0, 10:20, 20:40] = 1
    box, row = torch.tensor([[18.0, 8.0, 42.0, 22.0]]), torch.tensor([0])
    resized = ResizedMasks(TensorMasks(masks), (1.5, 2.0)).crop(box * torch.tensor([1.5, 2, 1.5, 2]), row, 28)
    torch.testing.assert_close(resized, TensorMasks(masks).crop(box, row, 28))


def _transform(**kwargs) -> DetectionTransform:
    given = dict(min_size=64, max_size=100, image_mean=[0.5] * 3, image_std=[0.25] * 3, resize_in_training=True)
    return DetectionTransform(**{**given, **kwargs})


def _target(boxes: torch.Tensor, height: int, width: int) -> dict:
    masks = TensorMasks(torch.ones(len(boxes), height, width, dtype=torch.uint8))
    return dict(boxes=boxes, ignored=boxes + 1, masks=masks)


@pytest.mark.parametrize(
    ("size", "resized"),
    [((32, 48), (64, 96)), ((33, 49), (64, 95)), ((20, 60), (33, 100)), ((128, 100), (82, 64)), ((1, 900), (1, 100))],
)
def test_images_are_resized_to_the_nearest_pixel_and_padded_to_a_multiple_of_32(size, resized):
    images, _ = _transform().eval()([torch.rand(3, *size)])
    assert images.image_sizes == [resized]
    assert images.tensors.shape[2:] == tuple(math.ceil(n / 32) * 32 for n in resized)
    assert images.tensors[0, :, resized[0] :].abs().sum() == 0


def test_boxes_and_masks_are_resized_with_their_image_and_come_back():
    transform = _transform()
    boxes = torch.tensor([[4.0, 2.0, 20.0, 30.0]])
    images, (target,) = transform.train()([torch.rand(3, 32, 48)], [_target(boxes, 32, 48)])
    assert images.image_sizes == [(64, 96)]
    torch.testing.assert_close(target["boxes"], 2 * boxes)
    torch.testing.assert_close(target["ignored"], 2 * boxes + 2)
    assert target["masks"].ratios == (2.0, 2.0)
    (found,) = transform.eval().postprocess([dict(boxes=2 * boxes)], [(64, 96)], [(32, 48)])
    torch.testing.assert_close(found["boxes"], boxes)


def test_training_draws_a_size_or_leaves_the_image():
    drawn = _transform(min_size=(16, 32, 64)).train()
    sizes = {drawn([torch.rand(3, 20, 24)])[0].image_sizes[0][0] for _ in range(30)}
    assert sizes == {16, 32, 64}
    assert drawn.eval()([torch.rand(3, 20, 24)])[0].image_sizes == [(64, 77)]
    as_it_is = _transform(resize_in_training=False).train()
    images, (target,) = as_it_is([torch.rand(3, 20, 24)], [_target(torch.zeros(0, 4), 20, 24)])
    assert images.image_sizes == [(20, 24)] and isinstance(target["masks"], TensorMasks)
    assert as_it_is.eval()([torch.rand(3, 20, 24)])[0].image_sizes == [(64, 77)]
