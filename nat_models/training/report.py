"""What a run shows: its lines and progress, where its time went, and the files that users read."""

import importlib.util
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import LoggerType
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import nn

from ..errors import UserError
from ..writing import csv_text, swap_folder, write_atomically
from .drawing import png
from .settings import Settings
from .task import Task

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)  # paths are printed as they are
PLAIN_SECONDS = 60.0


def track(
    loader: Iterable,
    description: str,
    shown: bool = True,
    *,
    done: int = 0,
    total: int | None = None,
    status: Callable[[], str] = str,
) -> Iterator:
    """The batches of a loader, with a line of progress on a terminal; elsewhere a plain line every minute.

    Args:
        loader: What is iterated over.
        description: At the line's start; without one nothing is shown.
        shown: False shows nothing.
        done: Batches that were done before.
        total: Batches in all; None means the loader's length.
        status: Gives the line's end, such as the loss.
    """
    total = len(loader) if total is None else total
    if not (shown and description):
        yield from loader
    elif console.is_terminal:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
        with Progress(*columns, TextColumn("{task.fields[status]}"), console=console, transient=True) as progress:
            task = progress.add_task(description, total=total, completed=done, status="")
            for item in loader:
                yield item
                progress.update(task, advance=1, status=status())
    else:
        told = time.monotonic()
        for item in loader:
            yield item
            done += 1
            if time.monotonic() - told >= PLAIN_SECONDS:
                told = time.monotonic()
                console.print(f"{description}, step {done} of {total}  {status()}".rstrip())


class Clock:
    """Adds up what the parts of a run take. On an accelerator this makes each part wait for the device, so it is off
    unless asked for.

    Args:
        on: Whether anything is measured.
        device: What computes.
    """

    def __init__(self, on: bool, device: torch.device):
        self.on, self.device, self.seconds = on, device, Counter()
        self.started = time.perf_counter()

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if not self.on:
            yield
            return
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type != "cpu":
                torch.accelerator.synchronize()
            self.seconds[part] += time.perf_counter() - started

    def each(self, part: str, items: Iterable) -> Iterator:
        """The items, and what waiting for them took."""
        iterator = iter(items)
        while True:
            with self(part):
                try:
                    item = next(iterator)
                except StopIteration:
                    return
            yield item

    def __str__(self) -> str:
        whole = time.perf_counter() - self.started
        parts = [*self.seconds.most_common(), ("other", whole - self.seconds.total())]
        return "time: " + ", ".join(f"{part} {seconds:.1f} s ({seconds / whole:.1%})" for part, seconds in parts)


def tracker_names(trackers: str) -> list[str]:
    """The names by which accelerate knows what to log to."""
    if trackers == "none":
        return []
    installed = importlib.util.find_spec
    if trackers == "auto":
        return ["tensorboard"] if installed("tensorboard") else []
    names = [name.strip() for name in trackers.split(",")]
    for name in names:
        if name not in LoggerType.list() or name == "all":
            raise UserError(f"trackers must be auto, none, or names such as tensorboard,wandb; got {trackers!r}.")
        if not installed(name):
            raise UserError(f"The tracker {name} is not installed: pip install {name}")
    return names


def deciding_metric(settings: Settings, task: Task) -> str:
    """The metric that decides which epoch is best.

    Raises:
        UserError: The task has no metric of that name.
    """
    if settings.metric is not None and settings.metric not in task.figures:
        raise UserError(f"metric must be one of {', '.join(task.figures)}; got {settings.metric!r}.")
    return settings.metric or task.metric


def best_row(rows: Sequence[dict], task: Task) -> dict:
    """The epoch of the best result; of equal ones that with the lowest val_loss, then the earliest."""
    metric = deciding_metric(task.settings, task)
    sign = 1 if task.figures[metric] else -1
    return max(rows, key=lambda row: (sign * row[metric], -row.get("val_loss", 0.0), -row["epoch"]))


def is_published(output: Path, rows: Sequence[dict]) -> bool:
    """Whether `publish` has written these rows: it writes their table last."""
    path = output / "summary.csv"
    return path.is_file() and len(path.read_text().splitlines()) == len(rows) + 1


def publish(output: Path, rows: Sequence[dict], network: nn.Module, task: Task) -> None:
    """Writes what users read; nothing but rows and weights goes in, so it can be done again after a kill."""
    targets = ["last", "best"] if best_row(rows, task) is rows[-1] else ["last"]
    for target in targets:
        save_weights(output / target, rows, network, task)
    write_atomically(output / "curve.png", plot(rows, task.panels))
    write_atomically(
        output / "summary.csv", csv_text([list(rows[0]), *([row[name] for name in rows[0]] for row in rows)])
    )


def save_weights(folder: Path, rows: Sequence[dict], network: nn.Module, task: Task) -> None:
    """A folder of weights that is whole or absent."""
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    task.save(network, temporary, rows)
    swap_folder(temporary, folder)


def keep_newest(folder: Path, kind: str, count: int) -> None:
    """Deletes all kept weights of a kind but the newest; their names end in a number that grows."""
    for old in sorted(folder.glob(f"{kind}-*[0-9]"))[:-count]:
        shutil.rmtree(old)


def plot(rows: Sequence[dict], panels: Sequence[tuple[str, Sequence[str]]]) -> bytes:
    """The columns of each panel over the epochs, as a PNG."""
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    for axes, (unit, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for name in names:
            if name in rows[0]:
                axes.plot([row["epoch"] for row in rows], [row[name] for row in rows], label=name, marker=".")
        axes.set(xlabel="epoch", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    return png(figure)
