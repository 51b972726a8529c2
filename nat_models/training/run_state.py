"""The folder of a run: files that are whole or absent, and what continuing needs.

state/ alone decides how far a run has come, and everything else can be written again from it: a run killed at any
moment goes on with --resume as if nothing had happened.
"""

import os
import shutil
from pathlib import Path

from accelerate import Accelerator

from ..errors import UserError
from .settings import Settings, read_yaml


class Course:
    """A row per finished epoch, saved with the training state."""

    def __init__(self):
        self.rows = []

    def state_dict(self) -> dict:
        return {"rows": self.rows}

    def load_state_dict(self, state: dict) -> None:
        self.rows = state["rows"]


def check_output(settings: Settings, output: Path, resume: bool) -> bool:
    """Whether there is a run to go on with.

    A run is never overwritten, and never continued with other settings: the course would not be the same.
    """
    if not any((output / name).is_dir() for name in ("state", "state.old")):
        return False
    if not resume:
        raise UserError(f"{output} holds a run already: continue it with --resume, or choose another --output.")
    saved = Settings(**read_yaml(output / "config.yaml")).plain()
    for name, new in settings.plain().items():
        if saved[name] != new and name not in ("data", "output", "workers"):
            raise UserError(
                f"{name} must stay {saved[name]!r}, as the run in {output} began, to resume it; got {new!r}."
            )
    return True


def write_atomically(path: Path, content: str | bytes) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(temporary, path)


def swap_folder(new: Path, path: Path) -> None:
    """Puts a finished folder in the place of an older one. No system call replaces a folder that is not empty, so for
    an instant there is none at `path`, and `restore_folder` puts the older one back; half of one there never is."""
    old = path.with_name(f"{path.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


def restore_folder(path: Path) -> None:
    old = path.with_name(f"{path.name}.old")
    if old.is_dir() and not path.exists():
        os.replace(old, path)


def commit(accelerator: Accelerator, state: Path) -> None:
    """Saves all that continuing needs; from the swap on, the epoch counts as done."""
    temporary = state.with_name(f"{state.name}.tmp")
    if accelerator.is_main_process:
        shutil.rmtree(temporary, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(temporary))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        swap_folder(temporary, state)
