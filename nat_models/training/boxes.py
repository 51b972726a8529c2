"""Images with boxes, and perhaps masks, of objects: which are trained on, what classes there are, how many of each."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import Unreadable, UserError
from .annotations import AnnotatedPart, Texts
from .box_checks import Upright, check_objects, look_at
from .box_layouts import read_raw_boxes
from .held_out import grouping, split
from .images import threaded
from .listing import some
from .mask_values import distinct_colour
from .outlines import Outlines
from .raw_boxes import Problems, RawData
from .splits import say_near


@dataclass
class BoxData:
    """Images with annotated objects.

    Attributes:
        names: The classes; a label is an index into them.
        category_ids: The user's id of each class; None for one that the data lack.
        parts: "train" and "val", and "test" where there is one.
        masks: Whether every object has an outline.
        dropped: How many objects of each class are left out.
        notes: Lines that a user should see.
    """

    names: list[str]
    category_ids: list[int | None]
    parts: dict[str, AnnotatedPart]
    masks: bool
    dropped: Counter
    notes: list[str] = field(default_factory=list)

    @property
    def colours(self) -> list[tuple[int, int, int]]:
        """(red, green, blue) of each class."""
        return [distinct_colour(i) for i in range(len(self.names))]

    def digest(self) -> str:
        """A hash of classes, parts, names, sizes in bytes and all annotations: the same on every machine that has the
        same."""
        digest = hashlib.sha256(repr((self.names, self.category_ids, self.masks)).encode())
        for name, part in sorted(self.parts.items()):
            sizes = [os.path.getsize(image.path) for image in part.images]
            digest.update(repr((name, sizes)).encode())
            part.update(digest)
        return digest.hexdigest()


@dataclass
class ObjectCounts:
    """How many objects each class has.

    Attributes:
        names: The classes.
        kept: For each part the number of objects of each class.
        crowd: For each part the number of crowds of each class, which are not among those.
        dropped: Of each class, in all parts: left out for what is wrong with them.
    """

    names: list[str]
    kept: dict[str, list[int]]
    crowd: dict[str, list[int]]
    dropped: list[int]

    def lines(self) -> list[str]:
        """A line per class with its objects and its crowds in each part, and those that are left out."""
        width = max(len(name) for name in self.names)
        columns = [title for part in self.kept for title in (part, f"{part} crowd")] + ["dropped"]
        lines = [" " * width + "".join(f"{title:>13}" for title in columns)]
        for i, name in enumerate(self.names):
            counts = [n for part in self.kept for n in (self.kept[part][i], self.crowd[part][i])] + [self.dropped[i]]
            lines.append(f"{name:{width}}" + "".join(f"{n:>13,}" if n else f"{'-':>13}" for n in counts))
        return lines


def count_objects(data: BoxData) -> ObjectCounts:
    """Objects per class and part."""
    result = ObjectCounts(data.names, {}, {}, [data.dropped[name] for name in data.names])
    for name, part in data.parts.items():
        for counts, which in ((result.kept, ~part.crowd), (result.crowd, part.crowd)):
            counts[name] = np.bincount(part.labels[which], minlength=len(data.names)).tolist()
    return result


def read_box_data(
    source: str | Path,
    *,
    val_fraction: float | None = 0.1,
    seed: int = 0,
    exclude: Iterable[Path] = (),
    names: Sequence[str] | None = None,
    group: str | None = None,
    verify: str = "headers",
    skip_unreadable: bool = False,
    unreadable_limit: float = 0.01,
    skip_bad_annotations: bool = False,
    mask_orientation: str = "auto",
    allow_empty: bool = False,
    masks: bool | None = None,
    max_dets: int = 100,
) -> BoxData:
    """Images and the objects on them. Everything is read and checked once, before anything is trained.

    The source is one of these; a part is train, val (valid, validation) or test:

        PART/_annotations.coco.json                       COCO's JSON beside its images, as Roboflow exports it
        annotations/instances_train2017.json, train2017/  COCO as it is published; images may lie in images/ too
        annotations.json, images/                         COCO's JSON, to be split
        data.yaml, images/, labels/                       YOLO: boxes or polygons
        Annotations/, JPEGImages/, ImageSets/Main/        Pascal VOC

    Without images to validate on, some are held out by seed and names; copies of an image stay on one side. Classes are
    told by their names, whatever ids they have in which part; their order is that of the ids in the training part.
    Images without an object stay, as negatives.

    Args:
        source: A folder, a data.yaml or one JSON file.
        val_fraction: The part of the images that is held out where there is nothing to validate on; None holds out
            nothing: what is in no part is then all in "val".
        seed: Of what is held out.
        exclude: Folders that are never data, such as the output.
        names: The classes in the order of the labels, as a model has them, which all classes of the data must be among;
            None takes the data's own.
        group: A regular expression, searched in the image's name without suffix; images for which its first group (or
            else all that it matches) is the same are related, and never on both sides of the split.
        verify: full decodes every image; headers and none read headers, which sizes are compared with.
        skip_unreadable: Leave out images that cannot be read, and count them; else they are an error.
        unreadable_limit: The greatest part of the images that may be left out for that.
        skip_bad_annotations: Leave out annotations (or images) that something is wrong with, and count them; else they
            are an error.
        mask_orientation: How annotations lie on images with an EXIF orientation: "shown" as the image is shown,
            "stored" as its pixels are stored; "auto" tells it by the sizes that are listed.
        allow_empty: Whether a class may have no object in the training part.
        masks: Whether outlines are read; None reads them where there are any.
        max_dets: Images with more objects are counted in a note.

    Raises:
        UserError: The source has none of these shapes; something is wrong with images or annotations; an image is both
            trained on and validated on; a class has nothing to train on, or is unknown to the training part.
    """
    if mask_orientation not in ("auto", "shown", "stored"):
        raise UserError(f"mask_orientation must be auto, shown or stored, got {mask_orientation!r}.")
    source = Path(source)
    raw = read_raw_boxes(source, exclude)
    notes, problems = raw.notes, raw.problems
    headers = _read_headers(raw, verify == "full", unreadable_limit if skip_unreadable else 0.0)
    parts: dict[str, list[Upright]] = {}
    for part, images in raw.parts.items():
        looked = ((image, headers[image.image.path]) for image in images if image.image.path in headers)
        checked = (check_objects(image, header, mask_orientation, problems) for image, header in looked)
        parts[part] = [image for image in checked if image is not None]
    has_masks = _settle_outlines([x for part in parts.values() for x in part], masks, source, problems)
    notes += problems.settle(skip_bad_annotations)
    if empty := [part or "all" for part, images in parts.items() if not images]:
        raise UserError(f"{source} has no image of {some(empty)}" + (" left." if problems.found else "."))
    parts = split(source, parts, val_fraction, seed, grouping(group), notes)
    kept, ids = _number_classes(raw, parts, names, source)
    data = BoxData(kept, ids, {}, has_masks, problems.dropped, notes)
    for part, images in parts.items():
        data.parts[part] = _flatten(part, images, kept, has_masks, notes)
    _check_classes(data, allow_empty)
    notes += _say(data, parts, max_dets)
    return data


def _read_headers(raw: RawData, full: bool, limit: float) -> Mapping[str, object]:
    """By path, what the images say of themselves, without those that cannot be read.

    Raises:
        UserError: More than `limit` of them cannot be read.
    """
    images = {image.image.path: image for part in raw.parts.values() for image in part}
    looks = dict(zip(images, threaded(lambda x: look_at(x, full), images.values()), strict=True))
    errors = [e for e in looks.values() if isinstance(e, UserError)]
    wrong = [e for e in errors if not isinstance(e, Unreadable)]
    if wrong or len(errors) > limit * len(images):
        more = "" if len(errors) == 1 else f" ({len(errors)} of {len(images):,} images)"
        limited = f"; unreadable_limit is {limit:.2%}" if limit and not wrong else ""
        raise UserError("; ".join(map(str, (wrong or errors)[:10])) + more + limited)
    if errors:
        raw.notes.append(
            f"left out: {len(errors)} of {len(images):,} images, which cannot be read, such as {errors[0]}"
        )
        for path, look in looks.items():
            if isinstance(look, UserError):
                raw.problems.dropped.update(x.category for x in images[path].objects)
    return {path: look for path, look in looks.items() if not isinstance(look, UserError)}


def _settle_outlines(images: Sequence[Upright], wanted: bool | None, source: Path, problems: Problems) -> bool:
    """Whether objects have outlines; where some have none, those are problems. Crowds need none."""
    if wanted is False:
        return False
    objects = [(image, i) for image in images for i, item in enumerate(image.objects) if not item.crowd]
    lacking = {(id(image), i) for image, i in objects if image.outlines[i] is None}
    if len(lacking) == len(objects):
        if wanted and objects:
            raise UserError(f"{source} has boxes and no outline: masks cannot be learnt from it.")
        return bool(wanted)
    for image in images if lacking else ():
        kept = [i for i in range(len(image.objects)) if (id(image), i) not in lacking]
        for i in set(range(len(image.objects))) - set(kept):
            kind = "objects have a box and no outline, where others have one (--no-masks reads boxes alone)"
            problems.add(kind, f"{image.objects[i].name} of {image.image.name}", image.objects[i].category)
        image.keep(kept)
    return True


def _number_classes(
    raw: RawData, parts: Mapping[str, list[Upright]], names: Sequence[str] | None, source: Path
) -> tuple[list[str], list[int | None]]:
    """The classes, and the user's ids of them in the training part, or else in the first that has them."""
    order = [part for part in ("train", "", "val", "test") if part in raw.categories]
    ids = dict(raw.categories[order[0]])
    whose = "the training part" if names is None else "the model"
    known = list(ids if names is None else names)
    for part, images in parts.items():
        used = {item.category: None for image in images for item in image.objects}
        if strangers := [name for name in used if name not in known]:
            where = f"{source}, {part}"
            raise UserError(
                f"Classes in {where} that {whose} lacks: {some(strangers)}; it has {some(known) or 'none'}."
            )
    if not known:
        raise UserError(f"{source} names no class.")
    for part in order:
        ids = {**raw.categories[part], **ids}
    return known, [ids.get(name) for name in known]


def _flatten(
    part: str, images: Sequence[Upright], names: Sequence[str], masks: bool, notes: list[str]
) -> AnnotatedPart:
    index = {name: i for i, name in enumerate(names)}
    objects = [item for image in images for item in image.objects]
    counts = [len(image.objects) for image in images]
    boxes = [box for image in images for box in image.boxes]
    outlines = [outline for image in images for outline in image.outlines] if masks else [None] * len(objects)
    if masks:  # a crowd that has no outline is all of its box
        outlines = [_rectangle(box) if x is None else x for x, box in zip(outlines, boxes, strict=True)]
    return AnnotatedPart(
        names=Texts.of(image.image.name for image in images),
        paths=Texts.of(image.image.path for image in images),
        image_ids=_ids([image.raw.id for image in images], f"images of {part}", 0, notes),
        sizes=np.array([image.size for image in images], np.int32).reshape(-1, 2),
        starts=np.cumsum([0, *counts], dtype=np.int64),
        boxes=np.array(boxes, np.float32).reshape(-1, 4),
        labels=np.array([index[item.category] for item in objects], np.int64),
        areas=np.array([area for image in images for area in image.areas], np.float64),
        crowd=np.array([item.crowd for item in objects], bool),
        ids=_ids([item.id for item in objects], f"annotations of {part}", 1, notes),
        outlines=Outlines.of(outlines),
    )


def _rectangle(box: np.ndarray) -> list[np.ndarray]:
    x1, y1, x2, y2 = box
    return [np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])]


def _ids(given: Sequence[object], what: str, least: int, notes: list[str]) -> np.ndarray:
    """int64 ids, those that are given where they are whole numbers from `least` on; the others are new ones."""
    numbers = [_whole(x) for x in given]
    if any(x is None and y is not None for x, y in zip(numbers, given, strict=True)):
        notes.append(f"ids of {what} are not all whole numbers: they are numbered from 1")
        return np.arange(1, len(given) + 1)
    following = max((x for x in numbers if x is not None), default=0) + 1
    result = np.empty(len(given), np.int64)
    for i, number in enumerate(numbers):
        if number is None or number < least:
            if number is not None:
                notes.append(f"the id {number} of {what} is {following}: evaluators take {number} for none")
            number, following = following, following + 1
        result[i] = number
    return result


def _whole(given: object) -> int | None:
    """A number that an array of int64 can hold, None for what is none; 1.0 is 1."""
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not -(1 << 62) < given < 1 << 62:
        return None
    return int(given) if given == int(given) else None


def _check_classes(data: BoxData, allow_empty: bool) -> None:
    counts = count_objects(data)
    empty = [name for name, n in zip(data.names, counts.kept.get("train", ()), strict=False) if not n]
    if empty and not allow_empty:
        raise UserError(
            f"{len(empty)} of {len(data.names)} classes have no box in the training part: {some(empty)}. Leave such "
            "classes out, or say --allow-empty."
        )
    for part in data.parts:
        if part in ("train", "val") and not sum(counts.kept[part]):
            said = "crowds alone" if sum(counts.crowd[part]) else "no box at all"
            raise UserError(f"The images of {part} have {said}: nothing could be learnt or measured.")


def _say(data: BoxData, parts: Mapping[str, list[Upright]], max_dets: int) -> list[str]:
    """Notes on what is unusual."""
    notes, images = say_near(data.names), [image for part in parts.values() for image in part]
    if turned := sum(image.turn != 1 for image in images):
        notes.append(f"annotations of {turned} images are turned, as the EXIF orientation of their image says")
    if far := [name for image in images for name in image.far]:
        notes.append(f"{len(far)} boxes have less than half in common with their outlines: {some(far, 3)}")
    for name, part in data.parts.items():
        objects = np.bincount(np.repeat(np.arange(len(part)), np.diff(part.starts))[~part.crowd], minlength=len(part))
        if negatives := int((np.diff(part.starts) == 0).sum()):
            notes.append(f"{negatives:,} of {len(part):,} images of {name} have no object: they are negatives")
        if many := int((objects > max_dets).sum()):
            most = int(objects.max())
            notes.append(
                f"{many:,} images of {name} have more than {max_dets} objects (up to {most}), which is max_dets: the "
                "rest cannot be found"
            )
    return notes
