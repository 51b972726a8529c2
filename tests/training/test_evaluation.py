"""Promises of figures and reports, and of the commands evaluate and predict."""

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.metrics import confusion_matrix, log_loss, precision_recall_fscore_support
from timm.data import create_transform, resolve_model_data_config

from nat_models.checkpoints.saving import save_model
from nat_models.cli import main
from nat_models.errors import UserError
from nat_models.training.evaluation import judge
from nat_models.training.models import class_names, make_model, readable, resolve_name
from tests.training.conftest import TINY, fit, make_settings


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
    copy = shutil.copytree(trained / "best", tmp_path / "best")  # in no run's folder: nothing says what was held out
    assert evaluate("--model", copy, "--data", data, "--output", tmp_path / "r") == 0
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
    # Without a word: a run's own data are not evaluated on what it was trained on, and val_fraction is its own.
    assert evaluate("--model", trained / "last", "--data", data, "--output", tmp_path / "r") == 0
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


def test_runs_that_held_out_different_images_are_not_compared(data, trained, tmp_path, capsys):
    other = shutil.copytree(trained, tmp_path / "other")
    config = (other / "config.yaml").read_text()
    assert "seed: 0" in config
    (other / "config.yaml").write_text(config.replace("seed: 0", "seed: 1"))
    models = ["--model", trained, other, "--data", data]
    assert evaluate(*models) == 2
    assert "held out different parts" in capsys.readouterr().err
    assert evaluate(*models, "--seed", "0") == 0


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
    assert metrics["real_unlabelled"] == 1
    for wrong in ("[[1]]", '{"1": [1]}', "[[1], [1], [1000]]"):
        (tmp_path / "real.json").write_text(wrong)
        assert evaluate(*flags) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "strangers"], "Classes in .* that the model lacks: orange; it has blue, green, red"),
        (["--data", "colours", "--split", "test"], "has no part test"),
        (["--data", "nowhere"], "There is no folder"),
        (["--data", "colours", "--model", "empty"], "empty holds no config.json of a model, but nothing"),
        (["--data", "colours", "--model", "nat_mino"], "Unknown model 'nat_mino'"),
        (["--data", "colours", "--model", "nat_mini.nothing"], "Invalid pretrained tag"),
        (["--data", "colours", "--model", "gone/best"], "There is no folder gone/best"),
        (["--data", "colours", "--model", "local-dir:gone"], "There is no folder gone"),
        (["--data", "colours", "--model", "broken"], "config.json cannot be read"),
        (["--data", "colours", "--model", "foreign"], "config.json names no architecture that timm knows"),
        (["--data", "colours", "--model", "a/b", "a_b", "--output", "r"], "--model names a_b twice, or another model"),
        (["--data", "colours", "--model", "a/b", "a/b"], "--model names a/b twice"),
        (["--data", "colours", "--model", "a/b", "a_b", "--checkpoint", "x.pth"], "--checkpoint .* for one --model"),
        (["--data", "colours", "--img-size", "0"], "--img-size: must be an integer of at least 1, got '0'"),
        (["--data", "colours", "--batch-size", "0"], "--batch-size: must be an integer of at least 1"),
        (["--data", "colours", "--num-workers", "-1"], "--num-workers: must be an integer of at least 0"),
        (["--data", "colours", "--crop-pct", "0"], "--crop-pct: must be above 0 and at most 1"),
        (["--data", "colours", "--interpolation", "cubic"], "--interpolation: invalid choice"),
        (["--data", "colours", "--device", "nonsense"], "--device: 'nonsense' cannot be used"),
    ],
)
def test_a_mistake_is_one_line(data, trained, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "strangers").mkdir()
    for name, text in dict(broken="{", foreign='{"architectures": []}').items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
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


def test_paths_come_from_standard_input(data, trained, tmp_path, monkeypatch, capsys):
    odd = os.path.join(os.fsencode(tmp_path), b"caf\xe9.png")  # not UTF-8
    shutil.copy(data / "red" / "1.png", odd)
    paths = [os.fsencode(data / "red" / f"{i}.png") for i in (5, 1)] + [odd]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n".join(paths) + b"\n\n"), encoding="utf-8"))
    assert predict(trained, "-", "--format", "jsonl") == 0
    assert [os.fsencode(json.loads(line)["image"]) for line in capsys.readouterr().out.splitlines()] == paths


def test_a_path_on_standard_input_is_answered_before_the_next_one_comes(data, trained, monkeypatch):
    written = io.StringIO()

    def lines():
        for i in (5, 1):
            yield os.fsencode(data / "red" / f"{i}.png") + b"\n"
            assert f"{i}.png" in written.getvalue()  # who asks for the next one has answered

    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=lines()))
    monkeypatch.setattr(sys, "stdout", written)
    assert predict(trained, "-", "--batch-size", "1") == 0


def test_an_unreadable_image_is_an_error_or_is_skipped_and_counted(data, trained, tmp_path, capsys):
    (tmp_path / "torn.png").write_bytes(b"torn")
    arguments = [tmp_path / "torn.png", data / "red" / "1.png"]
    assert predict(trained, *arguments, "--output", tmp_path / "p") == 2
    assert not list(tmp_path.glob("p*"))
    assert predict(trained, *arguments, "--skip-unreadable") == 0
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1
    assert "torn.png cannot be read" in err and err.endswith("skipped 1 images that cannot be read\n")
    assert predict(trained, arguments[0], "--skip-unreadable", "--output", tmp_path / "p") == 2  # nothing is left
    assert not list(tmp_path.glob("p*"))


def test_images_are_sorted_by_class_and_none_is_overwritten(data, trained, tmp_path):
    sources = [data / "red", data / "blue"]
    assert predict(trained, *sources, "--sort-into", tmp_path / "s") == 0
    sorted_ = [path for path in (tmp_path / "s").rglob("*") if path.is_file()]
    assert len(sorted_) == 36 and {path.parent.name for path in sorted_} <= {"red", "green", "blue"}
    assert predict(trained, data / "red" / "1.png", "--sort-into", tmp_path / "s", "--min-probability", "1") == 0
    assert [path.name for path in (tmp_path / "s" / "_unsure").iterdir()] == ["1.png"]
    assert predict(trained, data / "red" / "1.png", "--sort-into", tmp_path / "s", "--min-probability", "1") == 0
    assert sorted(path.name for path in (tmp_path / "s" / "_unsure").iterdir()) == ["1.png", "1_1.png"]
    assert predict(trained, data, "--sort-into", data / "sorted") == 2


def test_whoever_reads_no_further_ends_the_command_quietly(data, trained):
    command = f"{sys.executable} -m nat_models predict --model {trained} {data} --batch-size 2 | head -1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)


def test_names_of_models_and_classes(trained, monkeypatch):
    assert resolve_name(str(trained)) == f"local-dir:{trained}/best"
    assert resolve_name(str(trained / "last")) == f"local-dir:{trained}/last"
    assert resolve_name("nat_tiny") == "nat_tiny"
    monkeypatch.chdir(trained.parent)
    shutil.copytree(trained, "nat_tiny")
    assert resolve_name("nat_tiny") == "nat_tiny"  # a run in a folder of this name does not take its place
    assert resolve_name("./nat_tiny") == "local-dir:nat_tiny/best"
    assert readable("n01440764") == "tench" and readable("red") == "red"
    assert readable("n00004475") == "organism" and readable("n99999999") == "n99999999"  # of ImageNet-22k; of none


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


def test_a_run_is_published_with_the_card_of_its_own(trained, capsys):
    assert main(["push", "--model", str(trained), "--repo", "user/colours", "--dry-run"]) == 0
    card = capsys.readouterr().out.partition("\n---\n")[2]
    own = (trained / "best" / "README.md").read_text().removeprefix("---\n").replace("local-dir:", "hf-hub:")
    shown = [line for line in own.replace("FOLDER", "user/colours").splitlines() if line not in card.splitlines()]
    assert shown == []


def save(folder: Path, names: list[str], multi_label: bool = False, bias: float | None = None) -> Path:
    """An untrained network, whose answers differ from image to image."""
    torch.manual_seed(0)
    model = timm.create_model("nat_mini", num_classes=len(names), **TINY["model_kwargs"])
    torch.nn.init.normal_(model.head.fc.weight, std=2)
    if bias is not None:
        torch.nn.init.constant_(model.head.fc.bias, bias)
    folder.mkdir()
    config = dict(label_names=names, problem_type="multi_label_classification" if multi_label else None)
    save_model(model, folder, model_config=config, data_config=dict(input_size=(3, 32, 32)))
    return folder


def test_names_of_classes_are_taken_as_they_are(data, tmp_path):
    names = ["true", "$x^$", "count"]  # a column's name, a broken formula
    (tmp_path / "d").mkdir()
    for name, colour in zip(names, ("red", "green", "blue"), strict=True):
        (tmp_path / "d" / name).symlink_to(data / colour)
    model = save(tmp_path / "m", names)
    assert evaluate("--model", model, "--data", tmp_path / "d", "--output", tmp_path / "r") == 0
    with open(tmp_path / "r" / "confusion.csv", newline="") as file:
        table = list(csv.reader(file))
    assert table[0] == ["true", *names] and [row[0] for row in table[1:]] == names
    assert [sum(map(int, row[1:])) for row in table[1:]] == [18, 18, 18]


def test_what_is_no_number_is_an_error_that_names_the_image(data, tmp_path, capsys):
    model = save(tmp_path / "m", ["red", "green", "blue"], bias=float("nan"))
    assert predict(model, data / "red" / "1.png") == 2
    assert f"{data / 'red' / '1.png'} in float32 is not finite" in capsys.readouterr().err
    assert evaluate("--model", model, "--data", data) == 2


def test_no_class_leads_out_of_the_folder_that_is_sorted_into(data, tmp_path, capsys):
    model = save(tmp_path / "m", ["..", "a/b"])
    assert predict(model, data / "red", "--sort-into", tmp_path / "s") == 0
    assert {path.name for path in (tmp_path / "s").iterdir()} <= {"_", "a_b"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "s"]
    assert predict(save(tmp_path / "n", ["a_b", "a/b"]), data / "red", "--sort-into", tmp_path / "t") == 2
    assert "'a/b' a folder of its own" in capsys.readouterr().err and not (tmp_path / "t").exists()


def test_several_labels_are_answered_and_judged_one_by_one(data, tmp_path, capsys):
    model, images = save(tmp_path / "m", ["b", "a"], multi_label=True), [data / "red" / f"{i}.png" for i in range(6)]
    with (tmp_path / "d.csv").open("w") as file:
        file.write("path,labels,split\n")
        file.writelines(f"{image},{'a;b' if i % 2 else 'a'},val\n" for i, image in enumerate(images))
    assert evaluate("--model", model, "--data", tmp_path / "d.csv", "--output", tmp_path / "r") == 0
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert predict(model, *images, "--threshold", "0", "--format", "jsonl", "--output", tmp_path / "p") == 0
    answers = [json.loads(line)["predictions"] for line in (tmp_path / "p").read_text().splitlines()]
    right = wrong = 0  # by hand: micro-F1 is over all labels of all images
    for i, answer in enumerate(answers):
        for row in answer:
            true = row["class"] == "a" or i % 2 == 1
            right += true and row["probability"] > 0.5
            wrong += true != (row["probability"] > 0.5)
    assert right and wrong and metrics["micro_f1"] == pytest.approx(200 * right / (2 * right + wrong))
    mistakes = rows(tmp_path / "r" / "mistakes.csv")
    assert len(mistakes) == wrong and {row["true"] for row in mistakes} <= {"yes", "no"}
    sure = [abs(float(row["probability"]) - 0.5) for row in mistakes]
    assert sure == sorted(sure, reverse=True)
    assert (tmp_path / "r" / "reliability.png").is_file() and not (tmp_path / "r" / "confusion.csv").exists()
    assert sum(row["probability"] for row in answers[0]) != pytest.approx(1, abs=1e-3)  # sigmoids
    assert predict(model, images[0], "--threshold", "1", "--format", "csv") == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{images[0]},,,"  # no label, and not forgotten
    assert evaluate("--model", model, "--data", data) == 2


def test_of_many_classes_the_matrix_has_those_that_occur():
    found, truth = torch.full((3, 2000), 1e-5), [7, 1500, 7]
    found[[0, 1, 2], [7, 7, 1999]] = 0.9
    judgement = judge(found.numpy(), truth, [str(i) for i in range(2000)])
    assert judgement.confusion_names == ["7", "1500", "1999"]
    assert judgement.confusion.tolist() == [[1, 0, 1], [1, 0, 0], [0, 0, 0]]
    assert len(judgement.per_class) == 2000
