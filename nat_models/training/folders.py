"""Folders of the networks that a task writes: config.json, which names the architecture, and model.safetensors."""

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path

from torch import nn

from ..checkpoints.files import read_config
from ..checkpoints.saving import save_tensors
from ..errors import UserError

WEIGHTS = "model.safetensors"
_CONFIG = "config.json"


def write_folder(network: nn.Module, folder: Path, config: Mapping) -> None:
    """Writes config.json and model.safetensors into a folder that exists; `config` has the key "architecture"."""
    save_tensors(network.state_dict(), folder / WEIGHTS)
    (folder / _CONFIG).write_text(json.dumps(config, indent=2))


def find_folder(folder: Path, architectures: Collection[str]) -> Path | None:
    """The folder, or the best/ of a run in it, whose network is of one of the architectures; None if it is neither."""
    for path in (folder, folder / "best"):
        with suppress(UserError):
            if read_config(path / _CONFIG).get("architecture") in tuple(architectures):
                return path
    return None


def open_folder(folder: Path, architectures: Collection[str], what: str, task: str) -> tuple[Path, dict]:
    """Where find_folder finds the network, and what its config.json holds.

    Args:
        folder: Where to look.
        architectures: Of the network.
        what: What it is, for the error: "segmenter".
        task: What `train --task` calls the task that writes it.

    Raises:
        UserError: There is no such network.
    """
    found = find_folder(folder, architectures)
    if found is None:
        raise UserError(f"{folder} holds no {what}: a folder that `train --task {task}` wrote, or best/ in it.")
    return found, read_config(found / _CONFIG)
