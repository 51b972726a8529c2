"""Annotations as people have them by mistake: one line that names them and the rule, or a counted skip."""

import json
import re

import numpy as np
import pytest

from nat_models.errors import UserError
from nat_models.training.boxes import read_box_data
from nat_models.training.outlines import encode
from tests.training.boxed import (
    SIZE,
    THINGS,
    Thing,
    by_stem,
    put_images,
    put_one,
    put_roboflow,
    put_voc,
    put_yolo,
    xml,
)
from tests.training.label_maps import exif, picture, put

NOT_A_NUMBER = float("nan")


def first(**kwargs):
    """The first annotation, a cat, says otherwise."""
    return lambda root: put_one(root, lambda x: x["annotations"][0].update(kwargs))


def without(key):
    return lambda root: put_one(root, lambda x: x["annotations"][0].pop(key) and None)


def segmented(value):
    return first(segmentation=value)


def image(**kwargs):
    """The first image, which has a cat and a dog, says otherwise."""
    return lambda root: put_one(root, lambda x: x["images"][0].update(kwargs))


def lines(*found):
    """YOLO: the labels of the first image."""

    def make(root):
        put_yolo(root)
        put(root / "labels/train/a.txt", "\n".join(("0 0.5 0.5 0.2 0.2", *found)).encode())

    return make


def voc(old, new):
    """VOC: the XML of the first image says otherwise."""

    def make(root):
        put_voc(root)
        put(root / "Annotations/a.xml", xml("a", THINGS["a"]).replace(old, new, 1))

    return make


RLE = {"size": list(SIZE), "counts": encode(np.eye(*SIZE, dtype=np.uint8)).decode()}
# What can be left out: how it is written, what the error says, and how many objects are left out.
SKIPPED = {
    "a box right of its image": (first(bbox=[70, 6, 10, 10]), r"boxes reach out of .*annotation 1 .*x 70 to 80, y", 1),
    "a box that reaches out": (first(bbox=[60, 6, 10, 10]), r"1 boxes reach out .* of 64 x 48", 1),
    "corners for width and height": (first(bbox=[40, 6, 64, 30]), "1 boxes reach out of their image", 1),
    "a width of 0": (first(bbox=[4, 6, 0, 10]), "1 annotations have no area: annotation 1 .*width 0, height 10", 1),
    "a height below 0": (first(bbox=[4, 6, 5, -2]), "1 annotations have no area: .*height -2", 1),
    "an unknown category": (first(category_id=17), r"1 annotations are of an unknown category: .*category 17", 0),
    "an unknown image": (first(image_id=99), "1 annotations are of an image that is not listed: .*image 99", 1),
    "an id twice": (first(id=2), r"1 annotation ids stand twice: annotation 2 \(annotations.json\)", 1),
    "a polygon of two points": (
        segmented([[4, 6, 20, 30]]),
        "1 polygons have fewer than 3 points: annotation 1.*, 2",
        1,
    ),
    "a polygon of an odd count": (segmented([[4, 6, 20, 6, 20, 30, 4]]), "1 polygons have an x without a y", 1),
    "a polygon outside": (segmented([[4, 6, 90, 6, 90, 30]]), "1 outlines reach out of .*x 4 to 90, y 6 to 30", 1),
    "a polygon on a line": (segmented([[4, 6, 8, 6, 12, 6]]), "1 annotations have no area: .*the outline", 1),
    "a polygon with NaN": (
        segmented([[4, 6, NOT_A_NUMBER, 6, 8, 30]]),
        "1 annotations hold numbers that are not fin",
        1,
    ),
    "NaN in a box": (first(bbox=[4, NOT_A_NUMBER, 5, 5]), "1 annotations hold numbers that are not finite", 1),
    "infinity in a box": (first(bbox=[4, 6, float("inf"), 5]), "1 annotations hold numbers that are not finite", 1),
    "a number beyond all": (first(bbox=[4, 6, 10**400, 5]), "1 annotations hold numbers that are not finite", 1),
    "a word in a box": (first(bbox=[4, "6", 5, 5]), "1 annotations hold what is no number: .*'6'", 1),
    "null in a box": (first(bbox=[4, None, 5, 5]), "1 annotations hold what is no number", 1),
    "a box of three": (first(bbox=[4, 6, 5]), r"1 boxes are not \[x, y, width, height\]: .*\[4, 6, 5\]", 1),
    "an outline that is a word": (segmented("x"), "1 outlines are neither polygons nor run lengths", 1),
    "RLE of another size": (
        segmented(dict(RLE, size=[64, 48])),
        r"do not fit their image: .*size \[64, 48\] and not",
        1,
    ),
    "RLE that is cut off": (segmented(dict(RLE, counts="P")), r"1 masks \(RLE\) cannot be read: .*cut off", 1),
    "RLE of too few pixels": (segmented(dict(RLE, counts=[10, 5])), "runs are 15 pixels of 48 x 64", 1),
    "RLE below 0": (segmented(dict(RLE, counts=[-8, 3080])), "do not fit their image", 1),
    "RLE without a pixel": (segmented(dict(RLE, counts=[SIZE[0] * SIZE[1]])), "1 annotations have no area", 1),
    "RLE without counts": (segmented({"size": list(SIZE)}), "1 annotations hold what is no number", 1),
    "no box": (
        lambda root: put_one(root, lambda x: x["annotations"][0].pop("bbox") and None, outlines=False),
        r"1 annotations lack a key: annotation 1 .*, bbox",
        1,
    ),
    "no category": (without("category_id"), "1 annotations lack a key: .*category_id", 0),
    "no image id": (without("image_id"), "1 annotations lack a key: .*image_id", 1),
    "no outline, where others have one": (without("segmentation"), "1 objects have a box and no outline, where", 1),
    "a missing image": (image(file_name="lost.png"), r"1 images are missing: lost.png \(annotations.json\)", 2),
    "an image id twice": (image(id=2), r"1 image ids stand twice: 2, of b.png too", 3),
    "an image listed twice": (image(file_name="b.png"), "1 images are listed twice: b.png, ids 1 and 2", 1),
    "another size": (
        image(width=65),
        "another size than their annotations say: .*a.png is 64 x 48, listed as 65 x 48",
        2,
    ),
    "a width of nothing": (image(width=0), "1 images have a height or width that is none: a.png, 0 x 48", 2),
    "an image without a name": (
        lambda root: put_one(root, lambda x: x["images"][3].pop("file_name") and None),
        "1 images lack an id or a file_name",
        0,
    ),
    "yolo: an unknown class": (
        lines("7 0.5 0.5 0.1 0.1"),
        r"unknown category: line 2 of labels/train/a.txt, category 7",
        0,
    ),
    "yolo: half a class": (lines("0.5 0.5 0.5 0.1 0.1"), "unknown category: .*category 0.5", 0),
    "yolo: pixels": (lines("0 20 20 10 10"), "1 boxes reach out of their image: line 2 of labels", 1),
    "yolo: no width": (lines("0 0.5 0.5 0 0.1"), "1 annotations have no area", 1),
    "yolo: a word": (lines("0 0.5 x 0.1 0.1"), "1 annotations hold what is no number", 0),
    "yolo: nan": (lines("0 nan 0.5 0.1 0.1"), "1 annotations hold numbers that are not finite", 1),
    "yolo: a score": (
        lines("0 0.5 0.5 0.1 0.1 0.9"),
        "1 lines are neither a box nor a polygon: line 2 .*, 6 numbers",
        1,
    ),
    "yolo: two numbers": (lines("0 0.5 0.5"), "1 polygons have fewer than 3 points", 1),
    "voc: a word": (
        voc(b"<xmin>5<", b"<xmin>x<"),
        "1 annotations hold numbers that are not finite: object 1 of a.xml",
        1,
    ),
    "voc: no name": (voc(b"<name>cat</name>", b""), "1 annotations lack a key: object 1 of a.xml, name", 0),
    "voc: turned round": (voc(b"<xmax>20<", b"<xmax>2<"), "1 annotations have no area: object 1 of a.xml", 1),
    "voc: another size": (voc(b"<width>64<", b"<width>63<"), "1 images have another size", 2),
}


@pytest.mark.parametrize("case", SKIPPED)
def test_a_mistake_is_one_line_or_a_counted_skip(tmp_path, case):
    make, message, count = SKIPPED[case]
    make(tmp_path)
    fraction = dict(val_fraction=None)
    with pytest.raises(UserError) as e:
        read_box_data(tmp_path, **fraction)
    assert re.search(message, str(e.value)), e.value
    assert "\n" not in str(e.value) and "skip_bad_annotations leaves them out" in str(e.value)
    data = read_box_data(tmp_path, **fraction, skip_bad_annotations=True, allow_empty=True)
    assert any(re.search(f"left out: .*{message}", note) for note in data.notes)
    assert sum(data.dropped.values()) == count


def one_line(make, message: str, **kwargs):
    return make, message, kwargs


def written(content):
    return lambda root: put_one(root, lambda _: content)


def changed(change):
    return lambda root: put_one(root, lambda x: change(x) and None)


def _copies(root):
    put_roboflow(root)
    (root / "val/e.png").write_bytes((root / "train/a.png").read_bytes())


def _same(root):
    put_yolo(root)
    (root / "data.yaml").write_text("train: images/train\nval: images/train\nnames: [cat, cow, dog]\n")


def _turned(root):
    put_one(root, suffix=".jpg", things={"a": THINGS["a"]})
    put(root / "images/a.jpg", picture(0, SIZE), exif=exif(3))


def _turned_yolo(root):
    put_yolo(root)
    put(root / "images/train/b.jpg", picture(0, SIZE), exif=exif(6))
    (root / "images/train/b.png").unlink()


def _two_kinds(root):
    put_one(root)
    put_yolo(root)


def _strange(root):
    others = {"train": {"cat": 1, "cow": 2, "dog": 3}, "val": {"cat": 1, "horse": 2, "cow": 3}}
    put_roboflow(root, ids=others)
    path = root / "val/_annotations.coco.json"
    content = json.loads(path.read_text())
    content["annotations"][0]["category_id"] = 2
    path.write_text(json.dumps(content))


def yaml_of(text: str):
    return lambda root: (put_yolo(root), (root / "data.yaml").write_text(text))


GOOD = '{"images": [], "annotations": [], "categories": []}'
REFUSED = {
    "JSON that is cut off": one_line(written('{"images": [{"id": 1'), r"annotations\.json cannot be read as JSON"),
    "JSON of a list": one_line(written("[]"), "must hold an object with images, annotations, categories, got a list"),
    "no categories": one_line(changed(lambda x: x.pop("categories")), "a list of categories: its keys are annotations"),
    "annotations of words": one_line(changed(lambda x: x.update(annotations=["x"])), "annotations must be objects"),
    "images by name": one_line(changed(lambda x: x.update(images={})), "a list of images: it is no list"),
    "a category twice": one_line(
        changed(lambda x: x["categories"][1].update(id=1)), "the category id 1 twice: cat and"
    ),
    "a name twice": one_line(
        changed(lambda x: x["categories"][1].update(name=" cat")), "two categories of the name 'cat'"
    ),
    "a category without a name": one_line(
        changed(lambda x: x["categories"][1].pop("name")), "must have a name and an id"
    ),
    "crowds alone": one_line(
        changed(lambda x: [entry.update(iscrowd=1) for entry in x["annotations"]]),
        r"Every annotation of .*annotations\.json is a crowd \(iscrowd 1\)",
    ),
    "no annotation": one_line(changed(lambda x: x.update(annotations=[])), "val have no box at all"),
    "no image": one_line(written(GOOD), "has no image of all"),
    "no image is there": one_line(
        lambda root: (put_one(root), [x.unlink() for x in (root / "images").iterdir()]),
        "No image that .* lists is there",
    ),
    "a class without a box": one_line(
        lambda root: put_roboflow(root, scenes={"train": {"b": THINGS["b"]}, "val": {"a": THINGS["a"]}}),
        "Classes in .*, val that|2 of 3 classes have no box in the training part: cat, cow.*--allow-empty",
    ),
    "a class of val alone": one_line(_strange, "Classes in .*, val that the training part lacks: horse"),
    "copies in val": one_line(_copies, "1 images are copies of images in another part: train/a.png and val/e.png"),
    "training images in val": one_line(_same, "4 images are copies of images in another part"),
    "EXIF that does not tell": one_line(
        _turned, r"nothing tells if .*mask_orientation .*images/a\.jpg \(orientation 3\)"
    ),
    "EXIF without a size": one_line(_turned_yolo, r"nothing tells if .*b\.jpg \(orientation 6\)"),
    "EXIF, told wrongly": one_line(_turned, "must be auto, shown or stored, got 'x'", mask_orientation="x"),
    "a damaged image": one_line(
        lambda root: (put_one(root), (root / "images/a.png").write_bytes(b"x")), "a.png cannot be read as an image"
    ),
    "two kinds of annotations": one_line(_two_kinds, "annotations of several kinds: COCO, YOLO: keep one"),
    "nothing": one_line(lambda root: None, "holds no annotations: .*found nothing"),
    "images alone": one_line(lambda root: put_images(root / "images", "ab"), "holds no annotations: .*found images"),
    "yolo: broken YAML": one_line(yaml_of("names: [a"), "data.yaml cannot be read as YAML"),
    "yolo: no names": one_line(yaml_of("train: images/train"), "must hold names, train and perhaps val"),
    "yolo: another count": one_line(yaml_of("train: images/train\nnames: [a]\nnc: 2"), "says nc: 2, and has 1 names"),
    "yolo: a name twice": one_line(yaml_of("train: images/train\nnames: [a, a]"), "names classes twice: a"),
    "yolo: key points": one_line(yaml_of("kpt_shape: [17, 3]\nnames: [a]"), "is of key points"),
    "yolo: no folder": one_line(
        yaml_of("train: images/lost\nnames: [a]"), "There is no .*images/lost, which data.yaml"
    ),
    "yolo: no labels": one_line(
        lambda root: (put_yolo(root), (root / "labels").rename(root / "texts")), "No image of train in .* has a file of"
    ),
    "voc: broken XML": one_line(voc(b"</annotation>", b""), r"a\.xml cannot be read as XML"),
    "voc: no images": one_line(
        lambda root: (put_voc(root), (root / "JPEGImages").rename(root / "photos")),
        "must hold its images in JPEGImages",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_meant_is_refused(tmp_path, case):
    make, message, kwargs = REFUSED[case]
    (root := tmp_path / "data").mkdir()
    make(root)
    for skip in (False, True) if "EXIF" not in case else (False,):
        with pytest.raises(UserError) as e:
            read_box_data(root, **{"val_fraction": None, "skip_bad_annotations": skip, **kwargs})
        assert re.search(message, str(e.value)), e.value
        assert "\n" not in str(e.value)


def test_the_first_ten_are_named_and_all_are_counted(tmp_path):
    things = {"a": [Thing("cat", (1, 1, 9, 9))] * 30}
    put_one(tmp_path, lambda x: [e.update(bbox=[1, 1, 0, 5]) for e in x["annotations"][:14]] and None, things=things)
    with pytest.raises(UserError) as e:
        read_box_data(tmp_path, val_fraction=None)
    assert str(e.value).startswith("14 annotations have no area: annotation 1 ")
    assert len(re.findall(r"annotation \d+ \(", str(e.value))) == 10 and "and 4 more" in str(e.value)


def test_unreadable_images_are_left_out_up_to_a_limit(tmp_path):
    put_one(tmp_path)
    (tmp_path / "images/b.png").write_bytes(b"x")
    data = read_box_data(tmp_path, val_fraction=None, skip_unreadable=True, unreadable_limit=0.3)
    assert "b" not in by_stem(data, "val") and data.dropped == {"dog": 1}
    with pytest.raises(UserError, match=r"unreadable_limit is 20\.00%"):
        read_box_data(tmp_path, val_fraction=None, skip_unreadable=True, unreadable_limit=0.2)
