"""Promises of the split into training and validation images."""

import shutil

import pytest

from nat_models.errors import UserError
from nat_models.training.splits import read_data


def test_the_split_is_stratified_and_depends_on_seed_and_names_alone(data, tmp_path):
    found = read_data(data, val_fraction=0.25)
    train, val = found.parts["train"], found.parts["val"]
    assert found.names == ["blue", "green", "red"]
    assert [val.targets.count(i) for i in range(3)] == [4, 4, 4]
    assert not set(train.images) & set(val.images)
    assert len(train) + len(val) == 54

    def relative(root, **kwargs):
        part = read_data(root, val_fraction=0.25, **kwargs).parts["val"]
        return [(image.name, t) for image, t in zip(part.images, part.targets, strict=True)]

    for file in sorted(data.rglob("*.png"), reverse=True):  # another order on disk
        (tmp_path / file.parent.name).mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / file.parent.name)
    assert relative(tmp_path) == relative(data)
    assert relative(data, seed=1) != relative(data)


def test_train_and_val_folders_are_taken_as_they_are(data, tmp_path):
    shutil.copytree(data, tmp_path / "train")
    shutil.copytree(data / "red", tmp_path / "val" / "red")
    found = read_data(tmp_path)
    train, val = found.parts["train"], found.parts["val"]
    assert (len(train), len(val), found.names) == (54, 18, ["blue", "green", "red"])
    assert set(val.targets) == {2}
    shutil.copytree(data / "red", tmp_path / "val" / "orange")
    with pytest.raises(UserError, match="lacks: orange"):
        read_data(tmp_path)


def test_images_outside_class_folders_are_an_error_that_names_one(data, tmp_path):
    shutil.copytree(data, tmp_path / "deep" / "er")
    with pytest.raises(UserError, match=r"CLASS.*found .*\.png"):
        read_data(tmp_path)
