"""Objects found on one image, and the forms in which people take them: COCO's results, rows of a table, pictures."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .detectors import DetectorConfig
from .drawing import draw_objects, encoded
from .instance_masks import InstanceMasks
from .mask_sets import shrunk, to_picture
from .outlines import Outlines, run_lengths

FIELDS = ("image", "image_id", "class", "category_id", "score", "x", "y", "width", "height")
MASK_FIELDS = ("mask_pixels",)  # besides, of a detector with mask heads
_SHOWN = 2048  # px, the longest side of a picture for people
_LETTERS = 45  # of the shown picture's short side, the height of letters


@dataclass
class Detections:
    """Objects found on one image, the best first.

    Attributes:
        size: (height, width) px of the image.
        boxes: [N, 4] float32, (x1, y1, x2, y2) px.
        labels: [N] int64, indices of classes.
        scores: [N] float32.
        codes: Compressed run lengths of N masks of the image's size; None of a detector without mask heads.
    """

    size: tuple[int, int]
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    codes: list[bytes] | None

    def __len__(self) -> int:
        return len(self.labels)

    def chosen(self, indices: Sequence[int] | np.ndarray) -> "Detections":
        """Those of some indices, in their order."""
        indices = np.asarray(indices, np.int64)
        codes = None if self.codes is None else [self.codes[i] for i in indices]
        return Detections(self.size, self.boxes[indices], self.labels[indices], self.scores[indices], codes)

    def above(self, threshold: float) -> "Detections":
        """Those that score at least this."""
        return self.chosen(np.flatnonzero(self.scores >= threshold))


def coco_results(found: Detections, image_id: int, config: DetectorConfig) -> list[dict]:
    """Entries of COCO's results: boxes as x, y, width, height, the user's category ids, masks as run lengths in text.

    Scores are exact, so that they rank as the detector's do.
    """
    ids, entries = config.ids(), []
    for i, box in enumerate(_corners_and_sides(found)):
        entry = dict(image_id=image_id, category_id=ids[found.labels[i]], bbox=box, score=float(str(found.scores[i])))
        if found.codes is not None:
            entry["segmentation"] = dict(size=list(found.size), counts=found.codes[i].decode("ascii"))
        entries.append(entry)
    return entries


def object_rows(found: Detections, name: str, image_id: int, config: DetectorConfig) -> list[list]:
    """A row for each object, in the order of FIELDS and, with masks, MASK_FIELDS; px and pixels."""
    ids, rows = config.ids(), []
    for i, box in enumerate(_corners_and_sides(found)):
        label = found.labels[i]
        row = [name, image_id, config.classes[label], ids[label], round(float(found.scores[i]), 4)]
        row += [round(x, 2) for x in box]
        rows.append(row if found.codes is None else [*row, int(run_lengths(found.codes[i])[1::2].sum())])
    return rows


def _corners_and_sides(found: Detections) -> list[list[float]]:
    boxes = found.boxes.astype(np.float64)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).round(4).tolist()


def picture_jpeg(image: Tensor, found: Detections, config: DetectorConfig) -> bytes:
    """The image [C, H, W] with boxes, masks, names and scores on it; at most 2048 px wide or high."""
    masks = None if found.codes is None else InstanceMasks(Outlines.of(found.codes), found.size)
    drawn = draw_on(image, found.boxes, found.labels, config, masks=masks, scores=found.scores)
    return encoded(Image.fromarray(drawn), "JPEG", quality=90)


def draw_on(
    image: Tensor,
    boxes: np.ndarray,
    labels: np.ndarray,
    config: DetectorConfig,
    *,
    masks: InstanceMasks | None,
    scores: np.ndarray | None = None,
    crowd: np.ndarray | None = None,
    longest: int = _SHOWN,
) -> np.ndarray:
    """[H, W, 3] uint8: an image with objects on it, at most `longest` px wide or high.

    Args:
        image: [C, H, W] as it was read.
        boxes: [N, 4], (x1, y1, x2, y2) px of the image.
        labels: [N] indices of classes.
        config: Names the classes and their colours.
        masks: Of the objects, on the image.
        scores: [N]; None for the truth.
        crowd: [N] bool; None for none.
        longest: See above.
    """
    size = tuple(image.shape[1:])
    picture = to_picture(shrunk(image, longest))
    height, width = picture.shape[:2]
    ratios = np.array([width / size[1], height / size[0]] * 2, np.float32)
    return draw_objects(
        picture,
        boxes * ratios,
        labels,
        [tuple(colour) for colour in config.colours],
        config.classes,
        masks=None if masks is None else MasksAt(masks.resized(height, width)),
        crowd=crowd,
        scores=scores,
        longest=None,
        letters=max(11, min(height, width) // _LETTERS),
    )


class MasksAt(Sequence):
    """Masks [H, W] of an image's objects, made one at a time."""

    def __init__(self, masks: InstanceMasks):
        self.masks = masks

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self.masks[torch.tensor([index])].dense()[0].numpy()
