"""Mask R-CNN: boxes, classes and masks of objects, on a backbone with four levels.

Source: He et al., "Mask R-CNN", ICCV 2017, arXiv:1703.06870; the form and the settings of the NAT and DiNAT papers
(arXiv:2204.07143, 2209.15001), which are those of mmdetection 2.19.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn
from torchvision.models.detection.faster_rcnn import TwoMLPHead

from ..checkpoints.detection import fit_rcnn, num_classes_of_rcnn, read_rcnn
from .detector import CHANNELS, Detector, DetectorSettings
from .features import make_backbone
from .rcnn import BoxByBoxMatcher
from .roi_heads import Stage

# Stochastic depth of the published systems' backbones on COCO.
PUBLISHED: Mapping[str, float] = {
    "nat_mini": 0.2,
    "nat_tiny": 0.2,
    "nat_small": 0.35,
    "dinat_mini": 0.2,
    "dinat_tiny": 0.2,
    "dinat_small": 0.35,
    "dinat_s_tiny": 0.2,
    "dinat_s_small": 0.35,
}
STDS = (0.1, 0.1, 0.2, 0.2)  # of a box's deltas
_NUM_CLASSES = 80


def mask_rcnn(
    backbone: str,
    num_classes: int | None = None,
    weights: str | Path | Mapping | None = None,
    *,
    masks: bool = True,
    coco_labels: bool = False,
    **kwargs,
) -> Detector:
    """Mask R-CNN on a registered network of ours; without masks, Faster R-CNN.

    Of the backbones that were published so, dilations and stochastic depth are those of the published system (COCO);
    `dilations` and `drop_path_rate` say otherwise.

    Args:
        backbone: timm's name; with pretrained=True its ImageNet weights, and norms of the levels that begin at 1 and 0.
        num_classes: Without the background; None means those of `weights`, or 80 without. Another number than that of
            `weights` makes new logits and deltas, and warns of it; all else is loaded.
        weights: A file, or what one holds: in mmdetection's layout or ours, with anything around it.
        masks: Have a mask head; False for sets of boxes alone.
        coco_labels: Labels are COCO's category ids, 1 to 90 with gaps, and not 0 to 79.
        **kwargs: DetectorSettings, named as torchvision names them: min_size, box_score_thresh, ...; and more arguments
            of the backbone: pretrained, in_chans, dilations, ...

    Raises:
        ValueError: The backbone does not have maps at strides 4, 8, 16 and 32; a setting breaks its rule.
        CheckpointError: The weights cannot be read, or do not fit; nothing is loaded in part.
    """
    settings = DetectorSettings().taken_from(kwargs)
    checkpoint, num_classes = read_weights(weights, num_classes)
    ((above, below),) = settings.box_thresholds(1)
    rate = PUBLISHED.get(backbone.partition(".")[0])
    network = make_backbone(
        backbone, kwargs, system="Mask R-CNN", drop_path_rate=rate, patterns=published_dilations(backbone)
    )
    # Here the box by box step only hands a positive to another true box.
    matcher = BoxByBoxMatcher(above, below, lower_bound=above)
    stage = Stage(TwoMLPHead(CHANNELS * 7 * 7, 1024), num_classes, masks, stds=STDS, matcher=matcher)
    model = Detector(network, [stage], settings, beta=0.0, inside_only=False, coco_labels=coco_labels)
    return load_weights_into(model, checkpoint)


def published_dilations(backbone: str) -> Sequence | None:
    """The patterns of dilations that the published detectors' backbones have on COCO, which repeat over blocks."""
    if backbone.startswith("dinat_isotropic"):
        return None
    if backbone.startswith("dinat_s_"):
        return ((1, 28), (1, 14), (1, 3, 1, 5, 1, 7), (1, 3))
    return ((1, 28), (1, 7, 1, 14), (1, 3, 1, 5, 1, 7), (1, 3)) if backbone.startswith("dinat_") else None


def read_weights(weights: str | Path | Mapping | None, num_classes: int | None) -> tuple[Mapping | None, int]:
    """A detector's tensors in our layout, and the number of classes that its network is made with."""
    checkpoint = None if weights is None else read_rcnn(weights)
    if num_classes is None:
        num_classes = _NUM_CLASSES if checkpoint is None else num_classes_of_rcnn(checkpoint)
    return checkpoint, num_classes


def load_weights_into(model: nn.Module, checkpoint: Mapping | None) -> nn.Module:
    """The model, with what read_weights read."""
    if checkpoint is not None:
        model.load_state_dict(fit_rcnn(checkpoint, model))
    return model
