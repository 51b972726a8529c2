"""RoI heads of one stage, Mask R-CNN's, or of several, the Cascade's: what classifies, moves and fills boxes.

Classes are 0 to num_classes - 1; the background is num_classes.

Source: He et al., "Mask R-CNN", arXiv:1703.06870; Cai and Vasconcelos, "Cascade R-CNN", arXiv:1712.00726; as in
mmdetection 2.19.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import batched_nms, clip_boxes_to_image, generalized_box_iou_loss

from .rcnn import (
    AlignedRoIPool,
    BackgroundLastPredictor,
    BoxByBoxMatcher,
    ClampingBoxCoder,
    at_least_float32,
    lies_in_crowd,
)

_MASK_CHANNELS = 256
_MASK_CONVOLUTIONS = 4
_GIOU_WEIGHT = 10.0
_VISIBLE = 0.5  # share of a cell from which it belongs to a mask


class Sample(NamedTuple):
    """The boxes of one image that a stage learns from, positives first.

    Attributes:
        boxes: [S, 4].
        truth: [S, 4], the true boxes of the positives; of negatives the boxes themselves.
        labels: [S], classes; the background for negatives.
        matches: [P], of the positives: which true box.
        is_truth: [S], whether a box is itself a true one, put among the proposals.
    """

    boxes: Tensor
    truth: Tensor
    labels: Tensor
    matches: Tensor
    is_truth: Tensor

    @property
    def positives(self) -> Tensor:
        return self.boxes[: len(self.matches)]


class Stage(nn.Module):
    """A box head and, with `masks`, a mask head, and how they learn.

    Args:
        box_head: [N, 256, 7, 7] -> [N, 1024].
        num_classes: Without the background.
        masks: Have a mask head.
        stds: Of the deltas, for ClampingBoxCoder.
        matcher: Hands true boxes to proposals.
        giou: Learn boxes by GIoU, times 10, in place of the deltas' L1.
        weight: Of all losses of this stage.
    """

    def __init__(
        self,
        box_head: nn.Module,
        num_classes: int,
        masks: bool,
        *,
        stds: Sequence[float],
        matcher: BoxByBoxMatcher,
        giou: bool = False,
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.box_head = box_head
        self.box_predictor = BackgroundLastPredictor(1024, num_classes)
        if masks:
            self.mask_head = MaskRCNNHeads(_MASK_CHANNELS, [_MASK_CHANNELS] * _MASK_CONVOLUTIONS, dilation=1)
            self.mask_predictor = MaskRCNNPredictor(_MASK_CHANNELS, _MASK_CHANNELS, num_classes)
            for layer in (self.mask_predictor.conv5_mask, self.mask_predictor.mask_fcn_logits):
                nn.init.zeros_(layer.bias)
        for layer in self.box_head.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        self.num_classes = num_classes
        self.box_coder = ClampingBoxCoder(stds)
        self.matcher = matcher
        self.giou = giou
        self.weight = weight

    def predict_boxes(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 256, 7, 7] -> logits [N, num_classes + 1], deltas [N, num_classes, 4]."""
        return self.box_predictor(self.box_head(features))

    def predict_masks(self, features: Tensor) -> Tensor:
        """[N, 256, 14, 14] -> logits [N, num_classes, 28, 28]."""
        return at_least_float32(self.mask_predictor(self.mask_head(features)))

    def sample(self, proposals: Tensor, target: Mapping, sampler: BalancedPositiveNegativeSampler) -> Sample:
        """Draws from one image's proposals [N, 4]. True boxes come first and are positives of themselves."""
        truth = target["boxes"].to(proposals.dtype)
        matches = self.matcher.match(proposals, truth, lies_in_crowd(proposals, target["ignored"].to(proposals.dtype)))
        own = torch.arange(len(truth), device=proposals.device)
        boxes, matches = torch.cat([truth, proposals]), torch.cat([own, matches])
        positive, negative = (torch.where(each[0])[0] for each in sampler([self.matcher.labels(matches)]))
        index, matches = torch.cat([positive, negative]), matches[positive]
        labels = torch.full_like(index, self.num_classes)
        labels[: len(matches)] = target["labels"][matches]
        boxes = boxes[index]
        nearest = torch.cat([truth[matches], boxes[len(matches) :]])
        return Sample(boxes, nearest, labels, matches, index < len(truth))

    def losses(self, logits: Tensor, deltas: Tensor, samples: Sequence[Sample]) -> dict[str, Tensor]:
        """loss_classifier and loss_box_reg, unweighted: means over all boxes of the batch's samples."""
        labels = torch.cat([sample.labels for sample in samples])
        boxes, truth = (torch.cat([sample[i] for sample in samples]) for i in (0, 1))
        number = max(1, len(labels))
        (positive,) = torch.where(labels < self.num_classes)
        given, boxes, truth = deltas[positive, labels[positive]], boxes[positive], truth[positive]
        if self.giou:
            decoded = self.box_coder.decode_single(given, boxes)
            of_boxes = _GIOU_WEIGHT * generalized_box_iou_loss(decoded, truth, reduction="sum", eps=1e-6)
        else:
            of_boxes = F.l1_loss(given, self.box_coder.encode_single(truth, boxes), reduction="sum")
        of_classes = F.cross_entropy(logits, labels, reduction="sum")
        return dict(loss_classifier=of_classes / number, loss_box_reg=of_boxes / number)

    def mask_loss(self, logits: Tensor, samples: Sequence[Sample], targets: Sequence[Mapping]) -> Tensor:
        """The mean over the positives' cells, of their true classes' logits; 0 without positives."""
        if len(logits) == 0:
            return logits.sum()
        pairs = [(s, t) for s, t in zip(samples, targets, strict=True) if len(s.matches)]
        size = logits.shape[-1]
        cells = [t["masks"].crop(s.positives, t["rows"][s.matches], size).to(logits.device) for s, t in pairs]
        wanted = torch.cat([x if x.dtype == torch.bool else x >= _VISIBLE for x in cells]).to(logits.dtype)
        labels = torch.cat([s.labels[: len(s.matches)] for s, _ in pairs])
        own = logits[torch.arange(len(labels), device=logits.device), labels]
        return F.binary_cross_entropy_with_logits(own, wanted)

    def refine(self, logits: Tensor, deltas: Tensor, boxes: Tensor, size: tuple[int, int], labels: Tensor) -> Tensor:
        """Boxes [N, 4] of one image moved for the next stage, without gradient, and clipped to its size.

        By the deltas of their labels [N]; for the background, those of the best class.
        """
        best = torch.where(labels < self.num_classes, labels, logits[:, :-1].argmax(1))
        chosen = deltas.detach()[torch.arange(best.shape[0], device=best.device), best]
        return clip_boxes_to_image(self.box_coder.decode_single(chosen, boxes), size)


class StagedRoIHeads(nn.Module):
    """Runs the stages on RoIs of a pyramid: each moves the boxes for the next, logits and masks are averaged.

    Args:
        stages: One or several.
        batch_size_per_image: Boxes sampled in training.
        positive_fraction: Of them at most this share are positives.
        score_thresh: Detections score more than this.
        nms_thresh: Of two detections of a class with a larger IoU the better one is kept.
        detections_per_img: At most this many, the best.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        *,
        batch_size_per_image: int,
        positive_fraction: float,
        score_thresh: float,
        nms_thresh: float,
        detections_per_img: int,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.box_roi_pool, self.mask_roi_pool = AlignedRoIPool(7), AlignedRoIPool(14)
        self.sampler = BalancedPositiveNegativeSampler(batch_size_per_image, positive_fraction)
        self.score_thresh = score_thresh
        self.nms_thresh = nms_thresh
        self.detections_per_img = detections_per_img

    def has_mask(self) -> bool:
        return hasattr(self.stages[0], "mask_head")

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections of each image in evaluation, losses in training; the other one is empty.

        Masks are [N, 1, 28, 28], probabilities on the boxes.
        """
        maps = list(features.values())
        if self.training:
            return [], self._losses(maps, proposals, image_shapes, targets)
        results = self._detect(maps, proposals, image_shapes)
        if self.has_mask():
            self._add_masks(maps, results)
        return results, {}

    def _losses(self, maps: list[Tensor], proposals: list[Tensor], sizes: list, targets: list[dict]) -> dict:
        losses = {}
        for i, stage in enumerate(self.stages):
            samples = [stage.sample(*each, self.sampler) for each in zip(proposals, targets, strict=True)]
            logits, deltas = stage.predict_boxes(self.box_roi_pool(maps, [s.boxes for s in samples]))
            found = stage.losses(logits, deltas, samples)
            if self.has_mask():
                cut = self.mask_roi_pool(maps, [s.positives for s in samples])
                found["loss_mask"] = stage.mask_loss(stage.predict_masks(cut), samples, targets)
            prefix = f"stage{i}." if len(self.stages) > 1 else ""
            losses |= {f"{prefix}{name}": stage.weight * loss for name, loss in found.items()}
            if i + 1 < len(self.stages):
                counts = [len(s.boxes) for s in samples]
                parts = zip(logits.split(counts), deltas.split(counts), samples, sizes, strict=True)
                moved = [(stage.refine(a, b, s.boxes, size, s.labels), s) for a, b, s, size in parts]
                proposals = [boxes[~s.is_truth] for boxes, s in moved]  # true boxes come back as they are
        return losses

    def _detect(self, maps: list[Tensor], proposals: list[Tensor], sizes: list) -> list[dict[str, Tensor]]:
        counts = [len(boxes) for boxes in proposals]
        total = 0
        for i, stage in enumerate(self.stages):
            logits, deltas = stage.predict_boxes(self.box_roi_pool(maps, proposals))
            total = total + logits
            if i + 1 < len(self.stages):
                parts = zip(logits.split(counts), deltas.split(counts), proposals, sizes, strict=True)
                proposals = [
                    stage.refine(a, b, boxes, size, a.new_full((len(a),), stage.num_classes, dtype=torch.long))
                    for a, b, boxes, size in parts
                ]
        scores = (total / len(self.stages)).softmax(1)[:, :-1]
        parts = zip(scores.split(counts), deltas.split(counts), proposals, sizes, strict=True)
        return [self._best(stage, *part) for part in parts]

    def _best(self, stage: Stage, scores: Tensor, deltas: Tensor, boxes: Tensor, size: tuple[int, int]) -> dict:
        """Of one image's scores [N, num_classes] and deltas [N, num_classes, 4]."""
        row, labels = torch.where(scores > self.score_thresh)
        found = clip_boxes_to_image(stage.box_coder.decode_single(deltas[row, labels], boxes[row]), size)
        scores = scores[row, labels]
        keep = batched_nms(found, scores, labels, self.nms_thresh)[: self.detections_per_img]
        return dict(boxes=found[keep], labels=labels[keep], scores=scores[keep])

    def _add_masks(self, maps: list[Tensor], results: list[dict[str, Tensor]]) -> None:
        cut = self.mask_roi_pool(maps, [found["boxes"] for found in results])
        labels = torch.cat([found["labels"] for found in results])
        rows = torch.arange(len(labels), device=labels.device)
        masks = sum(stage.predict_masks(cut)[rows, labels].sigmoid() for stage in self.stages) / len(self.stages)
        for found, each in zip(results, masks.split([len(f["boxes"]) for f in results]), strict=True):
            found["masks"] = each[:, None]
