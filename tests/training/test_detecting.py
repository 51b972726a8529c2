"""nat-models predict with a detector: COCO's results, the table of objects, pictures, tiles."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.mask import decode
from torchvision.transforms.v2.functional import pil_to_tensor, to_pil_image

from nat_models.cli import main
from nat_models.training.detections import Detections, picture_jpeg
from nat_models.training.detectors import detector_of, load_detector, save_detector
from nat_models.training.outlines import encode
from tests.training.bright import CONFIG, Brightness, paint, put_config
from tests.training.label_maps import exif

SCENES = {
    "a.png": [("red", (10, 20, 50, 40), 255), ("green", (60, 30, 100, 90), 230), ("red", (80, 5, 90, 15), 51)],
    "more/b.png": [("green", (3, 4, 40, 41), 204)],
    "dark.png": [],
}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run's folder, whose detector finds what is bright."""
    put_config(tmp_path / "run" / "best")
    monkeypatch.setattr("nat_models.training.detecting.load_detector", lambda f: (Brightness(), detector_of(f)))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def put_images(root: Path, scenes=SCENES) -> Path:
    for name, things in scenes.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(paint(things)).save(root / name)
    return root


@pytest.fixture
def images(tmp_path) -> Path:
    return put_images(tmp_path / "images")


def read(folder: Path) -> tuple[list, dict, list]:
    rows = list(csv.DictReader((folder / "objects.csv").open()))
    return json.loads((folder / "detections.json").read_text()), json.loads((folder / "images.json").read_text()), rows


def test_a_folder_of_images_becomes_results_a_table_and_pictures(run, images, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["predict", "--model", "run", "images", "--output", "out"]) == 0
    said = "look at out: detections.json, objects.csv and pictures/ of 3 images, 3 objects of a score from 0.5 on"
    assert said in capsys.readouterr().out
    files = {p.relative_to(output).as_posix() for p in output.rglob("*") if p.is_file()}
    pictures = {f"pictures/{name}.jpg" for name in ("a", "more/b", "dark")}
    assert files == {"detections.json", "images.json", "objects.csv", *pictures}
    results, told, rows = read(output)
    names = {image["id"]: image["file_name"] for image in told["images"]}
    assert names == {1: "a.png", 2: "dark.png", 3: "more/b.png"}
    assert told["images"][0] == dict(id=1, file_name="a.png", height=96, width=128)
    assert told["categories"] == [dict(id=30, name="green"), dict(id=7, name="red")]
    found = [(names[x["image_id"]], x["category_id"], x["bbox"], round(x["score"], 3)) for x in results]
    assert found == [
        ("a.png", 7, [10, 20, 40, 20], 1),
        ("a.png", 30, [60, 30, 40, 60], 0.902),
        ("a.png", 7, [80, 5, 10, 10], 0.2),  # less than is shown
        ("more/b.png", 30, [3, 4, 37, 37], 0.8),
    ]
    inside = decode(results[1]["segmentation"])
    assert inside.shape == (96, 128) and inside.sum() == pytest.approx(2400, abs=12) and inside[31:89, 61:99].all()
    assert [(row["image"], row["class"], row["category_id"], row["image_id"]) for row in rows] == [
        ("images/a.png", "red", "7", "1"),
        ("images/a.png", "green", "30", "1"),
        ("images/more/b.png", "green", "30", "3"),
    ]
    box = [float(rows[1][key]) for key in ("score", "x", "y", "width", "height", "mask_pixels")]
    assert box == [0.902, 60, 30, 40, 60, inside.sum()]
    picture = np.asarray(Image.open(output / "pictures" / "a.jpg"))
    dark = np.asarray(Image.open(output / "pictures" / "dark.jpg"))
    assert picture.shape == (96, 128, 3) and dark.max() < 10


def test_results_load_into_cocos_own_tools(run, images):
    assert main(["predict", "--model", "run", "images"]) == 0
    found = COCO("detected/images.json").loadRes("detected/detections.json")
    assert len(found.anns) == 4 and found.cats[7]["name"] == "red"
    assert found.annToMask(found.anns[2]).shape == (96, 128)


def test_the_threshold_is_that_of_all_files(run, images):
    assert main(["predict", "--model", "run", "images", "--threshold", "0.85"]) == 0
    results, _, rows = read(Path("detected"))
    assert len(results) == len(rows) == 2
    assert main(["predict", "--model", "run", "images", "--threshold", "0.1"]) == 0
    results, _, rows = read(Path("detected"))
    assert len(results) == len(rows) == 4


def test_a_threshold_below_the_detectors_own_finds_more(run, tmp_path):
    put_images(tmp_path / "faint", {"a.png": [("red", (10, 20, 50, 40), 8)]})
    for flags, count in (([], 0), (["--threshold", "0.01"], 1)):
        assert main(["predict", "--model", "run", "faint", *flags]) == 0
        assert len(read(Path("detected"))[0]) == count


def test_no_object_at_all_is_valid_files(run, tmp_path):
    put_images(tmp_path / "black", {"a.png": [], "b.png": []})
    assert main(["predict", "--model", "run", "black"]) == 0
    results, told, rows = read(Path("detected"))
    assert results == [] and rows == [] and [image["id"] for image in told["images"]] == [1, 2]
    assert Path("detected/objects.csv").read_text().startswith("image,image_id,class,category_id,score,x,y,")
    COCO("detected/images.json")


@pytest.mark.parametrize("names", [("a.png", "more/b.png", "dark.png"), ("x/a.png", "other\\b.png", "dark.png")])
def test_ids_of_images_are_taken_from_cocos_json(run, images, names):
    entries = [dict(id=100 + i, file_name=name) for i, name in enumerate(names)]
    Path("ids.json").write_text(json.dumps(dict(images=entries)))
    assert main(["predict", "--model", "run", "images", "--image-ids", "ids.json"]) == 0
    results, told, rows = read(Path("detected"))
    assert [x["image_id"] for x in results] == [100, 100, 100, 101]
    assert {x["file_name"]: x["id"] for x in told["images"]} == {"a.png": 100, "more/b.png": 101, "dark.png": 102}
    assert [row["image_id"] for row in rows] == ["100", "100", "101"]


def test_tiles_give_what_the_whole_image_gives(run, tmp_path):
    things = [("red", (20, 20, 250, 60), 250), ("green", (120, 100, 140, 180), 200), ("red", (5, 150, 30, 190), 230)]
    (tmp_path / "large").mkdir()
    Image.fromarray(paint(things, (200, 300))).save(tmp_path / "large" / "a.png")
    for flags in ([], ["--tile", "128"]):
        assert main(["predict", "--model", "run", "large", *flags]) == 0
        results, _, _ = read(Path("detected"))
        assert [(x["category_id"], x["bbox"]) for x in results] == [
            (7, [20, 20, 230, 40]),
            (7, [5, 150, 25, 40]),
            (30, [120, 100, 20, 80]),
        ]
        assert results[0]["segmentation"]["size"] == [200, 300]
        assert decode(results[0]["segmentation"]).sum() == pytest.approx(9200, abs=60)


def test_boxes_lie_on_the_upright_image(run, tmp_path):
    (tmp_path / "turned").mkdir()
    upright = paint([("red", (10, 20, 50, 40), 255)])
    Image.fromarray(np.ascontiguousarray(np.rot90(upright))).save(tmp_path / "turned" / "a.png", exif=exif(6))
    assert main(["predict", "--model", "run", "turned"]) == 0
    (found,), told, _ = read(Path("detected"))
    assert found["bbox"] == [10, 20, 40, 20] and found["segmentation"]["size"] == [96, 128]
    assert (told["images"][0]["height"], told["images"][0]["width"]) == (96, 128)


def test_arrays_of_any_number_of_bands_are_read(tmp_path, monkeypatch, capsys):
    put_config(tmp_path / "run", replace(CONFIG, mean=[0.5] * 5, std=[0.2] * 5))
    monkeypatch.setattr("nat_models.training.detecting.load_detector", lambda f: (Brightness(), detector_of(f)))
    monkeypatch.chdir(tmp_path)
    bands = np.zeros((96, 128, 5), np.uint16)
    bands[20:40, 10:50, 0] = 65535
    np.save(tmp_path / "scene.npy", bands)
    assert main(["predict", "--model", "run", "scene.npy"]) == 0
    (found,), _, _ = read(Path("detected"))
    assert found["bbox"] == [10, 20, 40, 20] and Path("detected/pictures/scene.jpg").is_file()
    Image.new("RGB", (64, 64)).save("photo.png")
    assert main(["predict", "--model", "run", "photo.png"]) == 2
    assert "photo.png cannot be read as 5 bands: save such images as .npy, [H, W, C]." in capsys.readouterr().err


def test_unreadable_images_are_skipped_on_request(run, images, capsys):
    (images / "broken.png").write_bytes(b"no image")
    assert main(["predict", "--model", "run", "images", "--skip-unreadable"]) == 0
    assert "skipped: " in capsys.readouterr().err
    assert [x["file_name"] for x in read(Path("detected"))[1]["images"]] == ["a.png", "dark.png", "more/b.png"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--top-k", "2"], "--top-k is not for a detector"),
        (["--multi-scale"], "--multi-scale is not for a detector"),
        (["--img-size", "64"], "--img-size is not for a detector"),
        (["--tile", "100"], "A tile must be a multiple of 32 px and at least 128, got 100."),
        (["--threshold", "1.5"], "--threshold"),
        (["--output", "images/found"], "must not lie in what is read, images"),
        (["images/a.png", "copy/a.jpg"], "would both have the picture a.jpg: rename one."),
        (["broken.png"], "broken.png cannot be read as an image"),
        (["--image-ids", "none.json"], "--image-ids none.json cannot be read as COCO's JSON with images"),
        (["--image-ids", "empty.json"], "it lacks 'images'"),
        (["--image-ids", "some.json"], "images/dark.png is none of the images of some.json"),
        (["--image-ids", "twice.json"], "would both have the image id 4"),
        (["--image-ids", "unclear.json"], "images/a.png: 2 images of unclear.json have its name"),
    ],
)
def test_mistakes_are_one_line_and_leave_no_results(flags, message, run, images, tmp_path, capsys):
    (tmp_path / "copy").mkdir()
    Image.open("images/a.png").save("copy/a.jpg")
    (tmp_path / "broken.png").write_bytes(b"no image")
    names = {"some": {"a.png": 3}, "twice": {"a.png": 4, "dark.png": 4}, "unclear": {"x/a.png": 3, "y/a.png": 4}}
    for name, ids in names.items():
        entries = [dict(id=number, file_name=file) for file, number in ids.items()]
        (tmp_path / f"{name}.json").write_text(json.dumps(dict(images=entries)))
    (tmp_path / "empty.json").write_text("{}")
    sources = [] if flags[0].endswith("g") else ["images"]
    assert main(["predict", "--model", "run", *sources, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not [p for p in tmp_path.rglob("*") if p.name.startswith(("detections.json", "objects.csv"))]


@pytest.mark.parametrize("flags", [["--image-ids", "x.json"], ["--tile", "512"]])
def test_a_classifier_has_no_flags_of_detectors(flags, images, capsys):
    assert main(["predict", "--model", "nat_mini", "--no-pretrained", str(images), *flags]) == 2
    assert f"{flags[0]} is not for a classifier, as nat_mini is one." in capsys.readouterr().err


def test_the_results_are_what_the_saved_network_finds(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = replace(CONFIG, category_ids=[None, None])
    (tmp_path / "run" / "best").mkdir(parents=True)
    save_detector(config.make_network(), tmp_path / "run" / "best", config)
    monkeypatch.chdir(tmp_path)
    values = np.random.default_rng(1).integers(0, 256, (8, 12, 3), np.uint8)
    image = pil_to_tensor(to_pil_image(values).resize((120, 80)))
    to_pil_image(image).save("a.png")
    assert main(["predict", "--model", "run", "a.png"]) == 0
    results, told, _ = read(Path("detected"))
    network, _ = load_detector(tmp_path / "run")
    with torch.no_grad():
        (expected,) = network([image / 255])
    boxes = torch.tensor([x["bbox"] for x in results])
    boxes[:, 2:] += boxes[:, :2]
    assert len(results) == 10 and torch.allclose(boxes, expected["boxes"], atol=1e-3)
    assert [x["score"] for x in results] == pytest.approx(expected["scores"].tolist(), abs=1e-6)
    assert [x["category_id"] - 1 for x in results] == expected["labels"].tolist()
    assert [x["id"] for x in told["categories"]] == [1, 2]
    for x, mask in zip(results, expected["masks"], strict=True):
        assert (decode(x["segmentation"]) == (mask[0] >= 0.5).numpy()).mean() > 0.999


def test_a_picture_has_the_classes_colours_and_is_no_larger_than_people_look_at():
    mask = np.zeros((1500, 3000), np.uint8)
    mask[600:1200, 300:1500] = 1
    box, label, score = np.array([[300, 300, 1500, 1200]], np.float32), np.array([1]), np.array([0.9], np.float32)
    found = Detections((1500, 3000), box, label, score, [encode(mask)])
    shown = io.BytesIO(picture_jpeg(torch.zeros(3, 1500, 3000, dtype=torch.uint8), found, CONFIG))
    picture = np.asarray(Image.open(shown)).astype(int)
    assert picture.shape == (1024, 2048, 3)
    assert picture[500, round(300 * 2048 / 3000) + 1].tolist() == pytest.approx([255, 0, 0], abs=40)  # the box's line
    assert picture[600, 600].tolist() == pytest.approx([115, 0, 0], abs=10)  # the mask
    assert picture[350, 600].max() < 10 and picture[600, 1500].max() < 10
