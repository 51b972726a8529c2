"""The known checkpoints: where they are, in which layout, and what they reach (weights/manifest.json)."""

import json
from typing import NamedTuple

from ..resources import resource


class Weights(NamedTuple):
    """A published checkpoint. revision and sha256 are None until somebody with access to the Hub has recorded them."""

    name: str  # arch.tag, timm's name
    repo: str  # on the Hugging Face Hub
    revision: str | None
    file: str
    sha256: str | None
    layout: str  # one of LAYOUTS
    license: str
    parameters: int
    top1: float  # ImageNet-1k, percent, as published


def list_weights() -> list[Weights]:
    """The entries of the manifest, in its order.

    Raises:
        UserError: The manifest is missing from the installation.
    """
    manifest = json.loads(resource("weights", "manifest.json").read_text())
    return [Weights(**entry) for entry in manifest["checkpoints"]]
