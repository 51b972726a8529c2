"""Promises of `nat-models features`."""

import json
import multiprocessing
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from timm.data import create_transform, resolve_model_data_config
from timm.models import save_for_hf

from nat_models.cli import main

NAMES = ["a.png", "b/10.png", "b/2.png", "b/c/3.png", "b10.png", "z.png"]  # sorted as strings


@pytest.fixture
def images(tmp_path) -> Path:
    rng = np.random.default_rng(0)
    for name in reversed(NAMES):
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), dtype="uint8")).save(path)
    return tmp_path / "images"


@pytest.fixture
def model(tmp_path) -> torch.nn.Module:
    torch.manual_seed(0)
    kwargs = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), kernel_size=3, num_classes=4)
    model = timm.create_model("nat_mini", **kwargs)
    data_config = dict(input_size=(3, 32, 32), crop_pct=0.9)
    save_for_hf(model, tmp_path / "model", safe_serialization=True, data_config=data_config)
    return timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()


def extract(images: Path, *flags: str) -> int:
    model, output = images.parent / "model", images.parent / "features.safetensors"
    common = ["--data", str(images), "--model", f"local-dir:{model}", "--output", str(output)]
    return main(["features", *common, "--batch-size", "4", "--num-workers", "0", *flags])


def read(images: Path) -> tuple[torch.Tensor, dict]:
    with safe_open(images.parent / "features.safetensors", framework="pt") as f:
        return f.get_tensor("features"), f.metadata()


@torch.inference_mode()
def expected(model, images: Path, names: list[str], size: int = 32) -> torch.Tensor:
    transform = create_transform(**{**resolve_model_data_config(model), "input_size": (3, size, size)})
    batch = torch.stack([transform(Image.open(images / name).convert("RGB")) for name in names])
    return model.forward_head(model.forward_features(batch), pre_logits=True)


def test_features_are_the_pooled_ones_in_the_order_of_the_sorted_names(images, model):
    assert extract(images) == 0
    features, metadata = read(images)
    assert json.loads(metadata["files"]) == NAMES
    assert features.shape == (6, model.num_features)
    torch.testing.assert_close(features, expected(model, images, NAMES), rtol=1e-5, atol=1e-5)  # other batches


def test_the_metadata_names_model_and_preprocessing(images, model):
    assert extract(images, "--img-size", "48") == 0
    features, metadata = read(images)
    assert metadata["model"].startswith("local-dir:")
    preprocessing = json.loads(metadata["preprocessing"])
    assert (preprocessing["input_size"], preprocessing["crop_pct"]) == ([3, 48, 48], 0.9)
    torch.testing.assert_close(features, expected(model, images, NAMES, size=48), rtol=1e-5, atol=1e-5)


def test_lower_precision_computes_close_features_and_writes_float32(images, model):
    assert extract(images, "--precision", "bfloat16") == 0
    features, _ = read(images)
    assert features.dtype == torch.float32
    reference = expected(model, images, NAMES)
    assert not torch.equal(features, reference)
    torch.testing.assert_close(features, reference, rtol=0.05, atol=0.05)  # 8 bits of mantissa through 4 blocks


def test_a_checkpoint_file_gives_the_features_of_its_weights(images, model):
    kwargs = ["embed_dim=16", "depths=[1,1,1,1]", "num_heads=[1,1,1,1]", "kernel_size=3"]
    flags = ["--model", "nat_mini", "--checkpoint", str(images.parent / "model" / "model.safetensors")]
    assert extract(images, *flags, "--model-kwargs", *kwargs, "--img-size", "32") == 0
    features, metadata = read(images)
    assert json.loads(metadata["preprocessing"])["crop_pct"] == 0.875  # a file carries no preprocessing: the model's
    model.pretrained_cfg["crop_pct"] = 0.875
    torch.testing.assert_close(features, expected(model, images, NAMES), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_unreadable_image_is_an_error_that_names_it_and_nothing_is_written(images, model, capsys, workers):
    (images / "b" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert extract(images, "--num-workers", workers) == 2
    assert capsys.readouterr().err.startswith(f"error: {images / 'b' / 'torn.png'} cannot be read as an image")
    assert not list(images.parent.glob("features*"))
    assert not multiprocessing.active_children()  # or the command would wait for them at its end


def test_skip_unreadable_leaves_out_what_cannot_be_read_and_says_so(images, model, capsys):
    for name in NAMES[:4]:  # a whole batch of them
        (images / name).write_bytes(b"not an image")
    assert extract(images, "--skip-unreadable") == 0
    features, metadata = read(images)
    assert json.loads(metadata["files"]) == NAMES[4:]
    torch.testing.assert_close(features, expected(model, images, NAMES[4:]), rtol=1e-5, atol=1e-5)
    assert "a.png" in capsys.readouterr().err


def test_a_folder_without_images_is_an_error(tmp_path, model, capsys):
    (tmp_path / "empty").mkdir()
    assert extract(tmp_path / "empty") == 2
    assert "There are no images" in capsys.readouterr().err
