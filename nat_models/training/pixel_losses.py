"""Losses of logits against label maps; ignored pixels are those of label 255."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .mask_values import IGNORE

LOSSES = ("cross_entropy", "focal", "dice")
_FOCUS = 2.0  # the focal loss's exponent, its paper's


def pixel_loss(kind: str, logits: Tensor, labels: Tensor, mean: str = "all", weights: Tensor | None = None) -> Tensor:
    """One of LOSSES, a scalar in float32 or wider.

    Args:
        kind: "cross_entropy"; "focal" (arXiv:1708.02002), of softmax probabilities, with exponent 2; "dice", one minus
            the mean overlap of the classes that the labels of the batch hold, over labelled pixels.
        logits: [B, num_classes, H, W].
        labels: [B, H, W], int64.
        mean: Of the first two, "all": the sum over labelled pixels is divided by the number of all pixels, ignored ones
            included, as in mmsegmentation 0.20; "labelled": by that of labelled ones.
        weights: Of the classes, for the first two; a pixel's loss is multiplied by that of its class.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labelled = labels != IGNORE
    if kind == "dice":
        return _dice(logits, labels, labelled)
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
    if kind == "focal":
        loss = loss * (1 - (-loss).exp()) ** _FOCUS
    if weights is not None:
        loss = loss * weights.to(loss)[labels.masked_fill(~labelled, 0)]
    return loss.sum() / (labels.numel() if mean == "all" else labelled.sum().clamp(min=1))


def _dice(logits: Tensor, labels: Tensor, labelled: Tensor) -> Tensor:
    true = F.one_hot(labels.masked_fill(~labelled, 0), logits.shape[1]).movedim(-1, 1) * labelled[:, None]
    probabilities = logits.softmax(1) * labelled[:, None]
    overlap = 2 * (probabilities * true).sum((0, 2, 3))
    size = probabilities.sum((0, 2, 3)) + true.sum((0, 2, 3))
    held = true.sum((0, 2, 3)) > 0
    dice = torch.where(held, overlap / size.clamp(min=1e-12), 1.0)
    return (1 - dice).sum() / held.sum().clamp(min=1)
