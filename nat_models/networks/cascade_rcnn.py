"""Cascade Mask R-CNN: three stages of box and mask heads, each on the boxes that the one before moved.

Source: Cai and Vasconcelos, "Cascade R-CNN", CVPR 2018, arXiv:1712.00726 (with masks: arXiv:1906.09756); the form and
the settings of the NAT and DiNAT papers (arXiv:2204.07143, 2209.15001), which are those of mmdetection 2.19.
"""

from collections.abc import Mapping
from pathlib import Path

from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead

from .detector import CHANNELS, Detector, DetectorSettings
from .features import make_backbone
from .mask_rcnn import STDS, load_weights_into, published_dilations, read_weights
from .rcnn import BoxByBoxMatcher
from .roi_heads import Stage

# Stochastic depth of the published systems' backbones on COCO.
PUBLISHED: Mapping[str, float] = {
    "nat_mini": 0.2,
    "nat_tiny": 0.3,
    "nat_small": 0.3,
    "nat_base": 0.5,
    "dinat_mini": 0.2,
    "dinat_tiny": 0.3,
    "dinat_small": 0.5,
    "dinat_base": 0.6,
    "dinat_large": 0.6,
    "dinat_s_tiny": 0.3,
    "dinat_s_small": 0.5,
    "dinat_s_base": 0.6,
    "dinat_s_large": 0.6,
}
_STDS = (STDS, (0.05, 0.05, 0.1, 0.1), (0.033, 0.033, 0.067, 0.067))
_WEIGHTS = (1.0, 0.5, 0.25)  # of the stages' losses
_BETA = 1 / 9


def cascade_mask_rcnn(
    backbone: str,
    num_classes: int | None = None,
    weights: str | Path | Mapping | None = None,
    *,
    masks: bool = True,
    coco_labels: bool = False,
    **kwargs,
) -> Detector:
    """Cascade Mask R-CNN on a registered network of ours; without masks, Cascade R-CNN.

    Its losses are named stage0.loss_classifier and so on, besides those of the proposal network. BatchNorm in the box
    heads sees the sampled RoIs; the authors train it synchronised over processes.

    Args:
        backbone: As in mask_rcnn; dilations and stochastic depth are those of the published Cascade.
        num_classes: As in mask_rcnn.
        weights: As in mask_rcnn.
        masks: Have mask heads; False for sets of boxes alone.
        coco_labels: Labels are COCO's category ids, 1 to 90 with gaps, and not 0 to 79.
        **kwargs: As in mask_rcnn. rpn_post_nms_top_n_train is 2000, box_fg_iou_thresh (0.5, 0.6, 0.7).

    Raises:
        ValueError: The backbone does not have maps at strides 4, 8, 16 and 32; a setting breaks its rule.
        CheckpointError: The weights cannot be read, or do not fit; nothing is loaded in part.
    """
    settings = DetectorSettings(rpn_post_nms_top_n_train=2000, box_fg_iou_thresh=(0.5, 0.6, 0.7)).taken_from(kwargs)
    checkpoint, num_classes = read_weights(weights, num_classes)
    thresholds = settings.box_thresholds(len(_STDS))
    network = make_backbone(
        backbone,
        kwargs,
        system="Cascade Mask R-CNN",
        drop_path_rate=PUBLISHED.get(backbone.partition(".")[0]),
        patterns=published_dilations(backbone),
    )
    stages = [
        Stage(
            FastRCNNConvFCHead((CHANNELS, 7, 7), [CHANNELS] * 4, [1024], norm_layer=nn.BatchNorm2d),
            num_classes,
            masks,
            stds=stds,
            matcher=BoxByBoxMatcher(above, below, lower_bound=None),
            giou=True,
            weight=weight,
        )
        for stds, weight, (above, below) in zip(_STDS, _WEIGHTS, thresholds, strict=True)
    ]
    model = Detector(network, stages, settings, beta=_BETA, inside_only=True, coco_labels=coco_labels)
    return load_weights_into(model, checkpoint)
