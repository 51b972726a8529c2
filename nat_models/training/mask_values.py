"""Which class a number in a mask means: tables that people write, numbers that are found, and the reading of a mask."""

import colorsys
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import UserError, unknown
from .decoding import Encoded
from .listing import some
from .mask_files import name_colour, read_raw, turn, unpack

IGNORE = 255
MOST = 255  # classes: an index is a byte, and 255 is none
_REFUSE = object()


@dataclass(frozen=True)
class ClassTable:
    """What somebody wrote of the classes.

    Attributes:
        source: Where it was written, for errors.
        names: The classes in the order of their indices; None where nobody wrote any.
        values: For each number or packed colour its class, None for ignored; None where a number is the class's index.
        coloured: Whether `values` are colours.
        others: The class of all other numbers, None for ignored; where it is left out, others are errors.
    """

    source: str = ""
    names: list[str] | None = None
    values: dict[int, str | None] | None = None
    coloured: bool = False
    others: object = _REFUSE


@dataclass(frozen=True)
class MaskReading:
    """Turns a mask's file into class indices; can be pickled.

    Attributes:
        table: The class index of each number or packed colour; 255 is ignored.
        coloured: Whether masks are read as colours.
        others: The index of all other numbers; None makes them errors.
    """

    table: Mapping[int, int]
    coloured: bool = False
    others: int | None = None

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        keys = sorted(self.table)
        return np.array(keys, dtype=np.int64), np.array([self.table[key] for key in keys], dtype=np.uint8)

    @cached_property
    def _bytes(self) -> tuple[np.ndarray, np.ndarray]:
        """The index of each byte, and whether it has none."""
        return self._look_up(np.arange(256))

    def _look_up(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        keys, classes = self._sorted
        place = np.minimum(np.searchsorted(keys, values), len(keys) - 1)
        labels, lost = classes[place], keys[place] != values
        if self.others is not None:
            labels[lost], lost[:] = self.others, False
        return labels, lost

    def read(self, mask: Encoded) -> np.ndarray:
        """[H, W] uint8: the index of each pixel's class, 255 where it is ignored.

        Upright: turned as the file says itself, or else by `mask.turn`, where the mask has one.

        Raises:
            UserError: The file cannot be read as a mask, or holds a number that the table lacks.
        """
        raw = read_raw(mask, self.coloured)
        if raw.values.dtype == np.uint8:
            labels, lost = (table[raw.values] for table in self._bytes)
        else:
            labels, lost = self._look_up(raw.values)
        if lost.any():
            found = [self.say(value) for value in np.unique(raw.values[lost]).tolist()]
            raise UserError(f"{mask.path} holds what has no class: {some(found)}.")
        orientation = getattr(mask, "turn", 1) if raw.orientation is None else raw.orientation
        return np.ascontiguousarray(turn(labels, orientation))

    def renumbered(self, indices: Sequence[int]) -> "MaskReading":
        """The same reading where class i has the index indices[i]."""
        index = dict(enumerate(indices)) | {IGNORE: IGNORE, None: None}
        return MaskReading({v: index[i] for v, i in self.table.items()}, self.coloured, index[self.others])

    def say(self, value: int) -> str:
        """A number as its file has it: a colour as #rrggbb."""
        return name_colour(value) if self.coloured else str(value)


def read_table(classes: str | Path | Sequence[str] | None, folder: Path) -> ClassTable:
    """The classes as somebody wrote them.

    classes.json is one of

        ["background", "road"]                                 the index is the number in a mask
        {"0": "background", "1": "road"}                       as in transformers' id2label
        {"values": {"0": "background", "7": "road", "11": "road", "9": null}}
        {"colours": {"#000000": "background", "255,0,0": "road"}}

    Numbers need not follow each other; two with one name are one class; null is ignored, and so is 255 where nothing
    else is said of it. Classes are in the order in which they first appear, unless "names" lists them. "others" is the
    class of whatever is not listed, or null to ignore it; without it, that is an error. A text file has a class a line.

    Args:
        classes: A file, or the names themselves; None takes classes.json or classes.txt of the folder, if one is there.
        folder: Of the data.

    Raises:
        UserError: There is no such file, or it has none of these forms.
    """
    if classes is None:
        found = [folder / name for name in ("classes.json", "classes.txt") if (folder / name).is_file()]
        if len(found) > 1:
            raise UserError(f"{folder} holds both classes.json and classes.txt: keep one of them.")
        if not found:
            return ClassTable()
        classes = found[0]
    if not isinstance(classes, (str, Path)):
        return ClassTable("classes", _check_names(list(classes), "classes"))
    path = Path(classes)
    if not path.is_file():
        raise UserError(f"There is no file {path} of classes.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read as text: {e}") from None
    if path.suffix.lower() != ".json":
        return ClassTable(str(path), _check_names([line.strip() for line in text.rstrip().split("\n")], str(path)))
    try:
        content = json.loads(text, object_pairs_hook=_without_repeats)
    except ValueError as e:
        raise UserError(f"{path} cannot be read as JSON: {e}") from None
    return _parse(content, str(path))


def _without_repeats(pairs: list[tuple[str, object]]) -> dict:
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return content


def _check_names(names: list, source: str) -> list[str]:
    if wrong := [i for i, name in enumerate(names) if not (isinstance(name, str) and name.strip())]:
        raise UserError(f"{source} has no name for class {wrong[0]}.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(
            f"{source} names classes twice: {some(twice)}. Numbers of one class are merged in classes.json, "
            '{"values": {"1": "road", "2": "road"}}.'
        )
    return names


def _parse(content: object, source: str) -> ClassTable:
    if isinstance(content, list):
        return ClassTable(source, _check_names(content, source))
    if not isinstance(content, dict) or not content:
        raise UserError(f"{source} must hold names, values or colours, got {str(content)[:80]!r}.")
    if all(re.fullmatch(r"-?\d+", key) for key in content):
        content = {"values": content}
    keys = ("values", "colours", "names", "others")
    for key in content:
        if key not in keys:
            raise unknown(f"key in {source}:", key, keys)
    kinds = [kind for kind in ("values", "colours") if kind in content]
    if len(kinds) != 1 or not (isinstance(content[kinds[0]], dict) and content[kinds[0]]):
        raise UserError(f"{source} must have either values or colours, each with the name of its class.")
    coloured = kinds == ["colours"]
    values = {}
    for key, name in content[kinds[0]].items():
        if not (name is None or (isinstance(name, str) and name.strip())):
            raise UserError(f"{source}: the class of {key!r} must be a name, or null to ignore it, got {name!r}.")
        value = _colour(key, source) if coloured else _number(key, source)
        if value in values:
            raise UserError(f"{source}: {key!r} stands twice.")
        values[value] = name
    others = content.get("others", _REFUSE)
    if not (others is _REFUSE or others is None or (isinstance(others, str) and others.strip())):
        raise UserError(f"{source}: others must be the name of a class, or null to ignore it, got {others!r}.")
    used = list(dict.fromkeys(x for x in [*values.values(), others] if isinstance(x, str)))
    names = content.get("names", used)
    if not isinstance(names, list) or set(_check_names(names, source)) != set(used):
        raise UserError(f"{source}: names must list the classes of {kinds[0]}, {some(used)}, got {names!r}.")
    return ClassTable(source, names, values, coloured, others)


def _number(key: str, source: str) -> int:
    if not re.fullmatch(r"-?\d+", key):
        raise UserError(f"{source}: a value must be a whole number, got {key!r}.")
    return int(key)


def _colour(key: str, source: str) -> int:
    if match := re.fullmatch(r"#([0-9a-fA-F]{6})", key):
        return int(match[1], 16)
    parts = [part.strip() for part in key.strip("()[] ").split(",")]
    if len(parts) == 3 and all(part.isdecimal() and int(part) < 256 for part in parts):
        return int(parts[0]) << 16 | int(parts[1]) << 8 | int(parts[2])
    raise UserError(f'{source}: a colour must be written as "#ff0000" or "255,0,0", got {key!r}.')


def parse_mask_values(text: str | Mapping[int, int | None] | None) -> dict[int, int | None]:
    """Numbers that mean another one, "255:1,7:ignore"; None is ignored.

    Raises:
        UserError: It is not of this form.
    """
    if text is None or isinstance(text, Mapping):
        return dict({} if text is None else text)
    values = {}
    for pair in text.split(","):
        match = re.fullmatch(r"\s*(-?\d+)\s*:\s*(-?\d+|ignore)\s*", pair)
        if match is None or int(match[1]) in values:
            raise UserError(f"mask_values must be as in 255:1,7:ignore, each value once; got {text!r}.")
        values[int(match[1])] = None if match[2] == "ignore" else int(match[2])
    return values


def number_classes(
    table: ClassTable,
    found: Mapping[int, str],
    *,
    mask_values: Mapping[int, int | None],
    reduce_zero_label: bool,
) -> tuple[list[str], MaskReading]:
    """The classes and the reading of masks, from what was written and what the masks hold.

    Args:
        table: What was written.
        found: Every number that a mask holds, and where.
        mask_values: Numbers that mean another one, or are ignored (None), before anything else.
        reduce_zero_label: 0 is ignored and k is class k - 1, as in ADE20K.

    Raises:
        UserError: A number has no class; the numbers do not say what they mean; there are no two classes.
    """
    if table.values is not None:
        if mask_values or reduce_zero_label:
            raise UserError(f"mask_values and reduce_zero_label are said in {table.source}, which lists all values.")
        index = {name: i for i, name in enumerate(table.names)} | {None: IGNORE}
        mapping = {value: index[name] for value, name in table.values.items()}
        if not table.coloured:
            mapping.setdefault(IGNORE, IGNORE)
        others = None if table.others is _REFUSE else index[table.others]
        reading = MaskReading(mapping, table.coloured, others)
        if others is None:
            _refuse_lost([v for v in found if v not in mapping], found, reading, table.source)
        return _check_count(table.names, found, reading), reading
    _ask_for_255(found, mask_values)
    indices = {value: _plain_index(value, mask_values, reduce_zero_label) for value in found}
    used = sorted({index for index in indices.values() if index is not None})
    if table.names is None:
        if used != list(range(len(used))):
            raise UserError(_explain_gaps(found, used, mask_values))
        names = [str(index + reduce_zero_label) for index in used]
    else:
        names = table.names
        lost = [v for v, index in indices.items() if index is not None and not 0 <= index < len(names)]
        _refuse_lost(lost, found, MaskReading({}), f"{table.source}, which has {len(names)} classes")
    # What no mask holds today has its index all the same: another set of masks is read by the same rule.
    everything = {*indices, *mask_values, *range(len(names) + reduce_zero_label), IGNORE}
    mapping = {value: _plain_index(value, mask_values, reduce_zero_label) for value in everything}
    legal = {None: IGNORE} | {i: i for i in range(len(names))}
    reading = MaskReading({value: legal[index] for value, index in mapping.items() if index in legal})
    return _check_count(names, found, reading), reading


def _plain_index(value: int, mask_values: Mapping[int, int | None], reduce_zero_label: bool) -> int | None:
    """The class index that a number is, None for ignored."""
    meant = mask_values.get(value, value)
    if meant is None or meant == IGNORE:
        return None
    if reduce_zero_label:
        return None if meant == 0 else meant - 1
    return meant


def _ask_for_255(found: Iterable[int], mask_values: Mapping[int, int | None]) -> None:
    if set(found) in ({0, 255}, {255}) and 255 not in mask_values:
        raise UserError(
            "The masks hold 0 and 255 alone, and 255 is ignored by default: nothing would be learnt. Say what it "
            "means: mask_values 255:1 makes it a class, 255:ignore leaves it out."
        )


def _explain_gaps(found: Mapping[int, str], used: Sequence[int], mask_values: Mapping) -> str:
    example = ", ".join(f'"{value}": "name{i}"' for i, value in enumerate(sorted(found)[:3]))
    return (
        f"The masks hold the values {some(sorted(found), 20)}"
        + (f", which mask_values makes {some(used, 20)}" if mask_values else "")
        + ": without names they must be 0, 1, 2, ... and 255 for ignored. Name them in classes.json, "
        + f'{{"values": {{{example}}}}}; several may share a name, and null is ignored.'
    )


def _refuse_lost(lost: list[int], found: Mapping[int, str], reading: MaskReading, source: str) -> None:
    if lost:
        kind = "colours" if reading.coloured else "values"
        listed = [f"{reading.say(value)} ({found[value]})" for value in sorted(lost)]
        raise UserError(f"{len(lost)} {kind} of the masks have no class in {source}: {some(listed)}.")


def _check_count(names: list[str], found: Mapping[int, str], reading: MaskReading) -> list[str]:
    if not 2 <= len(names) <= MOST:
        held = some([reading.say(value) for value in sorted(found)])
        raise UserError(f"There must be 2 to {MOST} classes, found {len(names)}; the masks hold {held}.")
    return names


def choose_colours(
    names: Sequence[str], reading: MaskReading, palette: np.ndarray | None
) -> list[tuple[int, int, int]]:
    """A colour (RGB) per class: of the table of colours, or of the masks' palette if it tells all classes apart, else
    fixed ones that do."""
    first = {}
    for value in sorted(reading.table):
        first.setdefault(reading.table[value], value)
    if reading.coloured:
        told = {i: unpack(value) for i, value in first.items()}
    else:
        told = {i: v for i, v in first.items() if palette is not None and 0 <= v < len(palette)}
        told = {i: tuple(palette[value].tolist()) for i, value in told.items()}
    colours = [told.get(i) for i in range(len(names))]
    if None not in colours and len(set(colours)) == len(names):
        return colours
    return [distinct_colour(i) for i in range(len(names))]


def distinct_colour(index: int) -> tuple[int, int, int]:
    """The same colour for an index every time; neighbours are far apart, as hues at the golden ratio are."""
    hue = index * 0.61803398875 % 1
    lightness, saturation = ((0.5, 0.9), (0.35, 0.7), (0.7, 0.8))[index // 12 % 3]
    return tuple(round(255 * x) for x in colorsys.hls_to_rgb(hue, lightness, saturation))
