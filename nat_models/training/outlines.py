"""Outlines of objects, polygons or run lengths (RLE), in flat arrays; and their pixels.

Run lengths are COCO's: down the columns, from left to right, background first.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

Outline = list[np.ndarray] | bytes | None  # polygons [n, 2] of (x, y) px; compressed run lengths; no outline


@dataclass(frozen=True)
class Outlines:
    """Outlines of N objects. A slice of them is a view of the same arrays, so workers that were forked share them.

    Attributes:
        rings: [N + 1] int64; the polygons of object i are rings[i] to rings[i + 1].
        points: [polygons + 1] int64; the points of polygon j are points[j] to points[j + 1].
        xy: [points, 2] float64 px: with fewer bits, polygons would not always cover the pixels that pycocotools says.
        codes: [N + 1] int64; the run lengths of object i are codes[i] to codes[i + 1].
        rle: uint8, compressed run lengths.
    """

    rings: np.ndarray
    points: np.ndarray
    xy: np.ndarray
    codes: np.ndarray
    rle: np.ndarray

    @classmethod
    def of(cls, outlines: Iterable[Outline]) -> "Outlines":
        rings, points, codes, xy, rle = [0], [0], [0], [], []
        for outline in outlines:
            polygons = outline if isinstance(outline, list) else ()
            for polygon in polygons:
                xy.append(polygon)
                points.append(points[-1] + len(polygon))
            rings.append(rings[-1] + len(polygons))
            code = outline if isinstance(outline, bytes) else b""
            rle.append(code)
            codes.append(codes[-1] + len(code))
        flat = np.concatenate(xy).astype(np.float64) if xy else np.zeros((0, 2))
        indices = (np.array(x, np.int64) for x in (rings, points, codes))
        rings, points, codes = indices
        return cls(rings, points, flat, codes, np.frombuffer(b"".join(rle), np.uint8))

    def __len__(self) -> int:
        return len(self.rings) - 1

    def __getitem__(self, index: int) -> Outline:
        if self.codes[index] < self.codes[index + 1]:
            return self.rle[self.codes[index] : self.codes[index + 1]].tobytes()
        polygons = range(self.rings[index], self.rings[index + 1])
        return [self.xy[self.points[j] : self.points[j + 1]] for j in polygons] or None

    def between(self, start: int, stop: int) -> "Outlines":
        """Those of the objects from start to stop."""
        rings, codes = self.rings[start : stop + 1], self.codes[start : stop + 1]
        points = self.points[rings[0] : rings[-1] + 1]
        xy, rle = self.xy[points[0] : points[-1]], self.rle[codes[0] : codes[-1]]
        return Outlines(rings - rings[0], points - points[0], xy, codes - codes[0], rle)

    @property
    def present(self) -> np.ndarray:
        """[N] bool: whether an object has an outline."""
        return (np.diff(self.rings) > 0) | (np.diff(self.codes) > 0)


def run_lengths(code: bytes) -> np.ndarray:
    """int64 run lengths of COCO's compressed ones.

    Raises:
        ValueError: They end within a number, hold a character that is none of theirs, or a run below 0.
    """
    values = np.frombuffer(code, np.uint8).astype(np.int64) - 48
    if not len(values) or values.min() < 0 or values.max() > 63 or values[-1] & 32:
        raise ValueError("is cut off, or no run lengths")
    last = np.flatnonzero(~values & 32)
    first = np.concatenate([[0], last[:-1] + 1])
    place = np.arange(len(values)) - np.repeat(first, last - first + 1)
    if place.max() > 6:
        raise ValueError("holds a run of more than 2 ** 32 pixels")
    runs = np.add.reduceat((values & 31) << (5 * place), first)
    runs -= np.where(values[last] & 16, np.int64(1) << (5 * (last - first + 1)), 0)
    runs[1::2] = np.cumsum(runs[1::2])  # from the fourth on, a number is the difference to the last but one
    if len(runs) > 2:
        runs[2::2] = np.cumsum(runs[2::2])
    if runs.min() < 0:
        raise ValueError("holds a run below 0")
    return runs


def compress(runs: Sequence[int]) -> bytes:
    """COCO's compressed form of run lengths."""
    code = bytearray()
    for i, run in enumerate(runs):
        rest = int(run) - (int(runs[i - 2]) if i > 2 else 0)
        while True:
            piece, rest = rest & 31, rest >> 5
            ends = rest == (-1 if piece & 16 else 0)
            code.append(48 + (piece if ends else piece | 32))
            if ends:
                break
    return bytes(code)


def encode(mask: np.ndarray) -> bytes:
    """Compressed run lengths of a mask [H, W] of bool or 0 and 1."""
    from faster_coco_eval.core import mask as coco

    return coco.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"]


def decode_runs(code: bytes, height: int) -> np.ndarray:
    """uint8 [height, W] of compressed run lengths."""
    runs = run_lengths(code)
    return np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), runs).reshape(-1, height).T


def to_rle(outline: Outline, height: int, width: int) -> dict:
    """An outline as COCO's evaluators take it: {"size": [height, width], "counts": compressed run lengths}."""
    from faster_coco_eval.core import mask as coco

    if outline is None:
        outline = compress([height * width])
    if isinstance(outline, bytes):
        return {"size": [height, width], "counts": outline}
    rings = coco.frPyObjects([polygon.ravel().tolist() for polygon in outline], height, width)
    return coco.merge(rings)


def patch_of(outline: Outline, height: int, width: int) -> tuple[int, int, np.ndarray]:
    """The pixels of an outline, no more of them than its extent needs.

    Args:
        outline: In an image of this height and width.
        height: Of the image.
        width: Of the image.

    Returns:
        Row and column of the patch's corner, and the patch, [h, w] uint8 of 0 and 1; what is outside it is 0.
    """
    if isinstance(outline, list):
        # Moved to the patch's corner, a polygon would cover other pixels where its numbers are rounded.
        ends = np.ceil(np.concatenate(outline).max(axis=0)) + 1
        right, bottom = np.clip(ends, 1, (width, height)).astype(int).tolist()
        height, outline = bottom, to_rle(outline, bottom, right)["counts"]
    runs = run_lengths(outline) if outline else np.zeros(1, np.int64)
    ends = np.cumsum(runs)
    inside = (np.arange(len(runs)) % 2 == 1) & (runs > 0)
    if not inside.any():
        return 0, 0, np.zeros((0, 0), np.uint8)
    left, right = (ends - runs)[inside][0] // height, (ends[inside][-1] - 1) // height + 1
    lengths = np.diff(np.clip(np.concatenate([[0], ends]), left * height, right * height))
    columns = np.repeat((np.arange(len(runs)) % 2).astype(np.uint8), lengths).reshape(right - left, height)
    rows = np.flatnonzero(columns.any(axis=0))
    return int(rows[0]), int(left), columns[:, rows[0] : rows[-1] + 1].T


def extent_of(outline: Outline, height: int, width: int) -> tuple[float, float, float, float] | None:
    """(x1, y1, x2, y2) px around the pixels of an outline; None where it has none."""
    top, left, patch = patch_of(outline, height, width)
    rows, columns = np.flatnonzero(patch.any(axis=1)), np.flatnonzero(patch.any(axis=0))
    if not len(rows):
        return None
    return float(left + columns[0]), float(top + rows[0]), float(left + columns[-1] + 1), float(top + rows[-1] + 1)


def turn_points(xy: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray:
    """Points [..., 2] of (x, y) px, turned upright with their image.

    Args:
        xy: Edges of pixels are whole numbers, so that 0 is the left edge and the width the right one.
        size: (height, width) of the image before it is turned.
        orientation: EXIF's, 1 to 8.
    """
    x, y = xy[..., 0], xy[..., 1]
    height, width = size
    if orientation in (2, 3, 7, 8):
        x = width - x
    if orientation in (3, 4, 6, 7):
        y = height - y
    return np.stack([y, x] if orientation >= 5 else [x, y], axis=-1)


def turn_boxes(boxes: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray:
    """Boxes [..., 4] of (x1, y1, x2, y2) px, turned upright with their image; see turn_points."""
    if orientation == 1:
        return boxes
    corners = turn_points(boxes.reshape(*boxes.shape[:-1], 2, 2), size, orientation)
    return np.concatenate([corners.min(axis=-2), corners.max(axis=-2)], axis=-1)
