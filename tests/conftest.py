import json
from pathlib import Path

import pytest
import torch

from tests.fixtures.deterministic import array, parameter

FIXTURES = Path(__file__).parent / "fixtures"


def tensor(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The fixtures' deterministic input called `name`."""
    return torch.from_numpy(array(name, shape))


def original_state_dict(variant: str) -> dict[str, torch.Tensor]:
    """The authors' checkpoint of a variant, filled with the fixtures' deterministic weights."""
    shapes = json.loads((FIXTURES / "original_keys.json").read_text())[variant]
    return {key: torch.from_numpy(parameter(key, shape)) for key, shape in shapes.items()}


@pytest.fixture(autouse=True)
def _deterministic_seed() -> None:
    torch.manual_seed(0)
