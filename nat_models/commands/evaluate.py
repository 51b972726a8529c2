"""Evaluates one checkpoint or several on labelled images.

    nat-models evaluate --model output/best --data images [--split val] --output report

--data takes what training takes: folders, tables, saved datasets, shards. The checkpoint's own preprocessing is
used, and classes are matched by name. The output folder gets

    metrics.json                 top-1, top-5, cross-entropy, macro averages, calibration error, images per second
    per_class.csv                precision, recall, F1 and support
    confusion.csv, confusion.png
    mistakes.csv, mistakes.png   what was named wrongly, the surest first
    reliability.png              how often predictions of a confidence are right

Of several models each gets a folder of its own, and comparison.csv stands beside them. ImageNet's validation images
lie in a folder per synset (n01440764/...); --labels-real takes real.json of arXiv:2006.07159.
"""

import argparse
import json
import re
from pathlib import Path

import torch
from rich.table import Table
from timm.data.model_config import resolve_input_data_config
from torch import nn

from ..checkpoints import list_weights
from ..errors import UserError
from ..training.evaluation import PRECISIONS, Predictions, judge, predict, table, write_report
from ..training.models import class_names, is_multi_label, make_model, parse_model_kwargs
from ..training.report import console
from ..training.run_state import write_atomically, writing
from ..training.splits import read_part
from ..training.tables import Columns


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", nargs="+", required=True, help="timm names, or folders that runs wrote")
    add("--data", required=True, type=Path, help="labelled images: a folder, a table, a saved dataset or shards")
    add(
        "--split",
        choices=("train", "val", "test"),
        help="of the data; by default what there is to validate on",
    )
    add("--val-fraction", type=float, default=0.1, help="what the run held out, where the data have no parts")
    add("--seed", type=int, default=0, help="of what the run held out")
    for name in Columns._fields:
        add(f"--{name}-column", help="of a table; the usual names by default")
    add("--output", type=Path, help="folder to write")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=True, help="load the published weights")
    add("--checkpoint", help="load this weights file instead")
    add("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="more arguments of the model")
    add("--img-size", type=int, help="height and width; the model's by default")
    add("--crop-pct", type=float, help="part of the image's short side that is seen; the model's by default")
    add("--interpolation", help="bilinear, bicubic, ...; the model's by default")
    add("--labels-real", type=Path, metavar="FILE", help="real.json, for ImageNet's validation images")
    add("--batch-size", type=int, default=64)
    add("--num-workers", type=int, default=4, help="processes that load images")
    add("--precision", choices=PRECISIONS, default="float32", help="of the computation")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--skip-unreadable", action="store_true", help="leave out images that cannot be read, and count them")


def run(args: argparse.Namespace) -> None:
    if args.output is not None:
        with writing(args.output):
            args.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in args.model:
        model = _make_model(args, name)
        rows.append(_evaluate(args, name, model))
    shown = Table("", *[row["model"] for row in rows])
    for name in rows[0]:
        if name != "model":
            values = (row.get(name, "") for row in rows)
            shown.add_row(name, *(f"{value:.2f}" if isinstance(value, float) else str(value) for value in values))
    console.print(shown)
    if args.output is not None:
        if len(rows) > 1:
            write_atomically(args.output / "comparison.csv", table(rows))
        console.print(f"look at {args.output}")


def _make_model(args: argparse.Namespace, name: str) -> nn.Module:
    pretrained = args.pretrained and args.checkpoint is None
    kwargs = parse_model_kwargs(args.model_kwargs)
    return make_model(
        name, pretrained=pretrained, checkpoint=args.checkpoint, model_kwargs=kwargs, img_size=args.img_size
    )


def _evaluate(args: argparse.Namespace, name: str, model: nn.Module) -> dict:
    names = class_names(model)
    if len(names) != model.num_classes:
        raise UserError(f"{name} has {model.num_classes} outputs, and {len(names)} class names.")
    columns = Columns(*(getattr(args, f"{column}_column") for column in Columns._fields))
    chosen = dict(split=args.split, val_fraction=args.val_fraction, seed=args.seed, columns=columns)
    part, multi_label, notes = read_part(args.data, names, **chosen)
    if multi_label != is_multi_label(model):
        raise UserError(
            f"{name} was trained on {'several labels' if not multi_label else 'one label'} per image; "
            f"{args.data} has {'several' if multi_label else 'one'}."
        )
    for note in notes:
        console.print(note)
    asked = {k: getattr(args, k) for k in ("img_size", "crop_pct", "interpolation")}
    predictions = predict(
        model,
        part.images,
        resolve_input_data_config(model, asked),
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
    more = dict(model=name, data=str(args.data), split=args.split)
    if args.labels_real is not None:
        judgement.figures |= _real(args.labels_real, predictions)
    if (published := _published(model)) is not None:
        more["published_top1"] = judgement.figures["published_top1"] = published
    if args.output is not None:
        folder = args.output if len(args.model) == 1 else args.output / re.sub(r"[^\w.-]+", "_", name)
        with writing(folder):
            write_report(folder, predictions, targets, judgement, more)
    return dict(model=name, **judgement.figures, images=len(targets), images_per_second=predictions.images_per_second)


def _published(model: nn.Module) -> float | None:
    """The paper's top-1 of the published weights, if these are they."""
    cfg = model.pretrained_cfg
    name = f"{cfg.get('architecture')}.{cfg.get('tag')}"
    source = cfg.get("source", "")
    return next((w.top1 for w in list_weights() if w.name == name and source == "hf-hub" and not cfg.get("file")), None)


def _real(path: Path, predictions: Predictions) -> dict[str, float]:
    """Top-1 by ImageNet-ReaL: right is a class that any rater saw; images in which none was seen do not count."""
    try:
        labels = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise UserError(f"{path} cannot be read as real.json: {e}.") from None
    right = counted = 0
    for image, row in zip(predictions.images, predictions.probabilities, strict=True):
        number = re.search(r"ILSVRC2012_val_(\d{8})", image.name)
        if number is None or not 1 <= int(number[1]) <= len(labels):
            raise UserError(f"{image.name} is none of the {len(labels)} images of {path}: ILSVRC2012_val_00000001 ...")
        if accepted := labels[int(number[1]) - 1]:
            counted += 1
            right += int(row.argmax()) in accepted
    if not counted:
        raise UserError(f"{path} has no label for any of the images.")
    return dict(real_top1=100 * right / counted, real_images=counted)
