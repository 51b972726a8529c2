"""Masks as people have them by mistake: `nat-models check` says in one line what is wrong, or what it found."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from nat_models.cli import main
from tests.training.label_maps import (
    GREEN,
    LABELS,
    RED,
    SIZE,
    colours_of,
    exif,
    grey_tiff,
    palette_image,
    picture,
    put,
    put_pairs,
    rgb_16,
)

LABELS_255 = np.array([0, 255, 255], np.uint8)[LABELS]
COLOURED = colours_of(LABELS, (0, 0, 0), RED, GREEN)


def pairs(*stored: int, dtype=np.uint8, **kwargs):
    """Masks that hold these numbers."""
    return lambda root: put_pairs(root, np.array(stored, dtype)[np.minimum(LABELS, len(stored) - 1)], **kwargs)


def table(content, stored=(0, 1, 2), name: str = "classes.json"):
    """Masks that hold these numbers, and a table of classes."""

    def make(root: Path) -> None:
        mask = np.array(stored, np.uint8)[LABELS]
        put_pairs(root, mask)
        (root / name).write_text(content if isinstance(content, str) else json.dumps(content))

    return make


def beside(name: str, content, **kwargs):
    """Good pairs and one file more, or another one in place of a good one."""

    def make(root: Path) -> None:
        put_pairs(root)
        put(root / name, content, **kwargs)

    return make


def _frames(root):
    put_pairs(root)
    frames = [Image.fromarray(LABELS), Image.fromarray(LABELS)]
    (root / "masks/1.png").unlink()
    frames[0].save(root / "masks/1.tif", save_all=True, append_images=frames[1:])


def _in_place(name: str, content, **kwargs):
    """Good pairs, but that the mask 1 is another file."""

    def make(root: Path) -> None:
        put_pairs(root)
        (root / "masks/1.png").unlink()
        put(root / "masks" / name, content, **kwargs)

    return make


def _renamed(format: str, *, inner: str | None = None):
    def make(root: Path) -> None:
        put_pairs(root)
        kwargs = {} if inner is None else dict(compression=inner)
        Image.fromarray(LABELS).save(root / "masks/1.x", format=format, **kwargs)
        (root / "masks/1.x").rename(root / "masks/1.png")

    return make


def _leak(root):
    put_pairs(root, {"train/0": LABELS, "train/1": LABELS, "val/2": LABELS})
    (root / "images/val/2.png").write_bytes((root / "images/train/1.png").read_bytes())


def _no_common_name(root):
    for i in range(3):
        put(root / f"images/{i}.jpg", picture(i))
        put(root / f"masks/{i}_mask.png", LABELS)


def _parts_of_images_alone(root):
    put(root / "images/train/0.png", picture())
    put(root / "images/val/1.png", picture(1))
    put(root / "masks/0.png", LABELS)
    put(root / "masks/1.png", LABELS)


def _turned_otherwise(root):
    put_pairs(root)
    put(root / "images/1.png", picture(1, (20, 24)), exif=exif(6))


def _clear(root):
    put_pairs(root)
    image = Image.fromarray(LABELS).convert("LA")
    image.putalpha(Image.fromarray(LABELS))
    put(root / "masks/1.png", image)


def _test_only(root):
    put_pairs(root, {"train/0": LABELS, "val/1": LABELS})
    put(root / "images/train2/3.png", picture(3))


def _torn(side):
    def make(root: Path) -> None:
        put_pairs(root)
        path = root / side / "1.png"
        path.write_bytes(path.read_bytes()[:-30])

    return make


LIST = dict(values={"0": "a", "1": "b", "2": "c"})
# name: what makes the data, flags, the error
CASES = {
    "no folder": (lambda root: root.rmdir(), [], "There is no folder"),
    "an empty folder": (lambda root: None, [], "must hold images/ and masks/, .*; found no folder"),
    "folders of other names": (lambda root: put(root / "img/0.png", picture()), [], "must hold .* found img"),
    "no masks": (lambda root: put(root / "images/0.png", picture()), [], "one of masks and annotations, found neither"),
    "masks and annotations": (
        lambda root: put(put_pairs(root) / "annotations/0.png", LABELS),
        [],
        "one of masks and annotations, found masks and annotations",
    ),
    "no common name": (_no_common_name, [], r"No image of .* has a mask.*images/0\.jpg, .*masks/0_mask\.png"),
    "two masks of a name": (beside("masks/1.tif", LABELS), [], r"1\.png and .*1\.tif have one name but for the suffix"),
    "parts of images alone": (_parts_of_images_alone, [], "either both images/ and masks/ hold train/ and val/"),
    "parts and other files": (_test_only, [], r"images holds train, val, and beside them train2: sort them in"),
    "an image in two parts": (_leak, [], r"1 images are copies .* part: images/train/1\.png and images/val/2\.png"),
    "a group in two parts": (
        lambda root: put_pairs(root, {"train/p1_0": LABELS, "val/p1_1": LABELS}),
        ["--group", r"p\d"],
        r"1 images are of a group .*: images/train/p1_0\.png and images/val/p1_1\.png",
    ),
    "a group of everything": (pairs(0, 1, 2), ["--group", ""], "4 images in 1 groups: nothing can be held out"),
    "no group": (pairs(0, 1, 2), ["--group", "p(.)"], r"group 'p\(\.\)' does not match the image '0'"),
    "a broken group": (pairs(0, 1, 2), ["--group", "p("], r"group must be a regular expression, got 'p\('"),
    "one pair": (pairs(0, 1, 2, count=1), [], "1 images in 1 groups: nothing can be held out"),
    "masks as JPEG": (
        _in_place("1.jpg", LABELS),
        [],
        r"need not give back .* JPEG does not: .*1\.jpg\. Save .* PNG",
    ),
    "a JPEG called PNG": (_renamed("JPEG"), [], r"1\.png is a JPEG file, which may not give back"),
    "a TIFF with JPEG inside": (_renamed("TIFF", inner="jpeg"), [], r"1\.png is a TIFF with jpeg inside"),
    "numbers of a scale": (_renamed("PPM"), [], r"1\.png is a PPM file, which may not give back"),
    "inverted numbers": (
        _in_place("1.tif", grey_tiff(LABELS, 8, white_is=0)),
        [],
        r"1\.tif stores its numbers inverted",
    ),
    "16 bits of red, green and blue": (
        lambda root: put_pairs(root, {str(i): rgb_16(LABELS) for i in range(3)}),
        [],
        r"has 16 bits for each of several channels, of which 8 would be lost",
    ),
    "a WebP called PNG": (_renamed("WEBP"), [], r"1\.png is a WEBP file"),
    "colours without a table": (
        lambda root: put_pairs(root, COLOURED),
        [],
        r"0\.png holds colours, such as #ff0000: name them in classes\.json",
    ),
    "frames": (_frames, [], r"1\.tif holds 2 frames: a mask is one"),
    "transparent masks": (_clear, [], r"1\.png has transparent pixels, which are no class"),
    "fractions": (
        _in_place("1.tif", Image.fromarray(LABELS / np.float32(2))),
        [],
        "mode F, .*a class is a whole number",
    ),
    "one-hot arrays": (_in_place("1.npy", np.eye(3)[LABELS]), [], r"an array \[H, W\] of integers; .*\[32, 40, 3\]"),
    "a torn mask": (_torn("masks"), [], r"masks/1\.png cannot be read as a mask"),
    "a torn image": (_torn("images"), [], r"images/1\.png cannot be read as an image"),
    "a mask that is text": (beside("masks/1.png", b"<html>"), [], r"1\.png cannot be read as a mask: cannot identify"),
    "a pickled array": (
        _in_place("1.npy", np.array([{}], dtype=object)),
        [],
        r"1\.npy cannot be read as an array: .*objects in dtype",
    ),
    "another size": (
        beside("masks/1.png", LABELS[:, :-1].copy()),
        [],
        r"masks/1\.png has 39 x 32 pixels, and .*images/1\.png 40 x 32",
    ),
    "another size, turned": (_turned_otherwise, [], r"has 40 x 32 .* 24 x 20, shown as 20 x 24"),
    "a mask that lies sideways": (beside("masks/1.png", LABELS.T.copy()), [], "has 32 x 40 pixels, and .* 40 x 32"),
    "several bad masks": (
        lambda root: (put_pairs(root), [put(root / f"masks/{i}.png", b"") for i in (0, 1)]),
        [],
        r"0\.png cannot be read .*; .*1\.png cannot be read .* \(2 of 4 images and masks\)",
    ),
    "0 and 255": (pairs(0, 255), [], r"hold 0 and 255 alone, .*mask_values 255:1 makes it a class, 255:ignore"),
    "0 and 255, with names": (
        table("a\nb", (0, 255, 255), "classes.txt"),
        [],
        "hold 0 and 255 alone, and 255 is ignored by default: nothing would be learnt",
    ),
    "0 and 255 in a palette": (
        lambda root: put_pairs(root, {str(i): palette_image(LABELS_255, RED, GREEN) for i in range(3)}),
        [],
        "hold 0 and 255 alone",
    ),
    "0 and ignored": (
        pairs(0, 255),
        ["--mask-values", "255:ignore"],
        "2 to 255 classes, found 1; the masks hold 0, 255",
    ),
    "everything ignored": (pairs(255), [], "hold 0 and 255 alone"),
    "one class": (pairs(0), [], "There must be 2 to 255 classes, found 1; the masks hold 0"),
    "gaps": (pairs(0, 7, 11), [], r'hold the values 0, 7, 11: .*classes\.json, {"values": {"0": "name0", "7": "name1"'),
    "from 1": (pairs(1, 2, 3), [], r"hold the values 1, 2, 3: without names they must be 0, 1, 2, \.\.\. and 255"),
    "grey levels": (pairs(0, 128, 255), [], "hold the values 0, 128, 255"),
    "sixteen bits of instances": (pairs(0, 1001, 24003, dtype=np.uint16), [], "hold the values 0, 1001, 24003"),
    "a value without a class": (
        table({"values": {"0": "a", "1": "b"}}),
        [],
        r"1 values of the masks have no class in .*classes\.json: 2 \(masks/0\.png\)",
    ),
    "too few names": (
        table("a\nb", name="classes.txt"),
        [],
        r"1 values of the masks have no class in .*classes\.txt, which has 2 classes: 2 \(",
    ),
    "0 of ADE20K without reduce-zero-label": (
        table("a\nb", (0, 1, 2), "classes.txt"),
        ["--reduce-zero-label", "--mask-values", "2:3"],
        "1 values of the masks have no class",
    ),
    "too many names": (
        table("a\nb\nc\nd", name="classes.txt"),
        [],
        r"1 of 4 classes have no pixel in the training masks: d; the masks hold 0 \([\d,]+ pixels\), 1",
    ),
    "a class in val alone": (
        lambda root: put_pairs(root, {"train/0": LABELS % 2, "val/1": LABELS}),
        [],
        "1 of 3 classes have no pixel in the training masks: 2",
    ),
    "an unknown colour": (
        lambda root: (
            put_pairs(root, COLOURED),
            (root / "classes.json").write_text('{"colours": {"#000000": "a", "#ff0000": "b"}}'),
        ),
        [],
        r"1 colours of the masks have no class in .*: #008000 \(masks/0\.png\)",
    ),
    "a colour that is none": (table({"colours": {"red": "a"}}), [], """as "#ff0000" or "255,0,0", got 'red'"""),
    "a colour of 256": (table({"colours": {"256,0,0": "a"}}), [], "got '256,0,0'"),
    "broken JSON": (table('{"values": {"0": "a"'), [], r"classes\.json cannot be read as JSON"),
    "a number twice": (table('{"values": {"0": "a", "0": "b"}}'), [], "JSON: the key '0' stands twice"),
    "a number twice, written otherwise": (table({"values": {"1": "a", "01": "b"}}), [], "'01' stands twice"),
    "an unknown key": (table({"value": {"0": "a"}}), [], r"Unknown key in .*classes\.json: 'value', near to values"),
    "values and colours": (table({**LIST, "colours": {"#000000": "a"}}), [], "must have either values or colours"),
    "a value that is a word": (table({"values": {"road": "0"}}), [], "a value must be a whole number, got 'road'"),
    "a class that is a number": (table({"values": {"0": 1}}), [], "the class of '0' must be a name, or null"),
    "others that are a number": (table({**LIST, "others": 3}), [], "others must be the name of a class, or null"),
    "names that lack a class": (
        table({**LIST, "names": ["a", "b"]}),
        [],
        "names must list the classes of values, a, b, c",
    ),
    "JSON of a number": (table("3"), [], "must hold names, values or colours, got '3'"),
    "a name twice": (
        table("a\nb\na", name="classes.txt"),
        [],
        "names classes twice: a. Numbers of one class are merged",
    ),
    "an empty name": (table("a\n\nb", name="classes.txt"), [], r"classes\.txt has no name for class 1"),
    "two tables": (
        lambda root: (table(LIST)(root), table("a\nb\nc", name="classes.txt")(root)),
        [],
        "holds both classes.json and classes.txt",
    ),
    "a table that is not there": (pairs(0, 1, 2), ["--classes", "lost.json"], "There is no file lost.json of classes"),
    "values said twice": (
        table(LIST),
        ["--mask-values", "2:1"],
        "mask_values and reduce_zero_label are said in .*json",
    ),
    "broken mask values": (pairs(0, 1, 2), ["--mask-values", "255=1"], "must be as in 255:1,7:ignore, .* got '255=1'"),
    "mask values twice": (pairs(0, 1, 2), ["--mask-values", "2:1,2:0"], "each value once; got '2:1,2:0'"),
    "two bands": (pairs(0, 1, 2), ["--in-chans", "2"], r"cannot be read as 2 bands: save such images as \.npy"),
    "four bands of RGB": (pairs(0, 1, 2), ["--in-chans", "4"], r"has 3 bands of Pillow's mode RGB, and 4 are wanted"),
    "a flag that is none": (pairs(0, 1, 2), ["--class", "x"], "Unknown argument '--class', near to --classes"),
}


def check(root: Path, *flags: str) -> int:
    output = str(root.parent / "check.png")
    return main(["check", "--data", str(root), "--output", output, "--crop-size", "32", "--images", "2", *flags])


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_in_the_masks_is_one_line(tmp_path, capsys, case):
    make, flags, message = CASES[case]
    (root := tmp_path / "data").mkdir()
    make(root)
    assert check(root, *flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert re.search(message, error), error
    assert not (tmp_path / "check.png").exists()


def test_what_was_found_is_printed_and_drawn(tmp_path, capsys):
    root = tmp_path / "data"
    photographs = load_sample_images().images
    labels = np.zeros((80, 100), np.uint8)
    labels[10:40, 20:60], labels[:5] = 9, 255
    for i in range(8):
        photograph = Image.fromarray(photographs[i % 2]).crop((40 * i, 30 * i, 40 * i + 100, 30 * i + 80))
        put(root / f"images/{i}.jpg", photograph)
        put(root / f"masks/{i}.png", labels)
    put(root / "images/8.jpg", photograph)
    (root / "classes.json").write_text('{"values": {"0": "ground", "9": "a [b] $c$"}}')
    assert check(root, "--val-fraction", "0.25") == 0
    out = capsys.readouterr().out
    assert "left out: 1 images have no mask: images/8.jpg" in out
    assert "6 train, 2 val images with masks, 2 classes" in out
    share = (labels == 9).sum() / (labels != 255).sum()
    assert re.search(rf"a \[b\] \$c\$ +{100 * share:.3f}% +{100 * share:.3f}%", out)
    assert re.search(r"ignored, of all +6\.250% +6\.250%", out)
    assert re.search(r"mean of the bands: 0\.\d{4} 0\.\d{4} 0\.\d{4}\n", out)
    assert f"look at {tmp_path / 'check.png'}" in out
    drawn = np.asarray(Image.open(tmp_path / "check.png").convert("RGB")).astype(int)
    assert drawn.shape[1] > drawn.shape[0] > 300  # two rows of four
    # The colours of both classes cover much of what is drawn: hues are 0 and 222 degrees.
    red, blue = (drawn[..., 0] > drawn[..., 2] + 40).mean(), (drawn[..., 2] > drawn[..., 0] + 40).mean()
    assert red > 0.1 and blue > 0.01


def test_the_same_call_draws_the_same_sheet(tmp_path):
    root = put_pairs(tmp_path / "data", count=6)
    assert check(root) == 0
    first = (tmp_path / "check.png").read_bytes()
    assert check(root) == 0
    assert (tmp_path / "check.png").read_bytes() == first
    assert check(root, "--seed", "1") == 0
    assert (tmp_path / "check.png").read_bytes() != first


def test_many_bands_are_looked_at_too(tmp_path, capsys):
    root = tmp_path / "data"
    for i in range(4):
        put(root / f"images/{i}.npy", np.random.default_rng(i).integers(0, 4000, (*SIZE, 6)).astype(np.uint16))
        put(root / f"masks/{i}.npy", LABELS)
    assert check(root, "--in-chans", "6") == 0
    assert re.search(r"std of the bands:( 0\.\d{4}){6}\n", capsys.readouterr().out)


def test_a_full_check_decodes_images(tmp_path, capsys):
    root = put_pairs(tmp_path / "data")
    put(root / "images/1.jpg", picture())
    (root / "images/1.png").unlink()
    (root / "images/1.jpg").write_bytes((root / "images/1.jpg").read_bytes()[:-300])
    assert check(root, "--verify", "full") == 2
    assert "1.jpg cannot be read as an image" in capsys.readouterr().err


def test_a_sheet_that_cannot_be_written_is_one_line(tmp_path, capsys):
    root = put_pairs(tmp_path / "data")
    assert check(root, "--output", str(tmp_path / "lost" / "x.png")) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Cannot write" in error
