"""What a detector says of images: boxes, classes, scores and masks, whole or in tiles."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.transforms.v2 import functional

from ..errors import UserError
from ..networks.detector import PyramidBackbone
from ..networks.rcnn import BackgroundLastPredictor, Float32RPNHead, paste_masks
from .detections import Detections
from .detectors import DetectorConfig, load_detector
from .models import computing
from .seams import Patch, Tile, join, patch_code
from .segmenting import check_tile, spans


def open_detector(folder: Path, device: str, least_score: float | None = None) -> tuple[nn.Module, DetectorConfig]:
    """A detector as `find` takes it, and what its folder says of it.

    Args:
        folder: Of a run, or best/ or last/ in it.
        device: What to compute on.
        least_score: Objects are found from this score on, where that is less than the detector's own.

    Raises:
        UserError: The folder holds no detector.
        CheckpointError: The weights cannot be read, or do not fit.
    """
    network, config = load_detector(folder)
    network.transform.paste = False
    if least_score is not None:
        network.roi_heads.score_thresh = min(network.roi_heads.score_thresh, least_score)
    return network.to(torch.device(device)), config


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
    found = []
    for mask, box in zip(masks, boxes, strict=True):
        pasted = paste_masks(mask[None], box[None], size)[0, 0]
        # Beyond a pixel around its box, nothing of a mask is seen.
        left, top, right, bottom = (max(int(x), 0) for x in torch.cat([box[:2].floor() - 1, box[2:].ceil() + 1]))
        found.append(patch_code([Patch(top, left, (pasted[top:bottom, left:right] >= 0.5).byte().cpu().numpy())], size))
    return found


def find(
    network: nn.Module,
    image: Tensor,
    *,
    tile: int | None = None,
    nms_thresh: float = 0.5,
    precision: str = "float32",
    name: str = "the image",
) -> Detections:
    """Objects of an image.

    Args:
        network: As for `detect`.
        image: [C, H, W] as mask_sets.read_image gives it, with as many bands as the detector has means.
        tile: None sees the image whole, resized as the detector says. A number, in pixels and a multiple of 32, sees it
            at its own resolution in overlapping tiles of that side, each of which gives as many objects as the detector
            gives of an image. What goes on over a seam is joined, what two tiles see is kept once; see seams.join.
            Memory is that of the image, of one tile and of the objects.
        nms_thresh: With tiles: of two objects of a class with a larger IoU the better one is kept.
        precision: Of the computation: float32, bfloat16 or float16.
        name: What an error calls the image.

    Raises:
        UserError: The tile has no such side, or what is computed is not finite.
    """
    check_tile(tile)
    device = next(network.parameters()).device
    tiles, (height, width) = [], image.shape[1:]
    with _finite(network, f"What the detector computes of {name} in {precision} is not finite."):
        for row, _ in spans(height, tile):
            for column, _ in spans(width, tile):
                pixels = image[:, row, column].as_subclass(Tensor).to(device)
                pixels = functional.to_dtype(pixels, torch.float32, scale=True)
                size = tuple(pixels.shape[1:])
                with computing(precision, device), _resizing(network, None if tile is None else size):
                    (found,) = detect(network, [pixels])
                boxes, labels, scores = (found[key].cpu().numpy() for key in ("boxes", "labels", "scores"))
                own = Detections(size, boxes.astype(np.float32), labels, scores.astype(np.float32), found.get("masks"))
                tiles.append(Tile(row.start, column.start, own))
    return tiles[0].found if len(tiles) == 1 else join(tiles, (height, width), nms_thresh)


@contextmanager
def _resizing(network: nn.Module, size: tuple[int, int] | None) -> Iterator[None]:
    """In which images of one size stay as they are; None: in which they are resized as ever."""
    transform = network.transform
    before = transform.min_size, transform.max_size
    if size is not None:
        transform.min_size, transform.max_size = (min(size),), max(size)
    try:
        yield
    finally:
        transform.min_size, transform.max_size = before


@contextmanager
def _finite(network: nn.Module, message: str) -> Iterator[None]:
    """In which numbers that are not finite are an error. Of a score that is none, no object would come."""

    def check(module: nn.Module, given: tuple, result: object) -> None:
        results = result.values() if isinstance(result, dict) else result
        for x in results:
            for part in (x,) if isinstance(x, Tensor) else x:
                if not part.isfinite().all():
                    raise UserError(message)

    with ExitStack() as hooks:
        for module in network.modules():
            if isinstance(module, PyramidBackbone | Float32RPNHead | BackgroundLastPredictor):
                hooks.callback(module.register_forward_hook(check).remove)
        yield
