"""Promises of settings that are found by trying."""

import csv

import pytest
import torch
from PIL import Image

from nat_models.errors import UserError
from nat_models.training import tuning
from nat_models.training.parts import make_accelerator
from nat_models.training.tasks.classification import Classification
from nat_models.training.tuning import find_lr, steepest
from tests.training.conftest import fit, make_settings, same_course


def test_the_steepest_fall_is_found():
    rates = [10.0**-i for i in range(6, 0, -1)]
    assert steepest(rates, [1.0, 0.99, 0.9, 0.5, 0.45, 3.0]) == 1e-4  # around it from 0.99 to 0.5
    with pytest.raises(UserError, match="The loss falls at no learning rate"):
        steepest(rates, [1.0, 1.1, 1.2, 1.3, 1.4, 1.5])


def test_the_learning_rate_finder_draws_and_tells(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tuning, "STEPS", 40)
    settings = make_settings(data, tmp_path / "o", grad_accum=2, ema_decay=0.9)
    best = find_lr(settings, Classification(settings))
    assert 1e-5 < best < 0.5
    assert f"--lr {best:.2g}" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "o").iterdir()} == {"lr_finder.csv", "lr_finder.png"}
    with open(tmp_path / "o" / "lr_finder.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    rates = [float(row["lr"]) for row in rows]
    assert rates == sorted(rates) and rates[0] == 1e-7 and best in rates
    assert Image.open(tmp_path / "o" / "lr_finder.png").size[0] > 500


def _memory_for(images: int, monkeypatch) -> None:
    """As if the device had room for a step of so many images."""
    losses = Classification.losses

    def limited(task, model, batch):
        if len(batch[0]) > images:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return losses(task, model, batch)

    monkeypatch.setattr(Classification, "losses", limited)


def test_the_batch_is_halved_until_it_fits_and_the_whole_batch_stays(data, tmp_path, monkeypatch, capsys):
    _memory_for(5, monkeypatch)
    settings = make_settings(data, tmp_path / "found", batch_size=16, auto_batch_size=True)
    rows = fit(settings)
    assert "batch_size 16 does not fit in the memory: 4, and grad_accum 4" in capsys.readouterr().out
    fit(make_settings(data, tmp_path / "given", batch_size=4, grad_accum=4))
    same_course(tmp_path / "found", tmp_path / "given")
    _memory_for(1, monkeypatch)  # a run keeps the batch that it began with
    assert fit(settings, resume=True) == rows


def test_the_step_that_is_tried_is_one_of_the_run(data, tmp_path, monkeypatch):
    tried, losses = [], Classification.losses

    def seen(task, model, batch):
        weight = next(p for p in model.parameters() if p.dim() == 4 and min(p.shape) > 1)
        tried.append((weight.is_contiguous(memory_format=torch.channels_last), weight.requires_grad))
        return losses(task, model, batch)

    monkeypatch.setattr(Classification, "losses", seen)
    settings = make_settings(data, tmp_path / "o", channels_last=True, freeze="stem")
    tuning.fit_batch(settings, Classification(settings), make_accelerator(settings))
    assert tried == [(True, False)]


def test_memory_for_no_image_is_an_error(data, tmp_path, monkeypatch):
    _memory_for(0, monkeypatch)
    with pytest.raises(UserError, match="A step of 1 images does not fit in the memory; batch_size began at 8"):
        fit(make_settings(data, tmp_path / "o", auto_batch_size=True))
