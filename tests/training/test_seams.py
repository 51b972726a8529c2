"""Promises of tiles of a detector: they find what the whole image shows, each object once."""

import numpy as np
import pytest
import torch
from faster_coco_eval.core import mask as coco
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from nat_models.errors import UserError
from nat_models.networks.rcnn import paste_masks
from nat_models.training.detecting import codes, find
from nat_models.training.detections import Detections
from nat_models.training.outlines import decode_runs, encode
from nat_models.training.seams import Patch, Tile, join, patch_code
from nat_models.training.segmenting import spans
from tests.training.bright import CONFIG, Brightness, paint

SIZE = (300, 420)
# Tiles of 128 px begin at 0, 96, 192 and so on; beside each other they share 32 px.
AWAY = [("red", (10, 10, 60, 40), 200), ("green", (30, 60, 90, 90), 180), ("green", (150, 140, 185, 180), 90)]
ACROSS = {
    "larger than what two tiles share": ("red", (70, 20, 190, 60), 210),
    "smaller than it, and cut by one border": ("red", (110, 200, 136, 225), 150),
    "over the corner of four tiles": ("green", (60, 70, 170, 170), 255),
    "all of it in what two tiles share": ("red", (106, 20, 118, 60), 140),
    "over five tiles": ("red", (5, 245, 415, 270), 170),
    "ends at a border": ("red", (96, 100, 128, 120), 99),
    "ends just inside a border": ("green", (98, 100, 190, 120), 99),
    "all of the image": ("red", (0, 0, 420, 300), 99),
}


def sought(things, masks: bool = True, tile: int | None = None) -> Detections:
    image = torch.from_numpy(paint(things, SIZE)).permute(2, 0, 1)
    return find(Brightness(masks), image, tile=tile)


def same(whole: Detections, tiled: Detections) -> None:
    """The same objects; of their masks, pasting cuts off the very corners, more of them of larger ones."""
    first, second = (
        sorted((*box, label, score) for box, label, score in zip(x.boxes.tolist(), x.labels, x.scores, strict=True))
        for x in (whole, tiled)
    )
    assert whole.size == tiled.size and first == second
    assert (np.diff(tiled.scores) <= 0).all()
    for place, i in enumerate(np.lexsort(whole.boxes.T[::-1])) if whole.codes is not None else ():
        j = np.lexsort(tiled.boxes.T[::-1])[place]
        masks = [decode_runs(code, SIZE[0]) > 0 for code in (whole.codes[i], tiled.codes[j])]
        assert (masks[0] & masks[1]).sum() >= 0.985 * (masks[0] | masks[1]).sum()


@pytest.mark.parametrize("masks", [True, False])
def test_objects_away_from_seams_are_those_of_the_whole_image(masks):
    same(sought(AWAY, masks), sought(AWAY, masks, 128))


@pytest.mark.parametrize("masks", [True, False])
@pytest.mark.parametrize("thing", ACROSS.values(), ids=ACROSS)
def test_an_object_across_a_seam_comes_out_once_and_whole(thing, masks):
    whole = sought([thing], masks)
    assert len(whole) == 1
    same(whole, sought([thing], masks, 128))


@pytest.mark.parametrize("masks", [True, False])
def test_neighbours_across_a_seam_stay_two(masks):
    things = [("red", (70, 20, 190, 40), 210), ("red", (70, 44, 190, 64), 190), ("green", (75, 30, 185, 60), 99)]
    assert len(sought(things, masks)) == 3
    same(sought(things, masks), sought(things, masks, 128))


def test_a_slanting_object_is_joined_by_its_mask():
    """Its parts' boxes have little in common where two tiles meet; their pixels have all."""
    things = [("red", (60 + i, 20 + i, 68 + i, 28 + i), 200) for i in range(0, 100, 2)]
    (whole, tiled) = (sought(things, True, tile) for tile in (None, 128))
    assert len(whole) == len(tiled) == 1 and tiled.boxes.tolist() == whole.boxes.tolist()
    masks = [decode_runs(found.codes[0], SIZE[0]) > 0 for found in (whole, tiled)]
    # Of 28 x 28 cells on a box the whole object's mask is coarser than those of its parts.
    assert (masks[0] & masks[1]).sum() / (masks[0] | masks[1]).sum() > 0.6


def test_what_two_tiles_see_differently_stays_two():
    """Of two objects in the same place, one of each tile: in what both see, one is far the larger."""

    def found(box) -> Detections:
        boxes = np.array([box], np.float32)
        return Detections((128, 128), boxes, np.zeros(1, np.int64), np.ones(1, np.float32), None)

    # Tiles begin at 0 and 96. On the image: (20, 10, 128, 20) and (96, 10, 200, 100).
    tiles = [Tile(0, 0, found((20, 10, 128, 20))), Tile(0, 96, found((0, 10, 104, 100)))]
    assert len(join(tiles, (128, 224), 0.5)) == 2
    tiles[1] = Tile(0, 96, found((0, 10, 104, 20)))
    assert join(tiles, (128, 224), 0.5).boxes.tolist() == [[20, 10, 200, 20]]


def test_a_part_is_dropped_for_the_whole():
    """Tiles begin at 0 and 96. The first cuts off what the second sees all of."""

    def found(box, score) -> Detections:
        scores = np.array([score], np.float32)
        return Detections((128, 128), np.array([box], np.float32), np.zeros(1, np.int64), scores, None)

    tiles = [Tile(0, 0, found((98, 18, 128, 41), 0.5)), Tile(0, 96, found((14, 20, 44, 40), 0.75))]
    joined = join(tiles, (128, 224), 0.9)
    assert joined.boxes.tolist() == [[110, 20, 140, 40]] and joined.scores.tolist() == [0.75]


def test_tiles_are_not_resized_and_whole_images_are():
    network, image = Brightness(), torch.zeros(3, 200, 128, dtype=torch.uint8)
    find(network, image, tile=128)
    assert (
        [seen[0] for seen in network.seen]
        == [(128, 128), (104, 128)]
        == [(row.stop - row.start, 128) for row, _ in spans(200, 128)]
    )
    assert all(least == (min(size),) and most == max(size) for size, least, most in network.seen)
    network.seen.clear()
    find(network, image)
    assert network.seen == [((200, 128), (64,), 96)]


def test_a_tile_around_all_of_the_image_is_the_network_at_that_resolution():
    torch.manual_seed(0)
    network = CONFIG.make_network().eval()
    network.transform.paste = False
    values = np.random.default_rng(1).integers(0, 256, (8, 12, 3), np.uint8)
    image = pil_to_tensor(to_pil_image(values).resize((120, 80)))
    tiled = find(network, image, tile=128)
    assert network.transform.min_size == (64,) and network.transform.max_size == 96
    resized = find(network, image)
    network.transform.min_size, network.transform.max_size = (80,), 120
    whole = find(network, image)
    assert len(whole) == 10 and np.array_equal(whole.boxes, tiled.boxes) and whole.codes == tiled.codes
    assert not np.array_equal(whole.boxes, resized.boxes)


def test_no_object_in_any_tile():
    found = sought([], True, 128)
    assert len(found) == 0 and found.codes == [] and found.boxes.shape == (0, 4)


@pytest.mark.parametrize("place", ["rpn.head.cls_logits", "backbone.fpn", "roi_heads"])
def test_what_is_not_finite_is_an_error_and_no_empty_image(place):
    torch.manual_seed(0)
    network = CONFIG.make_network().eval()
    network.transform.paste = False
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if name.startswith(place) and "mask" not in name:
                parameter.fill_(float("nan"))
    with pytest.raises(UserError, match=r"What the detector computes of x\.png in float32 is not finite"):
        find(network, torch.zeros(3, 64, 96, dtype=torch.uint8), name="x.png")


@pytest.mark.parametrize("tile", [100, 64, 130])
def test_a_tile_has_a_side_that_tokens_divide(tile):
    with pytest.raises(UserError, match=f"A tile must be a multiple of 32 px and at least 128, got {tile}"):
        find(Brightness(), torch.zeros(3, 64, 96, dtype=torch.uint8), tile=tile)


@pytest.mark.parametrize("seed", range(12))
def test_run_lengths_of_patches_are_those_of_the_pasted_mask(seed):
    rng, size = np.random.default_rng(seed), (23, 31)
    canvas, patches = np.zeros(size, np.uint8), []
    for _ in range(1 + seed % 3):
        height, width = (int(rng.integers(1, side + 1)) for side in size)
        height = size[0] if seed % 4 == 0 else height  # columns that are full
        top, left = int(rng.integers(0, size[0] - height + 1)), int(rng.integers(0, size[1] - width + 1))
        pixels = (rng.random((height, width)) < (1.0, 0.5, 0.9, 0.0)[(seed // 3) % 4]).astype(np.uint8)
        canvas[top : top + height, left : left + width] |= pixels
        patches.append(Patch(top, left, pixels))
    expected = coco.encode(np.asfortranarray(canvas))["counts"]
    assert patch_code(patches, size) == expected


def test_no_patch_is_an_empty_mask():
    assert decode_runs(patch_code([], (5, 7)), 5).tolist() == np.zeros((5, 7)).tolist()


def test_run_lengths_of_boxes_are_those_of_their_pasted_masks():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(6, 1, 28, 28, generator=generator)
    boxes = [[3.2, 4.7, 30.1, 20.9], [-5, -9, 12, 8], [20, 10, 60, 50], [-9, 3, -4, 9], [50, 60, 70, 80], [4, 4, 4, 9]]
    pasted = paste_masks(masks, torch.tensor(boxes), (40, 50))[:, 0] >= 0.5
    assert codes(masks, torch.tensor(boxes), (40, 50)) == [encode(mask.numpy()) for mask in pasted]
    assert pasted.any((1, 2)).tolist() == [True, True, True, False, False, False]
