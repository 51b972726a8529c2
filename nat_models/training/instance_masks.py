"""Masks of an image's objects that stay polygons or run lengths, through every resize, crop and mirror image."""

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

from .outlines import Outlines, encode, patch_of, to_rle

_MARGIN = 2  # px around a box that RoIAlign may look at


class InstanceMasks:
    """Masks of N objects on an image that was resized, cropped and mirrored since they were outlined.

    Pixel (i, j) of a mask is pixel (rows[i], columns[j]) of what the outline covers, so that any chain of such changes
    is two arrays of indices, and nothing is decoded before it is asked for. A resized mask takes the nearest pixel.

    Args:
        outlines: Of N objects.
        size: (height, width) px of the image that they were drawn on.
        rows: [H] int64, a row of that image for each row here; None for all of them.
        columns: [W] int64, as for rows.
    """

    def __init__(
        self,
        outlines: Outlines,
        size: tuple[int, int],
        rows: np.ndarray | None = None,
        columns: np.ndarray | None = None,
    ):
        self.outlines, self.size = outlines, tuple(size)
        self.rows = np.arange(size[0]) if rows is None else rows
        self.columns = np.arange(size[1]) if columns is None else columns

    def __len__(self) -> int:
        return len(self.outlines)

    def __repr__(self) -> str:
        return f"InstanceMasks({len(self)} of {self.canvas[0]} x {self.canvas[1]})"

    @property
    def canvas(self) -> tuple[int, int]:
        """(height, width) px of the masks."""
        return len(self.rows), len(self.columns)

    def to(self, *args, **kwargs) -> "InstanceMasks":
        """Itself: outlines stay where they are, whatever device tensors beside them go to."""
        return self

    def _with(self, rows: np.ndarray, columns: np.ndarray) -> "InstanceMasks":
        return InstanceMasks(self.outlines, self.size, rows, columns)

    def resized(self, height: int, width: int) -> "InstanceMasks":
        """The same masks on the image resized to height x width px."""
        return self._with(self.rows[_nearest(len(self.rows), height)], self.columns[_nearest(len(self.columns), width)])

    def cropped(self, top: int, left: int, height: int, width: int) -> "InstanceMasks":
        """The same masks on a part of the image, which must lie inside it."""
        return self._with(self.rows[top : top + height], self.columns[left : left + width])

    def mirrored(self) -> "InstanceMasks":
        """The same masks on the image with left and right exchanged."""
        return self._with(self.rows, self.columns[::-1])

    def __getitem__(self, kept: Tensor) -> "InstanceMasks":
        """Those of some objects: [N] bool, or their indices."""
        chosen = torch.arange(len(self))[kept.cpu()].tolist()
        outlines = Outlines.of(self.outlines[i] for i in chosen)
        return InstanceMasks(outlines, self.size, self.rows, self.columns)

    def _frame(self, index: int) -> tuple[int, int, np.ndarray]:
        """Where the pixels of an outline begin, row and column, and they, with a border of zeros."""
        top, left, patch = patch_of(self.outlines[index], *self.size)
        return top, left, np.pad(patch, 1)

    def _cut(self, frame: tuple[int, int, np.ndarray], rows: slice, columns: slice) -> np.ndarray:
        top, left, patch = frame
        i = np.clip(self.rows[rows] - top + 1, 0, patch.shape[0] - 1)
        j = np.clip(self.columns[columns] - left + 1, 0, patch.shape[1] - 1)
        return patch[i[:, None], j]

    def dense(self) -> Tensor:
        """[N, H, W] uint8 of 0 and 1."""
        result = torch.zeros(len(self), *self.canvas, dtype=torch.uint8)
        for i in range(len(self)):
            result[i] = torch.from_numpy(self._cut(self._frame(i), slice(None), slice(None)))
        return result

    def codes(self) -> list[bytes]:
        """The compressed run lengths of each mask."""
        height, width = self.canvas
        if self.canvas == self.size and all((x == np.arange(len(x))).all() for x in (self.rows, self.columns)):
            return [to_rle(self.outlines[i], height, width)["counts"] for i in range(len(self))]
        return [encode(self._cut(self._frame(i), slice(None), slice(None))) for i in range(len(self))]

    def extents(self) -> Tensor:
        """[N, 4] float32: (x1, y1, x2, y2) px around the pixels of each mask; zeros where it has none."""
        result = torch.zeros(len(self), 4)
        for i in range(len(self)):
            pixels = self._cut(self._frame(i), slice(None), slice(None))
            rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
            if len(rows):
                result[i] = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
        return result

    def crop(self, boxes: Tensor, indices: Tensor, size: int) -> Tensor:
        """Of some objects the masks inside boxes, as `roi_align(dense, boxes, size, aligned=True) >= 0.5` gives them.

        Only pixels inside the boxes are made, of outlines that are decoded once each.

        Args:
            boxes: [K, 4], (x1, y1, x2, y2) px.
            indices: [K] int64, the object of each.
            size: Height and width of what comes out.

        Returns:
            [K, size, size] of 0 and 1, of the boxes' device and dtype.

        Source: Mask R-CNN's targets as mmdetection makes them; adaptive samples, aligned.
        """
        result = torch.zeros(len(boxes), size, size)
        frames: dict[int, tuple] = {}
        height, width = self.canvas
        for k, (box, index) in enumerate(zip(boxes.detach().float().cpu(), indices.tolist(), strict=True)):
            x1, y1, x2, y2 = box.tolist()
            left, right = max(0, int(np.floor(x1)) - _MARGIN), min(width, int(np.ceil(x2)) + _MARGIN)
            top, bottom = max(0, int(np.floor(y1)) - _MARGIN), min(height, int(np.ceil(y2)) + _MARGIN)
            if right <= left or bottom <= top:
                continue
            if index not in frames:
                frames[index] = self._frame(index)
            pixels = torch.from_numpy(self._cut(frames[index], slice(top, bottom), slice(left, right))).float()
            roi = torch.tensor([[0, x1 - left, y1 - top, x2 - left, y2 - top]])
            result[k] = roi_align(pixels[None, None], roi, size, 1.0, -1, aligned=True)[0, 0] >= 0.5
        return result.to(boxes)


def _nearest(before: int, after: int) -> np.ndarray:
    """[after] int64: the pixel of `before` whose middle is nearest, of a mirror image the mirrored one but for ties."""
    return (2 * np.arange(after) + 1) * before // (2 * after)
