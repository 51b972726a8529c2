"""A detector: a backbone of ours, a feature pyramid, a proposal network and RoI heads, with torchvision's interface."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from .features import moved_groups, normed_maps
from .rcnn import CornerAnchors, DetectionTransform, Float32RPNHead, Masks, ProposalNetwork, TensorMasks
from .roi_heads import Stage, StagedRoIHeads

CHANNELS = 256  # of the pyramid
# Numbers between 1 and 90 that COCO's 80 categories leave out.
_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = tuple(i for i in range(1, 91) if i not in _GAPS)


@dataclass(frozen=True, kw_only=True)
class DetectorSettings:
    """How a detector takes images, what it trains with and what it gives; named as torchvision names them.

    Attributes:
        min_size: Images are resized so that their short side is this many pixels. Of several, training draws one for
            each image, and a test has the last.
        max_size: And so that their long side is at most this many.
        image_mean: Subtracted from each channel of an image whose values are 0 to 1; None means ImageNet's, of another
            number of channels than 3 their average.
        image_std: Each channel is then divided by it; None as for image_mean.
        resize_in_training: Resize in training too; False for images that were resized already.
        anchor_sizes: Square roots of the anchors' areas at strides 4, 8, 16, 32 and 64, px.
        aspect_ratios: Of anchors, height / width.
        rpn_pre_nms_top_n_train, rpn_pre_nms_top_n_test: Proposals of a level that compete.
        rpn_post_nms_top_n_train, rpn_post_nms_top_n_test: Proposals of an image that are kept.
        rpn_nms_thresh: Of two proposals of a level with a larger IoU the better one is kept.
        rpn_fg_iou_thresh: From this IoU an anchor is a positive.
        rpn_bg_iou_thresh: Below this one it is a negative.
        rpn_batch_size_per_image: Anchors sampled in training.
        rpn_positive_fraction: Of them at most this share are positives.
        rpn_score_thresh: Proposals score at least this.
        box_score_thresh: Detections score more than this.
        box_nms_thresh: Of two detections of a class with a larger IoU the better one is kept.
        box_detections_per_img: Detections of an image.
        box_fg_iou_thresh: From this IoU a proposal is a positive; of several stages one each.
        box_bg_iou_thresh: Below this one it is a negative; None means box_fg_iou_thresh.
        box_batch_size_per_image: Proposals sampled in training.
        box_positive_fraction: Of them at most this share are positives.
    """

    min_size: int | Sequence[int] = 800
    max_size: int = 1333
    image_mean: Sequence[float] | None = None
    image_std: Sequence[float] | None = None
    resize_in_training: bool = True
    anchor_sizes: Sequence[float | Sequence[float]] = (32, 64, 128, 256, 512)
    aspect_ratios: Sequence[float] = (0.5, 1.0, 2.0)
    rpn_pre_nms_top_n_train: int = 2000
    rpn_pre_nms_top_n_test: int = 1000
    rpn_post_nms_top_n_train: int = 1000
    rpn_post_nms_top_n_test: int = 1000
    rpn_nms_thresh: float = 0.7
    rpn_fg_iou_thresh: float = 0.7
    rpn_bg_iou_thresh: float = 0.3
    rpn_batch_size_per_image: int = 256
    rpn_positive_fraction: float = 0.5
    rpn_score_thresh: float = 0.0
    box_score_thresh: float = 0.05
    box_nms_thresh: float = 0.5
    box_detections_per_img: int = 100
    box_fg_iou_thresh: float | Sequence[float] = 0.5
    box_bg_iou_thresh: float | Sequence[float] | None = None
    box_batch_size_per_image: int = 512
    box_positive_fraction: float = 0.25

    def taken_from(self, kwargs: dict) -> "DetectorSettings":
        """These settings with those among `kwargs`, which are taken out of it."""
        return replace(self, **{f.name: kwargs.pop(f.name) for f in fields(self) if f.name in kwargs})

    def normalisation(self, in_chans: int) -> tuple[Sequence[float], Sequence[float]]:
        """image_mean and image_std of a backbone.

        Raises:
            ValueError: They are not of in_chans channels.
        """
        found = []
        for name, usual in (("image_mean", IMAGENET_DEFAULT_MEAN), ("image_std", IMAGENET_DEFAULT_STD)):
            given = getattr(self, name)
            if given is None:
                given = usual if in_chans == len(usual) else (sum(usual) / len(usual),) * in_chans
            if len(given) != in_chans:
                raise ValueError(f"{name} is for {in_chans} channels, got {given}.")
            found.append(given)
        return tuple(found)

    def box_thresholds(self, stages: int) -> list[tuple[float, float]]:
        """For each stage, from which IoU a proposal is a positive and below which it is a negative.

        Raises:
            ValueError: There are not as many as stages, or the second is larger than the first.
        """
        above = self.box_fg_iou_thresh
        below = above if self.box_bg_iou_thresh is None else self.box_bg_iou_thresh
        above, below = ([x] * stages if isinstance(x, float | int) else list(x) for x in (above, below))
        if not len(above) == len(below) == stages or any(a < b for a, b in zip(above, below, strict=True)):
            raise ValueError(
                "box_fg_iou_thresh and box_bg_iou_thresh have a number for each stage, the second at most the first; "
                f"got {above} and {below} for {stages} stages."
            )
        return list(zip(above, below, strict=True))


class PyramidBackbone(nn.Module):
    """A network's normed maps, and the feature pyramid on them: 256 channels at strides 4, 8, 16, 32 and 64."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.out_channels = CHANNELS
        widths = [info["num_chs"] for info in body.feature_info]
        self.fpn = FeaturePyramidNetwork(widths, CHANNELS, extra_blocks=LastLevelMaxPool())
        for layer in self.fpn.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.xavier_uniform_(layer.weight)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, in_chans, H, W] -> maps [B, 256, H / stride, W / stride], finest first."""
        return self.fpn(OrderedDict((str(i), each) for i, each in enumerate(normed_maps(self.body, x))))


class Detector(GeneralizedRCNN):
    """What mask_rcnn and cascade_mask_rcnn make.

    In evaluation `detector(images)` takes a list of images [C, H, W] of any sizes, values 0 to 1, and gives for each a
    dict: boxes [N, 4] in the image's pixels, labels [N], scores [N], best first, and masks [N, 1, H, W], probabilities:
    an object is where they are at least 0.5. With `transform.paste = False` masks are [N, 1, 28, 28], probabilities on
    the boxes, for rcnn.paste_masks, one or some at a time: pasted masks of a hundred objects on a large image take much
    memory.

    In training `detector(images, targets)` gives a dict of losses; their plain sum is to be minimised. A target is a
    dict of

    - boxes [N, 4], float, px; N may be 0, and such images are negatives
    - labels [N], integers
    - masks [N, H, W] of zeros and ones, or anything with the method of rcnn.Masks, whose row i is box i's
    - iscrowd [N], optional: boxes for which this is not 0 are neither objects nor background. Anchors and proposals
      that lie for more than half in one are left out.

    Images of a batch are padded with zeros to one size, right and bottom, as the authors' are. Attention sees the
    padding, so an image's results depend on its batch where it is the smaller one there, and only there.

    Args:
        backbone: A network of ours with output_norms and four levels.
        stages: Of the RoI heads.
        settings: As the class says.
        beta: Of the proposal network's smooth L1; 0 is L1.
        inside_only: Whether anchors that leave the image are left out of its training.
        coco_labels: Labels are COCO's category ids, 1 to 90 with gaps, in targets and results.

    Raises:
        ValueError: coco_labels without 80 classes; image_mean or image_std not of the backbone's channels; not five
            anchor_sizes.
    """

    def __init__(
        self,
        backbone: nn.Module,
        stages: Sequence[Stage],
        settings: DetectorSettings,
        *,
        beta: float,
        inside_only: bool,
        coco_labels: bool = False,
    ) -> None:
        s, num_classes = settings, stages[0].num_classes
        if coco_labels and num_classes != len(COCO_IDS):
            raise ValueError(f"coco_labels are those of COCO's {len(COCO_IDS)} classes, got {num_classes=}.")
        if len(s.anchor_sizes) != 5:
            raise ValueError(f"anchor_sizes has an entry for each of 5 strides, got {s.anchor_sizes}.")
        sizes = [size if isinstance(size, Sequence) else (size,) for size in s.anchor_sizes]
        anchors = CornerAnchors(sizes, s.aspect_ratios)
        rpn = ProposalNetwork(
            anchors,
            Float32RPNHead(CHANNELS, anchors.num_anchors_per_location()[0]),
            beta=beta,
            inside_only=inside_only,
            fg_iou_thresh=s.rpn_fg_iou_thresh,
            bg_iou_thresh=s.rpn_bg_iou_thresh,
            batch_size_per_image=s.rpn_batch_size_per_image,
            positive_fraction=s.rpn_positive_fraction,
            pre_nms_top_n=dict(training=s.rpn_pre_nms_top_n_train, testing=s.rpn_pre_nms_top_n_test),
            post_nms_top_n=dict(training=s.rpn_post_nms_top_n_train, testing=s.rpn_post_nms_top_n_test),
            nms_thresh=s.rpn_nms_thresh,
            score_thresh=s.rpn_score_thresh,
        )
        roi_heads = StagedRoIHeads(
            stages,
            batch_size_per_image=s.box_batch_size_per_image,
            positive_fraction=s.box_positive_fraction,
            score_thresh=s.box_score_thresh,
            nms_thresh=s.box_nms_thresh,
            detections_per_img=s.box_detections_per_img,
        )
        normalisation = s.normalisation(backbone.in_chans)
        transform = DetectionTransform(s.min_size, s.max_size, *normalisation, s.resize_in_training)
        super().__init__(PyramidBackbone(backbone), rpn, roi_heads, transform)
        self.num_classes = num_classes
        ids = torch.tensor(COCO_IDS) if coco_labels else torch.arange(num_classes)
        self.register_buffer("label_ids", ids, persistent=False)

    def forward(self, images: Sequence[Tensor], targets: Sequence[Mapping] | None = None) -> dict | list[dict]:
        """Losses in training, detections in evaluation; see the class.

        Raises:
            ValueError: Training without targets, or with one that breaks a rule of theirs; which one.
        """
        if not self.training:
            results = super().forward(images)
            return [{**found, "labels": self.label_ids[found["labels"]]} for found in results]
        if targets is None or len(targets) != len(images):
            given = None if targets is None else len(targets)
            raise ValueError(f"Training takes a target for each image, got {given} for {len(images)} images.")
        return super().forward(images, [self._read(i, target) for i, target in enumerate(targets)])

    def _read(self, i: int, target: Mapping) -> dict:
        """A target as the parts take it: objects and crowds apart, labels from 0."""
        boxes, labels = target["boxes"], target["labels"]
        if boxes.ndim != 2 or boxes.shape[1] != 4 or labels.shape != boxes.shape[:1]:
            shapes = f"{list(boxes.shape)} and {list(labels.shape)}"
            raise ValueError(f"Target {i}: boxes are [N, 4] and labels [N], got {shapes}.")
        wrong = ~((boxes[:, 2:] > boxes[:, :2]).all(1) & boxes.isfinite().all(1))
        if wrong.any():
            raise ValueError(f"Target {i}: a box has width and height above 0, got {boxes[wrong][0].tolist()}.")
        crowd = target.get("iscrowd")
        crowd = torch.zeros_like(labels, dtype=torch.bool) if crowd is None else crowd.to(labels.device) != 0
        found = torch.searchsorted(self.label_ids, labels).clamp(max=self.num_classes - 1)
        if (unknown := labels[(self.label_ids[found] != labels) & ~crowd]).numel():
            known = f"{int(self.label_ids[0])} to {int(self.label_ids[-1])}"
            raise ValueError(f"Target {i}: labels are one of {self.num_classes} from {known}, got {int(unknown[0])}.")
        read = dict(boxes=boxes[~crowd], labels=found[~crowd], ignored=boxes[crowd], rows=torch.where(~crowd)[0])
        if self.roi_heads.has_mask() and len(read["boxes"]):
            if target.get("masks") is None:
                raise ValueError(f"Target {i} has no masks. A detector made with masks=False trains on boxes alone.")
            read["masks"] = self._read_masks(i, target["masks"], len(boxes))
        return read

    @staticmethod
    def _read_masks(i: int, masks: Tensor | Masks, number: int) -> Masks:
        if not isinstance(masks, Tensor):
            return masks
        if masks.ndim != 3 or len(masks) != number:
            raise ValueError(f"Target {i}: masks are [N, H, W] for {number} boxes, got {list(masks.shape)}.")
        return TensorMasks(masks)

    def forward_for_counting(self, image: Tensor) -> None:
        """Runs what nat_models.complexity counts on an image [1, C, H, W]: 1000 RoIs and 100 masks, as the papers do.

        Which boxes are chosen depends on numbers; how many, and so the cost, is fixed here.
        """
        self.rpn.head(list(self.backbone(image).values()))
        for stage in self.roi_heads.stages:
            stage.predict_boxes(image.new_empty(1000, CHANNELS, 7, 7))
            if self.roi_heads.has_mask():
                stage.predict_masks(image.new_empty(100, CHANNELS, 14, 14))

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups for layer-wise learning rates: those of the backbone, then the heads."""
        return moved_groups(self.backbone.body.group_matcher(coarse), "backbone.body.")

    def get_classifier(self) -> nn.ModuleList:
        """All that is not the backbone's network."""
        return nn.ModuleList([self.backbone.fpn, self.rpn, self.roi_heads])

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the paper's recipe does not decay besides norms: rpb."""
        return {f"backbone.body.{name}" for name in self.backbone.body.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.body.set_grad_checkpointing(enable)
