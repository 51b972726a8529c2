"""What the detectors of the NAT papers do otherwise than torchvision's, a class for each difference.

Boxes are x1, y1, x2, y2 in pixels, [N, 4]; width is x2 - x1.

Source: the rules of mmdetection 2.19, with which the papers (arXiv:2204.07143, 2209.15001) trained and tested. Ren et
al., "Faster R-CNN", arXiv:1506.01497; He et al., "Mask R-CNN", arXiv:1703.06870.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder, Matcher
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform, resize_boxes
from torchvision.ops import box_area, box_iou, roi_align

STRIDES = (4, 8, 16, 32, 64)  # of the pyramid's maps, px; RoIs are cut out of the first four
_DIVISIBLE = 32  # images are padded to a multiple of this many pixels
_COARSEST_OF_FINEST = 56  # px, side of the boxes that are cut out of the first map; each next map takes twice that
_IN_CROWD = 0.5  # share of a box's own area


def at_least_float32(x: Tensor) -> Tensor:
    """Scores and deltas leave autocast here: 16 bits do not hold a box of a thousand pixels."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class CornerAnchors(AnchorGenerator):
    """Anchors around the corners of cells, of any real size, at fixed strides; numbers of float32 in every dtype.

    torchvision rounds them to pixels, and divides the image's size by the map's for strides. Not clipped.

    Args:
        sizes: Of each map, square roots of the anchors' areas, px.
        aspect_ratios: Height / width.
    """

    def __init__(self, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[float]) -> None:
        super().__init__(tuple(map(tuple, sizes)), (tuple(aspect_ratios),) * len(sizes))

    def generate_anchors(self, scales, aspect_ratios, dtype=torch.float32, device="cpu") -> Tensor:
        """[len(aspect_ratios) * len(scales), 4], around (0, 0)."""
        scales = torch.as_tensor(scales, dtype=dtype, device=device)
        roots = torch.as_tensor(aspect_ratios, dtype=dtype, device=device).sqrt()
        width, height = ((side[:, None] * scales).flatten() for side in (1 / roots, roots))
        return torch.stack([-width, -height, width, height], 1) / 2

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """The same for each image: [N, 4] in the order map, row, column, anchor."""
        like = at_least_float32(feature_maps[0][:0])
        self.set_cell_anchors(torch.float32, like.device)
        sizes = [list(x.shape[-2:]) for x in feature_maps]
        anchors = torch.cat(self.grid_anchors(sizes, [[stride, stride] for stride in STRIDES])).to(like.dtype)
        return [anchors] * len(image_list.image_sizes)


class ClampingBoxCoder(BoxCoder):
    """Changes of size are bounded on both sides, to 16/1000 and 1000/16 of a box; torchvision bounds growth alone.

    Args:
        stds: Deltas are multiplied by these four to give shifts in widths and heights, and logarithms of sizes.
    """

    def __init__(self, stds: Sequence[float]) -> None:
        super().__init__(tuple(1 / std for std in stds), math.log(1000 / 16))

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Deltas [N, 4 * C] of boxes [N, 4] -> [N, 4 * C]."""
        shift, size = rel_codes.unflatten(1, (-1, 2, 2)).unbind(2)
        lowest = size.new_tensor(self.weights[2:]) * -self.bbox_xform_clip
        return super().decode_single(torch.stack([shift, torch.maximum(size, lowest)], 2).flatten(1), boxes)


class BoxByBoxMatcher(Matcher):
    """Each true box in turn takes the candidates of its best IoU, tied ones too, if that is at least `lower_bound`.

    The next true box may take them away again. torchvision has no such bound, and gives these candidates to the true
    box of their own best IoU.

    Args:
        high_threshold: From this IoU a candidate is a positive.
        low_threshold: Below this one it is a negative, between the two neither.
        lower_bound: None leaves the step out.
    """

    def __init__(self, high_threshold: float, low_threshold: float, lower_bound: float | None) -> None:
        super().__init__(high_threshold, low_threshold, allow_low_quality_matches=lower_bound is not None)
        self.lower_bound = lower_bound

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        best = match_quality_matrix.max(1, keepdim=True).values
        truth, candidate = torch.where((match_quality_matrix == best) & (best >= self.lower_bound))
        last = torch.full_like(matches, -1).scatter_reduce(0, candidate, truth, "amax")
        matches.copy_(torch.where(last >= 0, last, matches))

    def match(self, candidates: Tensor, truth: Tensor, left_out: Tensor) -> Tensor:
        """The true box of each candidate, [N]: its index, BELOW_LOW_THRESHOLD for a negative, BETWEEN_THRESHOLDS else.

        Args:
            candidates: [N, 4].
            truth: [M, 4], M may be 0.
            left_out: [N], the candidates that are neither positive nor negative whatever their IoU.
        """
        if len(truth) == 0 or len(candidates) == 0:
            matches = torch.full((len(candidates),), self.BELOW_LOW_THRESHOLD, device=candidates.device)
        else:
            matches = self(box_iou(truth, candidates).masked_fill(left_out, -1.0))
        return matches.masked_fill(left_out, self.BETWEEN_THRESHOLDS)

    def labels(self, matches: Tensor) -> Tensor:
        """Of `match`, as torchvision's sampler takes it: 1 positive, 0 negative, -1 neither."""
        return (matches >= 0).float() - (matches == self.BETWEEN_THRESHOLDS).float()


def lies_in_crowd(boxes: Tensor, crowds: Tensor) -> Tensor:
    """Whether more than half of a box's own area is in one of the crowd's regions: [N, 4] and [M, 4] -> [N]."""
    if len(crowds) == 0:
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    sides = torch.minimum(boxes[:, None, 2:], crowds[:, 2:]) - torch.maximum(boxes[:, None, :2], crowds[:, :2])
    return (sides.clamp(min=0).prod(2) > _IN_CROWD * box_area(boxes)[:, None]).any(1)


class Float32RPNHead(RPNHead):
    """Its logits and deltas are of float32 under autocast."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, deltas = super().forward(x)
        return list(map(at_least_float32, logits)), list(map(at_least_float32, deltas))


class ProposalNetwork(RegionProposalNetwork):
    """A region proposal network with mmdetection's assignment and losses.

    Args:
        anchor_generator: Of anchors.
        head: Gives logits and deltas.
        beta: Of smooth L1; 0 is L1.
        inside_only: Train with anchors inside the image alone.
        bg_iou_thresh: Also the lower bound of the box by box step.
        **kwargs: Of torchvision's RegionProposalNetwork.
    """

    def __init__(
        self,
        anchor_generator: AnchorGenerator,
        head: nn.Module,
        *,
        beta: float,
        inside_only: bool,
        fg_iou_thresh: float,
        bg_iou_thresh: float,
        **kwargs,
    ) -> None:
        super().__init__(anchor_generator, head, fg_iou_thresh, bg_iou_thresh, **kwargs)
        self.box_coder = ClampingBoxCoder((1.0, 1.0, 1.0, 1.0))
        self.proposal_matcher = BoxByBoxMatcher(fg_iou_thresh, bg_iou_thresh, bg_iou_thresh)
        self.min_size = torch.finfo(torch.float32).tiny  # only boxes without width or height are dropped
        self.beta = beta
        self.inside_only = inside_only

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        """Proposals of each image [N, 4], best first, and in training loss_objectness and loss_rpn_box_reg."""
        if targets is not None:
            targets = [{**t, "image_size": size} for t, size in zip(targets, images.image_sizes, strict=True)]
        return super().forward(images, features, targets)

    def assign_targets_to_anchors(self, anchors: list[Tensor], targets: list[dict]) -> tuple[list, list]:
        labels, matched = [], []
        for boxes, target in zip(anchors, targets, strict=True):
            truth = target["boxes"].to(boxes.dtype)
            left_out = lies_in_crowd(boxes, target["ignored"].to(boxes.dtype)) | self._outside(boxes, target)
            matches = self.proposal_matcher.match(boxes, truth, left_out)
            labels.append(self.proposal_matcher.labels(matches))
            matched.append(truth[matches.clamp(min=0)] if len(truth) else boxes)
        return labels, matched

    def _outside(self, boxes: Tensor, target: Mapping) -> Tensor:
        """Anchors of cells that only the batch's padding holds, and with inside_only those that leave the image."""
        height, width = target["image_size"]
        padded = boxes.new_tensor([math.ceil(n / _DIVISIBLE) * _DIVISIBLE for n in (width, height)])
        outside = ((boxes[:, :2] + boxes[:, 2:]) / 2 >= padded).any(1)
        if self.inside_only:
            outside |= (boxes[:, :2] < 0).any(1) | (boxes[:, 2:] >= boxes.new_tensor([width, height])).any(1)
        return outside

    def losses_of_anchors(
        self, objectness: Tensor, deltas: Tensor, labels: list[Tensor], targets: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Indices and losses [S] of the sampled anchors, indices and box losses [P] of the positives among them.

        Losses are divided by the number sampled, each image's positives and negatives counted as at least 1.
        """
        positive, negative = self.fg_bg_sampler(labels)
        number = sum(sampled.sum().clamp(min=1) for sampled in (*positive, *negative))
        positive, negative = (torch.cat(each).bool() for each in (positive, negative))
        index, box_index = torch.where(positive | negative)[0], torch.where(positive)[0]
        given, wanted = objectness.flatten()[index], positive[index].to(objectness.dtype)
        loss = F.binary_cross_entropy_with_logits(given, wanted, reduction="none")
        wanted = torch.cat(targets)[box_index]
        box_loss = F.smooth_l1_loss(deltas[box_index], wanted, beta=self.beta, reduction="none").sum(1)
        return index, loss / number, box_index, box_loss / number

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        _, loss, _, box_loss = self.losses_of_anchors(objectness, pred_bbox_deltas, labels, regression_targets)
        return loss.sum(), box_loss.sum()


class AlignedRoIPool(nn.Module):
    """RoIAlign on a pyramid: aligned to pixel centres, with as many samples as a bin has cells, at fixed strides.

    torchvision's MultiScaleRoIAlign is off by half a pixel (aligned=False), takes 2 x 2 samples and infers strides.

    Args:
        size: Of what is cut out, cells.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    @staticmethod
    def levels_of(boxes: Tensor) -> Tensor:
        """The map that each box is cut out of, [N], 0 to 3."""
        levels = torch.log2(box_area(boxes).sqrt() / _COARSEST_OF_FINEST + 1e-6).floor()
        return levels.clamp(0, 3).long()

    def forward(self, maps: Sequence[Tensor], boxes: Sequence[Tensor]) -> Tensor:
        """Maps [B, C, H, W] at strides 4 to 32 and boxes [N, 4] of each image -> [sum of N, C, size, size]."""
        of_image = [torch.full_like(each[:, :1], i) for i, each in enumerate(boxes)]
        rois = torch.cat([torch.cat(of_image), torch.cat(list(boxes))], 1)
        levels = self.levels_of(torch.cat(list(boxes)))
        out = maps[0].new_zeros(len(rois), maps[0].shape[1], self.size, self.size)
        for level, (x, stride) in enumerate(zip(maps, STRIDES, strict=False)):
            (index,) = torch.where(levels == level)
            x = at_least_float32(x)  # not the boxes in the maps' 16 bits
            cut = roi_align(x, rois[index].to(x.dtype), self.size, 1 / stride, sampling_ratio=-1, aligned=True)
            out = out.index_copy(0, index, cut.to(out.dtype))
        return out


class BackgroundLastPredictor(FastRCNNPredictor):
    """Logits with the background after the classes, and deltas for the classes alone; both of float32 under autocast.

    torchvision has the background first, with deltas of its own.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes + 1)
        self.bbox_pred = nn.Linear(in_channels, 4 * num_classes)
        nn.init.normal_(self.cls_score.weight, std=0.01)
        nn.init.normal_(self.bbox_pred.weight, std=0.001)
        for layer in (self.cls_score, self.bbox_pred):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, in_channels] -> [N, num_classes + 1], [N, num_classes, 4]."""
        logits, deltas = super().forward(x)
        return at_least_float32(logits), at_least_float32(deltas).unflatten(1, (-1, 4))


class Masks(Protocol):
    """True masks of an image's objects, which are rasterised when a part of them is asked for."""

    def crop(self, boxes: Tensor, indices: Tensor, size: int) -> Tensor:
        """What a grid of size x size over each box sees of one mask.

        Args:
            boxes: [K, 4], pixels of the image as it was given to the detector; may be on a device, and leave the image.
            indices: [K], rows of the target's boxes: which object's mask is meant.
            size: Cells of the grid, per side.

        Returns:
            [K, size, size]: the share of each cell that the mask covers, 0 to 1, or whether it covers at least half.
        """
        ...


class TensorMasks:
    """Masks of a tensor [N, H, W] of zeros and ones: cells are the means of samples, as RoIAlign takes them."""

    def __init__(self, masks: Tensor) -> None:
        self.masks = masks

    def crop(self, boxes: Tensor, indices: Tensor, size: int) -> Tensor:
        used, rows = indices.unique(return_inverse=True)
        masks = self.masks[used.to(self.masks.device)].to(boxes)
        rois = torch.cat([rows[:, None].to(boxes.dtype), boxes], 1)
        return roi_align(masks[:, None], rois, size, sampling_ratio=-1, aligned=True)[:, 0]


class ResizedMasks:
    """Masks of an image that was resized: boxes are taken back to its own pixels. No mask is resized.

    Args:
        masks: Of the image before.
        ratios: New width / old, new height / old.
    """

    def __init__(self, masks: Masks, ratios: tuple[float, float]) -> None:
        self.masks, self.ratios = masks, ratios

    def crop(self, boxes: Tensor, indices: Tensor, size: int) -> Tensor:
        return self.masks.crop(boxes / boxes.new_tensor([*self.ratios, *self.ratios]), indices, size)


@torch.no_grad()
def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Masks of boxes on their image: at each pixel's centre, interpolated between the cells, zero outside.

    A pixel belongs to the object where it is at least 0.5. torchvision's rounds boxes to whole pixels.

    Args:
        masks: [N, 1, h, w], probabilities.
        boxes: [N, 4], px.
        size: Height and width of the image, px.

    Returns:
        [N, 1, H, W] in float32, without gradient.
    """
    height, width = size
    pasted = masks.new_zeros(len(masks), 1, height, width, dtype=torch.float32)
    corners = torch.cat([boxes[:, :2].floor() - 1, boxes[:, 2:].ceil() + 1], 1).long()  # beyond, nothing is visible
    for i, (mask, box, corner) in enumerate(zip(masks.float(), boxes.float(), corners.tolist(), strict=True)):
        if not (box[2:] > box[:2]).all():
            continue
        left, top = max(corner[0], 0), max(corner[1], 0)
        right, bottom = min(corner[2], width), min(corner[3], height)
        if right <= left or bottom <= top:
            continue
        x, y = (torch.arange(a, b, device=box.device) + 0.5 for a, b in ((left, right), (top, bottom)))
        x, y = ((p - a) / (b - a) * 2 - 1 for p, a, b in ((x, box[0], box[2]), (y, box[1], box[3])))
        grid = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))], 2)
        pasted[i, :, top:bottom, left:right] = F.grid_sample(mask[None], grid[None], align_corners=False)[0]
    return pasted


class DetectionTransform(GeneralizedRCNNTransform):
    """Normalises, resizes and pads images; takes masks as they are, and pastes predicted ones.

    Sides are rounded to the nearest pixel; torchvision rounds them down.

    Args:
        min_size: The short side of resized images, px. Of several, training draws one and a test has the last.
        max_size: The longest long side, px.
        image_mean: Subtracted from each channel.
        image_std: Each channel is then divided by it.
        resize_in_training: Whether images are resized in training too.

    Attributes:
        paste: Give masks on the image. Otherwise they are left as the boxes' probabilities, for paste_masks.
    """

    def __init__(
        self,
        min_size: int | Sequence[int],
        max_size: int,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        resize_in_training: bool,
    ) -> None:
        super().__init__(min_size, max_size, list(image_mean), list(image_std), size_divisible=_DIVISIBLE)
        self.resize_in_training = resize_in_training
        self.paste = True

    def resize(self, image: Tensor, target: dict | None = None) -> tuple[Tensor, dict | None]:
        if self.training and not self.resize_in_training:
            return image, target
        old = image.shape[-2:]
        short = self.torch_choice(self.min_size) if self.training else self.min_size[-1]
        scale = min(short / min(old), self.max_size / max(old))
        new = [max(1, int(n * scale + 0.5)) for n in old]
        if new == list(old):
            return image, target
        image = F.interpolate(image[None], new, mode="bilinear", align_corners=False)[0]
        if target is not None:
            resized = {key: resize_boxes(target[key], old, new) for key in ("boxes", "ignored")}
            if (masks := target.get("masks")) is not None:
                resized["masks"] = ResizedMasks(masks, (new[1] / old[1], new[0] / old[0]))
            target = {**target, **resized}
        return image, target

    def postprocess(self, result: list[dict], image_shapes: list, original_image_sizes: list) -> list[dict]:
        for found, size, original in zip(result, image_shapes, original_image_sizes, strict=False):
            found["boxes"] = resize_boxes(found["boxes"], size, original)
            if "masks" in found and self.paste:
                found["masks"] = paste_masks(found["masks"], found["boxes"], original)
        return result
