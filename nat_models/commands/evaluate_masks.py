"""What `nat-models evaluate` does with segmenters: figures over the pixels of images at their original sizes."""

import argparse
import json
import math
from pathlib import Path

import torch
from rich.table import Table
from torchmetrics.classification import MulticlassConfusionMatrix

from ..errors import UserError
from ..training.evaluation import table
from ..training.mask_sets import read_image
from ..training.mask_values import IGNORE
from ..training.masks import MaskData, read_mask_data
from ..training.report import console, track
from ..training.segmenters import Segmenter, load_segmenter
from ..training.segmenting import check_tile, segment
from ..training.tasks.segmentation import scores
from ..writing import write_atomically, writing
from .held_out import asked, check_same, chosen_part, held_out_or_all, is_own_data, settings_of_run

_READING = ("classes", "reduce_zero_label", "mask_values", "group")  # of a run, how its masks are read


def evaluate_masks(args: argparse.Namespace, folders: dict[str, Path | None]) -> list[dict]:
    """Prints the figures of each class, writes metrics.json and per_class.csv where there are folders for them.

    Args:
        args: The command's.
        folders: The segmenters, and where the report of each goes.

    Raises:
        UserError: The data are no images and masks of the segmenter's classes, or cannot be read.
    """
    check_tile(args.tile)
    rows, images = [], None
    for name, folder in folders.items():
        network, about = load_segmenter(Path(name))
        data, part = _read(args, name, about)
        images = check_same(args, images, data.parts[part].images)
        rows.append(_evaluate(args, name, network.to(torch.device(args.device)), about, data, part, folder))
    return rows


def _read(args: argparse.Namespace, name: str, about: Segmenter) -> tuple[MaskData, str]:
    """The images and masks to evaluate on, read as the run read its own, and the part of them."""
    run = settings_of_run(Path(name))
    own = is_own_data(args, run)
    given = {key: run.get(key) for key in _READING} if own else {}
    given |= asked(args, ("classes", "mask_values"))
    given["reduce_zero_label"] = bool(args.reduce_zero_label or given.get("reduce_zero_label"))
    data = read_mask_data(
        args.data,
        **held_out_or_all(args, run),
        **given,
        names=about.classes,
        allow_empty=True,
        skip_unreadable=args.skip_unreadable,
    )
    return data, chosen_part(args, data)


def _evaluate(
    args: argparse.Namespace, name: str, network, about: Segmenter, data: MaskData, part: str, folder: Path | None
) -> dict:
    confusion = MulticlassConfusionMatrix(len(about.classes), ignore_index=IGNORE)
    pairs = data.parts[part]
    options = dict(tile=args.tile, multi_scale=args.multi_scale, precision=args.precision)
    for image, mask in track(list(zip(pairs.images, pairs.masks, strict=True)), name):
        found = segment(network, about, read_image(image, len(about.mean)), name=image.name, **options)
        confusion.update(torch.from_numpy(found)[None].long(), torch.from_numpy(data.reading.read(mask))[None].long())
    matrix = confusion.compute().double()
    if not matrix.sum():
        raise UserError(f"No pixel of {args.data} is labelled: nothing can be measured.")
    figures, each = scores(matrix)
    per_class = [
        {"class": label, "iou": iou, "accuracy": accuracy, "pixels": int(pixels)}
        for label, iou, accuracy, pixels in zip(about.classes, *each, matrix.sum(1).tolist(), strict=True)
    ]
    shown = Table("class", "IoU", "accuracy", "pixels")
    for row in per_class:
        known = ["-" if math.isnan(row[key]) else f"{row[key]:.2f}" for key in ("iou", "accuracy")]
        shown.add_row(row["class"], *known, f"{row['pixels']:,}")
    console.print(shown)
    result = dict(model=name, **figures, images=len(pairs))
    if folder is not None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            told = dict(result, data=str(args.data), split=part, device=args.device, **options)
            write_atomically(folder / "metrics.json", json.dumps(told, indent=2))
            write_atomically(folder / "per_class.csv", table(per_class))
    return result
