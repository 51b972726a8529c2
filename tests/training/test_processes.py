"""Promises of a run in several processes: real ones, over gloo, that print their ranks."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
import yaml
from accelerate import Accelerator
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

from nat_models.training.engine import evaluate
from nat_models.training.images import ImageSet, make_loader
from nat_models.training.splits import read_data
from nat_models.training.tasks.classification import Classification
from tests.training.conftest import fit, make_settings, same_course, summary
from tests.training.test_resume import RICH

PROGRAM = Path(__file__).with_name("program.py")


def start(settings, folder: Path, *flags: str) -> subprocess.Popen:
    """Two processes; what they say goes to the pipe."""
    folder.mkdir(exist_ok=True)
    (folder / "c.yaml").write_text(yaml.safe_dump(settings.plain()))
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", PROGRAM, folder]
    return subprocess.Popen(
        [sys.executable, *map(str, launch), "--config", str(folder / "c.yaml"), *flags],
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(PROGRAM.parents[2]),
            "ACCELERATE_USE_FSDP": str("--fsdp" in flags).lower(),
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        },
    )


def finish(process: subprocess.Popen) -> str:
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert {f"rank {rank} of 2 over gloo" for rank in (0, 1)} <= set(output.splitlines()), output
    return output


def losses(folder: Path, rank: int) -> torch.Tensor:
    return torch.tensor([float(line) for line in (folder / f"losses-{rank}.txt").read_text().split()])


def test_two_processes_learn_what_one_learns_of_twice_the_batch(data, tmp_path, monkeypatch):
    settings = dict(augment=False, drop_path=0.0, epochs=4, clip_grad=1.0, ema_decay=0.9, layer_decay=0.9)
    output = finish(start(make_settings(data, tmp_path / "two", **settings, batch_size=4), tmp_path / "told"))
    assert "in 2 processes, batch 8 = 2 x 4 x 1" in output
    seen, plain = [], Classification.losses

    def told(*args):
        result = plain(*args)
        seen.append(float(sum(result.values())))
        return result

    monkeypatch.setattr(Classification, "losses", told)
    fit(make_settings(data, tmp_path / "one", **settings, batch_size=8))
    two = (losses(tmp_path / "told", 0) + losses(tmp_path / "told", 1)) / 2
    assert len(seen) == len(two) == 20
    torch.testing.assert_close(two, torch.tensor(seen), atol=1e-4, rtol=0)
    a, b = (load_file(tmp_path / name / "last" / "model.safetensors") for name in ("one", "two"))
    for key in a:  # float32 sums in another order, over 20 steps of AdamW
        torch.testing.assert_close(a[key], b[key], atol=1e-3, rtol=0)


def test_two_processes_count_each_validation_image_once(data, tmp_path):
    """13 validation images are no multiple of 2 x 4: one process counts 7, the other 6."""
    (data_13 := tmp_path / "data").mkdir()
    shutil.copytree(data, data_13 / "train")
    shutil.copytree(data, data_13 / "val")
    for file in sorted((data_13 / "val").rglob("*.png"))[13:]:
        file.unlink()
    cfg = make_settings(data_13, tmp_path / "o", epochs=1, warmup_epochs=0, batch_size=4)
    finish(start(cfg, tmp_path / "told"))
    row = summary(tmp_path / "o")[0]
    model = timm.create_model(f"local-dir:{tmp_path / 'o' / 'last'}", pretrained=True)
    val = read_data(cfg.data, seed=cfg.seed).parts["val"]
    assert len(val) == 13
    image_set = ImageSet(val.images, val.targets, 3, create_transform(**resolve_model_data_config(model)))
    metrics = evaluate(Classification(cfg), model, make_loader(image_set, batch_size=13), Accelerator())
    assert float(row["val_loss"]) == pytest.approx(metrics["val_loss"], rel=1e-5)  # another order of float32 sums
    assert float(row["top1"]) == pytest.approx(metrics["top1"])


@pytest.mark.slow
def test_two_processes_killed_and_resumed_give_the_same_bits(data, tmp_path):
    settings = dict(**RICH, batch_size=4, epochs=6, workers=1, save_every_steps=2)
    finish(start(make_settings(data, tmp_path / "whole", **settings), tmp_path / "told"))
    cfg = make_settings(data, tmp_path / "killed", **settings)
    process = start(cfg, tmp_path / "told", "--slow")
    course, step = tmp_path / "killed" / "state" / "custom_checkpoint_0.pkl", 0
    while process.poll() is None and not step:
        time.sleep(0.01)
        if course.exists():
            step = torch.load(course, weights_only=False)["step"]
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert step in (2, 4)
    finish(start(cfg, tmp_path / "told", "--resume"))
    same_course(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_sigterm_to_the_launcher_ends_all_processes_with_one_line(data, tmp_path):
    cfg = make_settings(data, tmp_path / "o", batch_size=4, epochs=500)
    process = start(cfg, tmp_path / "told", "--slow")
    while process.poll() is None and not (tmp_path / "o" / "summary.csv").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert output.count("stopped after epoch") == 1, output
    state = torch.load(tmp_path / "o" / "state" / "custom_checkpoint_0.pkl", weights_only=False)
    steps = len(losses(tmp_path / "told", 0))
    assert 5 * len(state["rows"]) + state["step"] == steps


@pytest.mark.slow
def test_sharded_weights_are_saved_whole(data, tmp_path):
    cfg = make_settings(data, tmp_path / "o", batch_size=4, epochs=1, warmup_epochs=0, drop_path=0.0, augment=False)
    output = finish(start(cfg, tmp_path / "told", "--fsdp"))
    assert output.count("DistributedType.FSDP, DTensor") == 2
    assert len(losses(tmp_path / "told", 0)) == 5
    model = timm.create_model(f"local-dir:{tmp_path / 'o' / 'last'}", pretrained=True)
    val = read_data(cfg.data, val_fraction=cfg.val_fraction, seed=cfg.seed).parts["val"]
    image_set = ImageSet(val.images, val.targets, 3, create_transform(**resolve_model_data_config(model)))
    metrics = evaluate(Classification(cfg), model, make_loader(image_set, batch_size=13), Accelerator())
    assert float(summary(tmp_path / "o")[0]["val_loss"]) == pytest.approx(metrics["val_loss"], rel=1e-5)
