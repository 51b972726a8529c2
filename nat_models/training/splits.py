"""Which images are trained on and which are validated on, whatever they are listed by."""

import hashlib
import os
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from timm.utils.misc import natural_key

from ..errors import UserError
from .decoding import Encoded, ImageFile, suffixes
from .images import check_images, is_run, say, scan
from .listing import Listing, part_named, some
from .shards import read_shards
from .tables import (
    SUFFIXES,
    USUAL,
    Columns,
    is_saved_dataset,
    parquet_parts,
    read_datasets,
    read_saved_dataset,
    read_table,
)


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
        """A hash of classes, parts, names, sizes in bytes and targets: the same on every machine that has the same."""
        digest = hashlib.sha256(repr(self.names).encode())
        for name, part in sorted(self.parts.items()):
            for image, target in zip(part.images, part.targets, strict=True):
                size = getattr(image, "size", None)
                size = os.path.getsize(image.path) if size is None and isinstance(image, ImageFile) else size
                digest.update(f"{name}\0{image.name}\0{size}\0{target}\n".encode())
        return digest.hexdigest()


def read_listing(
    source: str | Path,
    *,
    exclude: Iterable[Path] = (),
    columns: Columns = USUAL,
    labelled: bool = True,
    kinds: frozenset[str] | None = None,
) -> Listing:
    """What a source holds, in any of the shapes that are read; see read_data for them, and scan for `kinds`."""
    source, path = str(source), Path(source)
    suffix = path.suffix.lower()
    if path.is_file() and suffix in SUFFIXES:
        return read_table(path, columns, labelled)
    if source.endswith((".tar.gz", ".tgz", ".zip", ".tar.bz2", ".tar.xz", ".rar", ".7z")):
        raise UserError(f"{source} is compressed: unpack it.")
    if suffix == ".tar":
        return read_shards(source, labelled)
    if path.is_file():
        raise UserError(f"{source} is neither a folder nor a table ({', '.join(SUFFIXES)}) nor a shard (.tar).")
    if not path.is_dir():
        raise UserError(f"There is no folder {source}.")
    if is_run(str(path)):
        raise UserError(f"{source} is a run's output, not data.")
    if is_saved_dataset(path):
        return read_saved_dataset(path, columns, labelled)
    if table := next((path / f"metadata{s}" for s in SUFFIXES if (path / f"metadata{s}").is_file()), None):
        return read_table(table, columns, labelled)
    images, passed_over = scan(path, exclude, kinds)
    if not images and passed_over[".parquet"]:
        return read_datasets(parquet_parts(path), columns, labelled)
    if not images and passed_over[".tar"]:
        return read_shards(source, labelled)
    listing = _by_folder(path, images, passed_over, labelled)
    if passed_over:
        listing.notes.append(f"passed over in {source}: {say(passed_over)}")
    return listing


def _by_folder(root: Path, images: Sequence[ImageFile], passed_over: Counter, labelled: bool) -> Listing:
    """A folder per class, at the top or in train/, val/ and test/."""
    if not images:
        raise UserError(f"There are no images in {root}" + (f", but {say(passed_over)}." if passed_over else "."))
    listing, folders = Listing(), {}
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if entry.is_dir() and not entry.name.startswith(".") and (part := part_named(entry.name)) is not None:
            if part in folders:
                raise UserError(f"{root} holds both {folders[part]}/ and {entry.name}/: keep one of them.")
            folders[part] = entry.name
    split = bool(folders) and {image.name.partition("/")[0] for image in images} <= set(folders.values())
    by_name = {name: part for part, name in folders.items()} if split else {}
    for image in images:
        parts = image.name.split("/")
        part = by_name.get(parts[0], "")
        if len(parts) != (3 if split else 2) and labelled:
            raise UserError(f"Images must lie in {root}/CLASS/, or in train/CLASS/ and val/CLASS/; found {image.path}.")
        listing.add(part, image, (parts[-2],) if labelled else ())
    if labelled:
        for part in listing.parts:
            _say_empty(listing, root / folders[part] if split else root, part, {x[1][0] for x in listing.parts[part]})
    return listing


def _say_empty(listing: Listing, folder: Path, part: str, found: set[str]) -> None:
    """A class folder without images is an error where it is trained on, else a note."""
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if not entry.is_dir() or entry.name.startswith(".") or entry.name == "__MACOSX" or entry.name in found:
            continue
        if is_run(entry.path):
            continue
        held = say(scan(Path(entry.path))[1]) or "nothing"
        line = f"The class folder {entry.path} holds no images, but {held}"
        if part in ("", "train"):
            raise UserError(f"{line}: fill it, remove it, or hide it behind a dot.")
        listing.notes.append(line)


def read_data(
    source: str | Path,
    *,
    names: Sequence[str] | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    exclude: Iterable[Path] = (),
    columns: Columns = USUAL,
) -> Data:
    """Labelled images in any of the shapes that are read.

    Without images to validate on, a part of each class is drawn by seed and class name: the same files on every
    machine, and another class more changes nothing for the rest. A class of one image is trained on only.

    Args:
        source: A folder with a folder per class, or with train/ and val/ (valid/, validation/) and test/ that have; a
            table (CSV, TSV, JSON lines, parquet) of paths, labels and perhaps splits; a folder of parquet files, or one
            that Hugging Face datasets saved; shards (.tar) of the webdataset format, one or a pattern.
        names: The classes in the order of the targets, as a model has them; None takes those that are found.
        val_fraction: The part of each class that is held out where there is nothing to validate on.
        seed: Of what is held out.
        exclude: Folders that are never data, such as the output.
        columns: Of a table, where they have other names than usual.

    Raises:
        UserError: The source has none of these shapes, or classes that `names` or the training images lack.
    """
    listing = read_listing(source, exclude=exclude, columns=columns)
    parts, notes = dict(listing.parts), list(listing.notes)
    if "" in parts:
        parts["train"] = parts.pop("") + parts.get("train", [])
    if "val" not in parts and "test" in parts and "train" in parts:
        parts["val"] = parts.pop("test")
        notes.append(f"{source} has nothing to validate on but its test images: they are validated on")
    if names is None:
        names = listing.names or _ordered(label for _, labels in parts.get("train", []) for label in labels)
    known = {name: i for i, name in enumerate(names)}
    for part, items in parts.items():
        strangers = _ordered(label for _, labels in items for label in labels if label not in known)
        if strangers:
            raise UserError(f"Classes in {_where(source, part)} that {_whose(listing, part)} lacks: {some(strangers)}.")
    if "val" not in parts and "train" in parts:
        parts["train"], parts["val"] = _hold_out(parts["train"], val_fraction, seed, listing.multi_label)
    if len(names) < 2 - listing.multi_label or not parts.get("val"):
        raise UserError(
            f"{source} must hold at least 2 classes and an image to validate on, found the classes {list(names)}."
        )
    notes += say_near(names)
    data = Data(list(names), {}, listing.multi_label, notes)
    for part, items in parts.items():
        targets = [tuple(known[x] for x in labels) if listing.multi_label else known[labels[0]] for _, labels in items]
        # By class, as folders are; a table may list them in any order.
        order = range(len(items)) if listing.multi_label else sorted(range(len(items)), key=targets.__getitem__)
        data.parts[part] = Part([items[i][0] for i in order], [targets[i] for i in order])
    return data


def read_part(
    source: str | Path,
    names: Sequence[str],
    *,
    split: str | None = None,
    val_fraction: float = 0.1,
    seed: int = 0,
    columns: Columns = USUAL,
) -> tuple[Part, bool, list[str]]:
    """One part of labelled images, for a model that is there already; also whether they have several labels, and notes.

    Args:
        source: As for read_data.
        names: The model's classes.
        split: train, val or test. None takes what there is to validate on, or else everything that is in no part.
        val_fraction: The part that a run held out where the source has no parts; for split="val" or "train".
        seed: Of what it held out.
        columns: Of a table.

    Raises:
        UserError: There is no such part, or it has classes that the model lacks.
    """
    listing = read_listing(source, columns=columns)
    parts = dict(listing.parts)
    if split in ("train", "val") and split not in parts and ({"", "train"} & set(parts)):
        whole = parts.pop("", []) + parts.pop("train", [])
        parts["train"], parts["val"] = _hold_out(whole, val_fraction, seed, listing.multi_label)
    chosen = split or next((part for part in ("val", "test", "") if part in parts), None)
    if chosen not in parts:
        raise UserError(f"{source} has no part {split or 'val or test'}, only {', '.join(parts)}: choose with --split.")
    known = {name: i for i, name in enumerate(names)}
    strangers = _ordered(label for _, labels in parts[chosen] for label in labels if label not in known)
    if strangers:
        raise UserError(f"Classes in {source} that the model lacks: {some(strangers)}; it has {some(list(names))}.")
    part = Part()
    for image, labels in parts[chosen]:
        part.images.append(image)
        part.targets.append(tuple(known[x] for x in labels) if listing.multi_label else known[labels[0]])
    return part, listing.multi_label, listing.notes


def _ordered(names: Iterable[str]) -> list[str]:
    return sorted(set(names), key=lambda name: (natural_key(name), name))


def _where(source: str | Path, part: str) -> str:
    return f"{source}, {part}"


def _whose(listing: Listing, part: str) -> str:
    return "the training part" if part != "train" else "the model"


def _hold_out(items: list, fraction: float, seed: int, multi_label: bool) -> tuple[list, list]:
    groups: dict[str, list] = {}
    for item in items:
        groups.setdefault("" if multi_label else item[1][0], []).append(item)
    train, val = [], []
    for name, members in groups.items():
        count = min(max(1, round(fraction * len(members))), len(members) - 1)
        held_out = set(random.Random(f"{seed}/{name}").sample(range(len(members)), count))
        for i, member in enumerate(members):
            (val if i in held_out else train).append(member)
    return train, val


def say_near(names: Sequence[str]) -> list[str]:
    """Notes on classes that differ in capitals or blanks only, which is more often a mistake than meant."""
    by_plain: dict[str, list[str]] = {}
    for name in names:
        by_plain.setdefault("".join(name.split()).lower(), []).append(name)
    return [f"classes that differ in capitals or blanks only: {near}" for near in by_plain.values() if len(near) > 1]


def drop_unreadable(data: Data, *, verify: str, skip: bool, limit: float) -> None:
    """Checks every image before the first step; see `check_images`.

    Args:
        data: Loses the images that cannot be read, and gains a note that counts them.
        verify: none, headers or full.
        skip: Leave them out; else they are an error.
        limit: The greatest part of the images that may be left out.

    Raises:
        UserError: Some cannot be read; the message counts them and lists the first ten.
    """
    if verify == "none":
        return
    errors, total = [], 0
    for part in data.parts.values():
        found = check_images(part.images, full=verify == "full")
        errors += found.values()
        total += len(part)
        keep = [i for i in range(len(part)) if i not in found]
        part.images, part.targets = [part.images[i] for i in keep], [part.targets[i] for i in keep]
    if not errors:
        return
    if not skip:
        more = "" if len(errors) == 1 else f" ({len(errors)} of {total:,} images; --skip-unreadable leaves them out)"
        raise UserError("; ".join(map(str, errors[:10])) + more)
    if len(errors) > limit * total:
        raise UserError(
            f"{len(errors)} of {total:,} images cannot be read, more than unreadable_limit, {limit:.2%}: "
            + "; ".join(map(str, errors[:10]))
        )
    data.notes.append(f"left out: {len(errors)} of {total:,} images, which cannot be read, such as {errors[0]}")


def find_images(
    sources: Iterable[str | Path], exclude: Iterable[Path] = (), kinds: frozenset[str] | None = None
) -> list[Encoded]:
    """Images without labels, of files, folders, tables, shards and saved datasets: each once, in order.

    Args:
        sources: Where they are.
        exclude: Folders that are passed over.
        kinds: The endings, in lower case, of files that are images; None takes what `decode` reads.

    Raises:
        UserError: A source is none of these, or holds no image.
    """
    files = suffixes() if kinds is None else kinds
    found: dict[Encoded, None] = {}
    for source in sources:
        path = Path(source)
        if path.is_file() and path.suffix.lower() in files:
            found[ImageFile(path.as_posix(), str(path))] = None
            continue
        listing = read_listing(source, exclude=exclude, labelled=False, kinds=kinds)
        found.update(dict.fromkeys(image for items in listing.parts.values() for image, _ in items))
    return list(found)
