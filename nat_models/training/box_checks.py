"""An image's listed objects held against the image: turned upright, and whatever is wrong with them named."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ..errors import UserError
from .decoding import decode
from .mask_files import UNKNOWN, Header, is_array, load_array, read_header, turn, turn_of
from .outlines import Outline, decode_runs, encode, extent_of, patch_of, run_lengths, turn_boxes, turn_points
from .raw_boxes import Problems, RawImage, RawObject

_SLACK = 1.0  # px by which a box may reach out of its image, as rounded ones do; it is cut there


@dataclass
class Upright:
    """An image's objects on the upright image.

    Attributes:
        raw: The image as it was listed.
        size: (height, width) px of the upright image.
        turn: The EXIF orientation, 1 to 8, by which its annotations were turned.
        objects: As they were listed; those that are wrong are left out.
        boxes: Of each, (x1, y1, x2, y2) px.
        outlines: Of each.
        areas: Of each, px.
        far: Names of those whose box has less than half in common with its polygons' extent.
    """

    raw: RawImage
    size: tuple[int, int]
    turn: int = 1
    objects: list[RawObject] = field(default_factory=list)
    boxes: list[np.ndarray] = field(default_factory=list)
    outlines: list[Outline] = field(default_factory=list)
    areas: list[float] = field(default_factory=list)
    far: list[str] = field(default_factory=list)

    @property
    def stem(self) -> str:
        return self.raw.stem

    @property
    def image(self):
        return self.raw.image

    def keep(self, kept: Sequence[int]) -> None:
        """Leaves out all other objects."""
        for name in ("objects", "boxes", "outlines", "areas"):
            values = getattr(self, name)
            setattr(self, name, [values[i] for i in kept])


def look_at(image: RawImage, full: bool) -> Header | UserError:
    """What the image's file says of itself, or why it cannot be read; `full` decodes its pixels."""
    try:
        header = read_header(image.image)
        if full:
            load_array(image.image).sum() if is_array(image.image) else decode(image.image, 3)
        return header
    except UserError as e:
        return e


def check_objects(image: RawImage, header: Header, lies: str, problems: Problems) -> Upright | None:
    """The objects of an image on the upright image; None where it must be left out.

    Args:
        image: As it is listed.
        header: What its file says.
        lies: How annotations lie on images with an EXIF orientation; see turn_of.
        problems: Gains what is wrong.
    """
    name, orientation = image.image.name, turn_of(header, image.size, lies)
    if orientation == UNKNOWN or orientation is None:
        if orientation == UNKNOWN:
            kind = "images have an EXIF orientation, and nothing tells if their annotations lie as the pixels are "
            kind += "stored or as they are shown (say with mask_orientation which, stored or shown)"
            said = f"{name} (orientation {header.orientation})"
        else:
            kind = "images have another size than their annotations say"
            sizes = [f"{w} x {h}" for h, w in dict.fromkeys((header.stored, header.shown))]
            said = f"{name} is {', shown as '.join(sizes)}, listed as {image.size[1]} x {image.size[0]}"
        problems.add(kind, said)
        problems.dropped.update(x.category for x in image.objects)
        return None
    frame = header.shown if orientation == 1 else header.stored
    result = Upright(image, header.shown, orientation)
    for item in image.objects:
        if (found := _check(item, image, frame, problems)) is None:
            continue
        box, outline, area = found
        if isinstance(outline, list) and item.box is not None and not item.crowd and _far(box, np.concatenate(outline)):
            result.far.append(item.name)
        result.objects.append(item)
        result.boxes.append(turn_boxes(box, frame, orientation))
        result.outlines.append(_turned(outline, frame, orientation))
        result.areas.append(area)
    return result


def _check(
    item: RawObject, image: RawImage, frame: tuple[int, int], problems: Problems
) -> tuple[np.ndarray, Outline, float] | None:
    """Box, outline and area of an object, inside its image; None for one that is wrong."""
    height, width = frame
    called, unit = f"{item.name} of {image.image.name}", (width, height) if image.relative else (1, 1)
    outline = item.outline
    if isinstance(outline, list):
        outline = [polygon * unit for polygon in outline] if image.relative else outline
        points = np.concatenate(outline)
        extent = [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()]
        if not _within(extent, frame, _SLACK):
            said = _say(extent, frame)
            return problems.add("outlines reach out of their image", f"{called}, {said}", item.category)
        if not _within(extent, frame, 0):
            outline = [polygon.clip(0, (width, height)) for polygon in outline]
    box = item.box if item.box is not None else extent_of(outline, height, width)
    if box is None:
        return problems.add("annotations have no area", called, item.category)
    x1, y1, x2, y2 = (x * side for x, side in zip(box, unit * 2, strict=True))
    if x2 <= x1 or y2 <= y1:
        said = f"width {x2 - x1:g}, height {y2 - y1:g}"
        return problems.add("annotations have no area", f"{called}, {said}", item.category)
    if not _within((x1, y1, x2, y2), frame, _SLACK):
        said = _say((x1, y1, x2, y2), frame)
        return problems.add("boxes reach out of their image", f"{called}, {said}", item.category)
    box = np.array([max(0.0, x1), max(0.0, y1), min(width, x2), min(height, y2)])
    sides = np.float32(box[2:]) - np.float32(box[:2])  # as they are kept
    covered = _area(outline, frame)
    if sides.min() <= 0 or covered == 0:
        what = "box" if sides.min() <= 0 else "outline"
        return problems.add("annotations have no area", f"{called}, the {what}", item.category)
    area = item.area if item.area is not None else float(sides.prod()) if covered is None else covered
    return box, outline, area


def _within(extent: Sequence[float], frame: tuple[int, int], slack: float) -> bool:
    x1, y1, x2, y2 = extent
    return x1 >= -slack and y1 >= -slack and x2 <= frame[1] + slack and y2 <= frame[0] + slack


def _say(box: Sequence[float], frame: tuple[int, int]) -> str:
    x1, y1, x2, y2 = box
    return f"x {x1:.6g} to {x2:.6g}, y {y1:.6g} to {y2:.6g} of {frame[1]} x {frame[0]}"


def _area(outline: Outline, frame: tuple[int, int]) -> float | None:
    """Of polygons by their corners, of run lengths in pixels; None without an outline."""
    if outline is None:
        return None
    if isinstance(outline, bytes):
        return float(run_lengths(outline)[1::2].sum())
    total = 0.0
    for polygon in outline:
        x, y = (polygon - polygon[0]).T  # which makes of the last and the first corner nothing to add
        total += abs(float(x[:-1] @ y[1:] - y[:-1] @ x[1:])) / 2
    return total or float(patch_of(outline, *frame)[2].sum())  # the halves of a bow tie cancel each other


def _far(box: np.ndarray, points: np.ndarray) -> bool:
    x1, y1, x2, y2 = box.tolist()
    (left, top), (right, bottom) = points.min(axis=0).tolist(), points.max(axis=0).tolist()
    common = max(0.0, min(x2, right) - max(x1, left)) * max(0.0, min(y2, bottom) - max(y1, top))
    return common < 0.5 * ((x2 - x1) * (y2 - y1) + (right - left) * (bottom - top) - common)


def _turned(outline: Outline, frame: tuple[int, int], orientation: int) -> Outline:
    if orientation == 1 or outline is None:
        return outline
    if isinstance(outline, bytes):
        return encode(turn(decode_runs(outline, frame[0]), orientation))
    return [turn_points(polygon, frame, orientation) for polygon in outline]
