"""Promises of outlines: their pixels are pycocotools', whatever part of them is made, and they turn with images."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as reference

from nat_models.training.mask_files import turn
from nat_models.training.outlines import (
    Outlines,
    compress,
    decode_runs,
    encode,
    extent_of,
    patch_of,
    run_lengths,
    to_rle,
    turn_boxes,
    turn_points,
)

SIDES = st.integers(1, 50)
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools


def random_mask(rng, height: int, width: int) -> np.ndarray:
    mask = (rng.random((height, width)) < rng.random()).astype(np.uint8)
    if rng.random() < 0.3:
        mask[:, width // 2 :] = 0
    return mask


def pasted(outline, height: int, width: int) -> np.ndarray:
    top, left, patch = patch_of(outline, height, width)
    whole = np.zeros((height, width), np.uint8)
    whole[top : top + patch.shape[0], left : left + patch.shape[1]] = patch
    return whole


@settings(max_examples=60, deadline=None)
@given(height=SIDES, width=SIDES, seed=st.integers(0, 10_000))
def test_run_lengths_are_pycocotools(height, width, seed):
    mask = random_mask(np.random.default_rng(seed), height, width)
    code = reference.encode(np.asfortranarray(mask))["counts"]
    assert encode(mask) == code
    runs = run_lengths(code)
    assert runs.sum() == height * width and runs[1::2].sum() == mask.sum()
    assert compress(runs.tolist()) == code
    assert np.array_equal(decode_runs(code, height), mask)
    assert np.array_equal(pasted(code, height, width), mask)


def test_long_runs_are_read():
    mask = np.zeros((3000, 2000), np.uint8)
    mask[7, 3], mask[2990:, 1999] = 1, 1
    assert run_lengths(encode(mask)).tolist() == [3 * 3000 + 7, 1, 1996 * 3000 - 8 + 2990, 10]


@settings(max_examples=60, deadline=None)
@given(height=SIDES, width=SIDES, count=st.integers(1, 3), seed=st.integers(0, 10_000))
def test_polygons_cover_the_pixels_that_pycocotools_says(height, width, count, seed):
    rng = np.random.default_rng(seed)
    # With two digits after the point, as they are published: many lie where rounding decides.
    polygons = [np.round(rng.random((rng.integers(3, 9), 2)) * (width, height), 2) for _ in range(count)]
    rles = reference.frPyObjects([polygon.ravel().tolist() for polygon in polygons], height, width)
    expected = reference.decode(reference.merge(rles))
    assert np.array_equal(pasted(polygons, height, width), expected)
    assert np.array_equal(decode_runs(to_rle(polygons, height, width)["counts"], height), expected)


@pytest.mark.parametrize("code", [b"", b"P", b"\x10", b"0" * 3 + b"p", b"o" * 9 + b"0"])
def test_what_is_no_run_lengths_is_an_error(code):
    with pytest.raises(ValueError):
        run_lengths(code)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_points_and_boxes_turn_as_pixels_do(orientation):
    mask = np.zeros((20, 30), np.uint8)
    mask[3:9, 5:17] = 1
    mask[3, 5] = 0
    box = np.array(extent_of(encode(mask), 20, 30))
    turned = turn(mask, orientation)
    assert turn_boxes(box, (20, 30), orientation).tolist() == list(extent_of(encode(turned), *turned.shape))
    polygon = np.array([(6, 3), (17, 3), (17, 9), (5, 9), (5, 4), (6, 4)], float)
    assert np.array_equal(pasted([polygon], 20, 30), mask)
    assert np.array_equal(pasted([turn_points(polygon, (20, 30), orientation)], *turned.shape), turned)


def test_outlines_of_every_kind_lie_in_one_array():
    triangle, square = np.array([(0, 0), (4, 0), (0, 4.0)]), np.array([(1, 1), (2, 1), (2, 2), (1, 2.0)])
    given = [[triangle], None, encode(np.eye(5)), [square, triangle + 0.125]]
    outlines = Outlines.of(given)

    def same(a, b) -> bool:
        if isinstance(a, list):
            return len(a) == len(b) and all(map(np.array_equal, a, b))
        return a == b

    assert len(outlines) == 4
    assert all(same(outlines[i], given[i]) for i in range(4))
    for start, stop in ((0, 4), (1, 3), (2, 4), (2, 2)):
        part = outlines.between(start, stop)
        assert len(part) == stop - start
        assert all(same(part[i], given[start + i]) for i in range(len(part)))
    assert np.shares_memory(outlines.between(3, 4).xy, outlines.xy)
