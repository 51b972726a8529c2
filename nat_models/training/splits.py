"""Which images are trained on and which are validated on."""

import random
from pathlib import Path

from timm.utils.misc import natural_key

from ..errors import UserError
from .images import list_images
from .settings import Settings


def _by_class(folder: Path) -> dict[str, list[Path]]:
    found = {}
    for file in list_images(folder):
        parts = file.relative_to(folder).parts
        if len(parts) != 2:
            raise UserError(f"Images must lie in {folder}/CLASS/, or in train/CLASS/ and val/CLASS/; found {file}.")
        found.setdefault(parts[0], []).append(file)
    return found


def find_data(settings: Settings) -> tuple[list[tuple[Path, int]], list[tuple[Path, int]], list[str]]:
    """Training samples, validation samples (file, class index), class names.

    Without train/ and val/, a part of each class is drawn by seed and class name: the same files on every machine, and
    another class more changes nothing for the rest. A class of one image is trained on only.
    """
    root = Path(settings.data)
    if (root / "train").is_dir() and (root / "val").is_dir():
        train, val = _by_class(root / "train"), _by_class(root / "val")
        if strangers := sorted(set(val) - set(train)):
            raise UserError(f"Classes in {root / 'val'} that {root / 'train'} lacks: {', '.join(strangers)}.")
    else:
        train, val = _by_class(root), {}
        for name, files in train.items():
            count = min(max(1, round(settings.val_fraction * len(files))), len(files) - 1)
            held_out = set(random.Random(f"{settings.seed}/{name}").sample(files, count))
            val[name] = [file for file in files if file in held_out]
            train[name] = [file for file in files if file not in held_out]
    names = sorted(train, key=lambda name: (natural_key(name), name))
    if len(names) < 2 or not any(val.values()):
        raise UserError(f"{root} must hold at least 2 classes and an image to validate on, found the classes {names}.")
    train, val = ([(f, i) for i, name in enumerate(names) for f in part.get(name, [])] for part in (train, val))
    return train, val, names
