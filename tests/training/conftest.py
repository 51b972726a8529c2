"""A data set of three colours and a network that learns it in seconds."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from nat_models.training.engine import train
from nat_models.training.tasks.classification import Classification, ClassificationSettings

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
    trackers="none",
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


def make_settings(data: Path, output: Path, **kwargs) -> ClassificationSettings:
    return ClassificationSettings(**{**TINY, "data": str(data), "output": str(output), **kwargs})


def fit(settings: ClassificationSettings, resume: bool = False) -> list[dict]:
    return train(settings, Classification(settings), resume)


@pytest.fixture(scope="module")  # not wider than one_thread, which would then come too late
def run(data, tmp_path_factory) -> tuple[Path, list[dict]]:
    output = tmp_path_factory.mktemp("run") / "output"
    return output, fit(make_settings(data, output, ema_decay=0.9, mixup=0.2, drop_path=0.1, clip_grad=1.0))


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
