"""Looks at images and their masks or boxes as training would, and trains nothing.

    nat-models check --data DIR [--classes classes.json] [--output check.png]

DIR holds images/ and masks/, each perhaps with train/ and val/ inside; or images with annotated objects, in COCO's
JSON, YOLO's text files or VOC's XML. What is found is printed: images, files that are left out, classes, the pixels or
the objects of each. The sheet shows images with their truth, as they are and as training changes them. What is wrong is
an error of one line; docs/segmentation_data.md says how masks are read, docs/detection_data.md how boxes are.
"""

import argparse
import random
from pathlib import Path

from matplotlib.figure import Figure

from ..errors import UserError
from ..training.box_layouts import holds_boxes
from ..training.drawing import draw_truth, png
from ..training.mask_sets import MaskSet, band_statistics, make_augmentation, to_picture
from ..training.masks import MaskData, read_mask_data
from ..training.models import count, fraction, positive
from ..training.report import console
from ..writing import write_atomically, writing
from .check_boxes import check_boxes

_OF_MASKS = ("classes", "reduce_zero_label", "mask_values", "crop_size", "scale")
_OF_BOXES = ("skip_bad_annotations", "masks", "max_dets", "short_side", "long_side", "crop")


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder with images/ and masks/, or with boxes")
    add("--task", choices=("segment", "detect"), help="what DIR is for; told by what it holds if left out")
    add("--output", type=Path, default=Path("check.png"), help="PNG file to write the sheet to (check.png)")
    add("--classes", help="names of classes: classes.json, or a text file with one a line; the folder's by default")
    add(
        "--reduce-zero-label", action="store_true", default=None, help="0 is ignored and k is class k - 1, as in ADE20K"
    )
    add("--mask-values", metavar="V:W,...", help="values that mean another one: 255:1,7:ignore")
    add("--mask-orientation", choices=("auto", "shown", "stored"), default="auto", help="of images with EXIF")
    add("--group", metavar="REGEX", help="images for which it finds the same stay on one side of the split")
    add("--allow-empty", action="store_true", help="allow classes with nothing to train on")
    add("--val-fraction", type=fraction, default=0.1, help="part that is held out where there is no val/ (0.1)")
    add("--verify", choices=("headers", "full"), default="headers", help="full decodes every image (headers)")
    add("--in-chans", type=positive, default=3, help="bands of an image, 1 to 16 (3)")
    add("--crop-size", type=positive, help="height and width of a training crop (512)")
    add("--scale", type=positive, nargs=2, metavar=("LONG", "SHORT"), help="box that images are fitted into first")
    add(
        "--skip-bad-annotations",
        action="store_true",
        default=None,
        help="boxes: leave out what something is wrong with",
    )
    add("--masks", action=argparse.BooleanOptionalAction, help="boxes: read outlines too (where there are some)")
    add("--max-dets", type=positive, help="boxes: objects of an image that can be found (100)")
    add("--short-side", type=positive, nargs="+", help="boxes: short sides that training draws from (480 512 .. 800)")
    add("--long-side", type=positive, help="boxes: the long side at most (1333)")
    add("--crop", action=argparse.BooleanOptionalAction, help="boxes: crop half of the training images (yes)")
    add("--images", type=positive, default=8, help="images on the sheet (8)")
    add("--seed", type=count, default=0, help="of the split and of what is drawn (0)")


def run(args: argparse.Namespace) -> None:
    task = args.task or ("detect" if holds_boxes(args.data) else "segment")
    strangers = _OF_MASKS if task == "detect" else _OF_BOXES
    if given := [name for name in strangers if getattr(args, name) is not None]:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise UserError(f"{args.data} is read as data to {task}, for which there is no {flags}; --task says otherwise.")
    figure = check_boxes(args) if task == "detect" else _check_masks(args)
    picture = png(figure)
    with writing(args.output):
        write_atomically(args.output, picture)
    console.print(f"look at {args.output}")


def _check_masks(args: argparse.Namespace) -> Figure:
    data = read_mask_data(
        args.data,
        val_fraction=args.val_fraction,
        seed=args.seed,
        classes=args.classes,
        reduce_zero_label=bool(args.reduce_zero_label),
        mask_values=args.mask_values,
        group=args.group,
        verify=args.verify,
        mask_orientation=args.mask_orientation,
        allow_empty=args.allow_empty,
    )
    for line in data.notes:
        console.print(line)
    sizes = ", ".join(f"{len(part):,} {name}" for name, part in data.parts.items())
    console.print(f"{sizes} images with masks, {len(data.names)} classes")
    for line in data.counts.lines():
        console.print(line)
    first = next(iter(data.parts.values()))
    mean, std = band_statistics(first.images, args.in_chans)
    for name, numbers in (("mean", mean), ("std", std)):
        console.print(f"{name} of the bands: {' '.join(f'{x:.4f}' for x in numbers)}")
    return _sheet(data, args, mean, [x if x > 0 else 1.0 for x in std])


def _sheet(data: MaskData, args: argparse.Namespace, mean: list[float], std: list[float]) -> Figure:
    """A row for each image: as it is, with its truth, and twice as training sees it."""
    part = next(iter(data.parts.values()))
    rules = dict(in_chans=args.in_chans, mean=mean, std=std)
    augmentation = make_augmentation(args.crop_size or 512, scale=args.scale and tuple(args.scale), **rules)
    items = MaskSet(part, data.reading, args.in_chans, augmentation, seed=args.seed)
    chosen = sorted(random.Random(args.seed).sample(range(len(part)), min(args.images, len(part))))
    pictures, labels, captions = [], [], []
    for index in chosen:
        image, truth = items.raw(index)
        pictures += [to_picture(image)] * 2
        labels += [None, truth.numpy()]
        captions += [part.images[index].name, part.masks[index].name]
        for epoch in (1, 2):
            changed, truth = items[epoch, index]
            pictures.append(to_picture(changed, mean, std))
            labels.append(truth.numpy())
            captions.append(f"in epoch {epoch}")
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in data.names]
    return draw_truth(pictures, labels, data.colours, names, captions=captions, title=str(args.data))
