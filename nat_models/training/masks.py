"""Images with a mask each: which are trained on, what classes there are, and how many pixels of each."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..errors import Unreadable, UserError
from .decoding import ImageFile, decode
from .held_out import grouping, split
from .images import threaded
from .listing import some
from .mask_files import MaskFile, is_array, load_array, read_header, read_raw, turn_to
from .mask_pairs import Pair, list_pairs
from .mask_values import IGNORE, ClassTable, MaskReading, choose_colours, number_classes, parse_mask_values, read_table
from .splits import say_near


@dataclass
class MaskPart:
    """Images, and the mask of each."""

    images: list[ImageFile] = field(default_factory=list)
    masks: list[MaskFile] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class MaskData:
    """Images with masks.

    Attributes:
        names: The classes; a pixel is an index into them, or 255.
        parts: "train" and "val", and "test" where there is one.
        reading: Reads a mask as class indices.
        colours: (red, green, blue) of each class, of the data where they have some.
        found: For each part, how many pixels hold each number (or packed colour) of the files.
        counts: How many pixels each class has; set when everything else is.
        notes: Lines that a user should see.
    """

    names: list[str]
    parts: dict[str, MaskPart]
    reading: MaskReading
    colours: list[tuple[int, int, int]]
    found: dict[str, Counter]
    counts: "Histogram | None" = None
    notes: list[str] = field(default_factory=list)

    def digest(self) -> str:
        """A hash of classes, parts, names, sizes in bytes and what masks hold: the same on every machine that has the
        same."""
        digest = hashlib.sha256(repr((self.names, sorted(self.reading.table.items()), self.reading.others)).encode())
        for name, part in sorted(self.parts.items()):
            digest.update(repr(sorted(self.found[name].items())).encode())
            for image, mask in zip(part.images, part.masks, strict=True):
                sizes = os.path.getsize(image.path), os.path.getsize(mask.path)
                digest.update(f"{name}\0{image.name}\0{mask.name}\0{sizes}\0{mask.turn}\n".encode())
        return digest.hexdigest()


@dataclass
class Histogram:
    """How many pixels each class has.

    Attributes:
        names: The classes.
        pixels: For each part the number of pixels of each class.
        ignored: For each part the number of those that are ignored.
    """

    names: list[str]
    pixels: dict[str, list[int]]
    ignored: dict[str, int]

    def ignored_share(self, part: str) -> float:
        """The share of a part's pixels that is ignored, from 0 to 1."""
        return self.ignored[part] / max(1, self.ignored[part] + sum(self.pixels[part]))

    def lines(self) -> list[str]:
        """A line per class with its percentage of the labelled pixels in each part, and one of the ignored share."""
        width = max(len(name) for name in [*self.names, "ignored, of all"])
        lines = [" " * width + "".join(f"{part:>12}" for part in self.pixels)]
        for i, name in enumerate(self.names):
            shares = [pixels[i] / max(1, sum(pixels)) for pixels in self.pixels.values()]
            lines.append(f"{name:{width}}" + "".join(f"{share:>12.3%}" if share else f"{'-':>12}" for share in shares))
        shares = [self.ignored_share(part) for part in self.pixels]
        return [*lines, f"{'ignored, of all':{width}}" + "".join(f"{share:>12.3%}" for share in shares)]

    def summary(self, part: str) -> str:
        """The most frequent and the rarest classes of a part, and its ignored share, in a line."""
        pixels = self.pixels[part]
        order = sorted(range(len(pixels)), key=lambda i: (-pixels[i], i))
        shown = [f"{self.names[i]} {pixels[i] / max(1, sum(pixels)):.2%}" for i in order]
        listed = shown if len(shown) <= 8 else [*shown[:4], "...", *shown[-3:]]
        return f"pixels of {part}: {', '.join(listed)}; {self.ignored_share(part):.2%} of all are ignored"


def histogram(data: MaskData, *, allow_empty: bool = False) -> Histogram:
    """Pixels per class and part, from what read_mask_data counted.

    Args:
        data: Images with masks.
        allow_empty: Whether a class may have no pixel in the training masks.

    Raises:
        UserError: A class has none.
    """
    result, reading = Histogram(data.names, {}, {}), data.reading
    for part, found in data.found.items():
        counts = Counter()
        for value, count in found.items():
            counts[reading.table.get(value, reading.others)] += count
        result.pixels[part] = [counts[i] for i in range(len(data.names))]
        result.ignored[part] = counts[IGNORE]
    empty = [name for name, n in zip(data.names, result.pixels.get("train", ()), strict=False) if not n]
    if empty and not allow_empty:
        held = some([f"{reading.say(value)} ({n:,} pixels)" for value, n in sorted(data.found["train"].items())], 20)
        raise UserError(
            f"{len(empty)} of {len(data.names)} classes have no pixel in the training masks: {some(empty)}; the masks "
            f"hold {held or 'nothing'}. Leave such classes out, or say --allow-empty."
        )
    return result


def read_mask_data(
    folder: str | Path,
    *,
    val_fraction: float | None = 0.1,
    seed: int = 0,
    exclude: Iterable[Path] = (),
    classes: str | Path | Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    reduce_zero_label: bool = False,
    mask_values: str | Mapping[int, int | None] | None = None,
    group: str | None = None,
    verify: str = "headers",
    skip_unreadable: bool = False,
    unreadable_limit: float = 0.01,
    mask_orientation: str = "auto",
    allow_empty: bool = False,
) -> MaskData:
    """Images and their masks. Every mask is decoded once, before anything is trained.

    The folder holds images/ and masks/ (or annotations/), each perhaps with train/ and val/ (training, validation, ...)
    inside; or train/ and val/ with images/ and masks/ in them. A mask has the path of its image but for the suffix.
    Without images to validate on, some are held out by seed and names; copies of an image stay on one side.

    Args:
        folder: Of the data.
        val_fraction: The part of the images that is held out where there is nothing to validate on; None holds out
            nothing: what is in no part is then all in "val".
        seed: Of what is held out.
        exclude: Folders that are never data, such as the output.
        classes: Names, or a file of them; see read_table.
        names: The classes in the order of the indices, as a model has them, which all classes of the data must be
            among; None takes the data's own.
        reduce_zero_label: 0 is ignored and k is class k - 1, as in ADE20K.
        mask_values: Numbers that mean another one; see parse_mask_values.
        group: A regular expression, searched in the image's path without suffix; images for which its first group (or
            else all that it matches) is the same are related, and never on both sides of the split.
        verify: full decodes every image; headers and none read headers, which the masks' sizes are compared with.
        skip_unreadable: Leave out pairs of which a file cannot be read, and count them; else they are an error.
        unreadable_limit: The greatest part of the pairs that may be left out.
        mask_orientation: How masks lie on images with an EXIF orientation; see turn_to.
        allow_empty: Whether a class may have no pixel in the training masks.

    Raises:
        UserError: The folder has none of these shapes; files cannot be read or do not fit each other; an image is both
            trained on and validated on; a number has no class, or a class no pixel.
    """
    if mask_orientation not in ("auto", "shown", "stored"):
        raise UserError(f"mask_orientation must be auto, shown or stored, got {mask_orientation!r}.")
    folder, values = Path(folder), parse_mask_values(mask_values)
    parts, notes = list_pairs(folder, list(exclude))
    table = read_table(classes, folder)
    if table.names is None and names is not None:
        table = ClassTable("the model", list(names))
    parts = split(folder, parts, val_fraction, seed, grouping(group), notes)

    def look(pair: Pair) -> tuple[int, dict[int, int], np.ndarray | None] | UserError:
        try:
            header, raw = read_header(pair.image), read_raw(pair.mask, table.coloured)
            orientation = turn_to(pair.image, header, pair.mask, raw, mask_orientation)
            if verify == "full":
                load_array(pair.image).sum() if is_array(pair.image) else decode(pair.image, 3)
            return orientation, _count(raw.values), raw.palette
        except UserError as e:
            return e

    pairs = [pair for items in parts.values() for pair in items]
    looks = dict(zip((pair.mask.path for pair in pairs), threaded(look, pairs), strict=True))
    parts = _drop(parts, looks, unreadable_limit if skip_unreadable else 0.0, notes)
    pairs = [pair for items in parts.values() for pair in items]
    data = MaskData([], {}, MaskReading({}), [], {}, notes=notes)
    where: dict[int, str] = {}
    for part, items in parts.items():
        turned = [pair.mask._replace(turn=looks[pair.mask.path][0]) for pair in items]
        data.parts[part], data.found[part] = MaskPart([pair.image for pair in items], turned), Counter()
        for pair in items:
            data.found[part].update(looks[pair.mask.path][1])
            for value in looks[pair.mask.path][1]:
                where.setdefault(value, pair.mask.name)
    rules = dict(mask_values=values, reduce_zero_label=reduce_zero_label)
    data.names, data.reading = number_classes(table, where, **rules)
    if names is not None:
        if strangers := [name for name in data.names if name not in names]:
            raise UserError(f"Classes in {folder} that the model lacks: {some(strangers)}; it has {some(names)}.")
        data.reading = data.reading.renumbered([list(names).index(name) for name in data.names])
        data.names = list(names)
    palette = next((looks[pair.mask.path][2] for pair in pairs if looks[pair.mask.path][2] is not None), None)
    data.colours = choose_colours(data.names, data.reading, palette)
    data.counts = histogram(data, allow_empty=allow_empty)
    turns = sum(mask.turn != 1 for part in data.parts.values() for mask in part.masks)
    if turns:
        notes.append(f"{turns} masks are turned, as the EXIF orientation of their image or their own says")
    if data.reading.others is not None:
        others = _others(data)
        notes.append(f"{sum(others.values()):,} pixels of {len(others)} values that are not listed are 'others'")
    blank = [pair.mask.name for pair in pairs if _all_ignored(looks[pair.mask.path][1], data.reading)]
    if blank:
        notes.append(f"{len(blank)} masks are ignored everywhere: {some(blank, 3)}")
    notes += say_near(data.names)
    notes += [data.counts.summary(part) for part in data.parts]
    return data


def _drop(
    parts: dict[str, list[Pair]], looks: Mapping[str, object], limit: float, notes: list[str]
) -> dict[str, list[Pair]]:
    """The parts without the pairs of which a file cannot be read, if they are no more than `limit` of all.

    Raises:
        UserError: They are more, or a pair is wrong in another way; the message lists the first five.
    """
    total = sum(map(len, parts.values()))
    errors = [e for e in looks.values() if isinstance(e, UserError)]
    wrong = [e for e in errors if not isinstance(e, Unreadable)]
    if wrong or len(errors) > limit * total:
        shown = wrong or errors
        more = "" if len(shown) == 1 else f" ({len(shown)} of {total:,} images and masks)"
        limited = f"; unreadable_limit is {limit:.2%}" if limit and not wrong else ""
        raise UserError("; ".join(map(str, shown[:5])) + more + limited)
    if errors:
        notes.append(f"left out: {len(errors)} of {total:,} images, which cannot be read, such as {errors[0]}")
    left = {
        part: [pair for pair in items if not isinstance(looks[pair.mask.path], UserError)]
        for part, items in parts.items()
    }
    for part in left:
        if not left[part]:
            raise UserError(f"No image of the part {part} can be read, such as {errors[0]}")
    return left


def _others(data: MaskData) -> Counter:
    return Counter({v: n for found in data.found.values() for v, n in found.items() if v not in data.reading.table})


def _all_ignored(found: Iterable[int], reading: MaskReading) -> bool:
    return all(reading.table.get(value, reading.others) == IGNORE for value in found)


def _count(values: np.ndarray) -> dict[int, int]:
    if values.dtype == np.uint8:
        counts = np.bincount(values.ravel(), minlength=1)
        present = np.flatnonzero(counts)
        return dict(zip(present.tolist(), counts[present].tolist(), strict=True))
    present, counts = np.unique(values, return_counts=True)
    return dict(zip(present.tolist(), counts.tolist(), strict=True))
