"""Whether anchors fit the boxes that are to be found."""

from collections.abc import Sequence

import numpy as np

from .annotations import AnnotatedPart

ANCHOR_SIZES = (32, 64, 128, 256, 512)  # px, of the paper's systems, and so are the others
ASPECT_RATIOS = (0.5, 1.0, 2.0)
LEAST_IOU = 0.3  # the RPN's, below which an anchor is background
_SHARE = 0.05  # of boxes that may have no fitting anchor without a note


def best_anchor_iou(
    sides: np.ndarray, anchor_sizes: Sequence[float] = ANCHOR_SIZES, ratios: Sequence[float] = ASPECT_RATIOS
) -> np.ndarray:
    """[N] IoU of each box with the anchor that fits it best, were their centres the same.

    Args:
        sides: [N, 2] width and height px at the network's scale.
        anchor_sizes: px, of the sides of square anchors.
        ratios: Height by width of anchors; their area is that of the square one.
    """
    sizes, ratios = np.asarray(anchor_sizes, float)[:, None], np.asarray(ratios, float)
    anchors = np.stack([sizes / np.sqrt(ratios), sizes * np.sqrt(ratios)], axis=-1).reshape(-1, 2)
    common = np.minimum(sides[:, None], anchors).prod(axis=-1)
    return (common / (sides.prod(axis=-1)[:, None] + anchors.prod(axis=-1) - common)).max(axis=1)


def scaled_sides(part: AnnotatedPart, short_side: int, long_side: int) -> np.ndarray:
    """[N, 2] width and height px of objects, crowds left out, when images have this short side, or less where the long
    one would be above `long_side`."""
    sizes = part.sizes_of_objects[~part.crowd]
    factor = np.minimum(short_side / sizes.min(axis=1, initial=1 << 30), long_side / sizes.max(axis=1, initial=1))
    return (part.boxes[:, 2:] - part.boxes[:, :2])[~part.crowd] * factor[:, None]


def note_anchors(
    part: AnnotatedPart,
    short_side: int,
    long_side: int,
    anchor_sizes: Sequence[float] = ANCHOR_SIZES,
    ratios: Sequence[float] = ASPECT_RATIOS,
    *,
    share: float = _SHARE,
) -> str | None:
    """A note where more than a share of the objects have no anchor of an IoU of 0.3 or more; else None."""
    sides = scaled_sides(part, short_side, long_side)
    if not len(sides):
        return None
    lost = best_anchor_iou(sides, anchor_sizes, ratios) < LEAST_IOU
    if lost.mean() <= share:
        return None
    low, middle, high = np.percentile(np.sqrt(sides.prod(axis=1)), (1, 50, 99))
    sizes = ", ".join(f"{x:g}" for x in anchor_sizes)
    return (
        f"{lost.mean():.1%} of the boxes have less than {LEAST_IOU} in common with any anchor of {sizes} px, if images "
        f"are resized to {short_side} px (long side at most {long_side}): boxes are {low:.0f} to {high:.0f} px there, "
        f"half of them above {middle:.0f}. Set other anchors, or another size."
    )
