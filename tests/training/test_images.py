"""Promises of images: what is one, how it is decoded, what becomes of one that cannot be read."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.transforms.functional import pil_to_tensor

from nat_models.cli import main
from nat_models.errors import CheckpointError, UserError
from nat_models.training import images as module
from nat_models.training.decoding import ImageFile, decode
from nat_models.training.images import ImageSet, check_images, make_loader, read_batches, say, scan
from tests.training.conftest import make_settings
from tests.training.storages import STORAGES, store

PHOTO = Image.fromarray(load_sample_images().images[0]).resize((64, 48))
TORN = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def read(path, in_chans=3, **kwargs) -> np.ndarray:
    return np.asarray(decode(ImageFile(path.name, str(path)), in_chans, **kwargs)).astype(float)


@pytest.mark.parametrize("how", STORAGES)
def test_a_picture_looks_the_same_however_it_is_stored(tmp_path, how):
    grey = how in ("png16", "float")
    pixels = read(store(PHOTO, tmp_path / "x", how), 1 if grey else 3)
    expected = np.asarray(PHOTO.convert("L") if grey else PHOTO).astype(float)
    assert pixels.shape == expected.shape
    # Lossy formats and palettes are some levels off; turned, clipped or inverted it would be dozens.
    assert np.abs(pixels - expected).mean() < (5 if how in ("exif", "jfif", "cmyk", "avif", "gif", "palette") else 0.5)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_comes_out_upright(tmp_path, orientation):
    pixels = np.zeros((4, 6), np.uint8)
    pixels[0, 0], pixels[0, 5] = 100, 200
    # What a camera stores: the inverse of what the tag says must be done. By the EXIF standard, row 0 and column 0 of
    # what is stored are, upright: 1 top/left, 2 top/right, 3 bottom/right, 4 bottom/left, 5 left/top, 6 right/top,
    # 7 right/bottom, 8 left/bottom.
    stored = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.T,
        6: pixels[:, ::-1].T,
        7: pixels[::-1, ::-1].T,
        8: pixels[::-1].T,
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x.png", exif=exif)
    assert (read(tmp_path / "x.png", 1) == pixels).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_shows_the_background(tmp_path, mode):
    image = PHOTO.convert("RGBA")
    image.putalpha(0)
    image = image.convert("LA") if mode == "LA" else image.quantize(16) if mode == "P" else image
    image.save(tmp_path / "x.png")
    assert (read(tmp_path / "x.png") == 255).all()
    assert (read(tmp_path / "x.png", background=(10, 20, 30)) == (10, 20, 30)).all()


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("L", (8, 8), value) for value in (40, 200)]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert (read(tmp_path / "x.gif") == 40).all()


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.full((4, 4), 70000, np.int32), "integers from 70000 to 70000, whose range is not known"),
        (np.full((4, 4), -1, np.int32), "integers from -1"),
        (
            np.full((4, 4), 300, np.float32),
            r"floating point from 300.0 to 300.0: it must lie within \[0, 1\] or \[0, 255\]",
        ),
        (np.full((4, 4), np.nan, np.float32), "floating point from nan"),
    ],
)
def test_pixels_of_an_unknown_range_are_not_guessed(tmp_path, pixels, message):
    Image.fromarray(pixels).save(tmp_path / "x.tiff")
    with pytest.raises(UserError, match=rf"x\.tiff cannot be read as an image: {message}"):
        read(tmp_path / "x.tiff")


def test_half_an_image_is_not_taken_for_one(tmp_path):
    PHOTO.save(tmp_path / "x.jpg")
    content = (tmp_path / "x.jpg").read_bytes()
    (tmp_path / "x.jpg").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot be read as an image: image file is truncated"):
        read(tmp_path / "x.jpg")


def test_a_bomb_is_an_error(tmp_path, monkeypatch):
    PHOTO.save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="exceeds limit"):
        read(tmp_path / "x.png")


def test_damaged_orientation_does_not_cost_the_image(tmp_path):
    PHOTO.save(tmp_path / "x.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert read(tmp_path / "x.jpg").shape == (48, 64, 3)


def test_a_program_that_calls_itself_an_image_is_not_run(tmp_path):
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with pytest.raises(UserError, match="cannot identify image file"):
        read(tmp_path / "x.png")


def test_what_is_no_data_is_passed_over_and_counted(tmp_path):
    names = ["a/1.PNG", "a/2.webp", "b/3.jpeg", "a/._1.png", "a/.DS_Store", "__MACOSX/a/1.png", "Thumbs.db", "n.txt"]
    names += [".ipynb_checkpoints/1.png", "a/x.heic", "b/README", "run/config.yaml", "run/.lock", "run/best/x.png"]
    for name in [*names, "out/1.png", "b/notes.txt"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found, passed_over = scan(tmp_path, exclude=[tmp_path / "out"])
    assert [image.name for image in found] == ["a/1.PNG", "a/2.webp", "b/3.jpeg"]
    assert passed_over == {
        "hidden": 3,
        "folder __MACOSX": 1,
        "folder .ipynb_checkpoints": 1,
        "folder run of a run": 1,
        "folder out of a run": 1,
        ".txt": 2,
        ".heic": 1,
        "without a suffix": 1,
    }
    assert say(passed_over).startswith("3 hidden, 2 .txt, 1 .heic (which Pillow reads with pillow-heif")


def test_links_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "1.png").touch()
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "linked").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    found, passed_over = scan(tmp_path / "data")
    assert [image.name for image in found] == ["a/linked/1.png"]
    assert passed_over == {"link to a folder around it": 1}


def test_a_check_finds_damaged_headers_and_with_full_damaged_pixels(tmp_path):
    paths = [tmp_path / f"{i}.jpg" for i in range(3)]
    for path in paths:
        PHOTO.save(path)
    paths[1].write_bytes(b"not an image")
    paths[2].write_bytes(paths[2].read_bytes()[:-200])
    images = [ImageFile(path.name, str(path)) for path in paths]
    assert list(check_images(images)) == [1]
    assert list(check_images(images, full=True)) == [1, 2]


def test_a_check_is_remembered_until_a_file_changes(tmp_path, monkeypatch, cache):
    PHOTO.save(tmp_path / "x.png")
    images = [ImageFile("x.png", str(tmp_path / "x.png"))]
    assert check_images(images) == {}
    (remembered,) = (cache / "nat_models" / "checked").iterdir()
    assert json.loads(remembered.read_text()) == {}
    monkeypatch.setattr(module, "check_header", pytest.fail)
    assert check_images(images) == {}
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    (tmp_path / "x.png").write_bytes(TORN)
    os.utime(tmp_path / "x.png", ns=(0, time.time_ns()))
    assert list(check_images(images)) == [0]


def test_a_check_needs_no_cache(tmp_path, monkeypatch):
    PHOTO.save(tmp_path / "x.png")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert check_images([ImageFile("x.png", str(tmp_path / "x.png"))]) == {}


def _draw(image) -> torch.Tensor:
    return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_augmentation_depends_on_seed_epoch_and_image_alone(data, workers):
    paths = sorted(data.rglob("*.png"))[:6]
    images = [ImageFile(path.name, str(path)) for path in paths]

    def draws(order, **kwargs):
        loader = make_loader(ImageSet(images, None, 3, _draw, **kwargs), 2, workers, sampler=order)
        return {int(i): row for rows, indices in read_batches(loader) for row, i in zip(rows, indices, strict=True)}

    first = draws([(1, i) for i in range(6)], seed=5)
    later = draws([(1, i) for i in (4, 2, 3, 0)], seed=5)
    assert all(torch.equal(later[i], first[i]) for i in later)
    assert len({tuple(row.tolist()) for row in first.values()}) == 6
    assert not torch.equal(draws([(2, 0)], seed=5)[0], first[0])
    assert not torch.equal(draws([(1, 0)], seed=6)[0], first[0])


def test_reading_leaves_the_random_numbers_of_the_main_process_alone(data):
    (path, *_) = data.rglob("*.png")
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    ImageSet([ImageFile(path.name, str(path))], None, 3, _draw)[(1, 0)]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1:] == (random.getstate(), np.random.get_state()[1].tolist())


def test_an_unreadable_image_is_an_error_that_names_it(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "red" / "torn.png").write_bytes(TORN)
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump(make_settings(tmp_path / "data", tmp_path / "o", workers=1).plain())
    )
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'data' / 'red' / 'torn.png'} cannot be read")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_leaves_its_worker_as_the_very_error(data, tmp_path, workers):
    (tmp_path / "torn.png").write_bytes(TORN)
    paths = [data / "red" / "0.png", tmp_path / "torn.png", data / "red" / "1.png"]
    images = [ImageFile(path.name, str(path)) for path in paths]
    loader = make_loader(ImageSet(images, [0, 1, 2], 3, pil_to_tensor), 2, workers)
    with pytest.raises(UserError) as raised:
        list(read_batches(loader))
    assert str(raised.value).startswith(f"{tmp_path / 'torn.png'} cannot be read")
    assert "Traceback" not in str(raised.value)
    told = []
    batches = list(read_batches(loader, told.append))
    assert [str(error) for error in told] == [str(raised.value)]
    assert [target.tolist() for _, target in batches] == [[0], [2]]


def test_a_program_that_an_error_ends_does_not_wait_for_its_workers(data):
    code = f"""
from pathlib import Path
from timm.data import create_transform
from nat_models.training.images import ImageSet, make_loader, read_batches, scan
images, _ = scan(Path({str(data)!r}))
images = ImageSet(images, None, 3, create_transform(32))
batches = read_batches(make_loader(images, 1, 2))
next(batches)
raise RuntimeError("a mistake")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.endswith("RuntimeError: a mistake\n"), done.stderr


def test_errors_are_pickled_whole():
    for error in (UserError("UserError: 1\n2"), CheckpointError("no weights")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy)) == (type(error), str(error))
