"""Promises of annotations: what was meant is read, in whatever shape and with whatever numbers it was written."""

import json

import numpy as np
import pytest
from PIL import Image

from nat_models.errors import UserError
from nat_models.training.anchors import best_anchor_iou, note_anchors
from nat_models.training.boxes import count_objects, read_box_data
from nat_models.training.outlines import encode, patch_of
from tests.training.boxed import (
    IDS,
    SCENES,
    SIZE,
    THINGS,
    Thing,
    by_stem,
    coco,
    put_images,
    put_one,
    put_roboflow,
    put_voc,
    put_yolo,
    xml,
)
from tests.training.label_maps import ORIENTED, exif, put

EXPECTED = {
    part: {stem: [(t.name, *map(float, t.box)) for t in things] for stem, things in scenes.items()}
    for part, scenes in SCENES.items()
}


def put_published(root):
    for part, things in SCENES.items():
        put_images(root / f"{part}2017", things)
        put(root / f"annotations/instances_{part}2017.json", json.dumps(coco(things, IDS)).encode())
        put(root / f"annotations/captions_{part}2017.json", b"{}")
    return root


def put_beside(root):
    for part, things in SCENES.items():
        put_images(root / "images" / part, things)
        put(root / f"annotations/instances_{part}.json", json.dumps(coco(things, IDS)).encode())
    return root


def put_valid(root):
    put_roboflow(root)
    (root / "val").rename(root / "valid")
    return root


def put_listed_yolo(root):
    put_yolo(root)
    for part, things in SCENES.items():
        (root / f"{part}.txt").write_text("".join(f"./images/{part}/{stem}.png\n" for stem in things))
    (root / "data.yaml").write_text("train: train.txt\nval: val.txt\nnames: {0: cat, 1: cow, 2: dog}\nnc: 3\n")
    return root


def put_exported_yolo(root):
    put_yolo(root)
    (root / "data.yaml").write_text("train: ../images/train\nval: ../images/val\nnames: [cat, cow, dog]\n")
    return root


SHAPES = {
    "roboflow": put_roboflow,
    "roboflow, valid": put_valid,
    "published": put_published,
    "images in images/": put_beside,
    "yolo": put_yolo,
    "yolo polygons": lambda root: put_yolo(root, polygons=True),
    "yolo lists": put_listed_yolo,
    "yolo exported": put_exported_yolo,
    "voc": put_voc,
    "voc from 0": lambda root: put_voc(root, first=0),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_set_reads_the_same_in_every_shape(tmp_path, shape):
    data = read_box_data(SHAPES[shape](tmp_path))
    assert data.names == ["cat", "cow", "dog"]
    assert {part: by_stem(data, part) for part in data.parts} == EXPECTED
    assert data.masks == (shape not in ("yolo", "yolo lists", "yolo exported", "voc", "voc from 0"))


def test_a_yaml_or_json_is_a_source_itself(tmp_path):
    put_yolo(tmp_path / "yolo")
    assert by_stem(read_box_data(tmp_path / "yolo/data.yaml")) == EXPECTED["train"]
    put_one(tmp_path / "one")
    data = read_box_data(tmp_path / "one/annotations.json", val_fraction=None)
    assert by_stem(data, "val") == EXPECTED["train"]


def renamed(root, change) -> None:
    path = root / "val/_annotations.coco.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_ids_and_order_of_categories_in_val_change_nothing(tmp_path):
    first = read_box_data(put_roboflow(tmp_path / "a"))
    others = {"val": {"dog": 90, "cat": 7, "unused": 8, "cow": 0}}
    second = read_box_data(put_roboflow(tmp_path / "b", ids=others))
    assert second.names == first.names and second.category_ids == [1, 2, 3]
    for part in SCENES:
        assert np.array_equal(first.parts[part].labels, second.parts[part].labels)
        assert np.array_equal(first.parts[part].boxes, second.parts[part].boxes)


def test_classes_have_the_order_of_the_ids_that_are_kept_with_gaps(tmp_path):
    gaps = {"dog": 3, "cow": 44, "cat": 90}
    data = read_box_data(put_roboflow(tmp_path, ids={part: dict(reversed(gaps.items())) for part in SCENES}))
    assert data.names == ["dog", "cow", "cat"] and data.category_ids == [3, 44, 90]
    assert by_stem(data) == EXPECTED["train"]


def test_a_models_classes_set_the_order(tmp_path):
    data = read_box_data(put_roboflow(tmp_path), names=["fox", "dog", "cat", "cow"], allow_empty=True)
    assert data.names == ["fox", "dog", "cat", "cow"] and data.category_ids == [None, 3, 1, 2]
    assert by_stem(data) == EXPECTED["train"]
    with pytest.raises(UserError, match="that the model lacks: cow; it has cat, dog"):
        read_box_data(tmp_path, names=["cat", "dog"])


def test_a_category_that_stands_above_all_is_no_class(tmp_path):
    put_one(tmp_path, lambda x: x["categories"].insert(0, dict(id=0, name="pets", supercategory="none")) or None)
    with pytest.raises(UserError, match="classes have no box in the training part: pets"):
        read_box_data(tmp_path, val_fraction=0.5)
    content = json.loads((tmp_path / "annotations.json").read_text())
    for entry in content["categories"][1:]:
        entry["supercategory"] = "pets"
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    data = read_box_data(tmp_path, val_fraction=None)
    assert data.names == ["cat", "cow", "dog"]
    assert any("stand above others" in note and "pets" in note for note in data.notes)


def test_what_is_held_out_depends_on_the_seed_and_keeps_copies_together(tmp_path):
    things = {f"{i}": [Thing("cat", (i, 1, 20 + i, 30))] for i in range(12)}
    put_one(tmp_path, things=things)
    copied = (tmp_path / "images/3.png").read_bytes()
    for stem in ("4", "5"):
        (tmp_path / f"images/{stem}.png").write_bytes(copied)
    sides = []
    for seed in range(6):
        data = read_box_data(tmp_path, val_fraction=0.3, seed=seed, allow_empty=True)
        val = frozenset(by_stem(data, "val"))
        assert len(val & {"3", "4", "5"}) in (0, 3) and 3 <= len(val) <= 4
        sides.append(val)
    assert len(set(sides)) > 1
    assert frozenset(by_stem(read_box_data(tmp_path, val_fraction=0.3, allow_empty=True), "val")) == sides[0]
    assert len(by_stem(read_box_data(tmp_path, val_fraction=0.5, group=r"^(\d)", allow_empty=True), "val")) >= 5


@pytest.mark.parametrize("put_set", [put_yolo, put_voc, put_roboflow])
def test_groups_are_told_by_the_name_in_the_part(tmp_path, put_set):
    things = {f"{group}_{i}": [Thing("cat", (1, 1, 20, 30))] for group in "pqrs" for i in range(3)}
    root = put_set(tmp_path, {"train": things})
    seen = set()
    for seed in range(4):
        data = read_box_data(root, val_fraction=0.25, seed=seed, group="^(.)_", allow_empty=True)
        sides = [{stem[0] for stem in by_stem(data, part)} for part in ("train", "val")]
        assert not sides[0] & sides[1] and len(by_stem(data, "val")) == 3
        seen |= sides[1]
    assert len(seen) > 1


def test_negatives_crowds_and_many_objects_are_counted(tmp_path):
    def change(content):
        content["annotations"][1]["iscrowd"] = 1
        content["annotations"][1]["segmentation"] = {"size": list(SIZE), "counts": [0, 100, SIZE[0] * SIZE[1] - 100]}
        content["annotations"][3]["iscrowd"] = 1
        del content["annotations"][3]["segmentation"]

    data = read_box_data(put_one(tmp_path, change), val_fraction=None, max_dets=1)
    part, counts = data.parts["val"], count_objects(data)
    assert part.crowd.tolist() == [False, True, False, True, False, False]
    assert counts.kept["val"] == [2, 1, 1] and counts.crowd["val"] == [1, 0, 1]
    assert "1 of 4 images of val have no object: they are negatives" in data.notes
    assert any(note.startswith("1 images of val have more than 1 objects (up to 2)") for note in data.notes)
    lines = counts.lines()
    assert lines[0].split() == ["val", "val", "crowd", "dropped"] and lines[1].split() == ["cat", "2", "1", "-"]
    assert patch_of(part.outlines[1], *SIZE)[2].sum() == 100
    assert patch_of(part.outlines[3], *SIZE)[2].shape == (28, 34)  # without an outline, a crowd is all of its box
    assert count_objects(data).kept["val"][0] + counts.crowd["val"][0] == 3


def test_a_mask_reads_the_same_in_every_form(tmp_path):
    mask = np.zeros(SIZE, np.uint8)
    mask[6:30, 4:20] = 1
    mask[6:10, 4:8] = 0
    flat = np.concatenate([[0], np.flatnonzero(np.diff(mask.T.ravel().astype(int))) + 1, [mask.size]])
    runs = np.diff(flat).tolist()
    forms = {
        "polygon": [[8, 6, 20, 6, 20, 30, 4, 30, 4, 10, 8, 10]],
        "flat polygon": [8, 6, 20, 6, 20, 30, 4, 30, 4, 10, 8, 10],
        "runs": {"size": list(SIZE), "counts": runs},
        "compressed": {"size": list(SIZE), "counts": encode(mask).decode()},
    }
    for form, segmentation in forms.items():

        def change(content, segmentation=segmentation):
            content["annotations"][0]["segmentation"] = segmentation
            del content["annotations"][0]["bbox"], content["annotations"][0]["area"]

        part = read_box_data(put_one(tmp_path / form, change), val_fraction=None).parts["val"]
        top, left, patch = patch_of(part.outlines[0], *SIZE)
        assert (top, left) == (6, 4) and np.array_equal(patch, mask[6:30, 4:20]), form
        assert part.boxes[0].tolist() == [4, 6, 20, 30] and part.areas[0] == mask.sum(), form


def test_an_annotation_id_of_0_gets_another_number(tmp_path):
    data = read_box_data(put_one(tmp_path, lambda x: x["annotations"][2].update(id=0)), val_fraction=None)
    assert data.parts["val"].ids.tolist() == [1, 2, 7, 4, 5, 6]
    assert any("the id 0 of annotations of val is 7" in note for note in data.notes)


def test_ids_that_are_words_are_numbered(tmp_path):
    def change(content):
        for entry in content["images"]:
            entry["id"] = f"i{entry['id']}"
        for entry in content["annotations"]:
            entry["image_id"] = f"i{entry['image_id']}"

    data = read_box_data(put_one(tmp_path, change), val_fraction=None)
    assert by_stem(data, "val") == EXPECTED["train"]
    assert data.parts["val"].image_ids.tolist() == [1, 2, 3, 4]


def test_numbers_as_tables_and_words_write_them_are_read(tmp_path):
    def change(content):
        for entry in content["annotations"]:
            entry.update(id=float(entry["id"]), image_id=float(entry["image_id"]), iscrowd="0")
            entry["category_id"] = float(entry["category_id"])

    data = read_box_data(put_one(tmp_path, change), val_fraction=None)
    assert by_stem(data, "val") == EXPECTED["train"] and not data.parts["val"].crowd.any()
    assert data.parts["val"].ids.tolist() == [1, 2, 3, 4, 5, 6]


def test_ids_that_no_array_holds_are_numbered(tmp_path):
    data = read_box_data(put_one(tmp_path, lambda x: x["annotations"][2].update(id=1 << 70)), val_fraction=None)
    assert data.parts["val"].ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert any(note.startswith("ids of annotations of val are not all whole numbers") for note in data.notes)


def test_a_rounded_box_is_cut_at_its_image(tmp_path):
    data = read_box_data(
        put_one(tmp_path, lambda x: x["annotations"][1].update(bbox=[24, 8, 40.7, 40.5])), val_fraction=None
    )
    assert data.parts["val"].boxes[1].tolist() == [24, 8, 64, 48]


def test_a_box_far_from_its_outline_is_said(tmp_path):
    data = read_box_data(put_one(tmp_path, lambda x: x["annotations"][1].update(bbox=[0, 0, 9, 9])), val_fraction=None)
    assert any("1 boxes have less than half in common with their outlines: annotation 2" in x for x in data.notes)


def test_difficult_objects_of_voc_are_crowds(tmp_path):
    root = put_voc(tmp_path)
    put(root / "Annotations/b.xml", xml("b", THINGS["b"], inside="<difficult>1</difficult>"))
    data = read_box_data(root)
    assert data.parts["train"].crowd.tolist() == [False, False, True, False, False, False]
    assert any(note.startswith("1 objects are difficult") for note in data.notes)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["polygon", "rle"])
def test_boxes_and_masks_are_turned_with_their_image(tmp_path, orientation, form):
    upright = np.zeros((*SIZE, 3), np.uint8)
    upright[6:30, 4:20] = 200
    stored = np.ascontiguousarray(ORIENTED[orientation](upright))
    mask = (stored[..., 0] > 0).astype(np.uint8)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x1, y1, x2, y2 = (int(x) for x in (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
    content = coco({"a": [Thing("cat", (x1, y1, x2, y2))]}, {"cat": 1}, size=mask.shape, suffix=".jpg")
    if form == "rle":
        content["annotations"][0]["segmentation"] = {"size": list(mask.shape), "counts": encode(mask).decode()}
    put(tmp_path / "stored/images/a.jpg", Image.fromarray(stored), exif=exif(orientation))
    put(tmp_path / "stored/annotations.json", json.dumps(content).encode())
    lies = "stored" if orientation in (2, 3, 4) else "auto"
    part = read_box_data(tmp_path / "stored", val_fraction=None, mask_orientation=lies).parts["val"]
    assert part.sizes.tolist() == [list(SIZE)] and part.boxes.tolist() == [[4, 6, 20, 30]]
    top, left, patch = patch_of(part.outlines[0], *SIZE)
    assert (top, left, *patch.shape) == (6, 4, 24, 16) and patch.all()
    # The same image, but that annotations lie as it is shown.
    shown = coco({"a": [Thing("cat", (4, 6, 20, 30))]}, {"cat": 1}, suffix=".jpg")
    put(tmp_path / "shown/images/a.jpg", Image.fromarray(stored), exif=exif(orientation))
    put(tmp_path / "shown/annotations.json", json.dumps(shown).encode())
    lies = "shown" if orientation in (2, 3, 4) else "auto"
    part = read_box_data(tmp_path / "shown", val_fraction=None, mask_orientation=lies).parts["val"]
    assert part.boxes.tolist() == [[4, 6, 20, 30]]


def test_the_digest_is_of_what_is_annotated(tmp_path):
    root = put_roboflow(tmp_path / "a")
    first = read_box_data(root).digest()
    root.rename(tmp_path / "b")
    assert read_box_data(tmp_path / "b").digest() == first
    renamed(tmp_path / "b", lambda x: x["annotations"][0]["bbox"].__setitem__(0, 9))
    second = read_box_data(tmp_path / "b").digest()
    renamed(tmp_path / "b", lambda x: x["annotations"][0]["segmentation"][0].__setitem__(0, 9))
    assert len({first, second, read_box_data(tmp_path / "b").digest()}) == 3


def test_anchors_are_held_against_boxes_at_the_networks_scale(tmp_path):
    ious = best_anchor_iou(np.array([[32, 32], [16, 16], [32 * 2**0.5, 16 * 2**0.5], [1000, 1000]]))
    assert ious == pytest.approx([1, 0.25, 1, 512**2 / 1000**2])
    part = read_box_data(put_roboflow(tmp_path)).parts["train"]
    assert note_anchors(part, 480, 1333) is None
    note = note_anchors(part, 24, 1333)
    assert note.startswith("100.0% of the boxes have less than 0.3") and "32, 64, 128, 256, 512 px" in note
    assert note_anchors(part, 24, 1333, anchor_sizes=(4, 8, 16)) is None


def test_boxes_alone_are_read_where_that_is_asked_for(tmp_path):
    put_one(tmp_path, lambda x: x["annotations"][0].pop("segmentation") and None)
    data = read_box_data(tmp_path, val_fraction=None, masks=False)
    assert not data.masks and by_stem(data, "val") == EXPECTED["train"]
    data = read_box_data(tmp_path, val_fraction=None, skip_bad_annotations=True)
    assert data.masks and len(data.parts["val"].boxes) == 5 and data.dropped == {"cat": 1}
    with pytest.raises(UserError, match="has boxes and no outline"):
        read_box_data(put_one(tmp_path / "plain", outlines=False), val_fraction=None, masks=True)


def test_a_subset_is_those_images_and_nothing_else(tmp_path):
    data = read_box_data(put_roboflow(tmp_path))
    whole = data.parts["train"]
    data.parts["train"] = whole.subset(np.flatnonzero(np.diff(whole.starts) > 0)[::-1])
    assert list(by_stem(data)) == ["c", "b", "a"]
    assert by_stem(data) == {stem: EXPECTED["train"][stem] for stem in "abc"}
    assert data.parts["train"].image_ids.tolist() == [3, 2, 1] and data.parts["train"].ids.tolist() == [
        4,
        5,
        6,
        3,
        1,
        2,
    ]
    top, left, patch = patch_of(data.parts["train"].outlines[3], *SIZE)
    assert (top, left, *patch.shape) == (0, 0, 12, 10)
    assert data.parts["train"].image(2) == whole.image(0)
    assert len(whole.subset([])) == 0
