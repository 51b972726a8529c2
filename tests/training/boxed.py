"""Small images with boxes and masks, written in every way that people keep them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tests.training.label_maps import picture, put

SIZE = (48, 64)


class Thing(NamedTuple):
    """An object: its class, its corners (x1, y1, x2, y2) px, and perhaps a polygon of the same extent."""

    name: str
    box: tuple[float, float, float, float]
    polygon: Sequence[tuple[float, float]] | None = None


THINGS = {
    "a": [Thing("cat", (4, 6, 20, 30)), Thing("dog", (24, 8, 60, 40))],
    "b": [Thing("dog", (0, 0, 10, 12))],
    "c": [Thing("cat", (30, 20, 64, 48)), Thing("cow", (2, 2, 12, 22)), Thing("cat", (16, 4, 26, 14))],
    "d": [],
}
SCENES = {"train": THINGS, "val": {"e": [Thing("cow", (8, 8, 40, 40)), Thing("cat", (40, 2, 62, 20))]}}


def corners(box: Sequence[float]) -> list[float]:
    x1, y1, x2, y2 = box
    return [x1, y1, x2, y1, x2, y2, x1, y2]


def coco(
    things: Mapping[str, Sequence[Thing]],
    ids: Mapping[str, int],
    *,
    outlines: bool = True,
    size: tuple[int, int] = SIZE,
    suffix: str = ".png",
) -> dict:
    """COCO's JSON of images by stem."""
    images, annotations = [], []
    for i, (stem, found) in enumerate(things.items(), 1):
        images.append(dict(id=i, file_name=stem + suffix, height=size[0], width=size[1]))
        for thing in found:
            x1, y1, x2, y2 = thing.box
            entry = dict(id=len(annotations) + 1, image_id=i, category_id=ids[thing.name], iscrowd=0)
            entry |= dict(bbox=[x1, y1, x2 - x1, y2 - y1], area=(x2 - x1) * (y2 - y1))
            if outlines:
                flat = corners(thing.box) if thing.polygon is None else [x for point in thing.polygon for x in point]
                entry["segmentation"] = [flat]
            annotations.append(entry)
    return dict(images=images, annotations=annotations, categories=[dict(id=i, name=n) for n, i in ids.items()])


IDS = {"cat": 1, "cow": 2, "dog": 3}


def put_images(folder: Path, stems, size: tuple[int, int] = SIZE) -> None:
    for stem in stems:
        put(folder / f"{stem}.png", picture(int.from_bytes(stem.encode(), "big"), size))


def put_roboflow(root: Path, scenes=SCENES, ids=None, outlines: bool = True) -> Path:
    """train/ and val/ with _annotations.coco.json; `ids` by part."""
    for part, things in scenes.items():
        put_images(root / part, things)
        content = coco(things, (ids or {}).get(part, IDS), outlines=outlines)
        (root / part / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def put_one(root: Path, change=None, things=THINGS, **kwargs) -> Path:
    """annotations.json and images/, to be split; `change` takes the JSON's content and changes it, or returns it."""
    put_images(root / "images", things)
    content = coco(things, IDS, **kwargs)
    changed = None if change is None else change(content)
    content = content if changed is None else changed
    (root / "annotations.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def put_yolo(root: Path, scenes=SCENES, names=("cat", "cow", "dog"), polygons: bool = False, extra: str = "") -> Path:
    """data.yaml, images/ and labels/; an image without objects has no file of labels."""
    height, width = SIZE
    for part, things in scenes.items():
        put_images(root / "images" / part, things)
        for stem, found in things.items():
            lines = []
            for thing in found:
                x1, y1, x2, y2 = thing.box
                numbers = [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]
                if polygons:
                    numbers = (np.array(corners(thing.box)).reshape(-1, 2) / (width, height)).ravel().tolist()
                lines.append(" ".join(map(str, [list(names).index(thing.name), *numbers])))
            if lines:
                put(root / "labels" / part / f"{stem}.txt", "\n".join(lines).encode())
    parts = "".join(f"{part}: images/{part}\n" for part in scenes)
    (root / "data.yaml").write_text(f"{parts}names: [{', '.join(names)}]\n{extra}")
    return root


def xml(stem: str, things: Sequence[Thing], size=SIZE, first: int = 1, inside: str = "") -> bytes:
    objects = "".join(
        f"<object><name>{t.name}</name>{inside}<bndbox><xmin>{t.box[0] + first}</xmin><ymin>{t.box[1] + first}</ymin>"
        f"<xmax>{t.box[2]}</xmax><ymax>{t.box[3]}</ymax></bndbox></object>"
        for t in things
    )
    shape = f"<size><width>{size[1]}</width><height>{size[0]}</height><depth>3</depth></size>"
    return f"<annotation><filename>{stem}.png</filename>{shape}{objects}</annotation>".encode()


def put_voc(root: Path, scenes=SCENES, **kwargs) -> Path:
    """JPEGImages/, Annotations/ and ImageSets/Main/."""
    for part, things in scenes.items():
        put_images(root / "JPEGImages", things)
        for stem, found in things.items():
            put(root / "Annotations" / f"{stem}.xml", xml(stem, found, **kwargs))
        put(root / "ImageSets" / "Main" / f"{part}.txt", "\n".join(things).encode())
    return root


def by_stem(data, part: str = "train") -> dict[str, list]:
    """For each image by stem its objects as (name, x1, y1, x2, y2)."""
    found = {}
    for i, objects in enumerate(data.parts[part]):
        names = [data.names[label] for label in objects.labels]
        boxes = objects.boxes.round(3).tolist()
        found[Path(data.parts[part].names[i]).stem] = [(n, *b) for n, b in zip(names, boxes, strict=True)]
    return found
