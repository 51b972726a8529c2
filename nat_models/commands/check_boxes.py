"""What `nat-models check` does with boxes: counts of objects, and pictures of them raw and as training sees them."""

import argparse
import random

import numpy as np
from matplotlib.figure import Figure

from ..training.anchors import note_anchors
from ..training.box_sets import LONG_SIDE, SHORT_SIDES, BoxSet, make_box_augmentation
from ..training.boxes import BoxData, count_objects, read_box_data
from ..training.drawing import draw_objects, draw_truth
from ..training.mask_sets import to_picture
from ..training.report import console


def check_boxes(args: argparse.Namespace) -> Figure:
    """Prints what is found, and gives the sheet.

    Raises:
        UserError: Something is wrong with the data.
    """
    data = read_box_data(
        args.data,
        val_fraction=args.val_fraction,
        seed=args.seed,
        group=args.group,
        verify=args.verify,
        skip_bad_annotations=bool(args.skip_bad_annotations),
        mask_orientation=args.mask_orientation,
        allow_empty=args.allow_empty,
        masks=args.masks,
        max_dets=args.max_dets or 100,
    )
    for line in data.notes:
        console.print(line)
    sizes = ", ".join(f"{len(part):,} {name}" for name, part in data.parts.items())
    console.print(f"{sizes} images with boxes{' and masks' * data.masks}, {len(data.names)} classes")
    for line in count_objects(data).lines():
        console.print(line)
    short, long = tuple(args.short_side or SHORT_SIDES), args.long_side or LONG_SIDE
    part = next(iter(data.parts.values()))
    if note := note_anchors(part, max(short), long):
        console.print(note)
    drawn = make_box_augmentation(short_sides=short, long_side=long, crop=args.crop is not False)
    return _sheet(data, BoxSet(part, data.masks, drawn, in_chans=args.in_chans, seed=args.seed), args)


def _sheet(data: BoxData, items: BoxSet, args: argparse.Namespace) -> Figure:
    """A row for each image: as it is, with its truth, and twice as training sees it."""
    chosen = sorted(random.Random(args.seed).sample(range(len(items)), min(args.images, len(items))))
    names = [name if len(name) <= 24 else f"{name[:23]}…" for name in data.names]
    pictures, captions = [], []
    for index in chosen:
        image, target = items.raw(index)
        pictures += [to_picture(image), _drawn(to_picture(image), target, data, names)]
        captions += [items.part.names[index], f"{len(target['labels'])} objects"]
        for epoch in (1, 2):
            changed, target = items[epoch, index]
            pictures.append(_drawn(to_picture(changed), target, data, names))
            captions.append(f"in epoch {epoch}: {changed.shape[2]} x {changed.shape[1]} px")
    alone = [None] * len(pictures)
    return draw_truth(pictures, alone, data.colours, names, captions=captions, title=str(args.data))


def _drawn(picture: np.ndarray, target: dict, data: BoxData, names: list[str]) -> np.ndarray:
    masks = target["masks"].dense().numpy() if "masks" in target else None
    boxes, labels, crowd = (np.asarray(target[key]) for key in ("boxes", "labels", "iscrowd"))
    return draw_objects(picture, boxes, labels, data.colours, names, masks=masks, crowd=crowd)
