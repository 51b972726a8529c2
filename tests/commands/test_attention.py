"""Promises of `nat-models attention`."""

import numpy as np
import pytest
from PIL import Image

from nat_models.cli import main

TINY = ["--model-kwargs", "embed_dim=16", "depths=[1,1,2,1]", "num_heads=[1,2,4,8]"]
MODEL = ["--model", "dinat_mini", "--no-pretrained", *TINY]


@pytest.fixture
def photo(tmp_path):
    """Lies on its side in the file: 80 x 120 with a note to turn it, 120 x 80 upright."""
    pixels = np.random.default_rng(0).integers(0, 255, (80, 120, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=exif)
    return tmp_path / "photo.jpg"


def test_it_draws_a_picture_of_all_levels_and_heads(photo, tmp_path, capsys):
    output = tmp_path / "attention.png"
    flags = ["--image", str(photo), "--pixel", "70,110", "--output", str(output), "--img-size", "64"]
    assert main(["attention", *flags, *MODEL]) == 0
    assert f"look at {output}" in capsys.readouterr().out.replace("\n", "")
    with Image.open(output) as picture:
        assert picture.width > 1000 and picture.height > 500
        assert len(set(picture.convert("RGB").getdata())) > 1000


@pytest.mark.parametrize(
    "pixel, message",
    [
        ("80,10", "The pixel 80,10 is outside"),  # upright it is 80 wide
        ("10,120", "which has 80 x 120 pixels"),
        ("10", "must be COLUMN,ROW"),
        ("-1,5", "must be COLUMN,ROW|expected one argument"),
    ],
)
def test_a_pixel_that_is_not_there_is_an_error(pixel, message, photo, capsys):
    import re

    assert main(["attention", "--image", str(photo), "--pixel", pixel, *MODEL]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_an_image_that_is_not_there_is_an_error(tmp_path, capsys):
    assert main(["attention", "--image", str(tmp_path / "no.jpg"), "--pixel", "1,1", *MODEL]) == 2
    assert f"error: There is no image {tmp_path / 'no.jpg'}." in capsys.readouterr().err
