import json
import os
from pathlib import Path

import pytest
import timm
import torch

from tests.fixtures.deterministic import array, parameter
from tests.forks import BEFORE_THE_HUB, Forks

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Several processes share the tests by file, because a file's tests share what is slow to make; pages of the
    documentation, which share nothing, go one by one."""
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(item.nodeid.partition("::")[0]))


def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The fixtures' deterministic input called `name`."""
    return torch.from_numpy(array(name, shape))


def original_state_dict(variant: str) -> dict[str, torch.Tensor]:
    """The authors' checkpoint of a variant, filled with the fixtures' deterministic weights."""
    shapes = json.loads((FIXTURES / "original_keys.json").read_text())[variant]
    return {key: torch.from_numpy(parameter(key, shape)) for key, shape in shapes.items()}


def needs_torch(version: str, why: str):
    """Skips a test where PyTorch is older; `why` says what an older one does."""
    return pytest.mark.skipif(torch.__version__ < version, reason=f"PyTorch before {version} {why}")


def assert_same_logits(run, model: torch.nn.Module) -> None:
    """At several batches and sizes; the last ends in maps of 6 and 3 under a window of 7."""
    for size in ((224, 224), (160, 288), (96, 96)):
        for batch in (1, 3):
            image = torch.randn(batch, 3, *size)
            with torch.no_grad():
                expected = model(image)
            torch.testing.assert_close(run(image), expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="session")
def hub_clients(tmp_path_factory):
    """Processes that know no hub yet."""
    forks = Forks(dict(os.environ), tmp_path_factory.mktemp("hub_clients"), BEFORE_THE_HUB)
    yield forks
    forks.close()


@pytest.fixture(autouse=True)
def _deterministic_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def network():
    """Makes a network whose biases and layer scales are of a size at which a mistake shows."""

    def make(name: str, **kwargs) -> torch.nn.Module:
        model = timm.create_model(name, **kwargs)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith((".gamma", ".rpb", ".bias")):
                    parameter.normal_(std=0.5)
        return model.eval()

    return make
