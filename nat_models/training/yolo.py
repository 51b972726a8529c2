"""Annotations in YOLO's text files: a line per object with its class and its box, or its polygon, in parts of 1."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from .decoding import ImageFile
from .images import scan
from .listing import part_named, some
from .raw_boxes import RawData, RawImage, RawObject

_NAMES = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")


def find_yaml(folder: Path) -> Path | None:
    """The file that tells of a YOLO data set in a folder, if there is one."""
    return next((folder / name for name in _NAMES if (folder / name).is_file()), None)


def read_yolo(file: Path, exclude: Sequence[Path] = ()) -> RawData:
    """What data.yaml and the text files of its images list.

    An image of images/.../x.jpg has its objects in labels/.../x.txt; without that file it has none.

    Args:
        file: data.yaml with `names`, `train` and perhaps `val` and `test`: folders of images, or text files that list
            them, relative to `path`, to the file, or to wherever "../" would have led.
        exclude: Folders that are never data.

    Raises:
        UserError: The file cannot be read, or says none of this; there are no images, or no labels.
    """
    import yaml

    try:
        about = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UserError(f"{file} cannot be read as YAML: {' '.join(str(e).split())}") from None
    if not isinstance(about, dict) or not about.get("names"):
        raise UserError(f"{file} must hold names, train and perhaps val and test.")
    if about.get("kpt_shape"):
        raise UserError(f"{file} is of key points (kpt_shape), which are not read: boxes and polygons are.")
    names = _names(about["names"], about.get("nc"), file)
    data, root = RawData(), file.parent
    for key, value in about.items():
        part = part_named(str(key))
        if part is None or not value:
            continue
        if part in data.parts:
            raise UserError(f"{file} names two sources for {part}: keep one of them.")
        images = _list_images(value, about.get("path"), root, part, exclude, data)
        if images is None:
            continue
        labelled = 0
        for found in images:
            labels = labels_of(Path(found.image.path))
            if labels.is_file():
                labelled += 1
                _read_labels(labels, os.path.relpath(labels, root), names, found, data)
            data.parts.setdefault(part, []).append(found)
        if not labelled:
            raise UserError(
                f"No image of {part} in {file} has a file of labels, such as {labels_of(Path(images[0].image.path))}."
            )
        if len(images) > labelled:
            data.notes.append(f"{len(images) - labelled} images of {part} have no file of labels: nothing is on them")
        data.categories[part] = {name: i for i, name in names.items()}
    if not data.parts:
        raise UserError(f"{file} must name train and perhaps val: folders of images.")
    return data


def _names(names: object, count: object, file: Path) -> dict[int, str]:
    if isinstance(names, dict):
        if any(not isinstance(key, int) for key in names):
            raise UserError(f"{file}: names must go by whole numbers, got {some(list(names), 3)}.")
        found = {key: str(names[key]).strip() for key in sorted(names)}
    elif isinstance(names, list):
        found = {i: str(name).strip() for i, name in enumerate(names)}
    else:
        raise UserError(f"{file}: names must be a list, or names by number, got {str(names)[:60]!r}.")
    if isinstance(count, int) and count != len(found):
        raise UserError(f"{file} says nc: {count}, and has {len(found)} names.")
    if twice := sorted({name for name in found.values() if list(found.values()).count(name) > 1}):
        raise UserError(f"{file} names classes twice: {some(twice)}.")
    return found


def _list_images(
    value: object, base: object, root: Path, part: str, exclude: Sequence[Path], data: RawData
) -> list[RawImage] | None:
    """The images of a part, named relative to the root."""
    found: dict[str, RawImage] = {}
    for entry in map(str, value if isinstance(value, list) else [value]):
        inner = entry
        while inner.startswith("../"):
            inner = inner[3:]
        bases = [root, *([root / str(base)] if base else [])][::-1]
        candidates = [x / e for e in (entry, inner) for x in bases]
        path = next((x for x in candidates if x.exists()), None)
        if path is None:
            if part == "test":
                data.notes.append(f"there are no test images at {entry}")
                return None
            raise UserError(f"There is no {candidates[0]}, which data.yaml names for {part}.")
        if path.is_dir():
            files = [(x.path, x.name) for x in scan(path, exclude)[0]]
        elif path.suffix.lower() == ".txt":
            files = []
            for line in filter(None, map(str.strip, path.read_text(encoding="utf-8-sig").splitlines())):
                image = next((x for x in (path.parent / line, root / line) if x.is_file()), None)
                if image is None:
                    data.problems.add("images are missing", f"{line} ({path.name})")
                else:
                    files.append((str(image), image.name))
        else:
            raise UserError(f"{path}, which data.yaml names for {part}, is neither a folder nor a text file.")
        for image, inner in files:
            name = os.path.relpath(image, root).replace(os.sep, "/")
            file = ImageFile(name, image)
            found.setdefault(os.path.normpath(image), RawImage(os.path.splitext(inner)[0], file, relative=True))
    if not found:
        raise UserError(f"There are no images of {part} at {some(value if isinstance(value, list) else [value])}.")
    return [found[path] for path in sorted(found)]


def labels_of(image: Path) -> Path:
    """The file of an image's labels: images/ in its path is labels/, else beside it."""
    parts = list(image.with_suffix(".txt").parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts)


def _read_labels(path: Path, where: str, names: dict[int, str], image: RawImage, data: RawData) -> None:
    problems = data.problems
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read as text: {e}") from None
    for number, line in enumerate(lines, 1):
        called = f"line {number} of {where}"
        if not (words := line.split()):
            continue
        try:
            values = [float(word) for word in words]
        except ValueError:
            problems.add("annotations hold what is no number", f"{called}, {line[:60]}")
            continue
        index = values[0]
        category = names.get(int(index)) if math.isfinite(index) and index == int(index) else None
        if not all(map(math.isfinite, values)):
            problems.add("annotations hold numbers that are not finite", f"{called}, {line[:60]}", category)
        elif category is None:
            problems.add("annotations are of an unknown category", f"{called}, category {words[0]}")
        elif len(values) == 5:
            x, y, width, height = values[1:]
            box = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            image.objects.append(RawObject(called, category, box))
        elif len(values) % 2 == 0:
            problems.add("lines are neither a box nor a polygon", f"{called}, {len(values)} numbers", category)
        elif len(values) < 7:
            problems.add("polygons have fewer than 3 points", f"{called}, {len(values) // 2}", category)
        else:
            polygon = np.array(values[1:]).reshape(-1, 2)
            box = [*polygon.min(axis=0).tolist(), *polygon.max(axis=0).tolist()]
            image.objects.append(RawObject(called, category, box, [polygon]))
