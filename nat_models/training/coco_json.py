"""Annotations in COCO's JSON: boxes, polygons, run lengths as numbers and compressed."""

import json
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..errors import UserError
from .decoding import ImageFile
from .listing import some
from .outlines import Outline, compress, run_lengths
from .raw_boxes import Problems, RawData, RawImage, RawObject

_KEYS = ("images", "annotations", "categories")


def read_coco(file: Path, part: str, folders: Sequence[Path], root: Path, data: RawData) -> None:
    """Adds what a file lists to `data`.

    Args:
        file: The JSON.
        part: Where its images belong, "" for in none.
        folders: Where its images may lie, the likeliest first.
        root: What names are relative to.
        data: Gains a part, or problems.

    Raises:
        UserError: The file cannot be read, lacks a list, or names two categories alike; or all of it is crowd.
    """
    content = _load(file)
    problems, where = data.problems, os.path.relpath(file, root)
    names = _categories(content["categories"], file)
    images, lost = _images(content["images"], where, folders, root, problems)
    missing = problems.found.get("images are missing")
    if missing and not images:
        raise UserError(f"No image that {file} lists is there, such as {missing[0]}.")
    taken: set = set()
    entries = content["annotations"]
    for i, entry in enumerate(entries):
        entries[i] = None  # a large file's numbers take more memory than all that is made of them
        _add_object(entry, where, images, lost, names, taken, problems)
    objects = [x for image in images.values() for x in image.objects]
    if objects and all(x.crowd for x in objects):
        raise UserError(f"Every annotation of {file} is a crowd (iscrowd 1): nothing could be learnt or measured.")
    data.parts[part] = list(images.values())
    used = {x.category for x in objects}
    data.categories[part] = _without_roots(content["categories"], names, used, data.notes)


def _load(file: Path) -> dict:
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{file} cannot be read as JSON: {e}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold an object with {', '.join(_KEYS)}, got a {type(content).__name__}.")
    for key in _KEYS:
        if not isinstance(content.get(key), list):
            said = f"its keys are {some(sorted(content)) or 'none'}" if key not in content else "it is no list"
            raise UserError(f"{file} must hold a list of {key}: {said}.")
        if wrong := [x for x in content[key] if not isinstance(x, dict)]:
            raise UserError(f"{file}: {key} must be objects, got {str(wrong[0])[:60]!r}.")
    return content


def _categories(entries: Sequence[dict], file: Path) -> dict[object, str]:
    """Names by id, in the order of the ids."""
    names: dict[object, str] = {}
    for entry in entries:
        name, number = entry.get("name"), entry.get("id")
        if not isinstance(name, str) or not name.strip() or isinstance(number, bool) or not isinstance(number, int):
            raise UserError(f"{file}: a category must have a name and an id that is a whole number, got {entry}.")
        if number in names:
            raise UserError(f"{file} has the category id {number} twice: {names[number]} and {name.strip()}.")
        if name.strip() in names.values():
            raise UserError(f"{file} has two categories of the name {name.strip()!r}: merge them, or rename one.")
        names[number] = name.strip()
    return {number: names[number] for number in sorted(names)}


def _without_roots(entries: Sequence[dict], names: dict, used: set[str], notes: list[str]) -> dict[str, int]:
    """Ids by name, without a category that only stands above others, as Roboflow writes one."""
    above = {
        str(x.get("supercategory")).strip() for x in entries if str(x.get("name")).strip() != x.get("supercategory")
    }
    roots = [name for name in names.values() if name in above and name not in used]
    if roots and len(roots) < len(names):
        line = f"categories that only stand above others, and have no annotation, are no classes: {some(roots)}"
        notes += [line] if line not in notes else []
        return {name: number for number, name in names.items() if name not in roots}
    return {name: number for number, name in names.items()}


def _images(
    entries: Sequence[dict], where: str, folders: Sequence[Path], root: Path, problems: Problems
) -> tuple[dict[object, RawImage], set]:
    """Images by id, and the ids of those that are left out."""
    images: dict[object, RawImage] = {}
    lost, files = set(), {}
    find = _finder(folders)
    for entry in entries:
        number, name = entry.get("id"), entry.get("file_name")
        if number is None or not isinstance(name, str) or isinstance(number, (dict, list)):
            problems.add("images lack an id or a file_name", f"{str(entry)[:80]} ({where})")
            continue
        if number in images or number in lost:
            images.pop(number, None)
            lost.add(number)
            problems.add("image ids stand twice", f"{number}, of {name} too ({where})")
            continue
        path = find(name)
        if path is None:
            lost.add(number)
            problems.add("images are missing", f"{name} ({where})")
            continue
        if path in files:
            lost.add(number)
            problems.add("images are listed twice", f"{name}, ids {files[path]} and {number} ({where})")
            continue
        files[path] = number
        size = [entry.get("height"), entry.get("width")]
        given = all(isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0 and x == x // 1 for x in size)
        if not given and size != [None, None]:
            lost.add(number)
            problems.add("images have a height or width that is none", f"{name}, {size[1]} x {size[0]} ({where})")
            continue
        file = ImageFile(os.path.relpath(path, root).replace(os.sep, "/"), str(path))
        images[number] = RawImage(os.path.splitext(name)[0], file, number, tuple(map(int, size)) if given else None)
    return images, lost


def _finder(folders: Sequence[Path]) -> Callable[[str], Path | None]:
    """Finds an image by its name, or by the last part of it where it was listed with a path of another machine."""
    present = [folder for folder in folders if folder.is_dir()]

    def find(name: str) -> Path | None:
        plain = name.replace("\\", "/").rpartition("/")[2]
        for candidate in dict.fromkeys((name, plain)):
            for folder in present:
                path = folder / candidate
                if not os.path.isabs(candidate) and path.is_file():
                    return path
        return None

    return find


def _add_object(
    entry: dict,
    where: str,
    images: dict[object, RawImage],
    lost: set,
    names: dict[object, str],
    taken: set,
    problems: Problems,
) -> None:
    number, image_id = entry.get("id"), entry.get("image_id")
    called = f"annotation {number} ({where})" if number is not None else f"an annotation without id ({where})"
    keys = [key for key in ("image_id", "category_id") if not isinstance(entry.get(key), (int, float, str))]
    if "bbox" not in entry and not entry.get("segmentation"):
        keys.append("bbox")
    category = names.get(entry["category_id"]) if "category_id" not in keys else None
    if keys:
        problems.add("annotations lack a key", f"{called}, {some(keys)}", category)
        return
    if image_id not in images:
        if image_id not in lost:
            problems.add("annotations are of an image that is not listed", f"{called}, image {image_id}", category)
        elif category is not None:
            problems.dropped[category] += 1
        return
    if category is None:
        problems.add("annotations are of an unknown category", f"{called}, category {entry['category_id']}")
        return
    if number is not None:
        if isinstance(number, (dict, list)) or number in taken:
            problems.add("annotation ids stand twice", called, category)
            return
        taken.add(number)
    image, crowd = images[image_id], entry.get("iscrowd") in (1, "1")
    try:
        outline = _outline(entry.get("segmentation"), image.size)
        box = _box(entry.get("bbox"), outline is not None)
    except _Wrong as e:
        problems.add(e.kind, f"{called}{e.detail}", category)
        return
    area = entry.get("area")
    area = float(area) if isinstance(area, (int, float)) and math.isfinite(area) and area > 0 else None
    image.objects.append(RawObject(called, category, box, outline, crowd, area, number))


class _Wrong(Exception):
    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind)
        self.kind, self.detail = kind, detail


def _numbers(values: object) -> np.ndarray:
    if not isinstance(values, list) or not set(map(type, values)) <= {int, float}:
        raise _Wrong("annotations hold what is no number", f", {str(values)[:60]}")
    try:
        array = np.array(values, np.float64)
    except OverflowError:  # of a whole number
        array = np.array([np.inf])
    if not np.isfinite(array).all():
        raise _Wrong("annotations hold numbers that are not finite", f", {str(values)[:60]}")
    return array


def _box(values: object, outlined: bool) -> list[float] | None:
    if values is None or (values == [] and outlined):
        return None
    box = _numbers(values)
    if len(box) != 4:
        raise _Wrong("boxes are not [x, y, width, height]", f", {values}")
    return [*box[:2].tolist(), *(box[:2] + box[2:]).tolist()]


def _outline(segmentation: object, size: tuple[int, int] | None) -> Outline:
    if not segmentation:
        return None
    if isinstance(segmentation, dict):
        return _rle(segmentation, size)
    if not isinstance(segmentation, list):
        raise _Wrong("outlines are neither polygons nor run lengths", f", {str(segmentation)[:60]}")
    flat = segmentation if isinstance(segmentation[0], list) else [segmentation]
    polygons = [_numbers(polygon) for polygon in flat]
    if any(len(polygon) % 2 for polygon in polygons):
        raise _Wrong("polygons have an x without a y")
    if short := [len(polygon) // 2 for polygon in polygons if len(polygon) < 6]:
        raise _Wrong("polygons have fewer than 3 points", f", {short[0]}")
    return [polygon.reshape(-1, 2) for polygon in polygons]


def _rle(segmentation: dict, size: tuple[int, int] | None) -> bytes:
    own, counts = segmentation.get("size"), segmentation.get("counts")
    kind = "masks (RLE) do not fit their image"
    if not isinstance(own, list) or len(own) != 2 or (size is not None and tuple(own) != size):
        wanted = "two numbers" if size is None else f"{list(size)}, [height, width] of the image"
        raise _Wrong(kind, f", size {own} and not {wanted}")
    try:
        runs = run_lengths(counts.encode()) if isinstance(counts, str) else _numbers(counts)
    except ValueError as e:
        raise _Wrong("masks (RLE) cannot be read", f", counts {e}") from None
    if not len(runs) or runs.min() < 0 or (runs != np.floor(runs)).any() or runs.sum() != own[0] * own[1]:
        raise _Wrong(kind, f", its runs are {runs.sum():.0f} pixels of {own[0]} x {own[1]}")
    return counts.encode() if isinstance(counts, str) else compress(runs.tolist())
