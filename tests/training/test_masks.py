"""Promises of masks: every encoding is read as documented, whatever numbers stand for the classes."""

import json
import pickle
import re
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from nat_models.errors import UserError
from nat_models.training.mask_files import MaskFile, read_header
from nat_models.training.mask_sets import read_image
from nat_models.training.mask_values import MaskReading
from nat_models.training.masks import histogram, read_mask_data
from tests.training.label_maps import (
    GREEN,
    LABELS,
    ORIENTED,
    RED,
    exif,
    grey_png,
    grey_tiff,
    palette_image,
    picture,
    put,
    put_pairs,
)

IDENTITY = MaskReading({0: 0, 1: 1, 2: 2, 255: 255})
TIFF_16 = Image.fromarray(LABELS.astype(np.uint16))
ENCODINGS = {
    "grey.png": LABELS,
    "grey.tif": LABELS,
    "grey.bmp": LABELS,
    "two bits.tif": grey_tiff(LABELS, 2),
    "four bits.tif": grey_tiff(LABELS, 4),
    "palette.png": palette_image(LABELS, (9, 9, 9), RED, GREEN),
    "palette.gif": palette_image(LABELS, (9, 9, 9), RED, GREEN),
    "two bits.png": grey_png(LABELS, 2),
    "four bits.png": grey_png(LABELS, 4),
    "sixteen bits.png": LABELS.astype(np.uint16),
    "sixteen bits.tif": TIFF_16,
    "integers.tif": Image.fromarray(LABELS.astype(np.int32)),
    "grey rgb.png": np.stack([LABELS] * 3, axis=2),
    "opaque.png": Image.fromarray(LABELS).convert("LA"),
    "opaque rgb.png": Image.fromarray(LABELS).convert("RGBA"),
    "bytes.npy": LABELS,
    "integers.npy": LABELS.astype(np.int64),
}


def one(path, turn: int = 1) -> MaskFile:
    return MaskFile(path.name, str(path), turn)


def by_name(data, part: str = "train") -> dict[str, np.ndarray]:
    """For each mask its pixels as names of classes, "" where they are ignored."""
    names = np.array([*data.names, *[""] * (256 - len(data.names))])
    masks = data.parts[part].masks
    return {mask.name: names[data.reading.read(mask)] for mask in masks}


@pytest.mark.parametrize("name", ENCODINGS)
def test_a_mask_reads_the_same_however_it_is_stored(tmp_path, name):
    labels = IDENTITY.read(one(put(tmp_path / name, ENCODINGS[name])))
    assert labels.dtype == np.uint8
    assert np.array_equal(labels, LABELS)


def test_one_bit_is_two_classes(tmp_path):
    path = put(tmp_path / "x.png", Image.fromarray(LABELS == 1))
    assert np.array_equal(IDENTITY.read(one(path)), LABELS == 1)


def test_numbers_above_a_byte_have_classes_too(tmp_path):
    root = put_pairs(tmp_path, np.array([7, 1000, 40000], np.uint16)[LABELS])
    (root / "classes.json").write_text(json.dumps({"values": {"40000": "far", "7": "near", "1000": None}}))
    (pixels, *_) = by_name(read_mask_data(root)).values()
    assert np.array_equal(pixels, np.array(["near", "", "far"])[LABELS])


def test_a_reading_can_be_pickled(tmp_path):
    mask = one(put(tmp_path / "x.png", LABELS))
    assert np.array_equal(IDENTITY.read(mask), pickle.loads(pickle.dumps(IDENTITY)).read(mask))


def test_a_number_without_a_class_is_never_read_as_another(tmp_path):
    with pytest.raises(UserError, match=r"x\.png holds what has no class: 2\."):
        MaskReading({0: 0, 1: 1, 3: 1}).read(one(put(tmp_path / "x.png", LABELS)))


# What is written in classes.json, what the masks hold in place of 0, 1 and 2, and the names of those.
TABLES = {
    "numbers that do not follow each other": (
        {"values": {"0": "ground", "7": "road", "11": "sky"}},
        (0, 7, 11),
        ("ground", "road", "sky"),
    ),
    "merged": ({"values": {"3": "ground", "7": "road", "11": "road"}}, (3, 7, 11), ("ground", "road", "road")),
    "ignored": ({"values": {"0": "ground", "7": None, "11": "sky"}}, (0, 7, 11), ("ground", "", "sky")),
    "255 by default": ({"values": {"0": "ground", "1": "road"}}, (0, 1, 255), ("ground", "road", "")),
    "255 as a class": ({"values": {"0": "ground", "255": "road"}}, (0, 255, 255), ("ground", "road", "road")),
    "others as a class": ({"values": {"5": "road"}, "others": "rest"}, (5, 60, 61), ("road", "rest", "rest")),
    "others ignored": ({"values": {"5": "a", "6": "b"}, "others": None}, (5, 6, 7), ("a", "b", "")),
    "as id2label": ({"0": "ground", "1": "road", "2": "sky"}, (0, 1, 2), ("ground", "road", "sky")),
    "a list": (["ground", "road", "sky"], (0, 1, 2), ("ground", "road", "sky")),
    "an order of its own": (
        {"values": {"0": "ground", "1": "road", "2": "sky"}, "names": ["sky", "road", "ground"]},
        (0, 1, 2),
        ("ground", "road", "sky"),
    ),
    "colours": (
        {"colours": {"#000000": "ground", "255,0,0": "road", "(0, 128, 0)": "sky"}},
        ((0, 0, 0), RED, GREEN),
        ("ground", "road", "sky"),
    ),
    "colours merged and ignored": (
        {"colours": {"#000000": "ground", "#FF0000": "road", "#008000": None, "#010101": "road"}},
        ((0, 0, 0), RED, GREEN),
        ("ground", "road", ""),
    ),
    "unknown colours ignored": (
        {"colours": {"#000000": "ground", "#ff0000": "road"}, "others": None},
        ((0, 0, 0), RED, GREEN),
        ("ground", "road", ""),
    ),
}


@pytest.mark.parametrize("case", TABLES)
def test_a_table_says_what_numbers_and_colours_mean(tmp_path, case):
    table, stored, names = TABLES[case]
    root = put_pairs(tmp_path, np.array(stored, np.uint8)[LABELS])
    (root / "classes.json").write_text(json.dumps(table))
    data = read_mask_data(root)
    assert set(data.names) == set(names) - {""}
    assert len(data.parts["train"]) == 4 - len(data.parts["val"]) == 3
    for pixels in by_name(data).values():
        assert np.array_equal(pixels, np.array(names)[LABELS])


def test_names_have_the_order_of_the_table(tmp_path):
    root = put_pairs(tmp_path)
    for names in (["sky", "road", "ground"], ["ground", "sky", "road"]):
        table = {"values": {"0": "ground", "1": "road", "2": "sky"}, "names": names}
        (root / "classes.json").write_text(json.dumps(table))
        assert read_mask_data(root).names == names


def test_a_palette_is_told_by_colours_where_a_table_has_them(tmp_path):
    root = put_pairs(tmp_path, {str(i): palette_image(LABELS, (0, 0, 0), RED, GREEN) for i in range(3)})
    (root / "c.json").write_text('{"colours": {"#ff0000": "road", "#000000": "ground", "#008000": "sky"}}')
    data = read_mask_data(root, classes=root / "c.json")
    assert data.colours == [RED, (0, 0, 0), GREEN]
    for pixels in by_name(data).values():
        assert np.array_equal(pixels, np.array(["ground", "road", "sky"])[LABELS])


def test_colours_to_draw_with_are_those_of_the_palette_or_all_distinct(tmp_path):
    mine = read_mask_data(
        put_pairs(tmp_path / "a", {str(i): palette_image(LABELS, (9, 9, 9), RED, GREEN) for i in range(3)})
    )
    assert mine.colours == [(9, 9, 9), RED, GREEN]
    grey = read_mask_data(
        put_pairs(tmp_path / "b", {str(i): palette_image(LABELS, (9, 9, 9), RED, RED) for i in range(3)})
    )
    assert len(set(grey.colours)) == 3


@pytest.mark.parametrize(
    ("stored", "kwargs", "names", "expected"),
    [
        ((0, 255, 255), dict(mask_values="255:1"), ["0", "1"], (0, 1, 1)),
        ((0, 255, 255), dict(mask_values="255:1", classes=["ground", "road"]), ["ground", "road"], (0, 1, 1)),
        ((0, 128, 255), dict(mask_values="255:1,128:ignore"), ["0", "1"], (0, 255, 1)),
        ((0, 1, 2), dict(reduce_zero_label=True), ["1", "2"], (255, 0, 1)),
        ((2, 1, 255), dict(reduce_zero_label=True, classes=["a", "b"]), ["a", "b"], (1, 0, 255)),
        ((1, 2, 255), dict(mask_values={1: 0, 2: 1}), ["0", "1"], (0, 1, 255)),
    ],
)
def test_numbers_are_mapped_before_they_are_indices(tmp_path, stored, kwargs, names, expected):
    data = read_mask_data(put_pairs(tmp_path, np.array(stored, np.uint8)[LABELS]), **kwargs)
    assert data.names == names
    assert np.array_equal(data.reading.read(data.parts["train"].masks[0]), np.array(expected)[LABELS])


def test_a_text_file_has_a_class_a_line(tmp_path):
    root = put_pairs(tmp_path)
    (root / "classes.txt").write_bytes("\ufeffground\r\nroad\r\nsky\r\n\r\n".encode())
    assert read_mask_data(root).names == ["ground", "road", "sky"]


def test_ids_that_are_permuted_with_their_names_change_nothing(tmp_path):
    rng = np.random.default_rng(0)
    maps = {str(i): rng.integers(0, 5, LABELS.shape).astype(np.uint8) for i in range(6)}
    names, order = ["a", "b", "c", "d", "e"], [3, 0, 4, 1, 2]
    first = put_pairs(tmp_path / "a", maps)
    (first / "classes.txt").write_text("\n".join(names))
    second = put_pairs(tmp_path / "b", {k: np.array(order, np.uint8)[v] for k, v in maps.items()})
    (second / "classes.txt").write_text("\n".join(names[order.index(i)] for i in range(5)))
    one, other = read_mask_data(first, seed=3), read_mask_data(second, seed=3)
    assert one.names != other.names
    for part in ("train", "val"):
        a, b = by_name(one, part), by_name(other, part)
        assert a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)
        counted = [dict(zip(x.names, histogram(x).pixels[part], strict=True)) for x in (one, other)]
        assert counted[0] == counted[1]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("lies", ["shown", "stored", "of its own"])
@pytest.mark.parametrize("kinds", [("png", "png"), ("tif", "png"), ("jpg", "tif"), ("tif", "tif")])
def test_a_mask_lies_on_its_upright_image(tmp_path, orientation, lies, kinds):
    turned = ORIENTED[orientation]
    pixels = np.asarray(picture(1))
    for i in range(3):
        shifted = np.roll(pixels, i, axis=1)
        put(tmp_path / f"images/{i}.{kinds[0]}", Image.fromarray(turned(shifted).copy()), exif=exif(orientation))
        own = dict(exif=exif(orientation)) if lies == "of its own" else {}
        put(tmp_path / f"masks/{i}.{kinds[1]}", (LABELS if lies == "shown" else turned(LABELS)).copy(), **own)
    told = lies == "of its own" or orientation in (1, 5, 6, 7, 8)  # by sizes; otherwise somebody has to say
    if not told:
        with pytest.raises(UserError, match=r"fits .* as it is stored and as its EXIF .*: say with mask_orientation"):
            read_mask_data(tmp_path)
    data = read_mask_data(tmp_path, mask_orientation="auto" if told else lies)
    for image, mask in zip(data.parts["train"].images, data.parts["train"].masks, strict=True):
        assert np.array_equal(data.reading.read(mask), LABELS)
        assert read_image(image, 3).shape[1:] == LABELS.shape


def test_a_mask_is_not_laid_otherwise_than_was_said(tmp_path):
    put(tmp_path / "images/0.png", Image.fromarray(np.asarray(picture()).swapaxes(0, 1).copy()), exif=exif(6))
    put(tmp_path / "masks/0.png", LABELS)
    with pytest.raises(UserError, match=r"has 40 x 32 pixels, and .* 32 x 40, shown as 40 x 32; .* is stored"):
        read_mask_data(tmp_path, val_fraction=None, mask_orientation="stored")


def test_a_png_may_state_its_orientation_after_its_pixels(tmp_path):
    content = put(tmp_path / "x.png", picture(), exif=exif(6)).read_bytes()
    at = content.index(b"eXIf") - 4
    length = int.from_bytes(content[at : at + 4], "big") + 12
    exif_chunk, rest = content[at : at + length], content[:at] + content[at + length :]
    end = rest.index(b"IEND") - 4
    path = put(tmp_path / "y.png", rest[:end] + exif_chunk + rest[end:])
    assert read_header(one(path)).orientation == 6


@pytest.mark.parametrize(
    "layout",
    [
        ("images/train", "masks/train", "images/val", "masks/val"),
        ("images/training", "annotations/training", "images/validation", "annotations/validation"),
        ("train/images", "train/masks", "val/images", "val/masks"),
        ("images/train", "masks/training", "images/valid", "masks/val"),
        ("train/images", "train/annotations", "valid/images", "valid/masks"),
    ],
)
def test_parts_are_found_in_each_layout(tmp_path, layout):
    for n, (images, masks) in enumerate((layout[:2], layout[2:])):
        for i in range(3 - n):
            put(tmp_path / images / f"deep/{i}.x.jpg", picture(10 * n + i))
            put(tmp_path / masks / f"deep/{i}.x.png", LABELS)
    data = read_mask_data(tmp_path)
    assert [(name, len(part)) for name, part in data.parts.items()] == [("train", 3), ("val", 2)]
    assert data.parts["val"].images[0].name == f"{layout[2]}/deep/0.x.jpg"
    assert data.parts["val"].masks[0].name == f"{layout[3]}/deep/0.x.png"


def test_orphans_are_listed_and_left_out(tmp_path):
    put_pairs(tmp_path)
    put(tmp_path / "images/9.png", picture(9))
    put(tmp_path / "images/0_mask.png", picture(10))
    put(tmp_path / "masks/8.png", LABELS)
    data = read_mask_data(tmp_path)
    assert "left out: 2 images have no mask: images/0_mask.png, images/9.png" in data.notes
    assert "left out: 1 masks have no image: masks/8.png" in data.notes
    assert sum(len(part) for part in data.parts.values()) == 4


def test_a_split_depends_on_seed_and_names_alone(tmp_path):
    root = put_pairs(tmp_path, count=20)
    val = [image.name for image in read_mask_data(root, val_fraction=0.25).parts["val"].images]
    assert len(val) == 5
    assert val == [image.name for image in read_mask_data(root, val_fraction=0.25).parts["val"].images]
    assert val != [image.name for image in read_mask_data(root, val_fraction=0.25, seed=1).parts["val"].images]
    whole = read_mask_data(root, val_fraction=None)
    assert {name: len(part) for name, part in whole.parts.items()} == {"val": 20}


@pytest.mark.parametrize("seed", range(5))
def test_a_group_is_on_one_side_and_so_are_copies(tmp_path, seed):
    masks = {f"p{patient}_{i}": LABELS for patient in range(6) for i in range(3)}
    put_pairs(tmp_path, masks)
    (tmp_path / "images/p5_0.png").write_bytes((tmp_path / "images/p0_0.png").read_bytes())
    data = read_mask_data(tmp_path, group=r"^p(\d+)_", val_fraction=0.4, seed=seed)
    sides = [{re.search(r"p(\d)", image.name)[1] for image in part.images} for part in data.parts.values()]
    assert not sides[0] & sides[1] and sides[0] | sides[1] == set("012345")
    assert ({"0", "5"} <= sides[0]) or ({"0", "5"} <= sides[1])
    assert "1 images are copies of others: the split keeps copies together" in data.notes
    assert len(data.parts["val"]) <= 7


def test_pixels_are_counted_with_names_and_the_ignored_share(tmp_path):
    half = LABELS.copy()
    half[16:] = 255
    root = put_pairs(tmp_path, {"train/0": LABELS, "train/1": half, "val/2": LABELS})
    data = read_mask_data(root, classes=["ground", "road", "sky"])
    found = histogram(data)
    expected = [Counter(LABELS.ravel().tolist()), Counter(half.ravel().tolist())]
    assert found.pixels["val"] == [expected[0][i] for i in range(3)]
    assert found.pixels["train"] == [expected[0][i] + expected[1][i] for i in range(3)]
    assert found.ignored == {"train": 16 * 40, "val": 0}
    assert found.ignored_share("train") == 0.25
    share = 100 * found.pixels["train"][1] / sum(found.pixels["train"])
    assert re.search(rf"^road +{share:.3f}% +28\.125%$", "\n".join(found.lines()), re.MULTILINE)
    assert any(
        line.startswith("pixels of train: ") and line.endswith("25.00% of all are ignored") for line in data.notes
    )


def test_a_class_may_have_no_pixel_on_request(tmp_path):
    root = put_pairs(tmp_path)
    kwargs = dict(classes=["ground", "road", "sky", "sea"])
    with pytest.raises(UserError, match=r"1 of 4 classes have no pixel in the training masks: sea"):
        read_mask_data(root, **kwargs)
    assert histogram(read_mask_data(root, **kwargs, allow_empty=True), allow_empty=True).pixels["train"][3] == 0


def test_what_is_odd_is_said(tmp_path):
    blank = np.full_like(LABELS, 255)
    root = put_pairs(tmp_path, {"0": LABELS, "1": LABELS, "2": LABELS, "3": blank})
    put(root / "masks/notes.txt", b"x")
    (root / "classes.json").write_text('{"values": {"0": "road", "1": "Road"}, "others": null}')
    notes = "\n".join(read_mask_data(root).notes)
    assert "1 masks are ignored everywhere: masks/3.png" in notes
    assert "passed over in" in notes and "1 .txt" in notes
    assert "differ in capitals or blanks only: ['road', 'Road']" in notes
    assert f"{3 * (LABELS == 2).sum():,} pixels of 1 values that are not listed are 'others'" in notes


def test_a_digest_changes_with_names_parts_and_labels(tmp_path):
    def digest(change=lambda root: None, **kwargs) -> str:
        root = put_pairs(tmp_path / str(len(list(tmp_path.iterdir()))))
        change(root)
        return read_mask_data(root, **kwargs).digest()

    swapped = np.array([0, 2, 1], np.uint8)[LABELS]
    changed = [
        digest(classes=["a", "b", "c"]),
        digest(seed=1),
        digest(lambda root: put(root / "masks/0.png", swapped)),
        digest(mask_values="1:2,2:1"),
    ]
    assert digest() == digest()
    assert len({digest(), *changed}) == 5


def test_what_cannot_be_read_is_left_out_and_counted_on_request(tmp_path):
    root = put_pairs(tmp_path, count=10)
    put(root / "masks/1.png", b"")
    put(root / "images/2.png", b"")
    with pytest.raises(UserError, match=r"1\.png cannot .*2\.png cannot be read .* \(2 of 10 images and masks\)$"):
        read_mask_data(root)
    with pytest.raises(UserError, match=r"\(2 of 10 images and masks\); unreadable_limit is 10\.00%$"):
        read_mask_data(root, skip_unreadable=True, unreadable_limit=0.1)
    data = read_mask_data(root, skip_unreadable=True, unreadable_limit=0.2)
    assert sum(len(part) for part in data.parts.values()) == 8
    assert any(line.startswith("left out: 2 of 10 images, which cannot be read, such as") for line in data.notes)
    put(root / "masks/3.png", LABELS[:-1].copy())
    with pytest.raises(UserError, match=r"masks/3\.png has 40 x 31 pixels, and .* 40 x 32\.$"):
        read_mask_data(root, skip_unreadable=True, unreadable_limit=0.9)


def test_classes_have_the_indices_that_a_model_gave_them(tmp_path):
    root = put_pairs(tmp_path, np.array([5, 3, 255], np.uint8)[LABELS])
    table = tmp_path / "classes.json"
    table.write_text('{"values": {"5": "ground", "3": "road", "9": "sky"}}')
    model = ["sky", "road", "sea", "ground"]
    data = read_mask_data(root, names=model, allow_empty=True)
    assert data.names == model
    assert np.array_equal(data.reading.read(data.parts["train"].masks[0]), np.array([3, 1, 255])[LABELS])
    with pytest.raises(UserError, match="that the model lacks: ground, road; it has sky, sea"):
        read_mask_data(root, names=["sky", "sea"], allow_empty=True)
    table.unlink()
    put_pairs(tmp_path)
    data = read_mask_data(root, names=model, allow_empty=True)
    assert np.array_equal(data.reading.read(data.parts["train"].masks[0]), LABELS)


def test_colours_to_draw_with_follow_the_indices_of_the_model(tmp_path):
    root = put_pairs(tmp_path, np.array([(0, 0, 0), RED, GREEN], np.uint8)[LABELS])
    (root / "classes.json").write_text('{"colours": {"#000000": "ground", "#ff0000": "road", "#008000": "sky"}}')
    assert read_mask_data(root, names=["sky", "road", "ground"]).colours == [GREEN, RED, (0, 0, 0)]


def test_a_torn_png_is_found_where_headers_are_read(tmp_path):
    path = put(tmp_path / "x.png", picture())
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"x\.png cannot be read as an image"):
        read_header(one(path))


def test_other_masks_are_read_by_the_same_rule(tmp_path):
    root = put_pairs(tmp_path / "data", np.array([0, 1, 1], np.uint8)[LABELS])
    reading = read_mask_data(root, classes=["ground", "road", "sky"], allow_empty=True).reading
    other = np.array([2, 255, 0], np.uint8)[LABELS]
    assert np.array_equal(reading.read(one(put(tmp_path / "x.png", other))), other)
    reading = read_mask_data(root, classes=["road", "sky"], allow_empty=True, reduce_zero_label=True).reading
    assert np.array_equal(reading.read(one(tmp_path / "x.png")), np.array([1, 255, 255])[LABELS])
