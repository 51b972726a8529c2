"""Masks of an image's objects that stay polygons or run lengths, through every resize, crop and mirror image."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import roi_align

from .outlines import Outlines, encode, patch_of, to_rle

_MARGIN = 2  # px around a box that RoIAlign may look at


class _Axis(NamedTuple):
    """One axis of a changed image: `count` px, of which u lies at start + step * u of the original one."""

    count: int
    start: float
    step: float

    def resized(self, count: int) -> "_Axis":
        return _Axis(count, self.start, self.step * self.count / count)

    def cropped(self, first: int, count: int) -> "_Axis":
        return _Axis(count, self.start + self.step * first, self.step)

    def mirrored(self) -> "_Axis":
        return _Axis(self.count, self.start + self.step * self.count, -self.step)

    def indices(self, first: int, last: int, whole: int) -> np.ndarray:
        """The original pixels in which the middles of pixels from first to last lie, of `whole` px."""
        middles = self.start + self.step * (np.arange(first, last) + 0.5)
        return np.floor(middles).astype(np.int64).clip(0, whole - 1)


class InstanceMasks:
    """Masks of N objects on an image that was resized, cropped and mirrored since they were outlined.

    Any chain of such changes is a start and a step along each axis, and nothing is decoded before it is asked for. A
    pixel is inside a mask where its middle lies in a pixel that the outline covers, so that a chain rounds once.

    Args:
        outlines: Of N objects.
        size: (height, width) px of the image that they were drawn on.
    """

    def __init__(self, outlines: Outlines, size: tuple[int, int], axes: tuple[_Axis, _Axis] | None = None):
        self.outlines, self.size = outlines, tuple(size)
        self.axes = tuple(_Axis(side, 0.0, 1.0) for side in size) if axes is None else axes

    def __len__(self) -> int:
        return len(self.outlines)

    def __repr__(self) -> str:
        return f"InstanceMasks({len(self)} of {self.canvas[0]} x {self.canvas[1]})"

    @property
    def canvas(self) -> tuple[int, int]:
        """(height, width) px of the masks."""
        return self.axes[0].count, self.axes[1].count

    def to(self, *args, **kwargs) -> "InstanceMasks":
        """Itself: outlines stay where they are, whatever device tensors beside them go to."""
        return self

    def resized(self, height: int, width: int) -> "InstanceMasks":
        """The same masks on the image resized to height x width px."""
        rows, columns = self.axes
        return InstanceMasks(self.outlines, self.size, (rows.resized(height), columns.resized(width)))

    def cropped(self, top: int, left: int, height: int, width: int) -> "InstanceMasks":
        """The same masks on a part of the image, which must lie inside it."""
        rows, columns = self.axes
        return InstanceMasks(self.outlines, self.size, (rows.cropped(top, height), columns.cropped(left, width)))

    def mirrored(self) -> "InstanceMasks":
        """The same masks on the image with left and right exchanged."""
        rows, columns = self.axes
        return InstanceMasks(self.outlines, self.size, (rows, columns.mirrored()))

    def __getitem__(self, kept: Tensor) -> "InstanceMasks":
        """Those of some objects: [N] bool, or their indices."""
        chosen = torch.arange(len(self))[kept.cpu()].tolist()
        outlines = Outlines.of(self.outlines[i] for i in chosen)
        return InstanceMasks(outlines, self.size, self.axes)

    def _frame(self, index: int) -> tuple[int, int, np.ndarray]:
        """Where the pixels of an outline begin, row and column, and they, with a border of zeros."""
        top, left, patch = patch_of(self.outlines[index], *self.size)
        return top, left, np.pad(patch, 1)

    def _cut(self, frame: tuple[int, int, np.ndarray], box: tuple[int, int, int, int] | None = None) -> np.ndarray:
        """[h, w] of the mask that _frame gave, inside (left, top, right, bottom); None for all of it."""
        top, left, patch = frame
        x1, y1, x2, y2 = (0, 0, *self.canvas[::-1]) if box is None else box
        i = (self.axes[0].indices(y1, y2, self.size[0]) - top + 1).clip(0, patch.shape[0] - 1)
        j = (self.axes[1].indices(x1, x2, self.size[1]) - left + 1).clip(0, patch.shape[1] - 1)
        return patch[i[:, None], j]

    def _place(self, frame: tuple[int, int, np.ndarray]) -> tuple[int, int, int, int]:
        """(left, top, right, bottom) of the pixels that may show the mask that _frame gave."""
        top, left, patch = frame
        ends = []
        for axis, whole, first, sides in zip(self.axes, self.size, (top, left), patch.shape, strict=True):
            pixels = axis.indices(0, axis.count, whole)
            shown = np.flatnonzero((pixels >= first) & (pixels < first + sides - 2))
            ends.append((int(shown[0]), int(shown[-1]) + 1) if len(shown) else (0, 0))
        (y1, y2), (x1, x2) = ends
        return x1, y1, x2, y2

    def dense(self) -> Tensor:
        """[N, H, W] uint8 of 0 and 1."""
        result = torch.zeros(len(self), *self.canvas, dtype=torch.uint8)
        for i in range(len(self)):
            frame = self._frame(i)
            x1, y1, x2, y2 = box = self._place(frame)
            result[i, y1:y2, x1:x2] = torch.from_numpy(self._cut(frame, box))
        return result

    def codes(self) -> list[bytes]:
        """The compressed run lengths of each mask."""
        height, width = self.canvas
        if self.axes == InstanceMasks(self.outlines, self.size).axes:
            return [to_rle(self.outlines[i], height, width)["counts"] for i in range(len(self))]
        return [encode(self._cut(self._frame(i))) for i in range(len(self))]

    def extents(self) -> Tensor:
        """[N, 4] float32: (x1, y1, x2, y2) px around the pixels of each mask; zeros where it has none."""
        result = torch.zeros(len(self), 4)
        for i in range(len(self)):
            frame = self._frame(i)
            box = self._place(frame)
            pixels = self._cut(frame, box)
            rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
            if len(rows):
                corner = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1])
                result[i] = corner + torch.tensor(box[:2] * 2)
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
            pixels = torch.from_numpy(self._cut(frames[index], (left, top, right, bottom))).float()
            roi = torch.tensor([[0, x1 - left, y1 - top, x2 - left, y2 - top]])
            result[k] = roi_align(pixels[None, None], roi, size, 1.0, -1, aligned=True)[0, 0] >= 0.5
        return result.to(boxes)
