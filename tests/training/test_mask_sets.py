"""Promises of images with label maps: changed together, reproducibly, and no label is ever invented."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from nat_models.errors import UserError
from nat_models.training.decoding import ImageFile
from nat_models.training.drawing import draw_truth, overlay, png
from nat_models.training.images import drawing_from, make_loader, read_batches
from nat_models.training.mask_sets import (
    Crop,
    Distort,
    MaskSet,
    band_statistics,
    fitted,
    make_augmentation,
    make_evaluation,
    read_image,
    to_picture,
)
from nat_models.training.masks import read_mask_data
from tests.training.label_maps import LABELS, SIZE, exif, five_bands, picture, put, put_pairs


def one(path) -> ImageFile:
    return ImageFile(path.name, str(path))


def pair(labels: np.ndarray, bands: int = 3) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """An image whose every band holds 40 times its label, so that what happens to one shows against the other."""
    labels = torch.from_numpy(labels)
    return tv_tensors.Image(labels.mul(40).expand(bands, -1, -1).clone()), tv_tensors.Mask(labels)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return read_mask_data(put_pairs(tmp_path_factory.mktemp("pairs"), count=8), val_fraction=0.25)


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 60),
    crop=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    scale=st.sampled_from([None, (50, 30)]),
    bands=st.sampled_from([1, 3, 5]),
    seed=st.integers(0, 1000),
)
def test_no_augmentation_invents_a_label(height, width, crop, scale, bands, seed):
    values = np.array([0, 7, 100, 254, 255], np.uint8)
    labels = values[np.random.default_rng(seed).integers(0, 5, (height, width))]
    half = [0.5] * bands
    augmentation = make_augmentation(crop, in_chans=bands, mean=half, std=half, scale=scale)
    with drawing_from(seed):
        image, changed = augmentation(*pair(labels, bands))
    assert image.shape == (bands, *crop) and changed.shape == crop
    assert set(changed.unique().tolist()) <= set(np.unique(labels).tolist()) | {255}


@pytest.mark.parametrize("seed", range(8))
def test_image_and_labels_are_changed_together(seed):
    # Blocks, far from whose borders bilinear and nearest agree.
    labels = np.kron(np.random.default_rng(seed).integers(0, 6, (5, 6)), np.ones((16, 16))).astype(np.uint8)
    augmentation = make_augmentation(48, mean=[0] * 3, std=[1] * 3, distort=False, ratio_range=(0.8, 2))
    with drawing_from(seed):
        image, changed = augmentation(*pair(labels))
    shown = (image[0] * 255 / 40).as_subclass(Tensor)
    inside = changed.as_subclass(Tensor) != 255
    agree = (shown - changed.as_subclass(Tensor)).abs()[inside] < 0.1
    assert inside.any() and agree.float().mean() > 0.8  # the rest are borders of the blocks


def test_what_is_padded_is_zero_after_normalising_and_ignored():
    image, labels = make_augmentation(64, ratio_range=(1, 1), hflip=0, distort=False)(*pair(LABELS))
    assert (image[:, 32:] == 0).all() and (image[:, :, 40:] == 0).all()
    assert (labels[32:] == 255).all() and (labels[:, 40:] == 255).all()
    assert torch.equal(labels[:32, :40].as_subclass(Tensor), torch.from_numpy(LABELS))
    expected = (LABELS[0, 0] * 40 / 255 - 0.485) / 0.229
    assert image[0, 0, 0].item() == pytest.approx(expected, abs=1e-6)


def test_a_mirror_image_has_mirrored_labels():
    image, labels = make_augmentation(32, ratio_range=(1, 1), hflip=1, distort=False, std=[1] * 3)(
        *pair(LABELS[:, :32].copy())
    )
    assert np.array_equal(labels.numpy(), LABELS[:, 31::-1])
    assert (image[0].argmax() % 32) == torch.from_numpy(LABELS[:, 31::-1].copy()).argmax() % 32


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((512, 683), (2048, 512), (512, 683)),
        ((1000, 600), (2048, 512), (853, 512)),
        ((300, 2000), (2048, 512), (307, 2048)),  # the long side decides
        ((100, 301), None, (100, 301)),
    ],
)
def test_an_image_is_fitted_into_the_box(size, scale, expected):
    assert fitted(size, scale) == expected


def test_a_factor_is_on_the_box_as_in_the_paper():
    assert fitted((512, 683), (2048, 512), 0.5) == (256, 342)
    assert fitted((33, 41), None, 2) == (66, 82)
    assert fitted((1, 50), None, 0.1) == (1, 5)


def test_a_crop_avoids_being_of_one_class():
    labels = np.zeros((32, 200), np.uint8)
    labels[:, 100:110] = 1
    shares = {}
    for most in (0.75, 1.0):
        crop, found = Crop((32, 20), most), []
        for seed in range(60):
            with drawing_from(seed):
                _, inside = crop(*pair(labels))
            found.append(torch.bincount(inside.flatten(), minlength=2).max().item() / inside.numel() < 0.75)
        shares[most] = np.mean(found)
    # A draw is good with probability 20 / 181; of eleven, one is with 1 - (161 / 181)^11 = 0.72.
    assert shares[1.0] < 0.3
    assert shares[0.75] > 0.5


def test_ignored_pixels_do_not_count_for_a_crop():
    # Of the labelled pixels of any crop that has both, half are of each class; most are ignored.
    labels = np.full((8, 64), 255, np.uint8)
    labels[:4, 30], labels[4:, 30] = 0, 1
    for seed in range(20):
        with drawing_from(seed):
            _, inside = Crop((8, 40), 0.75)(*pair(labels))
        assert set(inside.unique().tolist()) == {0, 1, 255}


def test_distortion_changes_colours_within_range_and_no_labels():
    photograph = tv_tensors.Image(torch.from_numpy(load_sample_images().images[1][:60, :80].copy()).permute(2, 0, 1))
    photograph = v2.functional.to_dtype(photograph, torch.float32, scale=True)
    labels, changes = tv_tensors.Mask(torch.zeros(60, 80, dtype=torch.uint8)), []
    for seed in range(40):
        with drawing_from(seed):
            image, same = Distort()(photograph, labels)
        assert same is labels and image.min() >= 0 and image.max() <= 1
        changes.append((image - photograph).abs().mean().item())
    assert 0 < np.mean(np.array(changes) == 0) < 0.2  # 1 of 16 draws nothing
    assert max(changes) > 0.1


def test_distortion_leaves_what_is_no_picture():
    image = tv_tensors.Image(torch.rand(5, 8, 8) * 3000)
    for seed in range(5):
        with drawing_from(seed):
            assert Distort()(image, None)[0] is image


def test_evaluation_keeps_the_label_map_as_it_is(data):
    items = MaskSet(data.parts["val"], data.reading, 3, make_evaluation(scale=(64, 20)))
    image, labels = items[0]
    assert image.shape == (3, 20, 25) and image.dtype == torch.float32
    assert labels.dtype == torch.int64 and np.array_equal(labels.numpy(), LABELS)
    image, _ = MaskSet(data.parts["val"], data.reading, 3, make_evaluation())[0]
    expected = np.asarray(Image.open(data.parts["val"].images[0].path)) / 255
    expected = (expected - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    assert np.allclose(image.permute(1, 2, 0), expected, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_item_depends_on_seed_epoch_and_image_alone(data, workers):
    def items(order, seed=5) -> dict:
        loader = make_loader(
            MaskSet(data.parts["train"], data.reading, 3, make_augmentation(24), seed=seed), 2, workers, sampler=order
        )
        batches = list(read_batches(loader))
        assert all(batch[0].shape == (2, 3, 24, 24) and batch[1].shape == (2, 24, 24) for batch in batches)
        pairs = [item for images, maps in batches for item in zip(images, maps, strict=True)]
        return dict(zip(order, pairs, strict=True))

    first = items([(1, i) for i in range(6)])
    later = items([(1, 4), (1, 2), (2, 0), (2, 1)])
    for key in ((1, 4), (1, 2)):
        assert all(torch.equal(a, b) for a, b in zip(first[key], later[key], strict=True))
    assert not torch.equal(first[1, 0][0], later[2, 0][0])
    assert not torch.equal(first[1, 0][0], items([(1, 0), (1, 1)], seed=6)[1, 0][0])


def test_a_batch_of_several_sizes_is_a_list(tmp_path):
    for i, size in enumerate([(20, 30), (20, 30), (25, 30)]):
        put(tmp_path / f"images/{i}.png", picture(i, size))
        put(tmp_path / f"masks/{i}.png", np.arange(size[0] * size[1]).reshape(size).astype(np.uint8) % 2)
    data = read_mask_data(tmp_path, val_fraction=None)
    batches = list(read_batches(make_loader(MaskSet(data.parts["val"], data.reading, 3, make_evaluation()), 3)))
    assert [tuple(x.shape) for x in batches[0][0]] == [(3, 20, 30), (3, 20, 30), (3, 25, 30)]
    assert [tuple(x.shape) for x in batches[0][1]] == [(20, 30), (20, 30), (25, 30)]
    assert isinstance(batches[0][1], list)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_went_bad_is_an_error_that_names_it(tmp_path, workers):
    data = read_mask_data(put_pairs(tmp_path), val_fraction=None)
    put(tmp_path / "masks/1.png", LABELS[:-1].copy())
    put(tmp_path / "masks/2.png", LABELS + 5)
    loader = make_loader(MaskSet(data.parts["val"], data.reading, 3, make_evaluation()), 4, workers)
    told = []
    (batch,) = read_batches(loader, told.append)
    assert len(batch[0]) == 2
    assert "masks/1.png is [31, 40], and" in str(told[0]) and "masks/2.png holds what has no class: 5" in str(told[1])


def test_an_image_and_its_mask_are_turned_alike(tmp_path):
    sideways = np.zeros((40, 32, 3), np.uint8)
    sideways[:, :, 0] = 40 * np.rot90(LABELS)
    for i in range(2):
        put(tmp_path / f"images/{i}.png", Image.fromarray(np.roll(sideways, i, axis=2)), exif=exif(6))
        put(tmp_path / f"masks/{i}.png", np.rot90(LABELS).copy())
    data = read_mask_data(tmp_path, val_fraction=None)
    image, labels = MaskSet(data.parts["val"], data.reading, 3, make_evaluation()).raw(0)
    assert np.array_equal(labels.numpy(), LABELS)
    assert np.array_equal(image[0].numpy(), 40 * LABELS)


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_arrays_of_any_number_of_bands(tmp_path, bands, dtype):
    rng = np.random.default_rng(0)
    array = rng.random((*SIZE, bands)) * {np.uint8: 255, np.uint16: 65535, np.float32: 3}[dtype]
    array = array.astype(dtype)
    image = read_image(one(put(tmp_path / "x.npy", array)), bands)
    assert image.dtype == (torch.uint8 if dtype == np.uint8 else torch.float32)
    expected = array.astype(np.float64) / (65535 if dtype == np.uint16 else 1)
    assert np.allclose(image.permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_pictures_of_one_three_and_four_bands(tmp_path):
    rgba = np.random.default_rng(0).integers(0, 256, (*SIZE, 4), dtype=np.uint8)
    path = put(tmp_path / "x.png", rgba)
    assert np.array_equal(read_image(one(path), 4).permute(1, 2, 0).numpy(), rgba)
    assert read_image(one(path), 3).shape == (3, *SIZE)
    assert read_image(one(put(tmp_path / "x.tif", rgba)), 4).shape == (4, *SIZE)
    assert np.array_equal(read_image(one(put(tmp_path / "y.tif", LABELS)), 1)[0].numpy(), LABELS)


@pytest.mark.parametrize(
    ("name", "content", "bands", "message"),
    [
        ("x.npy", np.zeros((4, 8, 8), np.uint8), 4, r"must be an array \[H, W, 4\], got \[4, 8, 8\]"),
        ("x.npy", np.zeros((8, 8), np.uint8), 3, r"must be an array \[H, W, 3\], got \[8, 8\]"),
        ("x.npy", np.zeros((8, 8, 2), np.int32), 2, "holds int32, whose range is not known"),
        ("x.npy", np.full((8, 8, 2), np.nan), 2, "holds numbers that are not finite"),
        ("x.npy", b"text", 2, "cannot be read as an array"),
        ("x.png", picture(), 5, "cannot be read as 5 bands"),
        ("x.png", picture(), 4, "has 3 bands of Pillow's mode RGB, and 4 are wanted"),
        ("x.tif", five_bands(), 3, "has 5 bands of Pillow's mode RGB, and 3 are wanted"),
    ],
)
def test_bands_are_never_guessed_or_dropped(tmp_path, name, content, bands, message):
    with pytest.raises(UserError, match=message):
        read_image(one(put(tmp_path / name, content)), bands)


def test_statistics_are_those_of_all_pixels(tmp_path):
    arrays = [np.random.default_rng(i).random((8 + i, 9, 5)) * 3 for i in range(3)]
    images = [one(put(tmp_path / f"{i}.npy", array)) for i, array in enumerate(arrays)]
    mean, std = band_statistics(images, 5)
    pixels = np.concatenate([array.reshape(-1, 5) for array in arrays])
    assert np.allclose(mean, pixels.mean(0), atol=1e-6) and np.allclose(std, pixels.std(0), atol=1e-6)
    assert np.allclose(band_statistics([one(put(tmp_path / "x.png", picture()))], 3)[0], 0.5, atol=0.02)


@pytest.mark.parametrize(("mean", "std"), [([0.5], [0.5]), ([0.5] * 3, [0.5, 0.5, 0]), ([0.5] * 3, [0.5] * 4)])
def test_statistics_that_do_not_fit_the_bands_are_an_error(mean, std):
    for make in (make_evaluation, lambda **kwargs: make_augmentation(8, **kwargs)):
        with pytest.raises(UserError, match="mean and std must have a number for each of 3 bands"):
            make(mean=mean, std=std)


def test_a_picture_comes_back_from_its_normalised_tensor():
    pixels = np.asarray(picture())
    image, _ = make_evaluation()(tv_tensors.Image(torch.from_numpy(pixels.copy()).permute(2, 0, 1)), None)
    assert np.array_equal(to_picture(image, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), pixels)
    assert to_picture(torch.rand(5, 8, 9) * 1000).shape == (8, 9, 3)
    assert to_picture(torch.rand(1, 8, 9)).shape == (8, 9, 3)


def test_an_overlay_has_the_colours_of_classes_and_stripes_where_pixels_are_ignored():
    labels = np.zeros((20, 20), np.uint8)
    labels[:10], labels[:, 10:] = 1, 255
    laid = overlay(np.full((20, 20, 3), 100, np.uint8), labels, [(200, 0, 0), (0, 0, 200)], strength=0.5)
    assert (laid[15, 5] == (150, 50, 50)).all() and (laid[5, 5] == (50, 50, 150)).all()
    ignored = laid[:, 10:].reshape(-1, 3)
    assert {tuple(x) for x in ignored.tolist()} == {(50, 50, 50), (177, 177, 177)}  # fractions are dropped


def test_the_legend_names_the_classes_that_are_there_the_largest_first():
    figure = draw_truth([np.asarray(picture())] * 2, [None, LABELS], [(1, 2, 3)] * 4, ["a", "$b", "c_", "d"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "$b", "c_"]
    labels = np.where(LABELS == 0, 255, LABELS)
    figure = draw_truth([np.asarray(picture())], [labels], [(1, 2, 3)] * 4, ["a", "$b", "c_", "d"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["$b", "c_", "ignored"]
    assert png(figure).startswith(b"\x89PNG")
