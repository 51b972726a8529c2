"""Promises of the split into training and validation images."""

import shutil

import pytest

from nat_models.errors import UserError
from nat_models.training.splits import find_data
from tests.training.conftest import make_settings


def test_the_split_is_stratified_and_depends_on_seed_and_names_alone(data, tmp_path):
    train, val, names = find_data(make_settings(data, "o"))
    assert names == ["blue", "green", "red"]
    assert [sum(t == i for _, t in val) for i in range(3)] == [4, 4, 4]
    assert not {f for f, _ in train} & {f for f, _ in val}
    assert len(train) + len(val) == 54

    def relative(root, **kwargs):
        return [(str(f.relative_to(root)), t) for f, t in find_data(make_settings(root, "o", **kwargs))[1]]

    for file in sorted(data.rglob("*.png"), reverse=True):  # another order on disk
        (tmp_path / file.parent.name).mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / file.parent.name)
    assert relative(tmp_path) == relative(data)
    assert relative(data, seed=1) != relative(data)


def test_train_and_val_folders_are_taken_as_they_are(data, tmp_path):
    shutil.copytree(data, tmp_path / "train")
    shutil.copytree(data / "red", tmp_path / "val" / "red")
    train, val, names = find_data(make_settings(tmp_path, "o"))
    assert (len(train), len(val), names) == (54, 18, ["blue", "green", "red"])
    assert {t for _, t in val} == {2}
    shutil.copytree(data / "red", tmp_path / "val" / "orange")
    with pytest.raises(UserError, match="lacks: orange"):
        find_data(make_settings(tmp_path, "o"))


def test_images_outside_class_folders_are_an_error_that_names_one(data, tmp_path):
    shutil.copytree(data, tmp_path / "deep" / "er")
    with pytest.raises(UserError, match=r"CLASS.*found .*\.png"):
        find_data(make_settings(tmp_path, "o"))
