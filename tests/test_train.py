"""Promises of scripts/train.py, on a network and images small enough for seconds."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from torch.utils.data import DataLoader

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import train as script  # noqa: E402

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
TINY = dict(
    model_kwargs=dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), kernel_size=3),
    img_size=32,
    batch_size=8,
    epochs=3,
    warmup_epochs=1,
    lr=2e-3,
    val_fraction=0.25,
    workers=0,
)
TIMING = ("seconds", "images_per_second")


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More threads only wait for each other on a network this small; one also fixes the order of sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    """Three noisy colours, 18 images each: any working training tells them apart."""
    root, rng = tmp_path_factory.mktemp("colours"), np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for i in range(18):
            pixels = np.clip(colour + rng.normal(0, 60, (32, 40, 3)), 0, 255).astype("uint8")
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def config(data: Path, output: Path, **kwargs) -> script.Config:
    return script.Config(**{**TINY, "data": str(data), "output": str(output), **kwargs})


@pytest.fixture(scope="module")  # not wider than one_thread, which would then come too late
def run(data, tmp_path_factory) -> tuple[Path, list[dict]]:
    output = tmp_path_factory.mktemp("run") / "output"
    return output, script.train(config(data, output, ema_decay=0.9, mixup=0.2, drop_path=0.1, clip_grad=1.0))


def summary(output: Path) -> list[dict]:
    with open(output / "summary.csv", newline="") as f:
        return list(csv.DictReader(f))


def same_course(a: Path, b: Path) -> None:
    courses = [[{k: v for k, v in row.items() if k not in TIMING} for row in summary(x)] for x in (a, b)]
    assert courses[0] == courses[1]
    for name in ("last", "best"):
        weights = [load_file(x / name / "model.safetensors") for x in (a, b)]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


class Killed(Exception):
    pass


def test_a_run_writes_every_promised_file_and_leaves_no_temporary_one(run):
    output, _ = run
    assert {p.name for p in output.iterdir()} == {"best", "last", "state", "config.yaml", "summary.csv", "curve.png"}
    assert Image.open(output / "curve.png").size[0] > 500


def test_the_loss_falls_and_separable_classes_are_told_apart(run):
    _, rows = run
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert rows[-1]["top1"] > 90


def test_the_summary_has_one_row_per_epoch_and_no_top5_for_three_classes(run):
    rows = summary(run[0])
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert set(rows[0]) == {"epoch", "lr", "train_loss", "val_loss", "top1", *TIMING}


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_saved_folder_restores_logits_labels_and_preprocessing(data, tmp_path, in_chans):
    cfg = config(data, tmp_path / "o", in_chans=in_chans, epochs=1, warmup_epochs=0, crop_pct=0.9, pretrained=False)
    rows = script.train(cfg)
    model = timm.create_model(f"local-dir:{tmp_path / 'o' / 'last'}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    assert model.num_classes == 3
    assert model.levels[0].blocks[0].attn.kernel_size == (3, 3)
    data_config = resolve_model_data_config(model)
    assert tuple(data_config["input_size"]) == (in_chans, 32, 32)
    assert data_config["crop_pct"] == 0.9
    assert len(data_config["mean"]) == in_chans

    _, val, _ = script.find_data(cfg)
    loader = DataLoader(script.ImageFiles(val, in_chans, create_transform(**data_config)), batch_size=8)
    metrics = script.evaluate(model, loader, Accelerator())
    assert metrics["images"] == len(val)
    assert metrics["val_loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-6)
    assert metrics["top1"] == rows[-1]["top1"]
    trained = load_file(tmp_path / "o" / "state" / "model.safetensors")
    assert all(torch.equal(v, trained[k]) for k, v in model.state_dict().items())


def test_a_run_killed_by_the_system_continues_to_the_same_result(data, tmp_path):
    settings = dict(epochs=8, ema_decay=0.9, cutmix=0.5, drop_path=0.2, workers=1, grad_accum=2, layer_decay=0.9)
    script.train(config(data, tmp_path / "whole", **settings))
    saved = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(saved | dict(output=str(tmp_path / "killed"))))
    command = [sys.executable, str(SCRIPTS / "train.py"), "--config", str(tmp_path / "c.yaml")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, env=env)
    while process.poll() is None and not (tmp_path / "killed" / "summary.csv").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # its loader processes too
    assert process.wait() == -signal.SIGKILL
    assert 1 <= len(summary(tmp_path / "killed")) < 8
    script.train(config(data, tmp_path / "killed", **settings), resume=True)
    same_course(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("writes", range(9))
def test_a_run_killed_between_any_two_renames_continues_to_the_same_result(data, tmp_path, run, monkeypatch, writes):
    """The second epoch puts each file in its place by a rename; the run dies before the one of this number."""
    settings = dict(ema_decay=0.9, mixup=0.2, drop_path=0.1, clip_grad=1.0)
    replace, calls = os.replace, []

    def dying(source, target):
        if (tmp_path / "o" / "summary.csv").exists():  # the first epoch is through
            if len(calls) == writes:
                raise Killed
            calls.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", dying)
    with pytest.raises(Killed):
        script.train(config(data, tmp_path / "o", **settings))
    monkeypatch.undo()
    for name in ("last", "best"):
        if (tmp_path / "o" / name).exists():
            timm.create_model(f"local-dir:{tmp_path / 'o' / name}", pretrained=True)
    script.train(config(data, tmp_path / "o", **settings), resume=True)
    same_course(run[0], tmp_path / "o")


def test_resuming_a_finished_run_changes_nothing(data, run, tmp_path):
    shutil.copytree(run[0], tmp_path / "o")
    settings = dict(ema_decay=0.9, mixup=0.2, drop_path=0.1, clip_grad=1.0)
    assert script.train(config(data, tmp_path / "o", **settings), resume=True) == run[1]
    same_course(run[0], tmp_path / "o")


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(data, run, capsys):
    flags = ["--data", str(data), "--output", str(run[0])]
    assert script.main(flags) == 2
    assert "--resume" in capsys.readouterr().err
    assert script.main([*flags, "--resume", "--lr", "0.5"]) == 2
    assert "lr must stay" in capsys.readouterr().err


def test_resume_takes_the_settings_of_the_run(run):
    resumed, resume = script.parse_args(["--resume", "--output", str(run[0])])
    assert resume
    assert (resumed.mixup, resumed.epochs, resumed.model_kwargs["kernel_size"]) == (0.2, 3, 3)


def test_accumulated_steps_make_one_update(data, tmp_path, monkeypatch):
    seen = []
    update = script.ModelEmaV3.update
    monkeypatch.setattr(script.ModelEmaV3, "update", lambda s, m, step: (seen.append(step), update(s, m, step=step)))
    script.train(config(data, tmp_path, epochs=2, grad_accum=2, ema_decay=0.9))
    assert seen == [1, 2, 3, 4, 5, 6]  # 42 images, 5 steps of 8: 3 updates an epoch, the last of one step


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch):
    monkeypatch.setattr(script.nn, "CrossEntropyLoss", lambda **kwargs: lambda x, y: x.sum() * float("nan"))
    with pytest.raises(script.UserError, match=r"loss is nan in epoch 1/3"):
        script.train(config(data, tmp_path))
    assert not (tmp_path / "state").exists()


def test_two_processes_count_each_validation_image_once(data, tmp_path):
    """13 validation images are no multiple of 2 x 4; accelerate repeats 3 of them to fill the last batches."""
    (data_13 := tmp_path / "data").mkdir()
    shutil.copytree(data, data_13 / "train")
    shutil.copytree(data, data_13 / "val")
    for file in sorted((data_13 / "val").rglob("*.png"))[13:]:
        file.unlink()
    cfg = config(data_13, tmp_path / "o", epochs=1, warmup_epochs=0, batch_size=4)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(script._plain(cfg)))
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"]
    command = [sys.executable, *launch, str(SCRIPTS / "train.py"), "--config", str(tmp_path / "c.yaml")]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    row = summary(tmp_path / "o")[0]
    model = timm.create_model(f"local-dir:{tmp_path / 'o' / 'last'}", pretrained=True)
    _, val, _ = script.find_data(cfg)
    assert len(val) == 13
    loader = DataLoader(script.ImageFiles(val, 3, create_transform(**resolve_model_data_config(model))), batch_size=13)
    metrics = script.evaluate(model, loader, Accelerator())
    assert float(row["val_loss"]) == pytest.approx(metrics["val_loss"], rel=1e-5)  # another order of float32 sums
    assert float(row["top1"]) == pytest.approx(metrics["top1"])


def test_the_split_is_stratified_and_depends_on_seed_and_names_alone(data, tmp_path):
    train, val, names = script.find_data(config(data, "o"))
    assert names == ["blue", "green", "red"]
    assert [sum(t == i for _, t in val) for i in range(3)] == [4, 4, 4]
    assert not {f for f, _ in train} & {f for f, _ in val}
    assert len(train) + len(val) == 54

    def relative(root, **kwargs):
        return [(str(f.relative_to(root)), t) for f, t in script.find_data(config(root, "o", **kwargs))[1]]

    for file in sorted(data.rglob("*.png"), reverse=True):  # another order on disk
        (tmp_path / file.parent.name).mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / file.parent.name)
    assert relative(tmp_path) == relative(data)
    assert relative(data, seed=1) != relative(data)


def test_train_and_val_folders_are_taken_as_they_are(data, tmp_path):
    shutil.copytree(data, tmp_path / "train")
    shutil.copytree(data / "red", tmp_path / "val" / "red")
    train, val, names = script.find_data(config(tmp_path, "o"))
    assert (len(train), len(val), names) == (54, 18, ["blue", "green", "red"])
    assert {t for _, t in val} == {2}
    shutil.copytree(data / "red", tmp_path / "val" / "orange")
    with pytest.raises(script.UserError, match="lacks: orange"):
        script.find_data(config(tmp_path, "o"))


def test_images_outside_class_folders_are_an_error_that_names_one(data, tmp_path):
    shutil.copytree(data, tmp_path / "deep" / "er")
    with pytest.raises(script.UserError, match=r"CLASS.*found .*\.png"):
        script.find_data(config(tmp_path, "o"))


def test_an_unreadable_image_is_an_error_that_names_it(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "red" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump(script._plain(config(tmp_path / "data", tmp_path / "o", workers=1)))
    )
    assert script.main(["--config", str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'data' / 'red' / 'torn.png'} cannot be read")


def test_flags_win_over_yaml_which_wins_over_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("lr: 1e-3\nepochs: 7\nmodel_kwargs: {kernel_size: 3, mlp_ratio: 2}\n")
    flags = [
        "--epochs",
        "9",
        "--model-kwargs",
        "kernel_size=5",
        "--data",
        "x",
        "--no-pretrained",
        "--clip-grad",
        "none",
    ]
    cfg, resume = script.parse_args(["--config", str(tmp_path / "c.yaml"), *flags])
    assert (cfg.lr, cfg.epochs, cfg.weight_decay) == (1e-3, 9, script.Config.weight_decay)
    assert cfg.model_kwargs == dict(kernel_size=5, mlp_ratio=2)
    assert (cfg.pretrained, cfg.clip_grad, resume) == (False, None, False)


@pytest.mark.parametrize(
    ("yaml_text", "flags", "message"),
    [
        ("epcohs: 3", [], r"Unknown key in .*c\.yaml: 'epcohs', near to epochs"),
        ("", ["--epcohs", "3"], "Unknown argument '--epcohs', near to --epochs"),
        ("", ["--epoch", "3"], "Unknown argument '--epoch', near to --epochs"),
        ("lr: fast", [], "lr must be of type float, got 'fast'"),
        ("epochs: 2.5", [], "epochs must be of type int, got 2.5"),
        ("pretrained: 1", [], "pretrained must be of type bool, got 1"),
        ("in_chans: 4", [], r"in_chans must be 1 \(grey\) or 3 \(RGB\), got 4"),
        ("warmup_epochs: 30", [], "warmup_epochs must be below epochs, 30, got 30"),
        ("", ["--mixup", "0.1", "--batch-size", "7"], "batch_size must be even"),
        ("", ["--model-kwargs", "kernel_size"], "model_kwargs must be key=value, got 'kernel_size'"),
    ],
)
def test_wrong_settings_are_errors_that_name_value_and_rule(tmp_path, yaml_text, flags, message):
    (tmp_path / "c.yaml").write_text(yaml_text)
    with pytest.raises(script.UserError, match=message):
        script.parse_args(["--data", "x", "--config", str(tmp_path / "c.yaml"), *flags])


def test_a_misspelt_model_and_a_batch_beyond_the_data_are_errors(data, tmp_path):
    with pytest.raises(script.UserError, match="Unknown model 'nat_mino', near to nat_mini"):
        script.train(config(data, tmp_path, model="nat_mino"))
    with pytest.raises(script.UserError, match="batch_size x processes, 64, must not exceed the 42 training images"):
        script.train(config(data, tmp_path, batch_size=64))


def test_a_checkpoint_file_is_where_training_starts(data, run, tmp_path):
    file = run[0] / "last" / "model.safetensors"
    cfg = config(data, tmp_path, checkpoint=str(file))
    model, weights = script.make_model(cfg, num_classes=3), load_file(file)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    other_head = script.make_model(cfg, num_classes=5)
    assert torch.equal(other_head.patch_embed.proj[0].weight, weights["patch_embed.proj.0.weight"])
    assert other_head.num_classes == 5


def test_a_run_is_resumed_without_the_checkpoint_it_began_from(data, run, tmp_path):
    shutil.copy(run[0] / "last" / "model.safetensors", tmp_path)
    cfg = config(data, tmp_path / "o", epochs=1, warmup_epochs=0, checkpoint=str(tmp_path / "model.safetensors"))
    rows = script.train(cfg)
    (tmp_path / "model.safetensors").unlink()
    assert script.train(cfg, resume=True) == rows


@pytest.mark.parametrize("path", sorted((SCRIPTS.parent / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_is_valid(path):
    cfg, _ = script.parse_args(["--config", str(path), "--data", "x"])
    script.make_model(script.Config(data="x", model=cfg.model, model_kwargs=cfg.model_kwargs), num_classes=2)
