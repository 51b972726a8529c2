"""Checkpoints of Mask R-CNN and Cascade Mask R-CNN: mmdetection's and ours, and fitting one to a network.

Both have the background last and deltas for the classes alone, so names change and no number does. torchvision's own
checkpoints have the background first and are not read.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..errors import CheckpointError
from .layouts import convert_state_dict
from .loading import complete
from .unwrapping import marked

DETECTION_LAYOUTS = ("nat_models", "original")  # ours and mmdetection's
_BODY, _BACKBONE = "backbone.body.", "backbone."  # of the network's own keys: in ours, in mmdetection's
_MARKS = ("rpn.head.cls_logits.weight", "rpn_head.rpn_cls.weight")
_CLASSIFIER = "roi_heads.stages.0.box_predictor.cls_score.weight"
# Ours and mmdetection's; # is any number, the same on both sides, and what follows in a key is kept.
_TRUNK = {
    "backbone.fpn.inner_blocks.#.0": "neck.lateral_convs.#.conv",
    "backbone.fpn.layer_blocks.#.0": "neck.fpn_convs.#.conv",
    "rpn.head.conv.0.0": "rpn_head.rpn_conv",
    "rpn.head.cls_logits": "rpn_head.rpn_cls",
    "rpn.head.bbox_pred": "rpn_head.rpn_reg",
}
_ONE_STAGE = {
    "roi_heads.stages.0.box_head.fc6": "roi_head.bbox_head.shared_fcs.0",
    "roi_heads.stages.0.box_head.fc7": "roi_head.bbox_head.shared_fcs.1",
    "roi_heads.stages.0.box_predictor.cls_score": "roi_head.bbox_head.fc_cls",
    "roi_heads.stages.0.box_predictor.bbox_pred": "roi_head.bbox_head.fc_reg",
    "roi_heads.stages.0.mask_head.#.0": "roi_head.mask_head.convs.#.conv",
    "roi_heads.stages.0.mask_predictor.conv5_mask": "roi_head.mask_head.upsample",
    "roi_heads.stages.0.mask_predictor.mask_fcn_logits": "roi_head.mask_head.conv_logits",
}
_STAGES = {
    "roi_heads.stages.#.box_head.#.0": "roi_head.bbox_head.#.shared_convs.#.conv",
    "roi_heads.stages.#.box_head.#.1": "roi_head.bbox_head.#.shared_convs.#.bn",
    "roi_heads.stages.#.box_head.5": "roi_head.bbox_head.#.shared_fcs.0",
    "roi_heads.stages.#.box_predictor.cls_score": "roi_head.bbox_head.#.fc_cls",
    "roi_heads.stages.#.box_predictor.bbox_pred": "roi_head.bbox_head.#.fc_reg",
    "roi_heads.stages.#.mask_head.#.0": "roi_head.mask_head.#.convs.#.conv",
    "roi_heads.stages.#.mask_predictor.conv5_mask": "roi_head.mask_head.#.upsample",
    "roi_heads.stages.#.mask_predictor.mask_fcn_logits": "roi_head.mask_head.#.conv_logits",
}


def read_rcnn(weights: str | Path | Mapping) -> dict[str, Tensor]:
    """The tensors of a Mask R-CNN or Cascade Mask R-CNN, in our layout, out of a file or what it holds.

    Raises:
        CheckpointError: It cannot be read, or holds no such detector or several.
        FileNotFoundError: There is no such file.
    """
    found = marked(weights, _MARKS)
    if len(found) != 1:
        held = "no detector" if not found else f"{len(found)} detectors"
        raise CheckpointError(f"The checkpoint holds {held}; expected one with {' or '.join(_MARKS)}.")
    ours = convert_rcnn(found[0], "nat_models")
    if _CLASSIFIER not in ours:
        raise CheckpointError(f"The checkpoint's detector lacks {_CLASSIFIER} (mmdetection: fc_cls of its box head).")
    return ours


def convert_rcnn(state_dict: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """A detector's tensors in another layout; no number changes. Keys that neither knows are kept as they are.

    Args:
        state_dict: In either of DETECTION_LAYOUTS.
        layout: One of DETECTION_LAYOUTS; "original" is mmdetection's.

    Raises:
        ValueError: `layout` is not in DETECTION_LAYOUTS.
        CheckpointError: The backbone is in no known layout.
    """
    if layout not in DETECTION_LAYOUTS:
        raise ValueError(f"layout must be one of {DETECTION_LAYOUTS}, got {layout=}.")
    ours = any(key.startswith("rpn.") for key in state_dict)
    prefix = _BODY if ours else _BACKBONE
    backbone = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    heads = {key: value for key, value in state_dict.items() if not key.startswith(prefix)}
    several = any(key.startswith(("roi_head.bbox_head.0.", "roi_heads.stages.1.")) for key in heads)
    names = _TRUNK | (_STAGES if several else _ONE_STAGE)
    if ours != (layout == "nat_models"):
        names = names if ours else {theirs: own for own, theirs in names.items()}
        patterns = [(_pattern(old), new.replace("#", "{}")) for old, new in names.items()]
        heads = {_renamed(key, patterns): value for key, value in heads.items()}
    new = _BODY if layout == "nat_models" else _BACKBONE
    return {f"{new}{key}": value for key, value in convert_state_dict(backbone, layout).items()} | heads


def _pattern(name: str) -> re.Pattern:
    return re.compile(re.escape(name).replace(r"\#", r"(\d+)") + r"(\.[a-z_]+)")


def _renamed(key: str, patterns: list[tuple[re.Pattern, str]]) -> str:
    for pattern, new in patterns:
        if found := pattern.fullmatch(key):
            *numbers, rest = found.groups()
            return new.format(*numbers) + rest
    return key


def num_classes_of_rcnn(state_dict: Mapping[str, Tensor]) -> int:
    """Of a detector's tensors in our layout, without the background."""
    return len(state_dict[_CLASSIFIER]) - 1


def fit_rcnn(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Exactly the keys and shapes of a network, or an error.

    Where the network has another number of classes, its own, new class logits, mask logits and deltas of every stage
    take the place of the checkpoint's; where it has no mask head, the checkpoint's is left out. Both are warned of. The
    stem is adapted to other input channels as timm does. Counters of batches, which nothing reads, may be missing.

    Args:
        state_dict: In our layout.
        model: A Detector; left as it is.

    Raises:
        CheckpointError: Keys are missing or unexpected, shapes differ; how many and which.
    """
    target = model.state_dict()
    fitted = dict(state_dict)
    notes = []
    if not model.roi_heads.has_mask():
        masks = [key for key in fitted if ".mask_head." in key or ".mask_predictor." in key]
        fitted = {key: value for key, value in fitted.items() if key not in masks}
        notes += ["its mask head is left out"] if masks else []
    if (found := num_classes_of_rcnn(state_dict)) != model.num_classes:
        parts = (".cls_score.", ".bbox_pred.", ".mask_fcn_logits.")
        own = [key for key in target if key.startswith("roi_heads.") and any(part in key for part in parts)]
        fitted |= {key: target[key] for key in own}
        notes.append(f"new are {len(own)} tensors that depend on the classes: {', '.join(own)}")
    complete(fitted, target, _BODY)
    if notes:
        has = f"The checkpoint has {found} classes, the model {model.num_classes}"
        warnings.warn(f"{has}: {'; '.join(notes)}. All else is loaded.", stacklevel=4)
    return fitted
