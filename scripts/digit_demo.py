"""What the demos of segmentation and detection share: a backbone from scripts/demo.py is fine-tuned on digits on
photographs, its figures are held against a mark, and predictions are drawn."""

import argparse
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from nat_models.errors import CheckpointError, Stopped, UserError
from nat_models.resources import resource
from nat_models.training.engine import train
from nat_models.training.report import console
from nat_models.training.settings import read_yaml
from nat_models.training.task import Task

DEMO = Path(__file__).resolve().parents[1] / "demo"


def run_demo(
    description: str,
    name: str,
    task_class: type[Task],
    *,
    write: Callable[[Path], None],
    draw: Callable[[Task, Path, Path], None],
    required: Mapping[str, float],
) -> int:
    """Trains, or goes on with, the demo in demo/NAME; returns the exit code.

    Args:
        description: Of the program.
        name: Of its folder, and of its recipe: digits_NAME.
        task_class: What is learnt.
        write: Makes the data, in a folder that may exist.
        draw: Takes the task, the folder of the last epoch's network, and the picture to write.
        required: What figures of the last epoch must reach. The best one was chosen on these very images.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--from-scratch", action="store_true", help="start from random weights, to compare")
    args = parser.parse_args()
    folder = DEMO / name
    try:
        rows = _fine_tune(folder, name, task_class, args.from_scratch, write, draw)
    except Stopped as e:
        sys.exit(str(e))
    except (UserError, CheckpointError) as e:
        sys.exit(f"error: {e}\nDelete {folder} to start over.")
    told = ", ".join(f"{figure} {rows[-1][figure]:.2f} %" for figure in required)
    seconds = sum(row["seconds"] for row in rows)
    console.print(f"of held-out images: {told}, {len(rows)} epochs in {seconds:.0f} s")
    missed = [f"{figure} must reach {least} %" for figure, least in required.items() if rows[-1][figure] < least]
    if missed and not args.from_scratch:
        print(f"error: {', '.join(missed)}; got {told}.", file=sys.stderr)
        return 1
    return 0


def _fine_tune(folder: Path, name: str, task_class: type[Task], from_scratch: bool, write, draw) -> list[dict]:
    backbone = DEMO / "run" / "best"
    if not (backbone / "model.safetensors").is_file():
        raise UserError(f"There is no backbone in {backbone}: run `make demo` first.")
    run = folder / ("scratch" if from_scratch else "run")
    report = folder / "report" / f"{run.name}.png"
    if report.exists():
        console.print(f"starting over: {folder} holds a finished demo")
        shutil.rmtree(run)
        report.unlink()
    elif run.exists():
        console.print(f"resuming the interrupted demo in {run}")
    report.parent.mkdir(parents=True, exist_ok=True)
    write(folder / "data")
    recipe = read_yaml(resource("configs", f"digits_{name}.yaml"), task_class.Settings)
    checkpoint = None if from_scratch else str(backbone)
    settings = task_class.Settings(**recipe, data=str(folder / "data"), output=str(run), checkpoint=checkpoint)
    task = task_class(settings)
    rows = train(settings, task, resume=True)
    draw(task, run / "last", report)
    console.print(f"look at {run / 'curve.png'} and {report}")
    return rows
