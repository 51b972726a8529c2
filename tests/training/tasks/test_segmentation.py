"""Promises of segmentation: figures, what it learns, what it starts from, and the engine's promises over it."""

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
from nat_models.training.engine import train
from nat_models.training.segmenters import is_segmenter, load_segmenter
from nat_models.training.tasks.segmentation import Segmentation, SegmentationMetrics, SegmentationSettings
from tests.training.conftest import TIMING, TINY, same_course, summary
from tests.training.test_processes import finish, losses, start

COLOURS = np.array([[90, 90, 90], [220, 40, 40], [40, 60, 220]])
BACKBONE = dict(TINY["model_kwargs"])
SMALL = dict(
    model_kwargs=BACKBONE,
    channels=16,
    crop_size=48,
    short_side=None,
    resize=(0.8, 1.2),
    batch_size=4,
    epochs=3,
    warmup_epochs=1,
    lr=3e-3,
    val_fraction=0.25,
    workers=0,
    trackers="none",
)


def write_masks(root, ids=(0, 1, 2), names=("ground", "red", "blue"), count: int = 16, side: int = 64):
    """Noisy rectangles of two colours on grey; `ids` are the classes' numbers in the masks."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for i in range(count):
        height, width = side + 8 * (i % 3), side - 8 * (i % 2)
        labels = np.zeros((height, width), np.uint8)
        for label in (1, 2):
            top, left = rng.integers(0, height - 24), rng.integers(0, width - 24)
            labels[top : top + 20, left : left + 22] = label
        pixels = np.clip(COLOURS[labels] + rng.normal(0, 30, (height, width, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        Image.fromarray(np.array(ids, np.uint8)[labels]).save(root / "masks" / f"{i}.png")
    (root / "classes.json").write_text(
        json.dumps({"values": {str(i): n for i, n in sorted(zip(ids, names, strict=True))}})
    )
    return root


@pytest.fixture(scope="session")
def masks(tmp_path_factory):
    return write_masks(tmp_path_factory.mktemp("masks") / "data")


def settings_for(data, output, **kwargs) -> SegmentationSettings:
    return SegmentationSettings(**{**SMALL, "data": str(data), "output": str(output), **kwargs})


def fit(settings, resume: bool = False) -> list[dict]:
    return train(settings, Segmentation(settings), resume)


@pytest.fixture(scope="module")
def run(masks, tmp_path_factory):
    output = tmp_path_factory.mktemp("segment") / "o"
    return output, fit(
        settings_for(
            masks,
            output,
            epochs=12,
            channels=32,
            lr=2e-2,
            clip_grad=1.0,
            drop_path=0.0,
            head_drop_rate=0.0,
            photometric=False,
            loss="cross_entropy+dice",
            loss_mean="labelled",
        )
    )


def test_figures_are_those_of_one_confusion_matrix():
    """Worked by hand: ignored pixels, a class that is nowhere, images and batches of unequal size."""
    metrics = SegmentationMetrics(["a", "b", "c", "nowhere"])
    true = [torch.tensor([[0, 0, 1, 255]]), torch.tensor([[1, 1], [2, 2], [0, 255]]), torch.tensor([[0]])]
    found = [torch.tensor([[0, 1, 1, 2]]), torch.tensor([[1, 0], [2, 2], [0, 0]]), torch.tensor([[0]])]
    each = [(f, torch.tensor(loss)) for f, loss in zip(found, (1.0, 2.0, 6.0), strict=True)]
    metrics.update(each[:2], [None, true[:2]])
    metrics.update(each[2:], [None, true[2:]])
    figures = metrics.compute()
    # a: 3 right of 4 true and 4 predicted; b: 2 of 3 and 3; c: 2 of 2 and 2.
    assert figures["iou a"] == pytest.approx(100 * 3 / 5) and figures["iou b"] == pytest.approx(100 * 2 / 4)
    assert figures["iou c"] == pytest.approx(100) and np.isnan(figures["iou nowhere"])
    assert figures["miou"] == pytest.approx((60 + 50 + 100) / 3)
    assert figures["mean_accuracy"] == pytest.approx(100 * (3 / 4 + 2 / 3 + 1) / 3)
    assert figures["pixel_accuracy"] == pytest.approx(100 * 7 / 9)
    assert figures["val_loss"] == pytest.approx(3)


def test_it_learns_and_the_saved_network_scores_the_same(run, masks):
    output, rows = run
    assert rows[-1]["miou"] > 80 and rows[-1]["miou"] > rows[0]["miou"]
    assert set(rows[-1]) >= {"iou ground", "iou red", "iou blue", "mean_accuracy", "pixel_accuracy"}
    network, about = load_segmenter(output / "last")
    assert list(about.classes) == ["ground", "red", "blue"] and is_segmenter(output)
    task = Segmentation(settings_for(masks, output / "again", channels=32))
    _, held_out = task.make_datasets(network)
    metrics = task.make_metrics()
    with torch.no_grad():
        for i in range(len(held_out)):
            batch = held_out.collate([held_out[i]])
            metrics.update(task.predict(network, batch), batch)
    assert metrics.compute()["miou"] == pytest.approx(rows[-1]["miou"], abs=1e-3)


def test_a_saved_segmenter_has_a_card_whose_code_runs(run, masks):
    output, rows = run
    card = (output / "last" / "README.md").read_text().replace("FOLDER", str(output / "last"))
    head, body = card.removeprefix("---\n").split("---\n", 1)
    metadata = yaml.safe_load(head)
    assert metadata["pipeline_tag"] == "image-segmentation" and "image-segmentation" in metadata["tags"]
    (measured,) = metadata["model-index"][0]["results"]
    assert measured["task"]["type"] == "image-segmentation"
    values = {metric["type"]: metric["value"] for metric in measured["metrics"]}
    assert values["mean_iou"] == pytest.approx(rows[-1]["miou"], abs=1e-4)
    assert set(values) == {"mean_iou", "mean_accuracy", "pixel_accuracy"}
    assert "Classes: ground, red, blue" in body and f"| iou red | {rows[-1]['iou red']:.4g} |" in body
    assert f"nat-models predict --model {output / 'last'} photo.jpg" in body
    assert "- mean: [0.485, 0.456, 0.406]" in body and "- short_side: None" in body
    assert "loss: cross_entropy+dice" in body and "12 of 12" in body
    (code,) = re.findall(r"^```python\n(.*?)^```", body, re.MULTILINE | re.DOTALL)
    exec(code, page := {})
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert page["network"](image).shape == (1, 3, 64, 96)


def test_the_command_scores_what_the_run_held_out(run, masks, tmp_path, capsys):
    output, rows = run
    report = tmp_path / "report"
    given = ["--model", str(output / "last"), "--data", str(masks), "--output", str(report)]
    assert main(["evaluate", *given]) == 0
    told = json.loads((report / "metrics.json").read_text())
    assert told["miou"] == pytest.approx(rows[-1]["miou"], abs=0.5) and told["images"] == 4
    assert "red" in capsys.readouterr().out and (report / "per_class.csv").read_text().count("\n") == 4
    assert main(["evaluate", *given, "--multi-scale"]) == 0
    assert json.loads((report / "metrics.json").read_text())["multi_scale"] is True
    assert main(["evaluate", *given, "--crop-pct", "0.5"]) == 2
    assert "--crop-pct is not for segmenters" in capsys.readouterr().err


def test_scores_are_of_the_original_size_whatever_the_network_sees(masks, tmp_path):
    task = Segmentation(settings_for(masks, tmp_path / "o", short_side=32))
    network = task.make_network(True).eval()
    _, held_out = task.make_datasets(network)
    image, labels = held_out[0]
    assert min(image.shape[1:]) == 32 and min(labels.shape) > 32
    (found, _), *_ = task.predict(network, held_out.collate([held_out[0]]))
    assert found.shape == labels.shape


def test_ids_permuted_with_their_names_give_the_same_course(masks, tmp_path):
    """The classes' order follows the names' first appearance, so it is written."""
    other = write_masks(tmp_path / "other", ids=(7, 200, 3))
    table = {"values": {"7": "ground", "200": "red", "3": "blue"}, "names": ["ground", "red", "blue"]}
    (other / "classes.json").write_text(json.dumps(table))
    first = fit(settings_for(masks, tmp_path / "a", epochs=2))
    second = fit(settings_for(other, tmp_path / "b", epochs=2))
    told = [[{k: v for k, v in row.items() if k not in TIMING} for row in rows] for rows in (first, second)]
    assert told[0] == told[1]


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


@pytest.mark.parametrize("step", [1, 4, 8])
def test_a_run_killed_at_a_step_goes_on_to_the_same_bits(masks, tmp_path, monkeypatch, step):
    rich = dict(ema_decay=0.9, drop_path=0.2, clip_grad=1.0, loss="cross_entropy+dice+focal", save_every_steps=1)
    fit(settings_for(masks, tmp_path / "whole", **rich))
    compute, calls = Segmentation.losses, []

    def counting(*args):
        calls.append(1)
        if len(calls) == step:
            raise Killed
        return compute(*args)

    monkeypatch.setattr(Segmentation, "losses", counting)
    settings = settings_for(masks, tmp_path / "o", **rich)
    with pytest.raises(Killed):
        fit(settings)
    monkeypatch.undo()
    fit(settings, resume=True)
    same_course(tmp_path / "whole", tmp_path / "o")


@pytest.mark.slow  # starts three processes
def test_two_processes_with_half_the_batch_each_follow_one(masks, tmp_path):
    given = dict(batch_norm="frozen", drop_path=0.0, head_drop_rate=0.0, resize=(1.0, 1.0), augment=False, epochs=5)
    alone = settings_for(masks, tmp_path / "one" / "o", **given, batch_size=4)
    (tmp_path / "one").mkdir()
    told = []
    task = Segmentation(alone)
    compute = task.losses
    task.losses = lambda *args: (result := compute(*args), told.append(sum(result.values()).item()))[0]
    train(alone, task)
    halves = settings_for(masks, tmp_path / "two" / "o", **given, batch_size=2)
    finish(start(halves, tmp_path / "two", "--task", "segment"))
    both = (losses(tmp_path / "two", 0) + losses(tmp_path / "two", 1)) / 2
    torch.testing.assert_close(both[:10], torch.tensor(told[:10]), rtol=0, atol=1e-3)
    assert summary(tmp_path / "one" / "o")[0]["miou"] == pytest.approx(
        summary(tmp_path / "two" / "o")[0]["miou"], abs=1
    )


def test_it_starts_from_a_classifiers_backbone(masks, tmp_path):
    classifier = timm.create_model("nat_mini", **BACKBONE, num_classes=10)
    (tmp_path / "classifier").mkdir()
    save_model(classifier, tmp_path / "classifier", model_config={}, data_config={})
    task = Segmentation(settings_for(masks, tmp_path / "o", checkpoint=str(tmp_path / "classifier")))
    network = task.make_network(True)
    assert torch.equal(network.backbone.levels[3].blocks[0].attn.rpb, classifier.levels[3].blocks[0].attn.rpb)
    assert not torch.equal(
        task.make_network(False).backbone.levels[3].blocks[0].attn.rpb, classifier.levels[3].blocks[0].attn.rpb
    )


def test_it_starts_from_another_segmenter_with_new_classes(run, masks, tmp_path):
    weights = str(run[0] / "best" / "model.safetensors")
    other = write_masks(tmp_path / "two", ids=(0, 1, 1), names=("ground", "thing", "thing"))
    network = Segmentation(settings_for(other, tmp_path / "o", weights=weights, channels=32)).make_network(True)
    before = load_file(weights)
    assert network.decode_head.conv_seg.out_channels == 2
    assert torch.equal(network.decode_head.bottleneck.conv.weight, before["decode_head.bottleneck.conv.weight"])


@pytest.mark.parametrize("mode, trained", [("batch", True), ("running", True), ("frozen", False)])
def test_statistics_of_batches_running_or_frozen(mode, trained, masks, tmp_path):
    output = tmp_path / "o"
    fit(settings_for(masks, output, epochs=2, batch_norm=mode, auxiliary_weight=0.4))
    saved = load_file(output / "last" / "model.safetensors")
    moved = saved["decode_head.bottleneck.bn.running_mean"].any().item()
    assert moved == (mode == "batch")
    assert (not saved["decode_head.bottleneck.bn.weight"].eq(1).all()) == trained


def test_one_image_has_no_batch_statistics(masks, tmp_path):
    with pytest.raises(UserError, match="grad_accum does not enlarge its batch"):
        settings_for(masks, tmp_path / "o", batch_size=1)
    fit(settings_for(masks, tmp_path / "o", batch_size=1, batch_norm="running", epochs=2))


def test_several_bands_are_trained_on(tmp_path):
    root = write_masks(tmp_path / "data", count=8)
    for path in (root / "images").iterdir():
        pixels = np.asarray(Image.open(path))
        np.save(path.with_suffix(".npy"), np.concatenate([pixels, pixels[..., :2]], 2))
        path.unlink()
    rows = fit(settings_for(root, tmp_path / "o", in_chans=5, photometric=False, epochs=2))
    _, about = load_segmenter(tmp_path / "o")
    assert len(about.mean) == 5 and about.backbone_kwargs["in_chans"] == 5 and rows


def test_the_command_trains_and_refuses_flags_of_another_task(masks, tmp_path, capsys):
    given = ["--data", str(masks), "--output", str(tmp_path / "o"), "--epochs", "1", "--warmup-epochs", "0"]
    given += ["--model-kwargs", "embed_dim=16", "depths=[1,1,1,1]", "num_heads=[1,1,1,1]", "kernel_size=3"]
    given += ["--workers", "0", "--batch-size", "4"]
    assert main(["train", "--task", "segment", "--mixup", "0.2", *given]) == 2
    assert "--mixup is not of this task" in capsys.readouterr().err
    assert main(["train", "--crop-size", "64", *given]) == 2
    assert "--crop-size is not of this task" in capsys.readouterr().err
    small = ["--channels", "16", "--crop-size", "48", "--short-side", "none", "--val-fraction", "0.25"]
    assert main(["train", "--task", "segment", *given, *small]) == 0
    printed = capsys.readouterr().out
    assert "3 classes" in printed and "pixels of train" in printed and "best: epoch 1 with miou" in printed


def test_recipes_are_settings():
    from nat_models.resources import resource
    from nat_models.training.settings import read_yaml

    for name in ("ade20k_upernet", "segment_small", "digits_segment"):
        SegmentationSettings(data="x", **read_yaml(resource("configs", f"{name}.yaml"), SegmentationSettings))
