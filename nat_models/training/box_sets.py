"""Images and their boxes and masks as tensors, changed together: what training sees, and what evaluation sees."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ..errors import UserError
from .annotations import AnnotatedPart
from .decoding import describe
from .images import Items
from .instance_masks import InstanceMasks
from .mask_sets import fitted, read_image

SHORT_SIDES = tuple(range(480, 801, 32))  # of the paper's training, and so are the others
LONG_SIDE = 1333
CROP_SHORT_SIDES = (400, 500, 600)
CROP_SIDES = (384, 600)
_OF_OBJECTS = ("boxes", "labels", "iscrowd", "area", "annotation_ids", "masks", "cut")


class BoxSet(Items):
    """(image, target) of annotated images: float32 [C, H, W] in 0 to 1, and a dict

        boxes           [N, 4] float32, (x1, y1, x2, y2) px
        labels          [N] int64, indices of classes
        iscrowd         [N] bool
        area            [N] float64 px, of the object in the image's file
        annotation_ids  [N] int64, the user's
        image_id        the user's
        masks           InstanceMasks of N objects, or with `dense` [N, H, W] uint8; left out without outlines

    Args:
        part: Images and what is annotated on them.
        masks: Whether masks are given.
        transform: Takes and gives both, the image and the boxes as tv_tensors.
        in_chans: Bands of an image.
        dense: Whether masks are tensors.
        seed: As for Items, of what the transform draws.
    """

    def __init__(
        self,
        part: AnnotatedPart,
        masks: bool,
        transform: nn.Module,
        *,
        in_chans: int = 3,
        dense: bool = False,
        seed: int = 0,
    ):
        super().__init__(len(part), seed)
        self.part, self.masks, self.transform = part, masks, transform
        self.in_chans, self.dense = in_chans, dense

    @staticmethod
    def collate(items: list[tuple[Tensor, dict]]) -> list[list]:
        """A batch [images, targets], both lists: sizes differ."""
        return [list(side) for side in zip(*items, strict=True)]

    def raw(self, index: int) -> tuple[tv_tensors.Image, dict]:
        """The image [C, H, W] as it was read, and its target.

        Raises:
            UserError: It cannot be read, or has another size than when it was checked.
        """
        file, found = self.part.image(index), self.part[index]
        image = read_image(file, self.in_chans)
        if tuple(image.shape[-2:]) != found.size:
            raise UserError(f"{describe(file)} is {list(image.shape[-2:])}, and was {list(found.size)} (H, W).")
        boxes = torch.from_numpy(np.array(found.boxes))
        target = dict(
            boxes=tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=found.size),
            labels=torch.from_numpy(np.array(found.labels)),
            iscrowd=torch.from_numpy(np.array(found.crowd)),
            area=torch.from_numpy(np.array(found.areas)),
            annotation_ids=torch.from_numpy(np.array(found.ids)),
            image_id=found.image_id,
        )
        if self.masks:
            target["masks"] = InstanceMasks(found.outlines, found.size)
        return image, target

    def read(self, index: int) -> tuple[Tensor, dict]:
        image, target = self.transform(*self.raw(index))
        target = dict(target, boxes=target["boxes"].as_subclass(Tensor))
        if self.dense and self.masks:
            target["masks"] = target["masks"].dense()
        return image.as_subclass(Tensor), target


def make_box_augmentation(
    *,
    short_sides: Sequence[int] = SHORT_SIDES,
    long_side: int = LONG_SIDE,
    crop: bool = True,
    crop_short_sides: Sequence[int] = CROP_SHORT_SIDES,
    crop_sides: tuple[int, int] = CROP_SIDES,
    hflip: float = 0.5,
) -> nn.Module:
    """What training does to an image and its objects: mirror, then evenly one of two: resize, or resize, crop, resize.

    An image is not normalised here, and not padded: the network does both.

    Args:
        short_sides: px, one of which is drawn for the short side.
        long_side: px, at most.
        crop: Off: always the first of the two.
        crop_short_sides: px, one of which is drawn for the short side before a crop.
        crop_sides: Least and greatest side of a crop, px; no more than the image has.
        hflip: Probability of a mirror image.

    Source: Hassani et al., CVPR 2023, arXiv:2204.07143: its recipe for COCO, which is Swin's.
    """
    resize = FitSides(short_sides, long_side)
    size = resize
    if crop:
        cut = v2.Compose([FitSides(crop_short_sides, long_side), CropBoxes(crop_sides), resize])
        size = v2.RandomChoice([resize, cut])
    return v2.Compose([MirrorBoxes(hflip), size, Settle(), _floats()])


def make_box_evaluation() -> nn.Module:
    """What evaluation does to an image: nothing but make numbers from 0 to 1. The network resizes it, and gives boxes
    of its original size, which is what is scored."""
    return v2.Compose([_floats()])


def _floats() -> nn.Module:
    return v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)


class FitSides(nn.Module):
    """Resizes an image and its objects, keeping the ratio, so that the short side is one of those given, or less where
    the long side would be above `long_side`; bilinear without antialiasing, as in the paper's training."""

    def __init__(self, short_sides: Sequence[int], long_side: int):
        super().__init__()
        self.short_sides, self.long_side = tuple(short_sides), long_side

    def forward(self, image: tv_tensors.Image, target: dict) -> tuple:
        short = self.short_sides[torch.randint(len(self.short_sides), ()).item()]
        size = fitted(tuple(image.shape[-2:]), (max(short, self.long_side), min(short, self.long_side)))
        if size == tuple(image.shape[-2:]):
            return image, target
        image = F.resize(image, list(size), v2.InterpolationMode.BILINEAR, antialias=False)
        target = dict(target, boxes=F.resize(target["boxes"], list(size)))
        if "masks" in target:
            target["masks"] = target["masks"].resized(*size)
        return image, target


class MirrorBoxes(nn.Module):
    """Exchanges left and right of an image and its objects, with a probability."""

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, image: tv_tensors.Image, target: dict) -> tuple:
        if torch.rand(()).item() >= self.probability:
            return image, target
        target = dict(target, boxes=F.horizontal_flip(target["boxes"]))
        if "masks" in target:
            target["masks"] = target["masks"].mirrored()
        return F.horizontal_flip(image), target


class CropBoxes(nn.Module):
    """A random crop of an image and its objects, each side drawn apart.

    Boxes are cut at its borders, and "cut" of the target says which were; what is left without area is dropped, a crowd
    like an object. Perhaps nothing is left.

    Args:
        sides: Least and greatest side, px.
    """

    def __init__(self, sides: tuple[int, int]):
        super().__init__()
        self.sides = sides

    def forward(self, image: tv_tensors.Image, target: dict) -> tuple:
        drawn = []
        for whole in image.shape[-2:]:
            least, greatest = (min(side, whole) for side in self.sides)
            side = torch.randint(least, greatest + 1, ()).item()
            drawn.append((torch.randint(whole - side + 1, ()).item(), side))
        (top, height), (left, width) = drawn
        image = F.crop(image, top, left, height, width)
        boxes = F.clamp_bounding_boxes(F.crop(target["boxes"], top, left, height, width))
        moved = target["boxes"].as_subclass(Tensor) - torch.tensor([left, top, left, top])
        plain = boxes.as_subclass(Tensor)
        target = dict(target, boxes=boxes, cut=(plain != moved).any(dim=1))
        if "masks" in target:
            target["masks"] = target["masks"].cropped(top, left, height, width)
        return image, keep(target, (plain[:, 2:] > plain[:, :2]).all(dim=1))


class Settle(nn.Module):
    """Makes the box of a mask that a crop cut the extent of what is left of it, and drops what has a side of less than
    a pixel."""

    def forward(self, image: tv_tensors.Image, target: dict) -> tuple:
        target = dict(target)
        boxes, cut = F.clamp_bounding_boxes(target["boxes"]), target.pop("cut", None)
        if cut is not None and "masks" in target and cut.any():
            boxes[cut] = target["masks"][cut].extents()
        _, kept = F.sanitize_bounding_boxes(boxes, min_size=1.0)
        return image, keep(dict(target, boxes=boxes), kept)


def keep(target: dict, kept: Tensor) -> dict:
    """The target of some of its objects, [N] bool."""
    if kept.all():
        return dict(target)
    result = {key: value[kept] if key in _OF_OBJECTS else value for key, value in target.items()}
    return dict(result, boxes=tv_tensors.wrap(result["boxes"], like=target["boxes"]))
