"""`nat-models check` on images with boxes: what was found is printed and drawn, what is wrong is one line."""

import json
import re

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from nat_models.cli import main
from nat_models.training.drawing import draw_objects
from nat_models.training.outlines import encode, extent_of
from tests.training.boxed import put_one, put_roboflow, put_voc, put_yolo
from tests.training.label_maps import LABELS, put_pairs

SMALL = ["--short-side", "40", "56", "--long-side", "100", "--images", "3"]


def check(root, *flags: str) -> int:
    return main(["check", "--data", str(root), "--output", str(root.parent / "check.png"), *SMALL, *flags])


def put_digits(root, count: int = 12):
    """Handwritten digits on photographs, their ink as run lengths: a real, tiny data set."""
    digits, photographs = load_digits(), load_sample_images().images
    images, annotations = [], []
    (root / "images").mkdir(parents=True)
    for i in range(count):
        scene = photographs[i % 2][30 * i : 30 * i + 64, 20 * i : 20 * i + 96].copy()
        ink = np.kron(digits.images[i] > 6, np.ones((5, 5), bool))
        mask = np.zeros(scene.shape[:2], bool)
        mask[10:50, 8 + i : 48 + i] = ink
        scene[mask] = 255
        Image.fromarray(scene).save(root / f"images/{i}.png")
        code = encode(mask)
        x1, y1, x2, y2 = extent_of(code, *mask.shape)
        images.append(dict(id=i, file_name=f"{i}.png", height=64, width=96))
        annotations.append(
            dict(
                id=i,
                image_id=i,
                category_id=int(digits.target[i]) % 2 + 5,
                bbox=[x1, y1, x2 - x1, y2 - y1],
                area=int(mask.sum()),
                iscrowd=int(i == count - 1),
                segmentation=dict(size=[64, 96], counts=code.decode()),
            )
        )
    categories = [dict(id=5, name="even"), dict(id=6, name="odd [x] $y$")]
    content = dict(images=images, annotations=annotations, categories=categories)
    (root / "annotations.json").write_text(json.dumps(content))
    return root


def test_what_was_found_is_printed_and_drawn(tmp_path, capsys):
    root = put_digits(tmp_path / "data")
    content = json.loads((root / "annotations.json").read_text())
    content["annotations"][1]["bbox"] = [90, 5, 40, 10]
    (root / "annotations.json").write_text(json.dumps(content))
    assert check(root, "--skip-bad-annotations", "--val-fraction", "0.25", "--seed", "1") == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "left out: 1 boxes reach out of their image: annotation 1 (annotations.json) of images/1.png, x 90" in out
    assert "the id 0 of annotations of" in out
    assert "9 train, 3 val images with boxes and masks, 2 classes" in out
    assert "train train crowd val val crowd dropped" in out
    even, odd = re.search(r"dropped even (.*?) odd \[x\] \$y\$ ((?:\S+ ){5})", out).groups()
    counts = [[0 if x == "-" else int(x) for x in line.split()] for line in (even, odd)]
    assert np.sum(counts) == 12 and [line[4] for line in counts] == [0, 1]
    assert sum(line[1] + line[3] for line in counts) == 1
    drawn = np.asarray(Image.open(tmp_path / "check.png").convert("RGB")).astype(int)
    assert drawn.shape[1] > 1000 and drawn.shape[0] > 500
    red = (drawn[..., 0] > drawn[..., 1] + 100) & (drawn[..., 0] > drawn[..., 2] + 100)
    assert red.mean() > 0.002  # the first class is red


@pytest.mark.parametrize("put", [put_roboflow, put_yolo, put_voc])
def test_every_shape_is_recognised(tmp_path, capsys, put):
    assert check(put(tmp_path / "data")) == 0
    out = capsys.readouterr().out
    masks = " and masks" if put is put_roboflow else ""
    assert f"4 train, 1 val images with boxes{masks}, 3 classes" in out
    assert "have less than 0.3 in common with any anchor" in " ".join(out.split())


def test_the_same_call_draws_the_same_sheet(tmp_path):
    root = put_roboflow(tmp_path / "data")
    assert check(root) == 0
    first = (tmp_path / "check.png").read_bytes()
    assert check(root) == 0
    assert (tmp_path / "check.png").read_bytes() == first
    assert check(root, "--seed", "1") == 0
    assert (tmp_path / "check.png").read_bytes() != first
    assert check(root, "--no-masks") == 0
    assert (tmp_path / "check.png").read_bytes() != first


MISTAKES = {
    "a bad box": (lambda r: put_one(r, lambda x: x["annotations"][0].update(bbox=[0, 0, 0, 1])), [], "have no area"),
    "flags of masks": (
        put_roboflow,
        ["--crop-size", "32"],
        "is read as data to detect, for which there is no --crop-size",
    ),
    "flags of boxes": (
        lambda r: put_pairs(r, LABELS),
        [],
        "read as data to segment, for which there is no --short-side",
    ),
    "a task that does not fit": (
        put_roboflow,
        ["--task", "segment"],
        "for which there is no --short-side, --long-side",
    ),
    "masks of boxes alone": (put_yolo, ["--masks"], "has boxes and no outline"),
    "no folder": (lambda r: None, ["--task", "detect"], "There is no folder"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line(tmp_path, capsys, case):
    make, flags, message = MISTAKES[case]
    make(tmp_path / "data")
    assert check(tmp_path / "data", *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error, error
    assert not (tmp_path / "check.png").exists()


def test_objects_are_drawn_where_they_are():
    picture = np.zeros((100, 200, 3), np.uint8)
    masks = np.zeros((2, 100, 200), np.uint8)
    masks[0, 30:60, 20:60], masks[1, 30:60, 120:180] = 1, 1
    boxes = np.array([[20, 30, 60, 60], [120, 30, 180, 60.0]])
    labels, colours = np.array([1, 0]), [(255, 0, 0), (0, 255, 0)]
    told = dict(masks=masks, crowd=np.array([False, True]))
    drawn = draw_objects(picture, boxes, labels, colours, ["cat", "dog"], **told)
    assert drawn.shape == picture.shape and not picture.any()
    assert drawn[45, 40].tolist() == [0, int(255 * 0.45), 0]
    assert drawn[45, 20].tolist() == [0, 255, 0]  # the border of the box
    inside = drawn[35:55, 125:175].reshape(-1, 3)
    assert {tuple(x) for x in inside.tolist()} == {(0, 0, 0), (114, 114, 114)}  # a crowd is striped
    assert not drawn[70:].any()
    half = draw_objects(picture, boxes, labels, colours, ["cat", "dog"], longest=100, scores=np.array([0.5, 0.25]))
    assert half.shape == (50, 100, 3) and half[22, 10].tolist() == [0, 255, 0] and not half[22, 20].any()
