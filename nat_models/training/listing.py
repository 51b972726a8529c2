"""Images as a source lists them, before they are split and their classes are numbered."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import UserError
from .decoding import Encoded

_PARTS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"}
_PARTS |= {"test": "test", "testing": "test"}


@dataclass
class Listing:
    """What a source holds.

    Attributes:
        parts: "train", "val" and "test", or "" for images that belong to none; in each the images with their labels:
            one, or several, or none where there are no labels.
        names: The classes in the order that the source gives them; None where it gives none.
        multi_label: Whether an image has any number of labels.
        notes: Lines that a user should see.
    """

    parts: dict[str, list[tuple[Encoded, tuple[str, ...]]]] = field(default_factory=dict)
    names: list[str] | None = None
    multi_label: bool = False
    notes: list[str] = field(default_factory=list)

    def add(self, part: str, image: Encoded, labels: Sequence[str]) -> None:
        self.parts.setdefault(part, []).append((image, tuple(labels)))


def part_named(word: str) -> str | None:
    """The part that a word in a table or a folder's name means, or None."""
    return _PARTS.get(word.strip().lower())


def tidy_labels(labels: Sequence[str]) -> list[str]:
    """Labels without blanks around them; where all are whole numbers, 1.0 and 1 are one class."""
    labels = [label.strip() for label in labels]
    if all(re.fullmatch(r"-?\d+(\.0*)?", label) for label in labels if label):
        return [label.partition(".")[0] for label in labels]
    return labels


def some(items: Sequence, count: int = 10) -> str:
    """The first few items, for an error."""
    return ", ".join(map(str, items[:count])) + (f" and {len(items) - count} more" if len(items) > count else "")


def refuse(problems: Sequence, what: str) -> None:
    """Raises an error that counts the problems and lists the first ten, if there are any."""
    if problems:
        raise UserError(f"{len(problems)} {what}: {some(problems)}.")
