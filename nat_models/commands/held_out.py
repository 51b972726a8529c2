"""What a run held out of its data, for the commands that evaluate what it wrote."""

import argparse
from collections.abc import Sequence
from pathlib import Path

import yaml

from ..errors import UserError
from ..training.boxes import BoxData
from ..training.masks import MaskData
from ..training.report import console


def settings_of_run(folder: Path) -> dict:
    """The settings of the run whose folder, or whose best/ or last/, this is; none of a folder that no run wrote."""
    path = next((p / "config.yaml" for p in (folder, folder.parent) if (p / "config.yaml").is_file()), None)
    settings = None if path is None else yaml.safe_load(path.read_text())
    return settings if isinstance(settings, dict) else {}


def is_own_data(args: argparse.Namespace, run: dict) -> bool:
    """Whether --data are what a run was trained on."""
    return bool(run.get("data")) and Path(run["data"]).resolve() == args.data.resolve()


def held_out(args: argparse.Namespace, run: dict) -> dict:
    """What is held out, by --val-fraction and --seed, or else as the run did."""
    held = dict(val_fraction=run.get("val_fraction", 0.1), seed=run.get("seed", 0))
    return held | asked(args, held)


def held_out_or_all(args: argparse.Namespace, run: dict) -> dict:
    """Of one folder without parts: what the run held out of its own data, or of other data all, unless flags say."""
    if is_own_data(args, run):
        return held_out(args, run)
    return dict(val_fraction=None) | asked(args, ("val_fraction", "seed"))


def chosen_part(args: argparse.Namespace, data: MaskData | BoxData) -> str:
    """The part that --split names, or else "val"; prints what is to be said of the data.

    Raises:
        UserError: The data have no such part.
    """
    part = args.split or "val"
    if part not in data.parts:
        raise UserError(f"{args.data} has no part {part}, only {', '.join(data.parts)}.")
    for note in data.notes:
        console.print(note)
    return part


def asked(args: argparse.Namespace, names: Sequence[str]) -> dict:
    """The flags of these names that were given."""
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}


def check_same(args: argparse.Namespace, images: Sequence | None, others: Sequence) -> Sequence:
    """Those images that a model is evaluated on.

    Raises:
        UserError: The model before was evaluated on others.
    """
    if images is not None and images != others:
        raise UserError(f"The runs held out different parts of {args.data}: name --seed and --val-fraction.")
    return others
