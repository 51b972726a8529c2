"""Which image a mask belongs to, and on which side of the split a pair is."""

import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..checkpoints.files import sha256_of
from ..errors import UserError
from .decoding import ImageFile
from .images import is_run, say, scan, threaded
from .listing import part_named, some
from .mask_files import SUFFIXES, MaskFile, with_arrays

_MASKS = ("masks", "annotations")


class Pair(NamedTuple):
    """An image and its mask; `stem` is what their names have in common: the path in their part, without suffix."""

    stem: str
    image: ImageFile
    mask: MaskFile


def list_pairs(folder: Path, exclude: list[Path]) -> tuple[dict[str, list[Pair]], list[str]]:
    """Pairs by part, "" for those in none, in the order of their names; and notes."""
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    if is_run(str(folder)):
        raise UserError(f"{folder} is a run's output, not data.")
    folders = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    notes, parts = [], {}
    if "images" in folders:
        images, masks = (_by_part(folder, name, exclude, notes) for name in ("images", _masks_of(folder, folders)))
        if set(images) != set(masks) and "" in {*images, *masks}:
            raise UserError(f"In {folder}, either both images/ and masks/ hold train/ and val/, or neither does.")
    else:
        by_part = [(part_named(name), name) for name in folders if (folder / name / "images").is_dir()]
        if not by_part or None in dict(by_part):
            raise UserError(
                f"{folder} must hold images/ and masks/, or train/ and val/ with these inside; found "
                f"{some(folders) or 'no folder'}."
            )
        images, masks = {}, {}
        for part, name in by_part:
            if part in images:
                raise UserError(f"{folder} holds two folders for {part}: keep one of them.")
            inner = [entry.name for entry in os.scandir(folder / name) if entry.is_dir()]
            sides = ("images", _masks_of(folder / name, inner))
            images[part], masks[part] = (_stems(_scan(folder, f"{name}/{side}", exclude, notes)) for side in sides)
    for part in images:
        if part == "test" and part not in masks:
            notes.append(f"{folder}: the test images have no masks and are left out")
            continue
        parts[part] = _pair(folder, part, images[part], masks.get(part, {}), notes)
    for part in masks.keys() - images.keys():
        _pair(folder, part, {}, masks[part], notes)
    return parts, notes


def _masks_of(folder: Path, folders: Sequence[str]) -> str:
    found = [name for name in _MASKS if name in folders]
    if len(found) != 1:
        raise UserError(f"{folder} must hold one of {' and '.join(_MASKS)}, found {' and '.join(found) or 'neither'}.")
    return found[0]


def _scan(folder: Path, side: str, exclude: list[Path], notes: list[str]) -> list[tuple[str, ImageFile]]:
    """Files below folder/side, each with its name from there on."""
    files, passed_over = scan(folder / side, exclude, with_arrays())
    if passed_over:
        notes.append(f"passed over in {folder / side}: {say(passed_over)}")
    return [(file.name, file._replace(name=f"{side}/{file.name}")) for file in files]


def _stems(files: list[tuple[str, ImageFile]]) -> dict[str, ImageFile]:
    found: dict[str, ImageFile] = {}
    for name, file in files:
        stem = os.path.splitext(name)[0]
        if stem in found:
            raise UserError(f"{found[stem].path} and {file.path} have one name but for the suffix: keep one of them.")
        found[stem] = file
    return found


def _by_part(folder: Path, side: str, exclude: list[Path], notes: list[str]) -> dict[str, dict[str, ImageFile]]:
    """Files of folder/side by part and by stem."""
    files = _scan(folder, side, exclude, notes)
    tops = {name.partition("/")[0] if "/" in name else "" for name, _ in files}
    if not tops or None in {part_named(top) for top in tops}:
        if named := sorted(top for top in tops if part_named(top)):
            others = sorted(top or "files" for top in tops if not part_named(top))
            raise UserError(f"{folder / side} holds {some(named)}, and beside them {some(others)}: sort them in.")
        return {"": _stems(files)}
    parts: dict[str, list] = defaultdict(list)
    for name, file in files:
        top, _, rest = name.partition("/")
        parts[top].append((rest, file))
    if len({part_named(top) for top in parts}) < len(parts):
        raise UserError(f"{folder / side} holds two folders for one part: {some(sorted(parts))}.")
    return {part_named(top): _stems(found) for top, found in parts.items()}


def _pair(
    folder: Path, part: str, images: dict[str, ImageFile], masks: dict[str, ImageFile], notes: list[str]
) -> list[Pair]:
    where = f"{folder}, {part}" if part else str(folder)
    if wrong := [mask.path for mask in masks.values() if os.path.splitext(mask.path)[1].lower() not in SUFFIXES]:
        raise UserError(
            f"{len(wrong)} masks of {where} are of a format that need not give back the numbers that were saved, as "
            f"JPEG does not: {some(wrong, 3)}. Save masks as PNG, from their source."
        )
    common = [stem for stem in images if stem in masks]
    if not common:
        shown = [some([file.name for file in files.values()], 2) or "none" for files in (images, masks)]
        raise UserError(
            f"No image of {where} has a mask, which has the image's name but for the suffix: images such as "
            f"{shown[0]}; masks such as {shown[1]}."
        )
    for files, other, what in ((images, masks, "images have no mask"), (masks, images, "masks have no image")):
        if orphans := [file.name for stem, file in files.items() if stem not in other]:
            notes.append(f"left out: {len(orphans)} {what}: {some(orphans)}")
    return [Pair(stem, images[stem], MaskFile(*masks[stem])) for stem in common]


def grouping(group: str | None) -> Callable[[Pair], str]:
    """The key of a pair's group; without an expression each pair is its own."""
    if group is None:
        return lambda pair: pair.image.path
    try:
        expression = re.compile(group)
    except re.error as e:
        raise UserError(f"group must be a regular expression, got {group!r}: {e}.") from None

    def key(pair: Pair) -> str:
        match = expression.search(pair.stem)
        if match is None or (found := match[1] if expression.groups else match[0]) is None:
            raise UserError(f"group {group!r} does not match the image {pair.stem!r}.")
        return found

    return key


def split(
    folder: Path,
    parts: dict[str, list[Pair]],
    val_fraction: float | None,
    seed: int,
    key: Callable[[Pair], str],
    notes: list[str],
) -> dict[str, list[Pair]]:
    """The parts, with something to validate on; no image and no group is in two of them."""
    hashes = _hash_of_copies([pair for items in parts.values() for pair in items])
    if "" in parts and val_fraction is None:
        return {"val": parts[""]}
    if "" in parts:
        parts = {"train": parts[""]}
    if "val" not in parts and "test" in parts and "train" in parts:
        parts["val"] = parts.pop("test")
        notes.append(f"{folder} has nothing to validate on but its test images: they are validated on")
    if "val" not in parts and "train" in parts and val_fraction is not None:
        whole = parts.pop("train")
        parts["train"], parts["val"] = _hold_out(folder, whole, _join(whole, key, hashes), val_fraction, seed)
        if copies := len(hashes) - len(set(hashes.values())):
            notes.append(f"{copies} images are copies of others: the split keeps copies together")
    else:
        _refuse_shared(parts, "images are copies of images in another part", lambda p: hashes.get(p.image.path))
        _refuse_shared(parts, "images are of a group that another part has too", key)
    order = [part for part in ("train", "val", "test") if part in parts]
    return {part: parts[part] for part in order}


def _refuse_shared(parts: dict[str, list[Pair]], what: str, key: Callable[[Pair], str | None]) -> None:
    seen: dict[str, tuple[str, Pair]] = {}
    shared = []
    for part in sorted(parts, key=("train", "val", "test").index):
        for pair in parts[part]:
            if (name := key(pair)) is not None:
                first_part, first = seen.setdefault(name, (part, pair))
                if first_part != part:
                    shared.append(f"{first.image.name} and {pair.image.name}")
    if shared:
        raise UserError(f"{len(shared)} {what}: {some(shared, 3)}.")


def _hash_of_copies(pairs: Sequence[Pair]) -> dict[str, str]:
    """By path, the sha256 of those images that are copies of others; only files of one size can be."""
    sizes = {pair.image.path: os.path.getsize(pair.image.path) for pair in pairs}
    often = Counter(sizes.values())
    candidates = [path for path, size in sizes.items() if often[size] > 1]
    hashes = dict(zip(candidates, threaded(sha256_of, candidates), strict=True))
    often = Counter(hashes.values())
    return {path: digest for path, digest in hashes.items() if often[digest] > 1}


def _join(pairs: Sequence[Pair], key: Callable[[Pair], str], hashes: Mapping[str, str]) -> list[list[Pair]]:
    """Groups of pairs that are related by key or by being copies, in the order of their first pair."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for pair in pairs:
        if pair.image.path in hashes:
            leader[find(f"copy {hashes[pair.image.path]}")] = find(f"group {key(pair)}")
    groups: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        groups[find(f"group {key(pair)}")].append(pair)
    return list(groups.values())


def _hold_out(
    folder: Path, pairs: Sequence[Pair], groups: list[list[Pair]], fraction: float, seed: int
) -> tuple[list[Pair], list[Pair]]:
    """Whole groups are held out, in an order drawn by seed, as long as they fit into the fraction; at least one."""
    if len(groups) < 2:
        raise UserError(
            f"{folder} has {len(pairs)} images in {len(groups)} groups: nothing can be held out. Two groups are needed."
        )
    order = random.Random(seed).sample(groups, len(groups))
    room, held = fraction * len(pairs), []
    for members in order[1:]:
        if len(members) <= room - len(held) + 0.5:
            held += members
    held = held or min(order, key=len)
    stems = {pair.stem for pair in held}
    return [pair for pair in pairs if pair.stem not in stems], [pair for pair in pairs if pair.stem in stems]
