"""What `nat-models evaluate` does with detectors: COCO's average precision, curves, and what is confused."""

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from ..errors import Unreadable, UserError
from ..training.box_sets import BoxSet, make_box_evaluation
from ..training.boxes import BoxData, read_box_data
from ..training.coco_results import CocoMetrics
from ..training.detecting import find, open_detector
from ..training.detection_report import (
    BACKGROUND,
    CURVE_FIELDS,
    Confusion,
    Shown,
    class_rows,
    confusion_png,
    curve_rows,
    curves_png,
    mistakes_png,
)
from ..training.detections import Detections
from ..training.detectors import DetectorConfig
from ..training.evaluation import table
from ..training.report import console, track
from ..training.segmenting import check_tile
from ..writing import csv_text, write_atomically, writing
from .held_out import check_same, chosen_part, held_out_or_all, is_own_data, settings_of_run

THRESHOLD = 0.5  # of the confusion matrix, unless it is given
_READING = ("group", "mask_orientation", "skip_bad_annotations")  # of a run, how its annotations are read
_SHEET = 12  # images with mistakes that are shown


def evaluate_boxes(args: argparse.Namespace, folders: dict[str, Path | None]) -> list[dict]:
    """Prints the figures of each class, writes a report where there are folders for them.

    Args:
        args: The command's.
        folders: The detectors, and where the report of each goes.

    Raises:
        UserError: The data are no images with boxes of the detector's classes, or cannot be read.
    """
    check_tile(args.tile)
    rows, images = [], None
    for name, folder in folders.items():
        network, config = open_detector(Path(name), args.device)
        data, part = _read(args, name, config)
        images = check_same(args, images, list(data.parts[part].images))
        rows.append(_evaluate(args, name, network, config, data, part, folder))
    return rows


def _read(args: argparse.Namespace, name: str, config: DetectorConfig) -> tuple[BoxData, str]:
    """The images and boxes to evaluate on, read as the run read its own, and the part of them."""
    run = settings_of_run(Path(name))
    own = is_own_data(args, run)
    given = {key: run[key] for key in _READING if key in run} if own else {}
    given["skip_bad_annotations"] = bool(args.skip_bad_annotations or given.get("skip_bad_annotations"))
    if args.masks and not config.masks:
        raise UserError(f"{name} finds boxes alone: there are no --masks to measure.")
    data = read_box_data(
        args.data,
        **held_out_or_all(args, run),
        **given,
        names=config.classes,
        allow_empty=True,
        skip_unreadable=args.skip_unreadable,
        unreadable_limit=1.0,
        masks=args.masks if config.masks else False,
        max_dets=_max_dets(config),
    )
    return data, chosen_part(args, data)


def _max_dets(config: DetectorConfig) -> int:
    return config.settings.get("box_detections_per_img", 100)


def _evaluate(
    args: argparse.Namespace,
    name: str,
    network: nn.Module,
    config: DetectorConfig,
    data: BoxData,
    part: str,
    folder: Path | None,
) -> dict:
    images = BoxSet(data.parts[part], data.masks, make_box_evaluation(), in_chans=len(config.mean))
    options = dict(tile=args.tile, precision=args.precision)
    nms_thresh = config.settings.get("box_nms_thresh", 0.5)
    threshold = THRESHOLD if args.threshold is None else args.threshold
    metrics = CocoMetrics(config.classes, data.masks, max_dets=_max_dets(config))
    confusion, mistaken = Confusion(len(config.classes), threshold), _Mistaken()
    started, unreadable = time.perf_counter(), []
    for i in track(range(len(images)), name):
        try:
            image, target = images.raw(i)
        except Unreadable as e:
            if not args.skip_unreadable:
                raise
            unreadable.append(e)
            continue
        found = find(network, image, nms_thresh=nms_thresh, name=images.part.names[i], **options)
        metrics.update([_as_tensors(found, data.masks)], [target])
        confusion.update(found, *(target[key].numpy() for key in ("boxes", "labels", "iscrowd")))
        mistaken.add(i, found.above(threshold))
    speed = (len(images) - len(unreadable)) / (time.perf_counter() - started)
    if unreadable:
        console.print(f"left out: {len(unreadable)} images that cannot be read, first {unreadable[0]}")
    if not mistaken.found:
        raise UserError(f"None of the {len(images)} images can be read.")
    if args.tile is not None:  # each tile gives as many as an image does elsewhere
        metrics.max_dets = max(metrics.max_dets, *(len(x.labels) for x in metrics.predicted))
    details = metrics.details()
    figures = {key: value for kind, found in details.items() for key, value in found.figures(kind).items()}
    per_class = class_rows(details, confusion, config)
    console.print(_shown(per_class, data.masks, threshold))
    result = dict(model=name, **figures, images=len(mistaken.found), images_per_second=speed)
    if folder is not None:
        told = dict(result, data=str(args.data), split=part, device=args.device, **options, threshold=threshold)
        told |= dict(max_dets=metrics.max_dets, unreadable=len(unreadable))
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

            def write(file: str, content: str | bytes) -> None:
                write_atomically(folder / file, content)

            known = {key: None if isinstance(x, float) and math.isnan(x) else x for key, x in told.items()}
            write("metrics.json", json.dumps(known, indent=2))  # JSON has no word for what is not known
            write("per_class.csv", table(per_class))
            true = confusion.matrix.sum(axis=1)[:-1]
            write("curves.csv", csv_text([CURVE_FIELDS, *curve_rows(details, config.classes, true)]))
            write("curves.png", curves_png(details, config.classes, true))
            names = [*config.classes, BACKGROUND]
            counts = zip(names, confusion.matrix.tolist(), strict=True)
            write("confusion.csv", csv_text([["true", *names], *([name, *row] for name, row in counts)]))
            write("confusion.png", confusion_png(confusion, config.classes))
            mistaken.write(write, images, confusion, config)
    return result


class _Mistaken:
    """What counts of each image, for the sheet of those with most mistakes."""

    def __init__(self) -> None:
        self.found: list[tuple[int, Detections]] = []

    def add(self, index: int, found: Detections) -> None:
        self.found.append((index, found))

    def write(self, write: Callable, images: BoxSet, confusion: Confusion, config: DetectorConfig) -> None:
        """Writes mistakes.csv and mistakes.png."""
        worst, names = confusion.worst(), images.part.names
        rows = [[names[self.found[i][0]], confusion.false[i], confusion.missed[i]] for i in worst]
        write("mistakes.csv", csv_text([["image", "found_wrongly", "missed"], *rows]))
        shown = []
        for i, (name, false, missed) in zip(worst[:_SHEET], rows, strict=False):
            index, found = self.found[i]
            shown.append(Shown(name, *_pair(images, index, found), f"{false} wrongly, {missed} missed"))
        title = f"{len(worst):,} of {len(self.found):,} images with mistakes at a score from {confusion.threshold:g} on"
        write("mistakes.png", mistakes_png(shown, config, title))


def _pair(images: BoxSet, index: int, found: Detections) -> tuple[torch.Tensor, Detections, dict]:
    image, target = images.raw(index)
    return image, found, target


def _as_tensors(found: Detections, masks: bool) -> dict:
    """As CocoMetrics takes it."""
    result = {key: torch.from_numpy(getattr(found, key)) for key in ("boxes", "labels", "scores")}
    return result | (dict(masks=found.codes) if masks else {})


def _shown(rows: list[dict], masks: bool, threshold: float) -> Table:
    kinds = ("box", "mask") if masks else ("box",)
    keys = [*(f"{kind}_ap" for kind in kinds), "true", "precision", "recall", "best_f1", "score_of_best_f1"]
    titles = [*(f"{kind} AP" for kind in kinds), "objects", "precision", "recall", "best F1", "its score"]
    shown = Table("class", *titles, caption=f"precision and recall are of objects of a score from {threshold:g} on")
    for row in rows:
        said = [f"{x:,}" if isinstance(x, int) else "-" if math.isnan(x) else f"{x:.2f}" for x in map(row.get, keys)]
        shown.add_row(row["class"], *said)
    return shown
