"""Which images are held out where nothing is given to validate on: copies and groups stay on one side."""

import os
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from ..checkpoints.files import sha256_of
from ..errors import UserError
from .decoding import ImageFile
from .images import threaded
from .listing import some


class Pictured(Protocol):
    """An image with what is known of it; `stem` is its path in its part, without suffix."""

    stem: str
    image: ImageFile


P = TypeVar("P", bound=Pictured)


def grouping(group: str | None) -> Callable[[P], str]:
    """The key of a pair's group; without an expression each pair is its own."""
    if group is None:
        return lambda pair: pair.image.path
    try:
        expression = re.compile(group)
    except re.error as e:
        raise UserError(f"group must be a regular expression, got {group!r}: {e}.") from None

    def key(pair: P) -> str:
        match = expression.search(pair.stem)
        if match is None or (found := match[1] if expression.groups else match[0]) is None:
            raise UserError(f"group {group!r} does not match the image {pair.stem!r}.")
        return found

    return key


def split(
    folder: Path,
    parts: dict[str, list[P]],
    val_fraction: float | None,
    seed: int,
    key: Callable[[P], str],
    notes: list[str],
) -> dict[str, list[P]]:
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
        _refuse_shared(
            parts, "images are copies of images in another part", lambda p: hashes.get(p.image.path, p.image.path)
        )
        _refuse_shared(parts, "images are of a group that another part has too", key)
    order = [part for part in ("train", "val", "test") if part in parts]
    return {part: parts[part] for part in order}


def _refuse_shared(parts: dict[str, list[P]], what: str, key: Callable[[P], str | None]) -> None:
    seen: dict[str, tuple[str, P]] = {}
    shared = []
    for part in sorted(parts, key=("train", "val", "test").index):
        for pair in parts[part]:
            if (name := key(pair)) is not None:
                first_part, first = seen.setdefault(name, (part, pair))
                if first_part != part:
                    shared.append(f"{first.image.name} and {pair.image.name}")
    if shared:
        raise UserError(f"{len(shared)} {what}: {some(shared, 3)}.")


def _hash_of_copies(pairs: Sequence[P]) -> dict[str, str]:
    """By path, the sha256 of those images that are copies of others; only files of one size can be."""
    sizes = {pair.image.path: os.path.getsize(pair.image.path) for pair in pairs}
    often = Counter(sizes.values())
    candidates = [path for path, size in sizes.items() if often[size] > 1]
    hashes = dict(zip(candidates, threaded(sha256_of, candidates), strict=True))
    often = Counter(hashes.values())
    return {path: digest for path, digest in hashes.items() if often[digest] > 1}


def _join(pairs: Sequence[P], key: Callable[[P], str], hashes: Mapping[str, str]) -> list[list[P]]:
    """Groups of pairs that are related by key or by being copies, in the order of their first pair."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    for pair in pairs:
        if pair.image.path in hashes:
            leader[find(f"copy {hashes[pair.image.path]}")] = find(f"group {key(pair)}")
    groups: dict[str, list[P]] = defaultdict(list)
    for pair in pairs:
        groups[find(f"group {key(pair)}")].append(pair)
    return list(groups.values())


def _hold_out(
    folder: Path, pairs: Sequence[P], groups: list[list[P]], fraction: float, seed: int
) -> tuple[list[P], list[P]]:
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
    paths = {pair.image.path for pair in held}
    left = [pair for pair in pairs if pair.image.path not in paths]
    return left, [pair for pair in pairs if pair.image.path in paths]
