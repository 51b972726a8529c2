"""Shards as the webdataset format has them: tar files whose members of one basename belong together.

A shard is read through once for where its members lie; then each is read at random, by its place.
"""

import glob
import io
import json
import re
import tarfile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import UserError
from .decoding import suffixes
from .listing import Listing, part_named, refuse


class ShardMember(NamedTuple):
    """An image within a tar file that is not compressed."""

    name: str
    path: str
    offset: int
    size: int

    def open(self) -> BinaryIO:
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))


def find_shards(source: str) -> list[Path]:
    """The tar files that a path, a folder or a pattern such as train-{000..009}.tar names."""
    if Path(source).is_file():
        return [Path(source)]
    if Path(source).is_dir():
        return sorted(Path(source).rglob("*.tar"))
    found = [Path(path) for pattern in _expand(source) for path in sorted(glob.glob(pattern))]
    refuse([pattern for pattern in _expand(source) if not glob.glob(pattern)], "shards are missing")
    return found


def _expand(pattern: str) -> list[str]:
    """The paths that braces stand for: {000..009} or {a,b}."""
    match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if match is None:
        return [pattern]
    if match[3] is not None:
        words = match[3].split(",")
    else:
        words = [str(i).zfill(len(match[1])) for i in range(int(match[1]), int(match[2]) + 1)]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [path for word in words for path in _expand(f"{before}{word}{after}")]


def read_shards(source: str, labelled: bool = True) -> Listing:
    """The images of shards, with the labels of their .cls or .json members.

    A number in .cls is a line of classes.txt beside the shards where there is one, else its own name.

    Raises:
        UserError: A shard is missing, damaged or compressed, or an image has no label or several.
    """
    listing, paths = Listing(), find_shards(source)
    if not paths:
        raise UserError(f"There are no shards in {source}.")
    classes = paths[0].parent / "classes.txt"
    if classes.is_file():
        listing.names = [line.strip() for line in classes.read_text().splitlines() if line.strip()]
    missing = []
    for path in paths:
        part = _part(path)
        for key, members in _index(path).items():
            images = [(suffix, place) for suffix, place in members.items() if suffix in suffixes()]
            if not images:
                continue
            suffix, (offset, size) = images[0]
            image = ShardMember(f"{path.name}/{key}{suffix}", str(path), offset, size)
            label = _label(path, members, listing.names) if labelled else None
            if labelled and label is None:
                missing.append(image.name)
            listing.add(part, image, () if label is None else (label,))
    refuse(missing, "images have no .cls and no label in their .json")
    return listing


def _part(path: Path) -> str:
    """The part that the shard's own name or its folder's begins with."""
    for name in (path.name, path.parent.name):
        if (part := part_named(re.split(r"[-_.\d]", name, maxsplit=1)[0])) is not None:
            return part
    return ""


def _index(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """For each basename the members by their suffix, as (offset, size)."""
    found: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                tar.members = []  # else it remembers all of them
                folder, _, base = member.name.rpartition("/")
                if not member.isfile() or base.startswith(".") or "__MACOSX" in folder:
                    continue
                stem, dot, suffix = base.partition(".")
                key = f"{folder}/{stem}" if folder else stem
                found.setdefault(key, {})[f"{dot}{suffix.lower()}"] = (member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as e:
        compressed = path.read_bytes()[:2] == b"\x1f\x8b" if path.is_file() else False
        cause = "it is compressed: unpack it with gunzip" if compressed else str(e)
        raise UserError(f"{path} cannot be read as a shard: {cause}.") from None
    return found


def _label(path: Path, members: dict, names: list[str] | None) -> str | None:
    def read(suffix: str) -> bytes:
        offset, size = members[suffix]
        return ShardMember("", str(path), offset, size).open().read()

    label = None
    try:
        if ".cls" in members:
            label = read(".cls").decode().strip()
        elif ".json" in members:
            record = json.loads(read(".json"))
            label = next((str(record[key]) for key in ("label", "cls", "class") if key in record), None)
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} has a label that cannot be read: {e}.") from None
    if not label:
        return None
    if names is not None and label.isdigit() and label not in names:
        if int(label) >= len(names):
            raise UserError(f"{path} has the label {label}, and classes.txt has {len(names)} lines.")
        return names[int(label)]
    return label
