"""What a detector says of images: boxes, classes, scores and masks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..networks.rcnn import paste_masks
from .outlines import encode


@torch.no_grad()
def detect(network: nn.Module, images: Sequence[Tensor]) -> list[dict]:
    """Objects of images, of each at most as many as the detector's box_detections_per_img, the best first.

    Args:
        network: A detector in evaluation whose `transform.paste` is False.
        images: [C, H, W], values 0 to 1, on its device.

    Returns:
        Of each image boxes [N, 4] px, labels [N], scores [N], and with mask heads masks: N compressed run lengths of
        the image's size.
    """
    found = network(list(images))
    for image, each in zip(images, found, strict=True):
        if "masks" in each:
            each["masks"] = codes(each["masks"], each["boxes"], tuple(image.shape[-2:]))
    return found


def codes(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> list[bytes]:
    """The compressed run lengths of masks [N, 1, h, w] of boxes [N, 4] on an image of a size (height, width), pasted
    one at a time, since a hundred of a large image would take gigabytes."""
    return [
        encode((paste_masks(mask[None], box[None], size)[0, 0] >= 0.5).cpu().numpy())
        for mask, box in zip(masks, boxes, strict=True)
    ]
