"""Annotations in Pascal VOC's XML: boxes."""

import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from timm.utils.misc import natural_key

from ..errors import UserError
from .decoding import ImageFile
from .images import scan
from .listing import part_named, some
from .raw_boxes import RawData, RawImage, RawObject

_IMAGES = ("JPEGImages", "images")


def is_voc(folder: Path) -> bool:
    """Whether a folder holds Annotations/ with XML."""
    return any((folder / "Annotations").glob("*.xml"))


def read_voc(folder: Path, exclude: Sequence[Path] = ()) -> RawData:
    """What the XML files of Annotations/ list, for images of their name in JPEGImages/ (or images/).

    ImageSets/Main/train.txt, val.txt and test.txt say what is in which part, trainval.txt and else all files what is to
    be split. Coordinates are whole pixels from 1, both ends included, as Pascal wrote them: xmin 1 and xmax W are the
    whole width. Where one is 0, all are taken as edges from 0, as other tools write them. What is difficult is read as
    a crowd: neither an object nor background.

    Raises:
        UserError: An XML file cannot be read; there is none, or no image.
    """
    data = RawData()
    place = next((folder / name for name in _IMAGES if (folder / name).is_dir()), None)
    if place is None:
        raise UserError(f"{folder} must hold its images in JPEGImages/, beside Annotations/.")
    images = {}
    for image in scan(place, exclude)[0]:
        file = image._replace(name=f"{place.name}/{image.name}")
        images.setdefault(image.name, file)
        images.setdefault(os.path.splitext(image.name)[0], file)
    trees = {path.stem: _parse(path) for path in sorted((folder / "Annotations").glob("*.xml"))}
    from_zero = any(0 in _corners(x) for tree in trees.values() for x in tree.iter("bndbox"))
    if from_zero:
        data.notes.append(
            f"a coordinate in {folder / 'Annotations'} is 0: all are taken as edges from 0, not pixels from 1"
        )
    names = sorted({_text(x, "name") for tree in trees.values() for x in tree.iter("object")} - {""})
    names.sort(key=natural_key)
    ids, difficult = {name: i for i, name in enumerate(names, 1)}, 0
    for part, stems in _parts(folder, sorted(trees)):
        found = []
        for stem in stems:
            if stem not in trees:
                data.problems.add("images have no file in Annotations", f"{stem}.xml")
                continue
            tree = trees[stem]
            image = images.get(stem) or images.get(_text(tree, "filename"))
            if image is None:
                data.problems.add("images are missing", f"{place.name}/{_text(tree, 'filename') or stem} ({stem}.xml)")
                continue
            found.append(_read(tree, stem, image, 0 if from_zero else 1, data))
            difficult += sum(x.crowd for x in found[-1].objects)
        data.parts[part], data.categories[part] = found, ids
    if difficult:
        data.notes.append(f"{difficult} objects are difficult: they are neither objects nor background, as crowds are")
    return data


def _parse(path: Path) -> ElementTree.Element:
    try:
        return ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError) as e:
        raise UserError(f"{path} cannot be read as XML: {e}") from None


def _parts(folder: Path, stems: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    sets = folder / "ImageSets" / "Main"
    lists = {p.stem: p for p in sorted(sets.glob("*.txt"))} if sets.is_dir() else {}
    by_part = {part: lists[name] for name in lists if (part := part_named(name)) is not None}
    if "train" not in by_part and "val" not in by_part:
        by_part = {"": lists["trainval"]} if "trainval" in lists else {}
    if not by_part:
        yield "", list(stems)
    for part, path in by_part.items():
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        yield part, [line.split()[0] for line in lines if line.strip()]


def _text(element: ElementTree.Element, key: str) -> str:
    return (element.findtext(key) or "").strip()


def _corners(bndbox: ElementTree.Element) -> list[float]:
    """xmin, ymin, xmax and ymax; nan for what is no number."""
    values = []
    for key in ("xmin", "ymin", "xmax", "ymax"):
        try:
            values.append(float(_text(bndbox, key)))
        except ValueError:
            values.append(math.nan)
    return values


def _read(tree: ElementTree.Element, stem: str, image: ImageFile, first: int, data: RawData) -> RawImage:
    size = [_text(tree, "size/height"), _text(tree, "size/width")]
    known = all(x.isdigit() and int(x) for x in size)
    result = RawImage(stem, image, size=(int(size[0]), int(size[1])) if known else None)
    for number, entry in enumerate(tree.iter("object"), 1):
        called, category = f"object {number} of {stem}.xml", _text(entry, "name")
        lacking = [key for key in ("name", "bndbox") if entry.find(key) is None or (key == "name" and not category)]
        if lacking:
            data.problems.add("annotations lack a key", f"{called}, {some(lacking)}")
            continue
        x1, y1, x2, y2 = _corners(entry.find("bndbox"))
        if not all(map(math.isfinite, (x1, y1, x2, y2))):
            data.problems.add("annotations hold numbers that are not finite", called, category)
            continue
        crowd = _text(entry, "difficult") == "1"
        result.objects.append(RawObject(called, category, (x1 - first, y1 - first, x2, y2), crowd=crowd))
    return result
