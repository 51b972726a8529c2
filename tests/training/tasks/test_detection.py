"""Promises of detection: what it learns, what it starts from, and the engine's promises over it."""

import json
import re

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from nat_models.checkpoints.saving import save_model
from nat_models.cli import main
from nat_models.errors import UserError
from nat_models.training.detectors import is_detector, load_detector
from nat_models.training.engine import train
from nat_models.training.tasks.detection import Detection, DetectionMetrics, DetectionSettings
from tests.training.boxed import SCENES, put_roboflow, put_voc, put_yolo
from tests.training.conftest import TINY, same_course
from tests.training.test_processes import finish, losses, start

BACKBONE = dict(TINY["model_kwargs"])
COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220)}
SMALL = dict(
    model_kwargs=BACKBONE,
    short_side=64,
    short_sides=(64,),
    long_side=80,
    crop=False,
    anchor_sizes=(12, 24, 48, 96, 192),
    detector_kwargs=dict(
        rpn_post_nms_top_n_train=32,
        rpn_post_nms_top_n_test=16,
        rpn_batch_size_per_image=32,
        box_batch_size_per_image=16,
    ),
    max_dets=10,
    batch_size=4,
    epochs=3,
    warmup_epochs=0.5,
    lr=5e-4,
    drop_path=0.0,
    val_fraction=0.25,
    workers=0,
    trackers="none",
)


def write_boxes(root, ids=(("red", 1), ("blue", 2)), count: int = 16, masks: bool = True):
    """annotations.json and images/: rectangles of two colours on grey; every eighth image has none. `ids` in order."""
    rng, images, annotations = np.random.default_rng(0), [], []
    (root / "images").mkdir(parents=True)
    for i in range(count):
        height, width = 64 + 8 * (i % 2), 64
        pixels = rng.normal(90, 20, (height, width, 3))
        images.append(dict(id=i + 1, file_name=f"{i:02}.png", height=height, width=width))
        for name in COLOURS if i % 8 else ():
            top, left = rng.integers(0, height - 26), (0 if name == "red" else 32) + rng.integers(0, 8)
            pixels[top : top + 24, left : left + 22] = COLOURS[name]
            entry = dict(id=len(annotations) + 1, image_id=i + 1, category_id=dict(ids)[name], iscrowd=0)
            box = [int(left), int(top), 22, 24]
            if masks:
                x, y = box[:2]
                entry["segmentation"] = [[x, y, x + 22, y, x + 22, y + 24, x, y + 24]]
            annotations.append(entry | dict(bbox=box, area=22 * 24))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / "images" / f"{i:02}.png")
    categories = [dict(id=i, name=name) for name, i in ids]
    (root / "annotations.json").write_text(
        json.dumps(dict(images=images, annotations=annotations, categories=categories))
    )
    return root


@pytest.fixture(scope="session")
def boxes(tmp_path_factory):
    return write_boxes(tmp_path_factory.mktemp("boxes") / "data", count=48)


def settings_for(data, output, **kwargs) -> DetectionSettings:
    return DetectionSettings(**{**SMALL, "data": str(data), "output": str(output), **kwargs})


def fit(settings, resume: bool = False) -> list[dict]:
    return train(settings, Detection(settings), resume)


@pytest.fixture(scope="module")
def run(boxes, tmp_path_factory):
    """Few epochs of many steps: what an epoch saves takes longer than to learn it."""
    output = tmp_path_factory.mktemp("detect") / "o"
    return output, fit(settings_for(boxes, output, epochs=4, lr=1e-3, clip_grad=5.0))


def test_it_learns_and_the_saved_network_scores_the_same(run, boxes):
    output, rows = run
    assert rows[-1]["box_ap50"] > 80 and rows[-1]["mask_ap50"] > 80 and rows[-1]["box_ap50"] > rows[0]["box_ap50"]
    assert set(rows[-1]) >= {"box_ap red", "mask_ap blue", "box_ap_small", "mask_ar", "train_loss"}
    network, config = load_detector(output / "last")
    assert (config.classes, config.category_ids, config.masks) == (["red", "blue"], [1, 2], True)
    assert is_detector(output)
    task = Detection(settings_for(boxes, output / "again"))
    _, held_out = task.make_datasets(network)
    network.transform.paste, metrics = False, task.make_metrics()
    for i in range(0, len(held_out), SMALL["batch_size"]):
        batch = held_out.collate([held_out[j] for j in range(i, min(i + SMALL["batch_size"], len(held_out)))])
        metrics.update(task.predict(network, batch), batch)
    figures = metrics.compute()
    for name in ("box_ap", "mask_ap"):
        assert figures[name] == pytest.approx(rows[-1][name], abs=1e-3)


def test_the_truth_as_predictions_scores_100(boxes, tmp_path):
    task = Detection(settings_for(boxes, tmp_path / "o"))
    _, held_out = task.make_datasets(task.make_network(False))
    metrics = task.make_metrics()
    for i in range(len(held_out)):
        batch = held_out.collate([held_out[i]])
        metrics.update([dict(target, scores=torch.ones(len(target["labels"]))) for target in batch[1]], batch)
    figures = metrics.compute()
    assert figures["box_ap"] == pytest.approx(100) and figures["mask_ap"] == pytest.approx(100)
    assert set(figures) == set(task.figures)


def test_a_saved_detector_has_a_card_whose_code_runs(run):
    output, rows = run
    card = (output / "last" / "README.md").read_text().replace("FOLDER", str(output / "last"))
    head, body = card.removeprefix("---\n").split("---\n", 1)
    metadata = yaml.safe_load(head)
    assert metadata["pipeline_tag"] == "object-detection"
    values = {metric["type"]: metric["value"] for metric in metadata["model-index"][0]["results"][0]["metrics"]}
    assert values["mask_ap"] == pytest.approx(rows[-1]["mask_ap"], abs=1e-4) and "box_ap red" not in values
    assert "Classes: red, blue" in body and f"nat-models predict --model {output / 'last'} photo.jpg" in body
    (code,) = re.findall(r"^```python\n(.*?)^```", body, re.MULTILINE | re.DOTALL)
    exec(code, page := {})
    with torch.no_grad():
        (found,) = page["network"]([torch.rand(3, 64, 96)])
    assert found["masks"].shape[1:] == (1, 64, 96)


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize(
    "system, step", [("mask_rcnn", 2), pytest.param("cascade_mask_rcnn", 4, marks=pytest.mark.slow)]
)
def test_a_run_killed_at_a_step_goes_on_to_the_same_bits(tmp_path, monkeypatch, system, step):
    few = write_boxes(tmp_path / "few", count=12)
    rich = dict(system=system, epochs=2, ema_decay=0.9, drop_path=0.2, short_sides=(56, 64), save_every_steps=1)
    rich |= dict(epochs=1) if system == "mask_rcnn" else {}
    fit(settings_for(few, tmp_path / "whole", **rich))
    compute, calls = Detection.losses, []

    def counting(*args):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return compute(*args)

    monkeypatch.setattr(Detection, "losses", counting)
    settings = settings_for(few, tmp_path / "o", **rich)
    with pytest.raises(Killed):
        fit(settings)
    monkeypatch.undo()
    fit(settings, resume=True)
    same_course(tmp_path / "whole", tmp_path / "o")


@pytest.mark.slow  # starts two processes
def test_two_processes_train_where_one_sees_negatives_alone(tmp_path):
    data = write_boxes(tmp_path / "data", count=8)
    path = data / "annotations.json"
    content = json.loads(path.read_text())
    content["annotations"] = [x for x in content["annotations"] if x["image_id"] in (2, 4)]
    path.write_text(json.dumps(content))
    settings = settings_for(data, tmp_path / "two" / "o", batch_size=1, epochs=2, allow_empty=True, val_fraction=0.2)
    finish(start(settings, tmp_path / "two", "--task", "detect"))
    told = [losses(tmp_path / "two", rank) for rank in (0, 1)]
    assert len(told[0]) == len(told[1]) > 3 and all(x.isfinite().all() for x in told)


def _course(task: Detection, steps: int) -> list[float]:
    """The losses of plain updates over the first images, in their order."""
    torch.manual_seed(0)
    network = task.make_network(False).train()
    train_set, _ = task.make_datasets(network)
    optimizer, told = torch.optim.SGD(network.parameters(), lr=1e-3), []
    for step in range(steps):
        batch = train_set.collate([train_set[1, step % len(train_set)]])
        loss = sum(task.losses(network, batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        told.append(loss.item())
    return told


def test_ids_permuted_with_their_names_give_the_same_course(boxes, tmp_path):
    other = write_boxes(tmp_path / "other", ids=(("red", 7), ("blue", 90)), count=48)
    tasks = [Detection(settings_for(data, tmp_path / "o")) for data in (boxes, other)]
    assert _course(tasks[0], 3) == _course(tasks[1], 3)
    assert tasks[1].config.category_ids == [7, 90]


def test_coco_yolo_and_voc_train_alike(tmp_path):
    told = {}
    for kind, put in (("coco", put_roboflow), ("yolo", put_yolo), ("voc", put_voc)):
        put(tmp_path / kind, SCENES)
        told[kind] = _course(Detection(settings_for(tmp_path / kind, tmp_path / "o", masks=False)), 5)
    assert told["yolo"] == pytest.approx(told["coco"], rel=1e-4)
    assert told["voc"] == pytest.approx(told["coco"], rel=1e-4)


def test_boxes_alone_train_without_masks(tmp_path):
    data = write_boxes(tmp_path / "data", masks=False)
    rows = fit(settings_for(data, tmp_path / "o", epochs=1))
    assert not [name for name in rows[0] if name.startswith("mask")]
    network, config = load_detector(tmp_path / "o")
    assert not config.masks and not network.roi_heads.has_mask()
    assert "masks" not in network([torch.rand(3, 64, 64)])[0]


def test_negatives_are_left_out_on_request(boxes, tmp_path):
    sizes = [Detection(settings_for(boxes, tmp_path / "o", negatives=n)).sizes[0] for n in (True, False)]
    assert sizes[0] > sizes[1]


def test_losses_that_are_not_finite_name_their_images(boxes, tmp_path):
    task = Detection(settings_for(boxes, tmp_path / "o"))
    network = task.make_network(False)
    train_set, _ = task.make_datasets(network)
    batch = train_set.collate([train_set[1, 1], train_set[1, 2]])
    torch.nn.init.constant_(network.rpn.head.cls_logits.bias, float("nan"))
    names = ", ".join(task.train.names[i] for i in (1, 2))
    with pytest.raises(UserError, match=rf"Losses of the images {re.escape(names)} are not finite \(.*loss_obj.* nan"):
        task.losses(network, batch)


def test_it_starts_from_a_classifiers_backbone(boxes, tmp_path):
    classifier = timm.create_model("nat_mini", **BACKBONE, num_classes=10)
    (tmp_path / "classifier").mkdir()
    save_model(classifier, tmp_path / "classifier", model_config={}, data_config={})
    task = Detection(settings_for(boxes, tmp_path / "o", checkpoint=str(tmp_path / "classifier")))
    same = [
        torch.equal(
            task.make_network(initial).backbone.body.levels[3].blocks[0].attn.rpb,
            classifier.levels[3].blocks[0].attn.rpb,
        )
        for initial in (True, False)
    ]
    assert same == [True, False]


def test_it_starts_from_another_detector_with_new_classes(run, tmp_path):
    weights = str(run[0] / "best" / "model.safetensors")
    other = write_boxes(tmp_path / "two", ids=(("red", 1), ("blue", 2)))
    content = json.loads((other / "annotations.json").read_text())
    content["categories"].append(dict(id=3, name="green"))
    (other / "annotations.json").write_text(json.dumps(content))
    task = Detection(settings_for(other, tmp_path / "o", weights=weights, allow_empty=True))
    with pytest.warns(UserWarning, match="3"):
        network = task.make_network(True)
    before = load_file(weights)
    (stage,) = network.roi_heads.stages
    assert stage.num_classes == 3
    assert torch.equal(network.rpn.head.conv[0][0].weight, before["rpn.head.conv.0.0.weight"])


def test_the_command_trains_and_refuses_what_is_wrong(tmp_path, capsys):
    few = write_boxes(tmp_path / "few", count=12)
    given = ["train", "--task", "detect", "--data", str(few), "--output", str(tmp_path / "o"), "--epochs", "1"]
    given += ["--model-kwargs", "embed_dim=16", "depths=[1,1,1,1]", "num_heads=[1,1,1,1]", "kernel_size=3"]
    given += ["--warmup-epochs", "0", "--workers", "0", "--batch-size", "4", "--val-fraction", "0.25", "--no-crop"]
    given += ["--short-side", "64", "--short-sides", "64", "--detector-kwargs", "rpn_post_nms_top_n_train=32"]
    for flags, message in (
        (["--mixup", "0.2"], "--mixup is not of this task"),
        (["--system", "yolo"], "system must be one of mask_rcnn, cascade_mask_rcnn, got 'yolo'"),
        (["--anchor-sizes", "8", "16"], "anchor_sizes must be five sides above 0"),
        (["--detector-kwargs", "min_size=3"], "detector_kwargs must name some of"),
    ):
        assert main([*given, *flags]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(given) == 0
    printed = capsys.readouterr().out
    assert re.search(r"2 classes, \d+ boxes to train on", printed) and "best: epoch 1 with mask_ap" in printed


def test_metrics_of_nothing_found_are_0():
    metrics = DetectionMetrics(["a"], masks=False)
    nothing = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), scores=torch.zeros(0))
    truth = dict(boxes=torch.tensor([[0.0, 0, 9, 9]]), labels=torch.tensor([0]), iscrowd=torch.tensor([False]))
    metrics.update([nothing], [None, [dict(truth, area=torch.tensor([81.0]), image_id=1)]])
    assert metrics.compute()["box_ap"] == 0
