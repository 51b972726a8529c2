"""nat-models evaluate with detectors: average precision, curves, what is confused, the worst images."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from nat_models.cli import main
from nat_models.training.coco_results import CocoMetrics
from nat_models.training.detection_report import Confusion, Curve, class_rows, curve_of
from nat_models.training.detections import Detections
from nat_models.training.detectors import detector_of, save_detector
from nat_models.training.instance_masks import InstanceMasks
from nat_models.training.outlines import Outlines, encode
from tests.training.bright import CONFIG, NAMES, Brightness, put_config, put_scenes

TRUE = {
    "a.png": [("red", (10, 20, 50, 40), 255), ("green", (60, 30, 100, 90), 230)],
    "b.png": [("green", (3, 4, 40, 41), 204), ("red", (60, 50, 120, 80), 153)],
    "c.png": [("red", (20, 20, 60, 60), 220)],
    "d.png": [],
}
# What is bright: some lie a little elsewhere, one has another colour, one is dark, one is where nothing is.
PAINTED = {
    "a.png": [("red", (13, 22, 53, 41), 255), ("green", (60, 30, 100, 90), 230), ("green", (5, 70, 25, 90), 245)],
    "b.png": [("green", (6, 4, 43, 41), 204)],
    "c.png": [("green", (20, 20, 60, 60), 220)],
    "d.png": [("red", (3, 3, 33, 33), 102)],
}
REPORT = {"metrics.json", "per_class.csv", "mistakes.csv", "mistakes.png"}
REPORT |= {f"{name}.{suffix}" for name in ("curves", "confusion") for suffix in ("csv", "png")}


@pytest.fixture
def run(tmp_path, monkeypatch) -> Path:
    """A run's folder, whose detector finds what is bright; one beside it finds boxes alone."""
    put_config(tmp_path / "run" / "best")
    put_config(tmp_path / "plain", replace(CONFIG, masks=False))
    monkeypatch.setattr(
        "nat_models.training.detecting.load_detector", lambda f: (Brightness(detector_of(f).masks), detector_of(f))
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


def told(folder: str = "report") -> dict:
    return json.loads(Path(folder, "metrics.json").read_text())


def rows(file: str, folder: str = "report") -> list[dict]:
    return list(csv.DictReader(Path(folder, file).open()))


def test_the_truth_has_perfect_figures(run):
    put_scenes(Path("data"), TRUE)
    assert main(["evaluate", "--model", "run", "--data", "data", "--output", "report"]) == 0
    found = told()
    known = ("box_ap", "box_ap50", "box_ap75", "mask_ap50", "mask_ap75")
    assert all(found[key] == pytest.approx(100) for key in known)
    assert found["mask_ap"] > 95  # the very corners of masks are not pasted
    assert found["box_ap_large"] is None and found["images"] == 4
    assert {p.name for p in Path("report").iterdir()} == REPORT
    for row in rows("per_class.csv"):
        assert [float(row[key]) for key in ("precision", "recall", "best_f1")] == [100, 100, 100]
    assert rows("mistakes.csv") == []


def by_pycocotools(kind: str) -> list[float]:
    """AP, AP50, AP75 of what predict wrote, against the user's own file."""
    truth = COCO("data/annotations.json")
    evaluator = COCOeval(truth, truth.loadRes("detected/detections.json"), kind)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    return (100 * evaluator.stats[:3]).tolist()


@pytest.mark.parametrize("ids", [None, {"red": 1, "green": 90}])
def test_predicted_results_have_the_average_precision_that_is_printed(run, ids, capsys):
    numbers = ids or dict(zip(NAMES, CONFIG.category_ids, strict=True))
    put_scenes(Path("data"), PAINTED, TRUE, ids=numbers, first=500)
    if ids is not None:
        config = json.loads(Path("run/best/config.json").read_text())
        Path("run/best/config.json").write_text(json.dumps(config | dict(category_ids=[ids[n] for n in NAMES])))
    assert main(["evaluate", "--model", "run", "--data", "data", "--output", "report"]) == 0
    printed, found = capsys.readouterr().out, told()
    ids_from = ["--image-ids", "data/annotations.json"]
    assert main(["predict", "--model", "run", "data/images", *ids_from]) == 0
    for kind, prefix in (("bbox", "box"), ("segm", "mask")):
        expected = by_pycocotools(kind)
        assert [found[f"{prefix}_{key}"] for key in ("ap", "ap50", "ap75")] == pytest.approx(expected, abs=1e-3)
        assert 10 < expected[0] < 60 and f"{expected[0]:.2f}" in printed


def test_classes_are_matched_by_name_whatever_their_ids(run, capsys):
    put_scenes(Path("data"), PAINTED, TRUE)
    put_scenes(Path("other"), PAINTED, TRUE, ids={"red": 1, "green": 90})
    printed = []
    for data in ("data", "other"):
        assert main(["evaluate", "--model", "run", "--data", data]) == 0
        cells = [[x.strip() for x in line.split("│")] for line in capsys.readouterr().out.splitlines()]
        printed.append([x for x in cells if x[1:2] and x[1].startswith(("box", "mask", "green", "red"))])
    assert printed[0] == printed[1] and len(printed[0]) == 16
    assert float(dict(x[1:3] for x in printed[0])["box_ap"]) > 10


def test_what_is_confused_missed_and_invented_is_told(run):
    put_scenes(Path("data"), PAINTED, TRUE)
    assert main(["evaluate", "--model", "run", "--data", "data", "--output", "report"]) == 0
    matrix = Path("report/confusion.csv").read_text().splitlines()
    assert matrix == [
        "true,green,red,background",
        "green,2,0,0",
        "red,1,1,1",
        "background,1,0,0",
    ]
    assert Path("report/mistakes.csv").read_text().splitlines() == [
        "image,found_wrongly,missed",
        "images/c.png,1,1",
        "images/a.png,1,0",
        "images/b.png,0,1",
    ]
    green, red = rows("per_class.csv")
    assert float(red["best_f1"]) == pytest.approx(50) and float(red["score_of_best_f1"]) == 1  # 1 of 1, and of 3
    assert [float(green[key]) for key in ("true", "found", "right", "precision", "recall")] == [2, 4, 2, 50, 100]
    assert [float(red[key]) for key in ("true", "found", "right", "precision")] == [3, 1, 1, 100]
    assert main(["evaluate", "--model", "run", "--data", "data", "--output", "report", "--threshold", "0.3"]) == 0
    assert Path("report/confusion.csv").read_text().splitlines()[-1] == "background,1,1,0"  # d.png scores 0.4
    assert told()["threshold"] == 0.3
    assert Image.open("report/mistakes.png").width > 500 and Image.open("report/curves.png").width > 500


def found_of(*objects) -> Detections:
    """(box, label, score) of each."""
    boxes = np.array([x[0] for x in objects], np.float32).reshape(-1, 4)
    labels, scores = np.array([x[1] for x in objects], np.int64), np.array([x[2] for x in objects], np.float32)
    return Detections((200, 200), boxes, labels, scores, None)


def test_a_confusion_matrix_worked_by_hand():
    confusion = Confusion(2, 0.5)
    boxes = np.array([[0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [100, 100, 200, 200]], np.float32)
    labels, crowd = np.array([0, 0, 1, 1]), np.array([False, False, False, True])
    found = found_of(
        ((0, 0, 10, 9), 1, 0.99),  # of another class: it takes what the next one leaves, which is nothing
        ((0, 0, 10, 10), 0, 0.8),  # right
        ((0, 0, 10, 10), 0, 0.7),  # a second one: found where nothing is left
        ((20, 0, 30, 10), 1, 0.6),  # the other class
        ((40, 0, 50, 4), 1, 0.9),  # an IoU of 0.4
        ((110, 110, 120, 120), 1, 0.9),  # in a crowd of its class: does not count
        ((130, 110, 140, 120), 0, 0.9),  # in a crowd of another class
        ((40, 0, 50, 10), 1, 0.4),  # below the threshold
    )
    confusion.update(found, boxes, labels, crowd)
    assert confusion.matrix.tolist() == [[1, 1, 0], [0, 0, 1], [2, 2, 0]]
    assert (confusion.false, confusion.missed) == ([5], [2])
    confusion.update(found_of(), boxes[:1], labels[:1], crowd[:1])
    assert confusion.matrix.tolist() == [[1, 1, 1], [0, 0, 1], [2, 2, 0]] and confusion.worst() == [0, 1]
    confusion.update(found_of(), boxes[:0], labels[:0], crowd[:0])
    assert confusion.worst() == [0, 1]
    figures = confusion.figures(0)
    assert (figures["true"], figures["found"], figures["right"]) == (3, 3, 1)
    assert figures["precision"] == figures["recall"] == pytest.approx(100 / 3)


def test_curves_are_those_of_the_ranked_objects():
    """Of four objects, in the order of the scores: right, wrong, right, right; one is never found."""
    config = replace(CONFIG, classes=["a", "b"], category_ids=[1, 2])
    metrics = CocoMetrics(config.classes, False)
    true = torch.tensor([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 50, 10], [60, 0, 70, 10]])
    found = torch.cat([true[:1], torch.tensor([[90.0, 0, 99, 10]]), true[1:3]])
    scores = torch.tensor([0.9, 0.8, 0.7, 0.6])
    labels, none = torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool)
    target = dict(boxes=true, labels=labels, iscrowd=none, area=torch.full((4,), 100.0), image_id=1)
    metrics.update([dict(boxes=found, labels=labels, scores=scores)], [target])
    details = metrics.details()
    curve = curve_of(details["box"], 0, 4)
    assert len(curve.recall) == 76 and set(curve.recall.tolist()) == {0, 0.25, 0.5, 0.75}
    at = dict(zip(curve.recall.tolist(), zip(curve.precision, curve.score, strict=True), strict=True))
    assert at[0.25] == pytest.approx((1, 0.9)) and at[0.5] == pytest.approx((0.75, 0.7))
    assert at[0.75] == pytest.approx((0.75, 0.6))
    levels, f1 = curve.over_score()
    assert levels.tolist() == pytest.approx([0.6, 0.7, 0.9])
    assert f1.tolist() == pytest.approx([0.75, 0.6, 0.4])  # 2 * 0.75 * 0.5 / 1.25; 2 * 1 * 0.25 / 1.25
    assert curve.best() == pytest.approx((0.75, 0.6))
    assert len(curve_of(details["box"], 1, 0).recall) == 0
    confusion = Confusion(2, 0.5)
    confusion.matrix[0, 0] = 4
    first, second = class_rows(details, confusion, config)
    assert first["best_f1"] == pytest.approx(75) and np.isnan(second["best_f1"]) and np.isnan(second["box_ap"])
    assert np.isnan(Curve(*(np.zeros(0),) * 3).best()[0])


def test_what_the_run_held_out_is_evaluated_as_the_run_read_it(run, capsys):
    put_scenes(Path("data"), {f"{i}.png": TRUE["a.png"] for i in range(8)})
    for i in range(8):  # copies would stay on one side of the split
        pixels = np.asarray(Image.open(f"data/images/{i}.png")).copy()
        pixels[0, 0, 2] = 20 * i
        Image.fromarray(pixels).save(f"data/images/{i}.png")
    settings = dict(data="data", val_fraction=0.25, seed=3, group=None, skip_bad_annotations=False)
    Path("run/config.yaml").write_text(yaml.safe_dump(settings))
    assert main(["evaluate", "--model", "run", "--data", "data", "--output", "report"]) == 0
    assert told()["images"] == 2 and told()["split"] == "val"
    assert main(["evaluate", "--model", "run", "--data", "data", "--output", "report", "--split", "train"]) == 0
    assert told()["images"] == 6
    content = json.loads(Path("data/annotations.json").read_text())
    content["annotations"][0]["bbox"] = [10, 10, 0, 5]
    Path("data/annotations.json").write_text(json.dumps(content))
    assert main(["evaluate", "--model", "run", "--data", "data"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    Path("run/config.yaml").write_text(yaml.safe_dump(dict(settings, skip_bad_annotations=True)))
    assert main(["evaluate", "--model", "run", "--data", "data"]) == 0


def test_several_detectors_are_compared_in_one_table(run, capsys):
    put_scenes(Path("data"), PAINTED, TRUE)
    assert main(["evaluate", "--model", "plain", "run", "--data", "data", "--output", "report"]) == 0
    compared = rows("comparison.csv")
    assert [row["model"] for row in compared] == ["plain", "run"] and compared[0]["mask_ap"] == ""
    assert float(compared[0]["box_ap"]) == pytest.approx(float(compared[1]["box_ap"]))
    assert float(compared[1]["mask_ap"]) > 10
    for name in ("plain", "run"):
        assert {p.name for p in Path("report", name).iterdir()} == REPORT
    assert "mask_ap" not in told("report/plain") and "mask_ap" in capsys.readouterr().out


def test_boxes_alone_are_measured_where_there_are_no_outlines(run):
    put_scenes(Path("data"), TRUE)
    content = json.loads(Path("data/annotations.json").read_text())
    for entry in content["annotations"]:
        del entry["segmentation"]
    Path("data/annotations.json").write_text(json.dumps(content))
    assert main(["evaluate", "--model", "run", "--data", "data", "--output", "report"]) == 0
    assert told()["box_ap"] == pytest.approx(100) and "mask_ap" not in told()


def test_tiles_are_measured_with_all_that_they_find(run, capsys):
    """Each tile gives at most as many objects as the network does; the image may have more."""
    count = 120
    grid = [("red", (x, y, x + 3, y + 3), 255) for y in range(2, 90, 8) for x in range(2, 120, 10)][:count]
    put_scenes(Path("data"), {"a.png": grid})
    assert main(["evaluate", "--model", "run", "--data", "data", "--output", "report", "--tile", "128"]) == 0
    assert told()["box_ap"] == pytest.approx(100) and (told()["max_dets"], told()["tile"]) == (count, 128)
    capsys.readouterr()
    assert main(["evaluate", "--model", "run", "--data", "data"]) == 0
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "box_ar" in x)
    assert f"{100 * 10 / count:.2f}" in line


def test_nothing_found_is_a_report_of_zeros(run):
    put_scenes(Path("data"), {"a.png": [], "b.png": []}, {"a.png": TRUE["a.png"], "b.png": []})
    assert main(["evaluate", "--model", "run", "--data", "data", "--output", "report"]) == 0
    assert told()["box_ap"] == told()["mask_ap"] == 0
    assert Path("report/confusion.csv").read_text().splitlines()[1:] == ["green,0,0,1", "red,0,0,1", "background,0,0,0"]
    assert rows("curves.csv") == [] and {p.name for p in Path("report").iterdir()} == REPORT


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--crop-pct", "0.5"], "--crop-pct is not for detectors"),
        (["--multi-scale"], "--multi-scale is not for detectors"),
        (["--labels-real", "x.json"], "--labels-real is not for detectors"),
        (["--tile", "33"], "A tile must be a multiple of 32 px and at least 128, got 33."),
        (["--split", "test"], "data has no part test, only val."),
        (["--data", "nowhere"], "nowhere"),
        (["--data", "strangers"], "Classes in strangers, val that the model lacks: blue; it has green, red."),
        (["--model", "run", "nat_mini"], "--model names classifiers and detectors: evaluate them one kind at a time."),
        (["--model", "plain", "--masks"], "plain finds boxes alone: there are no --masks to measure."),
        (["--data", "broken"], "cannot be read as an image"),
    ],
)
def test_mistakes_are_one_line(flags, message, run, capsys):
    put_scenes(Path("data"), TRUE)
    put_scenes(Path("strangers"), {"a.png": [("blue", (2, 2, 40, 40), 255)]}, ids={"blue": 1})
    put_scenes(Path("broken"), TRUE)
    Path("broken/images/a.png").write_bytes(b"no image")
    assert main(["evaluate", "--model", "run", "--data", "data", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_unreadable_images_are_left_out_on_request(run, capsys):
    put_scenes(Path("data"), TRUE)
    Path("data/images/a.png").write_bytes(b"no image")
    argv = ["evaluate", "--model", "run", "--data", "data", "--output", "report", "--skip-unreadable"]
    assert main(argv) == 0
    assert told()["images"] == 3 and "left out: 1 of 4 images" in capsys.readouterr().out
    Image.open("data/images/b.png").save("whole.jpg")
    cut_off = Path("whole.jpg").read_bytes()[:-300]  # its header can be read
    Path("data/images/b.png").write_bytes(cut_off)
    assert main(argv) == 0
    assert told()["images"] == 2 and told()["unreadable"] == 1
    assert main(argv[:-1]) == 2


@pytest.mark.parametrize("flags", [["--threshold", "0.4"], ["--skip-bad-annotations"], ["--no-masks"]])
def test_a_classifier_has_no_flags_of_detectors(flags, tmp_path, capsys):
    assert main(["evaluate", "--model", "nat_mini", "--data", str(tmp_path), *flags]) == 2
    assert f"{flags[0].replace('--no-', '--')} is not for classifiers." in capsys.readouterr().err


def test_a_saved_network_is_evaluated(tmp_path, monkeypatch):
    torch.manual_seed(0)
    (tmp_path / "run").mkdir()
    save_detector(CONFIG.make_network(), tmp_path / "run", CONFIG)
    monkeypatch.chdir(tmp_path)
    put_scenes(Path("data"), {name: TRUE[name] for name in ("a.png", "d.png")})
    assert main(["evaluate", "--model", "run", "--data", "data", "--output", "report"]) == 0
    assert 0 <= told()["box_ap"] < 50 and told()["max_dets"] == 10
    assert sum(int(row["found"]) for row in rows("per_class.csv")) == 0  # it is sure of nothing
    assert {p.name for p in Path("report").iterdir()} == REPORT


def test_the_truth_fed_as_predictions_is_perfect_by_mask_too():
    mask = np.zeros((50, 60), np.uint8)
    mask[5:45, 10:50] = 1
    metrics = CocoMetrics(["a"], True)
    boxes, labels = torch.tensor([[10.0, 5, 50, 45]]), torch.zeros(1, dtype=torch.int64)
    target = dict(boxes=boxes, labels=labels, iscrowd=torch.zeros(1, dtype=torch.bool), image_id=1)
    target |= dict(area=torch.tensor([1600.0]), masks=InstanceMasks(Outlines.of([encode(mask)]), (50, 60)))
    metrics.update([dict(boxes=boxes, labels=labels, scores=torch.ones(1), masks=[encode(mask)])], [target])
    figures = metrics.compute()
    assert figures["box_ap"] == figures["mask_ap"] == pytest.approx(100)
