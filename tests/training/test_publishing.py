"""Promises of a published folder: timm and transformers load it alike, whatever the network."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from timm.data.model_config import resolve_input_data_config

from nat_models.checkpoints.saving import save_model
from nat_models.training.models import class_names, is_multi_label, make_model

TINY = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), kernel_size=3)
NAMES = ["zebra", "ape", "cat", "dog"]


def save(folder, names=NAMES, multi_label=False, **kwargs):
    model = timm.create_model("nat_mini", num_classes=len(names), **TINY, **kwargs).eval()
    write(model, folder, names, multi_label)
    return model


def write(model, folder, names, multi_label=False):
    folder.mkdir(exist_ok=True)
    config = dict(label_names=names, problem_type="multi_label_classification" if multi_label else None)
    data_config = resolve_input_data_config(model, dict(img_size=48, crop_pct=0.9))
    save_model(model, folder, model_config=config, data_config=data_config)


# 1,000 classes are what timm and transformers take for granted; other values are what they may forget.
VARIANTS = [{}, dict(names=[f"c{i}" for i in range(1000)]), dict(in_chans=1), dict(global_pool="max")]


@pytest.mark.parametrize("variant", VARIANTS, ids=["plain", "1000", "grey", "max"])
def test_timm_loads_the_network_its_labels_and_its_preprocessing(tmp_path, variant):
    model = save(tmp_path / "best", **variant)
    loaded = make_model(str(tmp_path / "best"), pretrained=True).eval()
    x = torch.randn(2, variant.get("in_chans", 3), 48, 64)
    assert torch.equal(loaded(x), model(x))
    assert class_names(loaded) == variant.get("names", NAMES)
    config = resolve_input_data_config(loaded)
    assert (config["input_size"], config["crop_pct"]) == ((variant.get("in_chans", 3), 48, 48), 0.9)


@pytest.mark.parametrize("variant", VARIANTS, ids=["plain", "1000", "grey", "max"])
def test_transformers_loads_the_network_and_its_labels(tmp_path, variant):
    transformers = pytest.importorskip("transformers")
    model = save(tmp_path / "best", **variant)
    loaded = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "best").eval()
    x = torch.randn(2, variant.get("in_chans", 3), 48, 64)
    torch.testing.assert_close(loaded(x).logits, model(x), rtol=1e-5, atol=1e-6)  # threads may add in another order
    assert loaded.config.id2label == dict(enumerate(variant.get("names", NAMES)))


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_pipeline_gives_the_probabilities_of_timm(tmp_path, multi_label):
    transformers = pytest.importorskip("transformers")
    model = save(tmp_path / "best", multi_label=multi_label)
    image = Image.effect_mandelbrot((70, 60), (-2, -1, 1, 1), 50).convert("RGB")
    found = transformers.pipeline("image-classification", model=str(tmp_path / "best"))(image)
    transform = timm.data.create_transform(**resolve_input_data_config(model, dict(img_size=48, crop_pct=0.9)))
    with torch.no_grad():
        logits = model(transform(image)[None])[0]
    expected = logits.sigmoid() if multi_label else logits.softmax(dim=0)
    # The pipeline computes the softmax in numpy.
    assert {row["label"]: row["score"] for row in found} == pytest.approx(
        dict(zip(NAMES, expected.tolist(), strict=True)), abs=1e-6
    )


@pytest.mark.parametrize("multi_label", [False, True])
def test_whether_an_image_has_several_labels_is_read_back(tmp_path, multi_label):
    save(tmp_path / "best", multi_label=multi_label)
    loaded = make_model(str(tmp_path / "best"), pretrained=True)
    assert is_multi_label(loaded) is multi_label
    write(loaded, tmp_path / "again", NAMES)  # a fine-tune on one label per image
    assert not is_multi_label(make_model(str(tmp_path / "again"), pretrained=True))


def test_a_channels_last_network_is_saved(tmp_path):
    model = timm.create_model("nat_mini", num_classes=4, **TINY).to(memory_format=torch.channels_last)
    write(model, tmp_path / "best", NAMES)
    with safe_open(tmp_path / "best" / "model.safetensors", framework="pt") as f:
        assert all(torch.equal(f.get_tensor(key), value) for key, value in model.state_dict().items())


def test_a_network_fine_tuned_from_another_keeps_none_of_its_labels(tmp_path):
    save(tmp_path / "first")
    path = tmp_path / "first" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "label_descriptions": {"cat": "Felis catus"}}))
    write(make_model(str(tmp_path / "first"), pretrained=True), tmp_path / "best", ["a", "b", "c", "cat"])
    text = (tmp_path / "best" / "config.json").read_text()
    assert "zebra" not in text and "Felis" not in text
