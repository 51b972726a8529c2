"""Which images are trained on and which are validated on."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from timm.utils.misc import natural_key

from ..errors import UserError
from .images import Encoded, list_images


@dataclass
class Part:
    """Images and what is known of them: a class index each, or a tuple of them where an image has several labels."""

    images: list[Encoded] = field(default_factory=list)
    targets: list = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.images)


@dataclass
class Data:
    """Labelled images.

    Attributes:
        names: The classes; a target is an index into them.
        parts: "train" and "val", and "test" where there is one.
        multi_label: Whether a target is a tuple of any number of class indices.
        notes: Lines that a user should see: what was passed over, and where the parts come from.
    """

    names: list[str]
    parts: dict[str, Part]
    multi_label: bool = False
    notes: list[str] = field(default_factory=list)

    def digest(self) -> str:
        return "x"


def _by_class(folder: Path) -> dict[str, list[Encoded]]:
    found = {}
    for image in list_images(folder):
        parts = image.name.split("/")
        if len(parts) != 2:
            raise UserError(
                f"Images must lie in {folder}/CLASS/, or in train/CLASS/ and val/CLASS/; found {image.path}."
            )
        found.setdefault(parts[0], []).append(image)
    return found


def read_data(
    source: str | Path, *, names: Sequence[str] | None = None, val_fraction: float = 0.1, seed: int = 0
) -> Data:
    """Labelled images in any of the shapes that are read.

    Without train/ and val/, a part of each class is drawn by seed and class name: the same files on every machine, and
    another class more changes nothing for the rest. A class of one image is trained on only.

    Args:
        source: A folder with a folder per class, or with train/ and val/ that have.
        names: The classes in the order of the targets, as a model has them; None takes those that are found, sorted.
        val_fraction: The part of each class that is held out where there is no val/.
        seed: Of what is held out.

    Raises:
        UserError: The source has none of these shapes, or classes that `names` lacks.
    """
    root = Path(source)
    if (root / "train").is_dir() and (root / "val").is_dir():
        train, val = _by_class(root / "train"), _by_class(root / "val")
        if strangers := sorted(set(val) - set(train)):
            raise UserError(f"Classes in {root / 'val'} that {root / 'train'} lacks: {', '.join(strangers)}.")
    else:
        train, val = _by_class(root), {}
        for name, images in train.items():
            count = min(max(1, round(val_fraction * len(images))), len(images) - 1)
            held_out = set(random.Random(f"{seed}/{name}").sample(images, count))
            val[name] = [image for image in images if image in held_out]
            train[name] = [image for image in images if image not in held_out]
    if names is None:
        names = sorted(train, key=lambda name: (natural_key(name), name))
    if len(names) < 2 or not any(val.values()):
        raise UserError(f"{root} must hold at least 2 classes and an image to validate on, found the classes {names}.")
    parts = {"train": Part(), "val": Part()}
    for part, found in (("train", train), ("val", val)):
        for target, name in enumerate(names):
            parts[part].images += found.get(name, [])
            parts[part].targets += [target] * len(found.get(name, []))
    return Data(list(names), parts)
