"""Pictures of bright things on black, and a detector that finds them without having learnt anything."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import Tensor, nn

from nat_models.training.detectors import DetectorConfig

NAMES = ("green", "red")  # class 0 is bright in the second channel, class 1 in the first
CONFIG = DetectorConfig(
    system="mask_rcnn",
    backbone="nat_mini",
    backbone_kwargs=dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), kernel_size=3),
    classes=list(NAMES),
    category_ids=[30, 7],
    colours=[[0, 255, 0], [255, 0, 0]],
    masks=True,
    mean=[0.5] * 3,
    std=[0.2] * 3,
    short_side=64,
    long_side=96,
    settings=dict(rpn_pre_nms_top_n_test=50, rpn_post_nms_top_n_test=20, box_detections_per_img=10),
)


def regions(pixels: np.ndarray) -> list[np.ndarray]:
    """[H, W] bool of each region of true pixels that touch at their sides."""
    numbers, count = ndimage.label(pixels)
    return [numbers == i for i in range(1, count + 1)]


class Brightness(nn.Module):
    """Has a detector's interface: what is bright is an object, and how bright it is its score."""

    def __init__(self, masks: bool = True):
        super().__init__()
        self.masks, self.seen = masks, []
        self.weight = nn.Parameter(torch.zeros(1))
        self.transform = SimpleNamespace(paste=True, min_size=(64,), max_size=96)
        self.roi_heads = SimpleNamespace(score_thresh=0.05)

    def forward(self, images: Sequence[Tensor]) -> list[dict]:
        self.seen += [(tuple(x.shape[1:]), self.transform.min_size, self.transform.max_size) for x in images]
        return [self._find(image) for image in images]

    def _find(self, image: Tensor) -> dict:
        boxes, labels, scores, masks = [], [], [], []
        for label, channel in ((0, 1), (1, 0)):
            for region in regions((image[channel] > self.roi_heads.score_thresh).numpy()):
                rows, columns = np.flatnonzero(region.any(axis=1)), np.flatnonzero(region.any(axis=0))
                x1, y1, x2, y2 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
                boxes.append([x1, y1, x2, y2])
                labels.append(label)
                scores.append(image[channel][torch.from_numpy(region)].max())
                inside = torch.from_numpy(region[y1:y2, x1:x2].astype(np.float32))
                masks.append(F.interpolate(inside[None, None], (28, 28), mode="nearest")[0])
        order = np.argsort(-np.array(scores), kind="stable")
        found = dict(
            boxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)[order],
            labels=torch.tensor(labels, dtype=torch.int64)[order],
            scores=torch.tensor(scores, dtype=torch.float32)[order],
        )
        if self.masks:
            found["masks"] = torch.stack(masks)[order] if masks else torch.zeros(0, 1, 28, 28)
        return found


Thing = tuple[str, tuple[int, int, int, int], int]  # class, (x1, y1, x2, y2) px, brightness of 255


def paint(things: Sequence[Thing], size: tuple[int, int] = (96, 128)) -> np.ndarray:
    """[H, W, 3] uint8 of rectangles."""
    pixels = np.zeros((*size, 3), np.uint8)
    for name, (x1, y1, x2, y2), brightness in things:
        pixels[y1:y2, x1:x2, 0 if name == "red" else 1] = brightness
    return pixels


def put_scenes(
    root: Path,
    painted: Mapping[str, Sequence[Thing]],
    true: Mapping[str, Sequence[Thing]] | None = None,
    ids: Mapping[str, int] | None = None,
    first: int = 1,
) -> Path:
    """images/ and annotations.json, whose ids of images count in threes from `first`."""
    ids = dict(zip(NAMES, CONFIG.category_ids, strict=True)) if ids is None else ids
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for i, (name, things) in enumerate(painted.items()):
        pixels = paint(things)
        Image.fromarray(pixels).save(root / "images" / name)
        height, width = pixels.shape[:2]
        images.append(dict(id=first + 3 * i, file_name=name, height=height, width=width))
        for label, (x1, y1, x2, y2), _ in (painted if true is None else true)[name]:
            w, h = x2 - x1, y2 - y1
            entry = dict(id=len(annotations) + 1, image_id=first + 3 * i, category_id=ids[label], iscrowd=0)
            entry |= dict(bbox=[x1, y1, w, h], area=w * h, segmentation=[[x1, y1, x2, y1, x2, y2, x1, y2]])
            annotations.append(entry)
    categories = [dict(id=number, name=name) for name, number in sorted(ids.items(), key=lambda x: x[1])]
    (root / "annotations.json").write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories))
    )
    return root


def put_config(folder: Path, config: DetectorConfig = CONFIG) -> Path:
    """A detector's folder without weights, for which a Brightness stands in."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(architecture=config.system, **asdict(config))))
    return folder
