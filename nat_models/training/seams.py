"""Objects of overlapping tiles as objects of the image: what a seam cuts is joined, what two tiles see is one."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torchvision.ops import batched_nms

from .detections import Detections
from .outlines import compress, patch_of

_EDGE = 8  # px: a box that ends as near to its tile's border goes on beyond it
_SAME = 0.5  # IoU of two objects in what both tiles see
_PART = 0.5  # of its own area, that a part of an object has in common with the whole of it


class Tile(NamedTuple):
    """Where a tile begins, px of the image, and what is found on it, px of the tile."""

    top: int
    left: int
    found: Detections


class Patch(NamedTuple):
    """Pixels of a mask on the image: where they begin, and [h, w] of 0 and 1."""

    top: int
    left: int
    pixels: np.ndarray

    def inside(self, box: np.ndarray) -> "Patch":
        """What lies in (x1, y1, x2, y2), whole numbers, on a canvas of that size."""
        x1, y1, x2, y2 = (int(x) for x in box)
        canvas = np.zeros((y2 - y1, x2 - x1), np.uint8)
        return Patch(y1, x1, canvas).laid(self)

    def laid(self, other: "Patch") -> "Patch":
        """This canvas with another patch laid on it; what is outside is cut off."""
        (height, width), (h, w) = self.pixels.shape, other.pixels.shape
        y, x = other.top - self.top, other.left - self.left
        y1, y2, x1, x2 = max(y, 0), min(y + h, height), max(x, 0), min(x + w, width)
        if y2 > y1 and x2 > x1:
            self.pixels[y1:y2, x1:x2] |= other.pixels[y1 - y : y2 - y, x1 - x : x2 - x]
        return self


def join(tiles: Sequence[Tile], size: tuple[int, int], nms_thresh: float) -> Detections:
    """Objects of an image, the best first.

    Two objects of one class in two tiles are the same where they agree in what both tiles see: by their masks, or
    without masks by their boxes. Then

    - a part that its tile's border cuts off is dropped for the whole of it in the other tile;
    - parts that are cut off in both tiles are joined: the box around them, all of their masks' pixels, the best score.

    Last, of two objects of a class with a larger IoU than nms_thresh the better one is kept.

    Args:
        tiles: Of the image.
        size: (height, width) px of the image.
        nms_thresh: See above.
    """
    objects = _Objects(tiles, size)
    dropped, groups = np.zeros(len(objects), bool), list(range(len(objects)))
    pairs = [pair for pair in objects.pairs() if objects.agree(*pair)]
    for i, j in pairs:
        if not objects.goes_on(j, i) and objects.share(i, j) >= _PART:
            dropped[i] = True
    for i, j in pairs:
        if not dropped[i] and not dropped[j]:
            first, second = sorted((_root(groups, i), _root(groups, j)))
            groups[second] = first
    members: dict[int, list[int]] = {}
    for i in np.flatnonzero(~dropped).tolist():
        members.setdefault(_root(groups, i), []).append(i)
    found = [objects.joined(group) for group in members.values()]
    boxes = np.array([box for box, *_ in found], np.float32).reshape(-1, 4)
    labels, scores = np.array([x[1] for x in found], np.int64), np.array([x[2] for x in found], np.float32)
    whole = Detections(size, boxes, labels, scores, [x[3] for x in found] if objects.masks else None)
    kept = batched_nms(*(torch.from_numpy(x) for x in (boxes, scores, labels)), nms_thresh)
    return whole.chosen(kept.numpy())


def _root(groups: list[int], i: int) -> int:
    while groups[i] != i:
        i = groups[i]
    return i


class _Objects:
    """The objects of all tiles, in pixels of the image."""

    def __init__(self, tiles: Sequence[Tile], size: tuple[int, int]):
        self.size, self.tiles = size, tiles
        self.place = np.repeat(np.arange(len(tiles)), [len(t.found) for t in tiles])
        self.own = np.concatenate([np.arange(len(t.found)) for t in tiles])
        corners = [(t.left, t.top, t.left + t.found.size[1], t.top + t.found.size[0]) for t in tiles]
        self.borders = np.array(corners, np.float64)[self.place].reshape(-1, 4)
        moved = [t.found.boxes.astype(np.float64) + np.array([t.left, t.top] * 2) for t in tiles]
        self.boxes = np.concatenate(moved).reshape(-1, 4)
        self.labels = np.concatenate([t.found.labels for t in tiles])
        self.scores = np.concatenate([t.found.scores for t in tiles])
        self.masks = tiles[0].found.codes is not None
        near = np.abs(self.boxes - self.borders) <= _EDGE
        inner = self.borders != np.array([0, 0, size[1], size[0]])
        self.cut = near & inner  # [N, 4]: left, top, right, bottom

    def __len__(self) -> int:
        return len(self.labels)

    def goes_on(self, i: int, j: int) -> bool:
        """Whether object i is cut off at a border beyond which the tile of j sees."""
        beyond = np.array([-1, -1, 1, 1]) * (self.borders[j] - self.borders[i]) > 0
        return bool((self.cut[i] & beyond).any())

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(i, j) of one class in two tiles, i cut off towards the tile of j, both in what the two tiles see."""
        for i in np.flatnonzero(self.cut.any(axis=1)).tolist():
            candidates = np.flatnonzero((self.labels == self.labels[i]) & (self.place != self.place[i]))
            seen = _common(self.borders[i], self.borders[candidates])
            near = _common(_common(self.boxes[i], seen), self.boxes[candidates])
            for j in candidates[(near[:, 2:] > near[:, :2]).all(axis=1)].tolist():
                if self.goes_on(i, j):
                    yield i, j

    def agree(self, i: int, j: int) -> bool:
        """Whether two objects are the same in what both tiles see."""
        seen = _common(self.borders[i], self.borders[j])
        if self.masks:
            first, second = (self.patch(k).inside(seen).pixels > 0 for k in (i, j))
            if first.any() and second.any():
                return (first & second).sum() >= _SAME * (first | second).sum()
        first, second = (_common(self.boxes[k], seen) for k in (i, j))
        both = _area(_common(first, second))
        return both >= _SAME * (_area(first) + _area(second) - both)

    def share(self, i: int, j: int) -> float:
        """Of the area of box i the part that lies in box j."""
        return _area(_common(self.boxes[i], self.boxes[j])) / max(_area(self.boxes[i]), 1e-9)

    def patch(self, i: int) -> Patch:
        tile = self.tiles[self.place[i]]
        top, left, pixels = patch_of(tile.found.codes[self.own[i]], *tile.found.size)
        return Patch(tile.top + top, tile.left + left, pixels)

    def joined(self, group: Sequence[int]) -> tuple[np.ndarray, int, float, bytes | None]:
        """Box, label, score and run lengths of objects that are one."""
        boxes = self.boxes[group]
        box = np.concatenate([boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)])
        code = patch_code([self.patch(i) for i in group], self.size) if self.masks else None
        return box, int(self.labels[group[0]]), float(self.scores[group].max()), code


def _common(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """What boxes have in common; where they have nothing, an end lies before its beginning."""
    least, greatest = np.maximum(first[..., :2], second[..., :2]), np.minimum(first[..., 2:], second[..., 2:])
    return np.concatenate([least, greatest], axis=-1)


def _area(box: np.ndarray) -> float:
    return float(np.clip(box[2:] - box[:2], 0, None).prod())


def patch_code(patches: Sequence[Patch], size: tuple[int, int]) -> bytes:
    """The compressed run lengths of all pixels of patches, of one mask on an image of a size (height, width), which is
    never made."""
    patches = [p for p in patches if p.pixels.size]
    if not patches:
        return compress([size[0] * size[1]])
    top, left = min(p.top for p in patches), min(p.left for p in patches)
    bottom, right = (max(p[a] + p.pixels.shape[a] for p in patches) for a in (0, 1))
    canvas = Patch(top, left, np.zeros((bottom - top, right - left), np.uint8))
    for patch in patches:
        canvas.laid(patch)
    # Columns with a pixel of background above and below, so that each run begins and ends in its own column.
    columns = np.pad(canvas.pixels.T.astype(np.int8), ((0, 0), (1, 1)))
    steps = np.diff(columns, axis=1)
    starts, ends = ((left + c) * size[0] + top + r for c, r in (np.nonzero(steps == 1), np.nonzero(steps == -1)))
    if not len(starts):
        return compress([size[0] * size[1]])
    apart = starts[1:] != ends[:-1]  # of columns that are full from top to bottom, runs go on
    starts, ends = starts[np.r_[True, apart]], ends[np.r_[apart, True]]
    edges = np.stack([starts, ends], axis=1).ravel()
    runs = np.diff(np.r_[0, edges, size[0] * size[1]])
    return compress(runs[:-1] if runs[-1] == 0 else runs)
