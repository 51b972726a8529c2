"""The promise that a picture is learnt alike however it is stored, on real images."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from nat_models.resources import resource
from nat_models.training.engine import train
from nat_models.training.settings import read_yaml
from nat_models.training.tasks.classification import Classification, ClassificationSettings
from tests.training.storages import store

# Dark ink on light paper, in the ways that people store pictures; the network sees grey.
HOW = ("png", "exif", "png16", "webp", "tiff", "cmyk", "palette")


@pytest.mark.slow
def test_digits_train_alike_however_they_are_stored(tmp_path):
    """Eight epochs each: a storage that is read turned or clipped loses tens of points."""
    digits = load_digits()
    recipe = read_yaml(resource("configs", "digits.yaml"), ClassificationSettings)
    short = dict(epochs=8, warmup_epochs=1, trackers="none")
    reached = {}
    for how in HOW:
        for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            image = Image.fromarray((255 - pixels / 16 * 255).round().astype(np.uint8))
            store(image.resize((32, 32), Image.Resampling.BICUBIC), tmp_path / how / str(label) / f"{i:04}", how)
        settings = ClassificationSettings(
            **{**recipe, **short}, data=str(tmp_path / how), output=str(tmp_path / f"run_{how}")
        )
        reached[how] = train(settings, Classification(settings))[-1]["top1"]
    print(reached)
    assert min(reached.values()) > 90
    assert max(reached.values()) - min(reached.values()) <= 2
