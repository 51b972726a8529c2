"""Which of the shapes that people keep annotated images in a source has."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import UserError
from .coco_json import read_coco
from .images import is_run
from .listing import part_named, some
from .raw_boxes import RawData
from .voc import is_voc, read_voc
from .yolo import find_yaml, read_yolo

_ROBOFLOW = "_annotations.coco.json"
_OTHERS = ("captions_", "person_keypoints_", "image_info_", "panoptic_", "stuff_")  # files of COCO that are of no boxes


def read_raw_boxes(source: Path, exclude: Iterable[Path] = ()) -> RawData:
    """What a source lists; see read_box_data for its shapes.

    Raises:
        UserError: It has none of them, or a file of it cannot be read.
    """
    exclude = list(exclude)
    if source.is_file() and source.suffix.lower() in (".yaml", ".yml"):
        return read_yolo(source, exclude)
    if source.is_file() and source.suffix.lower() == ".json":
        above = source.parent.parent
        beside = [source.parent, source.parent / "images", *([above / "images"] if source.parent != above else [])]
        return _read_all([("", source, beside)], source.parent)
    if not source.is_dir():
        raise UserError(f"There is no folder {source}.")
    if is_run(str(source)):
        raise UserError(f"{source} is a run's output, not data.")
    found = [(shape, about) for shape, find in _SHAPES.items() if (about := find(source))]
    if len(found) > 1:
        raise UserError(f"{source} holds annotations of several kinds: {', '.join(x for x, _ in found)}: keep one.")
    if not found:
        held = sorted(entry.name for entry in os.scandir(source) if not entry.name.startswith("."))
        raise UserError(
            f"{source} holds no annotations: train/ and val/ with {_ROBOFLOW}, annotations/instances_train.json, "
            f"annotations.json, data.yaml (YOLO) or Annotations/ (VOC); found {some(held) or 'nothing'}."
        )
    shape, about = found[0]
    if shape == "YOLO":
        return read_yolo(about, exclude)
    return read_voc(source, exclude) if shape == "VOC" else _read_all(about, source)


def holds_boxes(source: Path) -> bool:
    """Whether a source has one of the shapes of annotated objects, and is no folder of images and masks."""
    if source.is_file():
        return source.suffix.lower() in (".yaml", ".yml", ".json")
    return source.is_dir() and not (source / "masks").is_dir() and any(find(source) for find in _SHAPES.values())


def _read_all(files: list[tuple[str, Path, list[Path]]], root: Path) -> RawData:
    data = RawData()
    for part, file, folders in files:
        if part in data.parts:
            raise UserError(
                f"{root} holds two files of annotations for {part or 'all'}, one is {file}: keep one of them."
            )
        read_coco(file, part, folders, root, data)
    return data


def _coco_files(folder: Path) -> list[tuple[str, Path, list[Path]]]:
    """For each part its JSON, and where its images may lie."""
    found = []
    for sub in _folders(folder):
        part = part_named(sub.name)
        jsons = [] if part is None else _jsons(sub)
        if len(jsons) > 1:
            jsons = [x for x in jsons if x.name == _ROBOFLOW] or jsons
        if len(jsons) > 1:
            raise UserError(f"{sub} holds several JSON files: {some([x.name for x in jsons])}: keep one of them.")
        found += [(part, file, [sub, sub / "images"]) for file in jsons]
    if found:
        return found
    inner = folder / "annotations"
    for place in (inner, folder):
        named = {file: _part_of(file.stem) for file in (_jsons(place) if place.is_dir() else [])}
        found = [(part, file, _near(folder, file, part)) for file, part in named.items() if part is not None]
        if not found and len(named) == 1:
            found = [("", file, _near(folder, file, "")) for file in named]
        if found:
            return sorted(found)
    return []


def _folders(folder: Path) -> list[Path]:
    entries = (Path(entry.path) for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    return sorted(entries)


def _jsons(folder: Path) -> list[Path]:
    files = (x for x in folder.glob("*.json") if not x.name.startswith((".", *_OTHERS)))
    return sorted(x for x in files if x.name != "classes.json")


def _word(stem: str) -> str:
    """What a file's name says beside that it holds annotations: train2017 of instances_train2017."""
    return re.sub(r"^(instances|annotations)_|_(annotations|coco)$", "", stem)


def _part_of(stem: str) -> str | None:
    return part_named(re.sub(r"[-_]?\d+$", "", _word(stem)))


def _near(folder: Path, file: Path, part: str) -> list[Path]:
    """Where the images of a file may lie."""
    words = [_word(file.stem), *([part] if part else [])]
    words += [x.name for x in _folders(folder) if part and _part_of(x.name) == part]
    inside = [base / word for word in dict.fromkeys(words) for base in (folder, folder / "images")]
    return [*inside, folder / "images", folder]


_SHAPES = {"COCO": _coco_files, "YOLO": find_yaml, "VOC": lambda folder: folder if is_voc(folder) else None}
