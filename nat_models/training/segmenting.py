"""What a segmenter says of images: label maps, whole, at several scales or in tiles; areas, and pictures of them."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional

from ..errors import UserError
from ..networks.upernet import UPerNet
from .decoding import Encoded, describe
from .drawing import encoded, overlay
from .mask_sets import fitted, shrunk, to_picture
from .models import computing
from .segmenters import Segmenter

FACTORS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)  # of the size of a test; each also mirrored
STRIDE = 32  # px, of the last level: tiles that begin at multiples of it are cut into tokens as the whole image is
LEAST_TILE = 4 * STRIDE
_MOST_CLASSES = 256  # that a map of 8 bits can tell apart
_AT_ONCE = 16  # classes whose logits are resized together
_SHOWN = 2048  # px, the longest side of a picture for people


@torch.inference_mode()
def segment(
    network: UPerNet,
    about: Segmenter,
    image: Tensor,
    *,
    tile: int | None = None,
    multi_scale: bool = False,
    precision: str = "float32",
    name: str = "the image",
) -> np.ndarray:
    """The class of each pixel of an image, [H, W], uint8.

    Args:
        network: In evaluation, on the device that computes.
        about: The classes, and how images are prepared.
        image: [C, H, W] as mask_sets.read_image gives it, with as many bands as the segmenter has means.
        tile: None sees the image whole, resized as the segmenter says, and resizes the logits back. A number, in pixels
            and a multiple of 32, sees it at its own resolution in overlapping tiles of that side; a pixel's class is
            that of the tile in which it lies deepest. What is farther away than a tile's border it cannot see: the
            pyramid pooling is then over the tile.
        multi_scale: The mean of the probabilities of 12 passes, at 6 sizes and mirrored; their memory grows with
            classes times pixels.
        precision: Of the computation: float32, bfloat16 or float16.
        name: What an error calls the image.

    Raises:
        UserError: The tile has no such side, there are more than 256 classes, or what is computed is not finite.
    """
    if len(about.classes) > _MOST_CLASSES:
        raise UserError(f"A label map of 8 bits holds {_MOST_CLASSES} classes, the segmenter has {len(about.classes)}.")
    check_tile(tile)
    device = next(network.parameters()).device
    mean, std = (torch.tensor(x, dtype=torch.float32, device=device)[:, None, None] for x in (about.mean, about.std))

    def cut(rows: slice, cols: slice) -> Tensor:
        pixels = functional.to_dtype(image[:, rows, cols].as_subclass(Tensor).to(device), torch.float32, scale=True)
        return ((pixels - mean) / std)[None]

    height, width = image.shape[1:]
    labels = np.empty((height, width), np.uint8)
    answer = _by_probability if multi_scale else _by_logits
    size_of = partial(fitted, scale=about.scale if tile is None else None)
    for row, kept_rows in spans(height, tile):
        for col, kept_cols in spans(width, tile):
            try:
                with computing(precision, device):
                    found = answer(network, cut(row, col), size_of)
            except FloatingPointError:
                raise UserError(f"What the segmenter computes of {name} in {precision} is not finite.") from None
            inside = slice(kept_rows.start - row.start, kept_rows.stop - row.start)
            beside = slice(kept_cols.start - col.start, kept_cols.stop - col.start)
            labels[kept_rows, kept_cols] = found[inside, beside].cpu().numpy()
    return labels


def check_tile(tile: int | None) -> None:
    """Raises a UserError for a side that no tile can have."""
    if tile is not None and (tile < LEAST_TILE or tile % STRIDE):
        raise UserError(f"A tile must be a multiple of {STRIDE} px and at least {LEAST_TILE}, got {tile}.")


def spans(length: int, tile: int | None) -> list[tuple[slice, slice]]:
    """Where tiles lie along an axis, and what of each is kept: all of the axis once.

    They begin at multiples of 32 and overlap by about a quarter; the middle of an overlap parts what is kept.

    Args:
        length: Of the axis, pixels.
        tile: Of a tile, a multiple of 32; None for one that is as long as the axis.
    """
    if tile is None or length <= tile:
        return [(slice(0, length), slice(0, length))]
    step = tile - max(tile // (4 * STRIDE), 1) * STRIDE
    last = -(-(length - tile) // STRIDE) * STRIDE
    starts = [*range(0, last, step), last]
    stops = [min(start + tile, length) for start in starts]
    cuts = [0, *((start + stop) // 2 for start, stop in zip(starts[1:], stops, strict=False)), length]
    tiles = [slice(start, stop) for start, stop in zip(starts, stops, strict=True)]
    return list(zip(tiles, map(slice, cuts, cuts[1:]), strict=True))


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return x if x.shape[2:] == tuple(size) else F.interpolate(x, size, mode="bilinear", align_corners=False)


def _coarse(network: UPerNet, x: Tensor) -> Tensor:
    """Logits at stride 4, in float32."""
    logits = network.decode_head(network.forward_features(x)).float()
    if not logits.isfinite().all():
        raise FloatingPointError
    return logits


def _by_logits(network: UPerNet, pixels: Tensor, size_of: Callable) -> Tensor:
    """[1, C, H, W] -> the class of the greatest logit, [H, W].

    Logits of all classes at once would be the greatest thing in memory by far, so the maximum runs over the classes.
    """
    size = pixels.shape[2:]
    x = _resize(pixels, size_of(size))
    best = None
    for first, part in enumerate(_coarse(network, x).split(_AT_ONCE, dim=1)):
        value, index = _resize(_resize(part, x.shape[2:]), size)[0].max(dim=0)
        index = index + first * _AT_ONCE
        if best is None:
            best, classes = value, index
        else:
            classes = torch.where(value > best, index, classes)
            best = torch.maximum(value, best)
    return classes


def _by_probability(network: UPerNet, pixels: Tensor, size_of: Callable) -> Tensor:
    """[1, C, H, W] -> the class of the greatest mean probability over sizes and mirror images, [H, W]."""
    size, total = pixels.shape[2:], 0
    for factor in FACTORS:
        x = _resize(pixels, size_of(size, factor=factor))
        for flipped in (False, True):
            logits = _resize(_coarse(network, x.flip(3) if flipped else x), x.shape[2:])
            logits = _resize(logits, size)
            total = total + (logits.flip(3) if flipped else logits).softmax(dim=1)
    return total[0].argmax(dim=0)


def label_png(labels: np.ndarray, about: Segmenter) -> bytes:
    """A label map as a PNG of 8 bits whose values are the classes; a palette shows them in their colours."""
    picture = Image.fromarray(labels)
    picture.putpalette([part for colour in about.colours for part in colour])
    return encoded(picture, "PNG")


def areas(labels: np.ndarray, image: Encoded, about: Segmenter) -> list[dict]:
    """A row per class: image, class, pixels, percent of the image."""
    counts = np.bincount(labels.ravel(), minlength=len(about.classes)).tolist()
    return [
        {"image": describe(image), "class": name, "pixels": n, "percent": round(100 * n / labels.size, 4)}
        for name, n in zip(about.classes, counts, strict=True)
    ]


def overlay_jpeg(image: Tensor, labels: np.ndarray, about: Segmenter) -> bytes:
    """The image [C, H, W] under its classes' colours, with a legend of those that occur; at most 2048 px wide or
    high."""
    shown = Image.fromarray(to_picture(shrunk(image, _SHOWN)))
    small = np.asarray(Image.fromarray(labels).resize(shown.size, Image.Resampling.NEAREST))
    blended = Image.fromarray(overlay(np.asarray(shown), small, about.colours, 0.5))
    counts = np.bincount(labels.ravel(), minlength=len(about.classes))
    found = [i for i in np.argsort(-counts, kind="stable").tolist() if counts[i]]
    height = max(14, min(shown.size) // 30)
    font = ImageFont.load_default(size=height)
    lines = [f"{about.classes[i]}  {100 * counts[i] / labels.size:.1f} %" for i in found]
    wide = int(max(font.getlength(line) for line in lines)) + 3 * height
    per_column = max(1, (blended.height - height) // (2 * height))
    columns = -(-len(lines) // per_column)
    canvas = Image.new("RGB", (blended.width + columns * wide, max(blended.height, 3 * height)), "white")
    canvas.paste(blended, (0, 0))
    draw = ImageDraw.Draw(canvas)
    for place, (index, line) in enumerate(zip(found, lines, strict=True)):
        left = blended.width + (place // per_column) * wide + height // 2
        top = height // 2 + (place % per_column) * 2 * height
        draw.rectangle((left, top, left + height, top + height), tuple(about.colours[index]), "black")
        draw.text((left + 3 * height // 2, top - height // 8), line, "black", font)
    return encoded(canvas, "JPEG", quality=90)
