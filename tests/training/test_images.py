"""Promises about images that cannot be read."""

import pickle
import shutil

import pytest
import yaml
from torchvision.transforms.functional import pil_to_tensor

from nat_models.cli import main
from nat_models.errors import CheckpointError, UserError
from nat_models.training.images import ImageFile, ImageSet, make_loader, read_batches
from tests.training.conftest import make_settings


def test_an_unreadable_image_is_an_error_that_names_it(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "data" / "red" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump(make_settings(tmp_path / "data", tmp_path / "o", workers=1).plain())
    )
    assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'data' / 'red' / 'torn.png'} cannot be read")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_image_leaves_its_worker_as_the_very_error(data, tmp_path, workers):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
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


def test_errors_are_pickled_whole():
    for error in (UserError("UserError: 1\n2"), CheckpointError("no weights")):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy)) == (type(error), str(error))
