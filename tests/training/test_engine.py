"""Promises of a training run, on a network and images small enough for seconds."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config
from timm.utils import ModelEmaV3

from nat_models.cli import main
from nat_models.errors import UserError
from nat_models.training.engine import evaluate
from nat_models.training.images import ImageSet, make_loader
from nat_models.training.splits import read_data
from nat_models.training.tasks.classification import Classification
from tests.training.conftest import TIMING, fit, make_settings, same_course, summary

NAMES = ("best", "last", "state", "config.yaml", "summary.csv", "curve.png", ".lock")


class Killed(Exception):
    pass


def test_a_run_writes_every_promised_file_and_leaves_no_temporary_one(run):
    output, _ = run
    assert {p.name for p in output.iterdir()} == {*NAMES}
    assert Image.open(output / "curve.png").size[0] > 500


def test_the_loss_falls_and_separable_classes_are_told_apart(run):
    _, rows = run
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["val_loss"] < rows[0]["val_loss"]
    assert rows[-1]["top1"] > 90


def test_the_summary_has_one_row_per_epoch_and_no_top5_for_three_classes(run):
    rows = summary(run[0])
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    assert set(rows[0]) == {
        "epoch",
        "lr",
        "train_loss",
        "val_loss",
        "top1",
        "macro_precision",
        "macro_recall",
        "macro_f1",
        *TIMING,
    }


@pytest.mark.parametrize("in_chans", [1, 3])
def test_a_saved_folder_restores_logits_labels_and_preprocessing(data, tmp_path, in_chans):
    cfg = make_settings(
        data, tmp_path / "o", in_chans=in_chans, epochs=1, warmup_epochs=0, crop_pct=0.9, pretrained=False
    )
    rows = fit(cfg)
    model = timm.create_model(f"local-dir:{tmp_path / 'o' / 'last'}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ["blue", "green", "red"]
    assert model.num_classes == 3
    assert model.levels[0].blocks[0].attn.kernel_size == (3, 3)
    data_config = resolve_model_data_config(model)
    assert tuple(data_config["input_size"]) == (in_chans, 32, 32)
    assert data_config["crop_pct"] == 0.9
    assert len(data_config["mean"]) == in_chans

    val = read_data(cfg.data, val_fraction=cfg.val_fraction, seed=cfg.seed).parts["val"]
    loader = make_loader(ImageSet(val.images, val.targets, in_chans, create_transform(**data_config)), batch_size=8)
    metrics = evaluate(Classification(cfg), model, loader, Accelerator())
    assert metrics["val_loss"] == pytest.approx(rows[-1]["val_loss"], rel=1e-6)
    assert metrics["top1"] == rows[-1]["top1"]
    trained = load_file(tmp_path / "o" / "state" / "model.safetensors")
    assert all(torch.equal(v, trained[k]) for k, v in model.state_dict().items())


def test_a_run_killed_by_the_system_continues_to_the_same_result(data, tmp_path):
    settings = dict(epochs=8, ema_decay=0.9, cutmix=0.5, drop_path=0.2, workers=1, grad_accum=2, layer_decay=0.9)
    fit(make_settings(data, tmp_path / "whole", **settings))
    saved = yaml.safe_load((tmp_path / "whole" / "config.yaml").read_text())
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(saved | dict(output=str(tmp_path / "killed"))))
    command = [sys.executable, "-m", "nat_models", "train", "--config", str(tmp_path / "c.yaml")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, env=env)
    while process.poll() is None and not (tmp_path / "killed" / "summary.csv").exists():
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # its loader processes too
    assert process.wait() == -signal.SIGKILL
    assert 1 <= len(summary(tmp_path / "killed")) < 8
    fit(make_settings(data, tmp_path / "killed", **settings), resume=True)
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
        fit(make_settings(data, tmp_path / "o", **settings))
    monkeypatch.undo()
    for name in ("last", "best"):
        if (tmp_path / "o" / name).exists():
            timm.create_model(f"local-dir:{tmp_path / 'o' / name}", pretrained=True)
    fit(make_settings(data, tmp_path / "o", **settings), resume=True)
    same_course(run[0], tmp_path / "o")


def test_resuming_a_finished_run_changes_nothing(data, run, tmp_path):
    shutil.copytree(run[0], tmp_path / "o")
    settings = dict(ema_decay=0.9, mixup=0.2, drop_path=0.1, clip_grad=1.0)
    assert fit(make_settings(data, tmp_path / "o", **settings), resume=True) == run[1]
    same_course(run[0], tmp_path / "o")


def test_a_run_is_neither_overwritten_nor_resumed_with_other_settings(data, run, capsys):
    flags = ["--data", str(data), "--output", str(run[0])]
    assert main(["train", *flags]) == 2
    assert "--resume" in capsys.readouterr().err
    assert main(["train", *flags, "--resume", "--lr", "0.5"]) == 2
    assert "lr must stay" in capsys.readouterr().err


def test_accumulated_steps_make_one_update(data, tmp_path, monkeypatch):
    seen = []
    update = ModelEmaV3.update
    monkeypatch.setattr(ModelEmaV3, "update", lambda s, m, step: (seen.append(step), update(s, m, step=step)))
    fit(make_settings(data, tmp_path, epochs=2, grad_accum=2, ema_decay=0.9))
    assert seen == [1, 2, 3, 4, 5, 6]  # 42 images, 5 steps of 8: 3 updates an epoch, the last of one step


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path, monkeypatch):
    losses = Classification.losses
    nan = lambda *args: {name: loss * float("nan") for name, loss in losses(*args).items()}  # noqa: E731
    monkeypatch.setattr(Classification, "losses", nan)
    with pytest.raises(UserError, match=r"loss is nan in epoch 1/3"):
        fit(make_settings(data, tmp_path))
    assert not (tmp_path / "state").exists()


def test_a_misspelt_model_and_a_batch_beyond_the_data_are_errors(data, tmp_path):
    with pytest.raises(UserError, match="Unknown model 'nat_mino', near to nat_mini"):
        fit(make_settings(data, tmp_path, model="nat_mino"))
    with pytest.raises(UserError, match="batch_size x processes, 64, must not exceed the 42 training images"):
        fit(make_settings(data, tmp_path, batch_size=64))


def test_a_run_is_resumed_without_the_checkpoint_it_began_from(data, run, tmp_path):
    shutil.copy(run[0] / "last" / "model.safetensors", tmp_path)
    cfg = make_settings(data, tmp_path / "o", epochs=1, warmup_epochs=0, checkpoint=str(tmp_path / "model.safetensors"))
    rows = fit(cfg)
    (tmp_path / "model.safetensors").unlink()
    assert fit(cfg, resume=True) == rows
