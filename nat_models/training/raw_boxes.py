"""Annotated images as a file lists them, before anything of it is believed; and what is wrong with them."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..errors import UserError
from .decoding import ImageFile
from .listing import some
from .outlines import Outline


@dataclass
class RawObject:
    """An object as it is listed.

    Attributes:
        name: What errors call it: "annotation 7".
        category: The name of its class.
        box: (x1, y1, x2, y2) px on the image as the file means it; in parts of its sides where the image's objects are
            `relative`. None takes the outline's extent.
        outline: Of the object, in the same unit; None where there is none.
        crowd: Whether it is a region of many, or of what cannot be told.
        area: As it is listed, px; None where it is not.
        id: As it is listed; None where it is not.
    """

    name: str
    category: str
    box: Sequence[float] | None
    outline: Outline = None
    crowd: bool = False
    area: float | None = None
    id: object = None


@dataclass
class RawImage:
    """An image as it is listed.

    Attributes:
        stem: Its path in its part, without suffix.
        image: Its file.
        id: As it is listed; None where it is not.
        size: (height, width) px as it is listed; None where it is not.
        objects: On it.
        relative: Whether coordinates are parts of the image's sides, from 0 to 1.
    """

    stem: str
    image: ImageFile
    id: object = None
    size: tuple[int, int] | None = None
    objects: list[RawObject] = field(default_factory=list)
    relative: bool = False


@dataclass
class Problems:
    """What is wrong with annotations, by kind; each kind is a phrase that can follow a number.

    Attributes:
        found: For each kind the things that are wrong.
        dropped: How many objects of each category are left out.
    """

    found: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    dropped: Counter = field(default_factory=Counter)

    def add(self, kind: str, what: str, category: str | None = None) -> None:
        """Notes something; `category` is of the object that is left out for it, if one is."""
        self.found[kind].append(what)
        if category is not None:
            self.dropped[category] += 1

    def lines(self) -> list[str]:
        """A line for each kind: how many there are, and the first ten."""
        return [f"{len(things)} {kind}: {some(things)}" for kind, things in self.found.items()]

    def settle(self, skip: bool) -> list[str]:
        """Notes on what is left out, if there is anything.

        Raises:
            UserError: Something is wrong and `skip` is False.
        """
        if self.found and not skip:
            raise UserError(f"{'; '.join(self.lines())} (skip_bad_annotations leaves them out).")
        return [f"left out: {line}" for line in self.lines()]


@dataclass
class RawData:
    """What a source lists.

    Attributes:
        parts: "train", "val" and "test", or "" for images that belong to none.
        categories: Of each part the user's ids of the classes by name, in the order of the ids.
        problems: What is wrong so far.
        notes: Lines that a user should see.
    """

    parts: dict[str, list[RawImage]] = field(default_factory=dict)
    categories: dict[str, dict[str, int]] = field(default_factory=dict)
    problems: Problems = field(default_factory=Problems)
    notes: list[str] = field(default_factory=list)
