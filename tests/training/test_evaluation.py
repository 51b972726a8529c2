"""Promises of figures and reports, and of the commands evaluate and predict."""

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support
from timm.data import create_transform, resolve_model_data_config

from nat_models.cli import main
from nat_models.errors import UserError
from nat_models.training.evaluation import judge
from nat_models.training.models import class_names, make_model, readable, resolve_name
from tests.training.conftest import fit, make_settings


def _probabilities(images: int, classes: int) -> np.ndarray:
    return torch.randn(images, classes).mul(2).softmax(dim=1).numpy()


def test_the_figures_are_those_of_scikit_learn():
    found, truth = _probabilities(60, 7), torch.randint(0, 6, (60,)).tolist()  # the last class never occurs
    judgement = judge(found, truth, list("abcdefg"))
    predicted = found.argmax(axis=1)
    labels = range(7)
    p, r, f, s = precision_recall_fscore_support(truth, predicted, labels=labels, zero_division=0)
    for row, values in zip(judgement.per_class, zip(100 * p, 100 * r, 100 * f, s, strict=True), strict=True):
        assert [row["precision"], row["recall"], row["f1"], row["support"]] == pytest.approx(list(values))
    assert (judgement.confusion == confusion_matrix(truth, predicted, labels=labels)).all()
    assert judgement.figures["top1"] == pytest.approx(100 * np.mean(predicted == truth))
    assert judgement.figures["cross_entropy"] == pytest.approx(log_loss(truth, found, labels=labels), rel=1e-5)
    occurs = [i for i in labels if i in set(truth) | set(predicted)]
    assert judgement.figures["macro_f1"] == pytest.approx(100 * f[occurs].mean())


def test_the_calibration_error_is_that_of_its_definition():
    found, truth = _probabilities(200, 4), torch.randint(0, 4, (200,)).numpy()
    confidence, right = found.max(axis=1), found.argmax(axis=1) == truth
    error = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert judge(found, truth.tolist(), list("abcd")).figures["ece"] == pytest.approx(100 * error, rel=1e-4)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """A run that has seen two epochs, on colours."""
    output = tmp_path_factory.mktemp("trained") / "o"
    fit(make_settings(data, output, epochs=2))
    return output


def evaluate(*flags) -> int:
    return main(["evaluate", "--num-workers", "0", "--batch-size", "8", *map(str, flags)])


def rows(path: Path) -> list[dict]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_report_has_every_file_and_counts_every_image(data, trained, tmp_path):
    assert evaluate("--model", trained, "--data", data, "--output", tmp_path / "r") == 0
    tables = {"metrics.json", "per_class.csv", "confusion.csv", "mistakes.csv"}
    pictures = {"confusion.png", "mistakes.png", "reliability.png"}
    assert {path.name for path in (tmp_path / "r").iterdir()} == tables | pictures
    for name in pictures:
        assert min(Image.open(tmp_path / "r" / name).size) > 50
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["images"] == 54 and metrics["images_per_second"] > 0
    assert [row["class"] for row in rows(tmp_path / "r" / "per_class.csv")] == ["blue", "green", "red"]
    assert sum(int(v) for row in rows(tmp_path / "r" / "confusion.csv") for k, v in row.items() if k != "true") == 54


def test_what_a_run_held_out_is_evaluated_as_the_run_did(data, trained, tmp_path):
    held_out = ["--split", "val", "--val-fraction", "0.25"]
    assert evaluate("--model", trained / "last", "--data", data, *held_out, "--output", tmp_path / "r") == 0
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    last = rows(trained / "summary.csv")[-1]
    assert metrics["images"] == 12
    assert metrics["cross_entropy"] == pytest.approx(float(last["val_loss"]), rel=1e-5)
    assert metrics["macro_f1"] == pytest.approx(float(last["macro_f1"]))


def test_classes_are_matched_by_name_whatever_their_order_and_mistakes_are_listed(data, trained, tmp_path):
    # Red images in the folder green: named red, they are mistakes. There is no folder blue.
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "red").symlink_to(data / "red")
    (tmp_path / "d" / "green").symlink_to(data / "red")
    assert evaluate("--model", trained, "--data", tmp_path / "d", "--output", tmp_path / "r") == 0
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    found = rows(tmp_path / "r" / "mistakes.csv")
    assert metrics["images"] == 36 and metrics["top1"] == pytest.approx(50, abs=9)
    assert all(row["image"].startswith("green/") for row in found if row["predicted"] == "red")
    # The sheet shows red images: an empty one has no colours.
    sheet = np.asarray(Image.open(tmp_path / "r" / "mistakes.png").convert("RGB")).astype(int)
    assert ((sheet[..., 0] > sheet[..., 1] + 60) & (sheet[..., 0] > sheet[..., 2] + 60)).sum() > 1000
    sure = [float(row["probability"]) for row in found]
    assert sure == sorted(sure, reverse=True) and len(sure) == round(36 * (1 - metrics["top1"] / 100))


def test_several_checkpoints_are_compared(data, trained, tmp_path, capsys):
    models = [trained / "best", trained / "last"]
    assert evaluate("--model", *models, "--data", data, "--output", tmp_path / "r") == 0
    assert [row["model"] for row in rows(tmp_path / "r" / "comparison.csv")] == [str(model) for model in models]
    assert len(list((tmp_path / "r").iterdir())) == 3
    assert "macro_f1" in capsys.readouterr().out


def test_imagenet_real_counts_what_any_rater_saw(tmp_path, monkeypatch):
    model = timm.create_model(
        "nat_mini", embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), kernel_size=3
    ).eval()
    monkeypatch.setattr("nat_models.commands.evaluate.make_model", lambda *args, **kwargs: model)
    for i in (1, 2, 3):
        path = tmp_path / "val" / "n01440764" / f"ILSVRC2012_val_{i:08}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (80 * i, 0, 0)).save(path)
    config = resolve_model_data_config(model)
    images = [Image.open(path) for path in sorted((tmp_path / "val").rglob("*.JPEG"))]
    with torch.no_grad():
        top = model(torch.stack([create_transform(**config)(image) for image in images])).argmax(1).tolist()
    (tmp_path / "real.json").write_text(json.dumps([[top[0], 5], [], [(top[2] + 1) % 1000]]))
    flags = ["--model", "nat_mini", "--data", tmp_path / "val", "--labels-real", tmp_path / "real.json"]
    assert evaluate(*flags, "--output", tmp_path / "r") == 0
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert (metrics["real_top1"], metrics["real_images"]) == (50, 2)
    assert "published_top1" not in metrics  # these are not the published weights
    (tmp_path / "real.json").write_text("[[1]]")
    assert evaluate(*flags) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "strangers"], "Classes in .* that the model lacks: orange; it has blue, green, red"),
        (["--data", "colours", "--split", "test"], "has no part test"),
        (["--data", "nowhere"], "There is no folder"),
        (["--data", "colours", "--model", "empty"], "empty holds no config.json of a model, but nothing"),
        (["--data", "colours", "--model", "nat_mino"], "Unknown model 'nat_mino'"),
    ],
)
def test_a_mistake_is_one_line(data, trained, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "strangers").mkdir()
    (tmp_path / "strangers" / "orange").symlink_to(data / "red")
    (tmp_path / "colours").symlink_to(data)
    assert evaluate(*(flags if "--model" in flags else ["--model", trained, *flags])) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    with pytest.raises(UserError, match=message):
        raise UserError(error)


def predict(trained, *arguments) -> int:
    return main(["predict", "--model", str(trained), "--batch-size", "4", *map(str, arguments)])


def test_predictions_come_in_order_with_the_model_s_probabilities(data, trained, tmp_path):
    paths = [data / "red" / "3.png", data / "blue" / "1.png", *sorted((data / "green").iterdir())[:4]]
    assert predict(trained, *paths, "--format", "jsonl", "--output", tmp_path / "p.jsonl", "--top-k", "2") == 0
    found = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["image"] for row in found] == [str(path) for path in paths]
    model = make_model(str(trained), pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    with torch.no_grad():
        expected = model(torch.stack([transform(Image.open(path)) for path in paths])).softmax(dim=1)
    for row, probabilities in zip(found, expected, strict=True):
        values, classes = probabilities.topk(2)
        assert [p["class"] for p in row["predictions"]] == [class_names(model)[i] for i in classes]
        assert [p["probability"] for p in row["predictions"]] == pytest.approx(values.tolist(), abs=1e-5)


def test_csv_has_a_row_per_class_and_a_table_a_line_per_image(data, trained, tmp_path, capsys):
    assert predict(trained, data / "red" / "3.png", "--format", "csv", "--output", tmp_path / "p.csv") == 0
    assert [row["rank"] for row in rows(tmp_path / "p.csv")] == ["1", "2", "3"]
    assert predict(trained, data / "red") == 0
    assert len(capsys.readouterr().out.splitlines()) == 18


def test_paths_come_from_standard_input(data, trained, monkeypatch, capsys):
    paths = [str(data / "red" / f"{i}.png") for i in (5, 1)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(paths) + "\n"))
    assert predict(trained, "-", "--format", "jsonl") == 0
    assert [json.loads(line)["image"] for line in capsys.readouterr().out.splitlines()] == paths


def test_an_unreadable_image_is_an_error_or_is_skipped_and_counted(data, trained, tmp_path, capsys):
    (tmp_path / "torn.png").write_bytes(b"torn")
    arguments = [tmp_path / "torn.png", data / "red" / "1.png"]
    assert predict(trained, *arguments, "--output", tmp_path / "p") == 2
    assert not list(tmp_path.glob("p*"))
    assert predict(trained, *arguments, "--skip-unreadable") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert "torn.png cannot be read" in err and err.endswith("skipped 1 images that cannot be read\n")


def test_images_are_sorted_by_class_and_none_is_overwritten(data, trained, tmp_path):
    sources = [data / "red", data / "blue"]
    assert predict(trained, *sources, "--sort-into", tmp_path / "s") == 0
    sorted_ = [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
    assert len(sorted_) == 36 and {path.parent.name for path in sorted_} <= {"red", "green", "blue"}
    assert predict(trained, data / "red" / "1.png", "--sort-into", tmp_path / "s", "--min-probability", "1.1") == 0
    assert [path.name for path in (tmp_path / "s" / "_unsure").iterdir()] == ["1.png"]
    assert predict(trained, data / "red" / "1.png", "--sort-into", tmp_path / "s", "--min-probability", "1.1") == 0
    assert sorted(path.name for path in (tmp_path / "s" / "_unsure").iterdir()) == ["1.png", "1_1.png"]
    assert predict(trained, data, "--sort-into", data / "sorted") == 2


def test_whoever_reads_no_further_ends_the_command_quietly(data, trained):
    command = f"{sys.executable} -m nat_models predict --model {trained} {data} --batch-size 2 | head -1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)


def test_names_of_models_and_classes(trained):
    assert resolve_name(str(trained)) == f"local-dir:{trained}/best"
    assert resolve_name(str(trained / "last")) == f"local-dir:{trained}/last"
    assert resolve_name("nat_tiny") == "nat_tiny"
    assert readable("n01440764") == "tench" and readable("red") == "red"


def test_a_run_loads_in_transformers(data, trained):
    transformers = pytest.importorskip("transformers")
    ours = make_model(str(trained), pretrained=True).eval()
    theirs = transformers.AutoModelForImageClassification.from_pretrained(trained / "best").eval()
    image = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(theirs(image).logits, ours(image))
    assert theirs.config.id2label == {0: "blue", 1: "green", 2: "red"}
    found = transformers.pipeline("image-classification", model=str(trained / "best"))(str(data / "red" / "1.png"))
    assert {row["label"] for row in found} == {"blue", "green", "red"}


def test_a_run_has_a_card_with_its_figures_and_recipe(trained):
    card = (trained / "best" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "Classes: blue, green, red" in card and "| top1 | " in card
    assert "lr: 0.002" in card and "weight_decay" not in card
