"""The folder of a run: its lock, and what continuing needs.

state/ alone decides how far a run has come, and everything else can be written again from it: a run killed at any
moment goes on with --resume as if nothing had happened.
"""

import dataclasses
import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import filelock
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from ..errors import UserError
from ..writing import swap_folder, writing
from .settings import FREE, Resume, Settings

VERSIONED = ("accelerate", "nat_models", "timm", "torch")
_NEVER_IN_BITS = ("python", "platform")  # told with a run, but no reason to refuse one


class Course:
    """How far a run has come; saved with the training state.

    Attributes:
        rows: A row of figures per finished epoch.
        step: Batches that this process is done with in the epoch after those.
        total: The sum of their losses.
        seconds: What the training of these batches took.
    """

    def __init__(self):
        self.rows, self.step, self.seconds = [], 0, 0.0
        self.total = torch.zeros(())
        self._totals = []

    @property
    def epoch(self) -> int:
        """The epoch that is being trained, from 1."""
        return len(self.rows) + 1

    def start_epoch(self) -> None:
        self.step, self.seconds, self.total = 0, 0.0, torch.zeros_like(self.total)

    def gather(self, accelerator: Accelerator) -> None:
        """Takes every process's total, before the main one saves."""
        self._totals = accelerator.gather(self.total.reshape(1)).tolist()

    def restore(self, accelerator: Accelerator) -> None:
        """Gives a process its own total after all have loaded what the main one saved."""
        self.total = torch.tensor(self._totals[accelerator.process_index], device=accelerator.device)

    def state_dict(self) -> dict:
        return dict(rows=self.rows, step=self.step, seconds=self.seconds, totals=self._totals)

    def load_state_dict(self, state: dict) -> None:
        self.rows, self.step, self.seconds, self._totals = (state[k] for k in ("rows", "step", "seconds", "totals"))

    def __str__(self) -> str:
        done = f"epoch {len(self.rows)}" if self.rows or not self.step else "the beginning"
        return f"after {done}" + (f", step {self.step} of epoch {self.epoch}" if self.step else "")


@contextmanager
def locked(output: Path, accelerator: Accelerator) -> Iterator[None]:
    """Makes the folder of a run and keeps every other run out of it for as long as this one lives.

    Raises:
        UserError: Another process has it, or the folder cannot be written to.
    """
    lock = filelock.FileLock(output / ".lock", timeout=0)
    if accelerator.is_main_process:
        with writing(output):
            if output.exists() and not output.is_dir():
                raise UserError(f"{output} is a file: choose another --output.")
            output.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except filelock.Timeout:
                raise UserError(f"Another run is writing to {output}: choose another --output.") from None
    accelerator.wait_for_everyone()
    try:
        yield
    finally:
        lock.release()


def describe(settings: Settings, classes: list[str], digest: str, processes: int) -> dict:
    """What decides the course of a run, as state/run.json has it."""
    versions = {name: version(name) for name in VERSIONED}
    versions |= dict(python=platform.python_version(), platform=platform.platform())
    return dict(settings=settings.plain(), classes=classes, data=digest, processes=processes, versions=versions)


def has_state(output: Path) -> bool:
    return any((output / name).is_dir() for name in ("state", "state.old"))


def _saved(output: Path) -> dict:
    folder = output / "state" if (output / "state").is_dir() else output / "state.old"
    try:
        return json.loads((folder / "run.json").read_text())
    except (OSError, ValueError):
        raise UserError(
            f"{folder} has no readable run.json: an earlier version of this package wrote it; start a new run."
        ) from None


def check_resume(run: dict, output: Path, resume: Resume) -> bool:
    """Whether there is a run to go on with.

    A run is never overwritten, and never continued with anything else than it began with: its course would change.

    Args:
        run: What `describe` says of this start.
        output: The folder of the run.
        resume: What --resume and its companions say.

    Raises:
        UserError: There is a run and none was wanted, or it began otherwise; the message says in what.
    """
    if not has_state(output):
        return False
    if not resume:
        raise UserError(f"{output} holds a run already: continue it with --resume, or choose another --output.")
    saved = _saved(output)
    for name, new in run["settings"].items():
        old = saved["settings"].get(name)
        if name in FREE or old == new:
            continue
        if name == "epochs":
            if resume.extend_epochs == new and new > old:
                continue
            raise UserError(f"epochs must stay {old}, as the run in {output} began; --extend-epochs makes it longer.")
        raise UserError(f"{name} must stay {old!r}, as the run in {output} began, to resume it; got {new!r}.")
    if saved["classes"] != run["classes"]:
        old, new = set(saved["classes"]), set(run["classes"])
        gone, come = sorted(old - new)[:5], sorted(new - old)[:5]
        change = f"gone: {gone}, new: {come}" if gone or come else "their order"
        raise UserError(f"The classes must stay those that the run in {output} began with; changed: {change}.")
    if saved["data"] != run["data"]:
        raise UserError(
            f"The images must stay those that the run in {output} began with: the digest of their names, sizes, labels "
            f"and parts was {saved['data'][:12]}, is {run['data'][:12]}."
        )
    if saved["processes"] != run["processes"]:
        raise UserError(
            f"The number of processes must stay {saved['processes']}, as the run in {output} began; "
            f"got {run['processes']}."
        )
    for name, old in saved["versions"].items():
        new = run["versions"][name]
        if old != new and name not in _NEVER_IN_BITS and not resume.accept_versions:
            raise UserError(
                f"The run in {output} began with {name} {old}, this is {new}: the same version gives the same bits, "
                "--accept-versions goes on without them."
            )
    return True


def saved_batch(settings: Settings) -> Settings:
    """The settings with the batch that a run found for itself when it began."""
    saved = _saved(Path(settings.output))["settings"]
    batch = {name: saved[name] for name in ("batch_size", "grad_accum")}
    return dataclasses.replace(settings, auto_batch_size=False, **batch)


def with_extended_epochs(settings: Settings, resume: Resume) -> Settings:
    if resume.extend_epochs is None:
        return settings
    if resume.extend_epochs < settings.epochs:
        raise UserError(f"--extend-epochs must exceed the run's epochs, {settings.epochs}, got {resume.extend_epochs}.")
    return dataclasses.replace(settings, epochs=resume.extend_epochs)


def commit(accelerator: Accelerator, course: Course, run: dict, state: Path) -> None:
    """Saves all that continuing needs; from the swap on, what it holds counts as done.

    Raises:
        UserError: The disk is full, or refuses; the state before this one stays.
    """
    temporary = state.with_name(f"{state.name}.tmp")
    course.gather(accelerator)
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (temporary / "run.json").write_text(json.dumps(run, indent=2))
            swap_folder(temporary, state)
    except (OSError, SafetensorError, RuntimeError) as e:  # torch.save raises RuntimeError where a disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        cause = getattr(e, "strerror", None) or str(e).partition("\n")[0]
        kept = "the state before it stays: mend this and go on with --resume" if has_state(state.parent) else "none yet"
        raise UserError(f"Cannot write {state}: {cause}; {kept}.") from None
