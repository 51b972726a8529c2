"""Evaluates checkpoints on labelled images, segmenters on images with masks, or detectors on images with boxes.

    nat-models evaluate --model output/best --data images [--split val] --output report

--data takes what training takes: folders, tables, saved datasets, shards. The checkpoint's own preprocessing is
used, and classes are matched by name. The output folder gets

    metrics.json                 top-1, top-5, cross-entropy, macro averages, calibration error, images per second
    per_class.csv                precision, recall, F1 and support
    confusion.csv, confusion.png
    mistakes.csv, mistakes.png   what was named wrongly, the surest first
    reliability.png              how often predictions of a confidence are right

Of segmenters: metrics.json and per_class.csv, with mean IoU and pixel accuracies at the images' original sizes.

Of detectors, COCO's average precision of boxes and masks, of all objects and by their size, in

    metrics.json, per_class.csv  per class also precision and recall at --threshold, and the score of the best F1
    curves.csv, curves.png       precision over recall, and F1 over the score, at an IoU of 0.5
    confusion.csv, confusion.png of boxes at --threshold and an IoU of 0.5, with what is background
    mistakes.csv, mistakes.png   the images with most that is missed or found wrongly: true and found

Of several models each gets a folder of its own, and comparison.csv stands beside them. ImageNet's validation images
lie in a folder per synset (n01440764/...); --labels-real takes real.json of arXiv:2006.07159.
"""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table
from timm.data import ImageNetInfo
from timm.data.model_config import resolve_input_data_config
from torch import nn

from ..errors import UserError
from ..training.detectors import is_detector
from ..training.evaluation import Predictions, judge, predict, table, write_report
from ..training.listing import some
from ..training.models import (
    add_computing_flags,
    add_preprocessing_flags,
    class_names,
    fraction,
    is_multi_label,
    make_model,
    parse_model_kwargs,
    positive,
    probability,
    published_as,
    refuse_flags,
    resolve_name,
)
from ..training.report import console
from ..training.segmenters import is_segmenter
from ..training.splits import Part, read_part
from ..training.tables import Columns
from ..writing import write_atomically, writing
from .evaluate_boxes import evaluate_boxes
from .evaluate_masks import evaluate_masks
from .held_out import check_same, held_out, is_own_data, settings_of_run


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="timm names, or folders that runs wrote")
    add("--data", required=True, type=Path, help="labelled images: a folder, a table, a saved dataset or shards")
    add(
        "--split",
        choices=("train", "val", "test"),
        help="of the data; by default what there is to validate on, of a run's own data what it held out",
    )
    add("--val-fraction", type=fraction, help="what is held out, where the data have no parts; as the run did, or 0.1")
    add("--seed", type=int, help="of what is held out; as the run did, or 0")
    for name in Columns._fields:
        add(f"--{name}-column", help="of a table; the usual names by default")
    add("--output", type=Path, help="folder to write")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=True, help="load the published weights")
    add("--checkpoint", help="load this weights file instead")
    add("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="more arguments of the model")
    add("--img-size", type=positive, help="height and width; the model's by default")
    add_preprocessing_flags(parser)
    add("--labels-real", type=Path, metavar="FILE", help="real.json, for ImageNet's validation images")
    add("--tile", type=positive, metavar="PX", help="of a segmenter or detector: see images in tiles of this side")
    add("--multi-scale", action="store_true", help="of a segmenter: the mean of 6 sizes, each also mirrored")
    add("--classes", help="of a segmenter: a file that names the values of masks")
    add("--mask-values", help="of a segmenter: values that mean another one, as in 255:1")
    add("--reduce-zero-label", action="store_true", help="of a segmenter: 0 is ignored, the others move down by one")
    add("--threshold", type=probability, help="of a detector: the least score in the confusion matrix (0.5)")
    add("--masks", action=argparse.BooleanOptionalAction, help="of a detector: measure masks too (where there are any)")
    add("--skip-bad-annotations", action="store_true", help="of a detector: leave them out, and count them")
    add_computing_flags(parser)


_FLAGS = {
    "classifiers": (
        *("pretrained", "checkpoint", "model_kwargs", "img_size", "crop_pct", "interpolation", "labels_real"),
        *(f"{name}_column" for name in Columns._fields),
    ),
    "segmenters": ("tile", "multi_scale", "classes", "mask_values", "reduce_zero_label"),
    "detectors": ("tile", "threshold", "masks", "skip_bad_annotations"),
}


def run(args: argparse.Namespace) -> None:
    folders = _folders(args)
    if args.output is not None:
        with writing(args.output):
            args.output.mkdir(parents=True, exist_ok=True)
    kinds = sorted({_kind(Path(name)) for name in args.model})
    if len(kinds) > 1:
        raise UserError(f"--model names {' and '.join(kinds)}: evaluate them one kind at a time.")
    wrong = [flag for flags in _FLAGS.values() for flag in flags if flag not in _FLAGS[kinds[0]]]
    refuse_flags(args, wrong, add_flags, kinds[0])
    evaluate = dict(classifiers=_evaluate_all, segmenters=evaluate_masks, detectors=evaluate_boxes)[kinds[0]]
    rows = evaluate(args, folders)
    names = list(dict.fromkeys(name for row in rows for name in row))
    shown = Table("", *[row["model"] for row in rows])
    for name in names:
        if name != "model":
            values = (row.get(name, "") for row in rows)
            shown.add_row(name, *(f"{value:.2f}" if isinstance(value, float) else str(value) for value in values))
    console.print(shown)
    if args.output is not None:
        if len(rows) > 1:
            write_atomically(args.output / "comparison.csv", table(rows, names))
        console.print(f"look at {args.output}")


def _kind(folder: Path) -> str:
    if is_segmenter(folder):
        return "segmenters"
    return "detectors" if is_detector(folder) else "classifiers"


def _evaluate_all(args: argparse.Namespace, folders: dict[str, Path | None]) -> list[dict]:
    rows, images = [], None
    for name, folder in folders.items():
        model = _make_model(args, name)
        part = _read(args, name, model)
        images = check_same(args, images, part.images)
        rows.append(_evaluate(args, name, model, part, folder))
    return rows


def _folders(args: argparse.Namespace) -> dict[str, Path | None]:
    """The models, and where the report of each goes."""
    if len(args.model) > 1 and (args.checkpoint or args.model_kwargs):
        raise UserError("--checkpoint and --model-kwargs are for one --model.")
    folders = {}
    for name in args.model:
        folder = args.output
        if folder is not None and len(args.model) > 1:
            folder /= re.sub(r"[^\w.-]+", "_", name.removeprefix("local-dir:"))
        if name in folders or (folder is not None and folder in folders.values()):
            raise UserError(f"--model names {name} twice, or another model whose report would have its name.")
        folders[name] = folder
    return folders


def _make_model(args: argparse.Namespace, name: str) -> nn.Module:
    pretrained = args.pretrained and args.checkpoint is None
    kwargs = parse_model_kwargs(args.model_kwargs)
    return make_model(
        name, pretrained=pretrained, checkpoint=args.checkpoint, model_kwargs=kwargs, img_size=args.img_size
    )


def _read(args: argparse.Namespace, name: str, model: nn.Module) -> Part:
    """The images to evaluate a model on."""
    source = resolve_name(name)
    run = settings_of_run(Path(source.removeprefix("local-dir:"))) if source.startswith("local-dir:") else {}
    names = class_names(model)
    columns = Columns(*(getattr(args, f"{column}_column") for column in Columns._fields))
    # Of one tree, what the run never saw.
    split = args.split or ("val" if is_own_data(args, run) else None)
    part, multi_label, notes = read_part(args.data, names, split=split, columns=columns, **held_out(args, run))
    if multi_label != is_multi_label(model):
        raise UserError(
            f"{name} was trained on {'several labels' if not multi_label else 'one label'} per image; "
            f"{args.data} has {'several' if multi_label else 'one'}."
        )
    for note in notes:
        console.print(note)
    return part


def _evaluate(args: argparse.Namespace, name: str, model: nn.Module, part: Part, folder: Path | None) -> dict:
    names, multi_label = class_names(model), is_multi_label(model)
    asked = {k: getattr(args, k) for k in ("img_size", "crop_pct", "interpolation")}
    data_config = resolve_input_data_config(model, asked)
    predictions = predict(
        model,
        part.images,
        data_config,
        multi_label=multi_label,
        batch_size=args.batch_size,
        workers=args.num_workers,
        precision=args.precision,
        device=args.device,
        skip_unreadable=args.skip_unreadable,
        description=name,
    )
    if predictions.unreadable:
        left_out = len(predictions.unreadable)
        console.print(f"left out: {left_out} images that cannot be read, first {predictions.unreadable[0]}")
    targets = [part.targets[i] for i in predictions.kept]
    judgement = judge(predictions.probabilities, targets, names, multi_label)
    more = dict(model=name, data=str(args.data), split=args.split, unreadable=len(predictions.unreadable))
    more |= dict(precision=args.precision, device=args.device, preprocessing=data_config)
    if args.labels_real is not None:
        judgement.figures |= _real(args.labels_real, predictions, names)
    if (args.pretrained or args.checkpoint) and (known := published_as(model)) is not None:
        more["published_top1"] = judgement.figures["published_top1"] = known.top1
    if folder is not None:
        with writing(folder):
            write_report(folder, predictions, targets, judgement, more)
    return dict(model=name, **judgement.figures, images=len(targets), images_per_second=predictions.images_per_second)


def _real(path: Path, predictions: Predictions, names: Sequence[str]) -> dict[str, float]:
    """Top-1 by ImageNet-ReaL: right is a class that any rater saw; images in which none was seen do not count."""
    try:
        labels = json.loads(path.read_text())
        if not all(isinstance(x, int) and 0 <= x < 1000 for row in labels for x in row):
            raise ValueError("it must hold a list of ImageNet-1k's class indices per image")
    except (OSError, TypeError, ValueError) as e:
        raise UserError(f"{path} cannot be read as real.json: {e}.") from None
    places, synsets = {name: i for i, name in enumerate(names)}, ImageNetInfo().label_names()
    if missing := [synset for synset in synsets if synset not in places]:
        raise UserError(f"--labels-real is for models of ImageNet's classes; this one lacks {some(missing)}.")
    right = counted = 0
    for image, row in zip(predictions.images, predictions.probabilities, strict=True):
        number = re.search(r"ILSVRC2012_val_(\d{8})", image.name)
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise UserError(f"{image.name} is none of the {len(labels)} images of {path}: ILSVRC2012_val_00000001 ...")
        if accepted := labels[int(number[1]) - 1]:
            counted += 1
            right += int(row.argmax()) in {places[synsets[i]] for i in accepted}
    if not counted:
        raise UserError(f"{path} has no label for any of the images.")
    return dict(real_top1=100 * right / counted, real_images=counted, real_unlabelled=len(predictions.images) - counted)
