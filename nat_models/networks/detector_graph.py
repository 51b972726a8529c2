"""A detector as one graph of tensors, for exporters: no Python branch asks how many boxes there are."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import clip_boxes_to_image, nms

from ..ops.tracing import is_exporting
from .detector import Detector
from .rcnn import STRIDES


class Detections(NamedTuple):
    """What is found in one image, best first.

    Attributes:
        boxes: [N, 4], x1, y1, x2, y2 in pixels of the image as it was given.
        labels: [N], integers, as the detector's.
        scores: [N].
        masks: [N, 1, 28, 28], probabilities on the boxes, for rcnn.paste_masks; None of a detector without mask heads.
    """

    boxes: Tensor
    labels: Tensor
    scores: Tensor
    masks: Tensor | None


class DetectorGraph(nn.Module):
    """What a detector computes on one image that is resized and normalised already.

    It pads the image to a multiple of 32 px, as the detector does, and takes any height and width. Two things are done
    otherwise than in the detector, to the same result up to rounding: each level of the pyramid has its proposals
    chosen by itself, and classes are kept from suppressing each other by moving their boxes far apart.

    Args:
        detector: In evaluation. Its modules are shared.
    """

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.backbone, self.rpn, self.roi_heads = detector.backbone, detector.rpn, detector.roi_heads
        self.divisible = detector.transform.size_divisible
        self.register_buffer("label_ids", detector.label_ids, persistent=False)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """[1, C, H, W] -> the tensors of Detections; three of them without mask heads."""
        size = image.shape[-2], image.shape[-1]
        padded = self._pad(image)
        maps = list(self.backbone(padded).values())
        boxes, labels, scores = self._detect(maps, self._proposals(maps, size), size)
        found = boxes, self.label_ids[labels], scores
        return (*found, self._masks(maps, boxes, labels)) if self.roi_heads.has_mask() else found

    def _pad(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if not (is_exporting() and isinstance(height, torch.SymInt)):
            return F.pad(image, (0, -width % self.divisible, 0, -height % self.divisible))
        # Numbers of their own: formulas of height and width grow with depth, and torch.export takes minutes over them.
        rows, columns = (torch.full((), (n - 1) // self.divisible + 1).item() for n in (height, width))
        for n in (rows, columns):
            torch._check(n >= 2)
        return F.pad(image, (0, columns * self.divisible - width, 0, rows * self.divisible - height))

    def _proposals(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        rpn = self.rpn
        logits, deltas = rpn.head(maps)
        # Not by its forward, which would keep a tracer's tensors.
        anchors = rpn.anchor_generator.grid_anchors([x.shape[-2:] for x in maps], [[n, n] for n in STRIDES])
        found = [self._best(*level, size) for level in zip(logits, deltas, anchors, strict=True)]
        boxes, scores = (torch.cat(each) for each in zip(*found, strict=True))
        return boxes[scores.sort(descending=True).indices[: rpn.post_nms_top_n()]]

    def _best(self, logits: Tensor, deltas: Tensor, anchors: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Proposals of a level and their scores, from its logits [1, A, H, W] and deltas [1, 4 * A, H, W]."""
        rpn, number = self.rpn, self.rpn.pre_nms_top_n()
        # Rows, columns, anchors; and so many more that there are enough to choose from. Without area, they are dropped.
        scores = torch.cat([logits[0].permute(1, 2, 0).flatten(), logits.new_full((number,), -torch.inf)])
        deltas = deltas[0].unflatten(0, (-1, 4)).permute(2, 3, 0, 1).flatten(0, 2)
        scores, best = scores.topk(number)
        deltas, anchors = (torch.cat([x, x.new_zeros(number, 4)])[best] for x in (deltas, anchors))
        boxes, scores = clip_boxes_to_image(rpn.box_coder.decode_single(deltas, anchors), size), scores.sigmoid()
        (kept,) = torch.where((boxes[:, 2:] - boxes[:, :2] >= rpn.min_size).all(1) & (scores >= rpn.score_thresh))
        boxes, scores = boxes[kept], scores[kept]
        kept = _suppress(boxes, scores, rpn.nms_thresh)
        return boxes[kept], scores[kept]

    def _detect(self, maps: list[Tensor], boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.roi_heads
        total = 0
        for i, stage in enumerate(heads.stages):
            logits, deltas = stage.predict_boxes(heads.box_roi_pool(maps, [boxes]))
            total = total + logits
            if i + 1 < len(heads.stages):
                background = torch.full_like(logits[:, 0], stage.num_classes, dtype=torch.long)
                boxes = stage.refine(logits, deltas, boxes, size, background)
        scores = (total / len(heads.stages)).softmax(1)[:, :-1]
        row, labels = torch.where(scores > heads.score_thresh)
        boxes = clip_boxes_to_image(stage.box_coder.decode_single(deltas[row, labels], boxes[row]), size)
        scores = scores[row, labels]
        kept = _suppress(_apart(boxes, labels, stage.num_classes, size), scores, heads.nms_thresh)
        kept = kept[: heads.detections_per_img]
        return boxes[kept], labels[kept], scores[kept]

    def _masks(self, maps: list[Tensor], boxes: Tensor, labels: Tensor) -> Tensor:
        heads = self.roi_heads
        cut = heads.mask_roi_pool(maps, [boxes])
        rows = torch.arange(labels.shape[0], device=labels.device)
        masks = sum(stage.predict_masks(cut)[rows, labels].sigmoid() for stage in heads.stages) / len(heads.stages)
        return masks[:, None]


def _apart(boxes: Tensor, labels: Tensor, num_classes: int, size: tuple[int, int]) -> Tensor:
    """Boxes [N, 4] moved so that those of two labels do not meet, each label to its place in a square of them.

    In a row of them, as torchvision has it, they would go so far that float32 rounds IoUs.
    """
    columns = math.isqrt(num_classes - 1) + 1
    height, width = size
    right = (labels % columns).to(boxes.dtype) * (width + 1)
    down = (labels // columns).to(boxes.dtype) * (height + 1)
    return boxes + torch.stack([right, down, right, down], 1)


def _suppress(boxes: Tensor, scores: Tensor, threshold: float) -> Tensor:
    """torchvision's nms where one box may be kept, or none: to torch.export it says that there are two or more.

    So two are put among them, without area and with the lowest score, and come out last.
    """
    kept = nms(torch.cat([boxes, boxes.new_zeros(2, 4)]), torch.cat([scores, scores.new_full((2,), -1)]), threshold)
    return kept[:-2]
