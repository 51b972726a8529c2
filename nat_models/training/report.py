"""What a run shows: its lines and progress, and the files that users read."""

import csv
import io
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.console import Console
from rich.progress import track as rich_track
from timm.models import save_for_hf
from torch import nn

from .run_state import swap_folder, write_atomically
from .task import Task

console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)  # paths are printed as they are


def track(loader: Iterable, description: str, shown: bool = True) -> Iterable:
    """The batches of a loader, with a line of progress on a terminal."""
    hidden = not (shown and console.is_terminal and description)
    return rich_track(loader, description, total=len(loader), console=console, transient=True, disable=hidden)


def best_row(rows: Sequence[dict], task: Task) -> dict:
    """The epoch of the best result, the earliest of equal ones."""
    return max(rows, key=lambda row: (row[task.metric], -row["val_loss"], -row["epoch"]))


def publish(output: Path, rows: Sequence[dict], network: nn.Module, task: Task) -> None:
    """Writes what users read; nothing but rows and weights goes in, so it can be done again after a kill."""
    targets = ["last", "best"] if best_row(rows, task) is rows[-1] else ["last"]
    configs = dict(model_config=task.model_config, data_config=task.data_config)
    for target in targets:
        temporary = output / f"{target}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        save_for_hf(network, temporary, safe_serialization=True, **configs)
        swap_folder(temporary, output / target)
    table = io.StringIO()
    writer = csv.DictWriter(table, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(output / "summary.csv", table.getvalue())
    write_atomically(output / "curve.png", plot(rows, task.panels))


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
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()
