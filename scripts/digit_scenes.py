"""Handwritten digits on photographs, a small real set for the demos of segmentation and detection.

scikit-learn's digits, enlarged and turned, lie on patches of scikit-image's photographs. No digit and no patch of the
held-out images is among the training images.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import skimage.data
from PIL import Image
from sklearn.datasets import load_digits

SIDE = 96
DIGIT = (44, 54)  # px, least and greatest side of a digit's scan
TURN = 12  # degrees, at most
ATTEMPTS = 30  # to find room for another digit
IMAGES = {"train": 600, "val": 150}
CLASSES = [str(i) for i in range(10)]
_PHOTOGRAPHS = ("astronaut", "camera", "chelsea", "coffee", "rocket", "brick", "grass", "gravel", "moon", "coins")


class Scene(NamedTuple):
    """A grey image [H, W], uint8, and of each digit on it the number and the pixels of its ink, [H, W]."""

    image: np.ndarray
    digits: list[tuple[int, np.ndarray]]


def scenes() -> Iterator[tuple[str, str, Scene]]:
    """Part, name and scene of each image, always the same ones."""
    digits = load_digits()
    pictures = [np.asarray(Image.fromarray(getattr(skimage.data, name)()).convert("L")) for name in _PHOTOGRAPHS]
    rng = np.random.default_rng(0)
    order = rng.permutation(len(digits.images))
    cut = len(order) * 4 // 5
    for part, chosen in (("train", order[:cut]), ("val", order[cut:])):
        for i in range(IMAGES[part]):
            yield part, f"{i:04}", _scene(digits, pictures, chosen, part == "train", rng)


def _scene(digits, pictures: list[np.ndarray], chosen: np.ndarray, upper: bool, rng) -> Scene:
    """A patch of a photograph's upper part, or of the rest, with a few digits."""
    picture = pictures[rng.integers(len(pictures))]
    split = picture.shape[0] - max(SIDE, picture.shape[0] // 4)
    picture = picture[:split] if upper else picture[split:]
    row, col = (rng.integers(length - SIDE + 1) for length in picture.shape)
    image = 178 + picture[row : row + SIDE, col : col + SIDE].astype(np.float32) * 0.3  # light, for dark ink
    found, taken = [], np.zeros((SIDE, SIDE), bool)
    for _ in range(ATTEMPTS):
        index, side = chosen[rng.integers(len(chosen))], int(rng.integers(DIGIT[0], DIGIT[1] + 1))
        scan = Image.fromarray((np.pad(digits.images[index], 1) / 16 * 255).astype(np.uint8))
        scan = scan.resize((side, side), Image.Resampling.BICUBIC)
        ink = np.asarray(scan.rotate(float(rng.uniform(-TURN, TURN)), Image.Resampling.BICUBIC, expand=True)) / 255
        top, left = (int(rng.integers(SIDE - n + 1)) for n in ink.shape)
        place = np.s_[top : top + ink.shape[0], left : left + ink.shape[1]]
        if taken[place][ink > 0].any():
            continue
        taken[place] |= ink > 0
        image[place] *= 1 - ink
        pixels = np.zeros((SIDE, SIDE), bool)
        pixels[place] = ink > 0.4
        found.append((int(digits.target[index]), pixels))
    return Scene(image.round().astype(np.uint8), found)


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """A folder to write in, which gets its name when it is complete."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    temporary.rename(folder)


def write_masks(folder: Path) -> None:
    """images/ and masks/, each with train/ and val/: a pixel's value is 0, or the digit whose ink it is plus 1."""
    if folder.is_dir():
        return
    with _appearing(folder) as temporary:
        for part, name, scene in scenes():
            mask = np.zeros(scene.image.shape, np.uint8)
            for digit, pixels in scene.digits:
                mask[pixels] = digit + 1
            for kind, values in (("images", scene.image), ("masks", mask)):
                path = temporary / kind / part / f"{name}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(values).save(path)
        (temporary / "classes.txt").write_text("\n".join(["background", *CLASSES]) + "\n")


def write_coco(folder: Path) -> None:
    """train/ and val/ with images, and annotations/instances_{train,val}.json with their boxes and masks (RLE)."""
    if folder.is_dir():
        return
    with _appearing(folder) as temporary:
        categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
        parts = {part: dict(images=[], annotations=[], categories=categories) for part in IMAGES}
        for part, name, scene in scenes():
            (temporary / part).mkdir(exist_ok=True)
            Image.fromarray(scene.image).save(temporary / part / f"{name}.png")
            image_id, coco = int(name) + 1, parts[part]
            coco["images"].append(dict(id=image_id, file_name=f"{name}.png", width=SIDE, height=SIDE))
            for digit, pixels in scene.digits:
                number = len(coco["annotations"]) + 1
                coco["annotations"].append(
                    dict(id=number, image_id=image_id, category_id=digit + 1, iscrowd=0, **_shape(pixels))
                )
        (temporary / "annotations").mkdir()
        for part, coco in parts.items():
            (temporary / "annotations" / f"instances_{part}.json").write_text(json.dumps(coco))


def _shape(pixels: np.ndarray) -> dict:
    """Box, area and run lengths, as COCO has them."""
    rows, cols = (np.flatnonzero(pixels.any(axis)) for axis in (1, 0))
    column_wise = pixels.ravel(order="F")
    turns = np.flatnonzero(np.diff(column_wise)) + 1
    bounds = [0, *([0] if column_wise[0] else []), *turns.tolist(), column_wise.size]
    box = [int(cols[0]), int(rows[0]), int(cols[-1] - cols[0] + 1), int(rows[-1] - rows[0] + 1)]
    counts = np.diff(bounds).tolist()
    return dict(bbox=box, area=int(pixels.sum()), segmentation=dict(size=list(pixels.shape), counts=counts))
