"""What `nat-models predict` does with a segmenter: label maps, overlays and areas in a folder."""

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..errors import UserError
from ..training.decoding import Encoded, describe
from ..training.mask_sets import read_image
from ..training.report import track
from ..training.segmenters import load_segmenter
from ..training.segmenting import areas, check_tile, label_png, overlay_jpeg, segment
from ..writing import writing
from .outputs import check_output, stem_of, write_below

_FIELDS = ("image", "class", "pixels", "percent")


def predict_masks(args: argparse.Namespace, chunks: Iterator[Sequence[Encoded]]) -> None:
    """Writes masks/NAME.png, overlays/NAME.jpg and areas.csv into args.output.

    Raises:
        UserError: An image cannot be read, the folder cannot be written, or two images would have one label map.
    """
    check_tile(args.tile)
    output = Path("segmented") if args.output is None else args.output
    check_output(output, args.sources)
    network, about = load_segmenter(Path(args.model))
    network = network.to(torch.device(args.device))
    with writing(output):
        output.mkdir(parents=True, exist_ok=True)
    taken, skipped, temporary = {}, 0, output / "areas.csv.tmp"
    try:
        with writing(output), open(temporary, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.DictWriter(file, _FIELDS, lineterminator="\n")
            writer.writeheader()
            for images in chunks:
                for image in track(images, "images"):
                    stem = stem_of(image, taken, "label map .png")
                    try:
                        picture = read_image(image, len(about.mean))
                    except UserError as e:
                        if not args.skip_unreadable:
                            raise
                        print(f"skipped: {e}", file=sys.stderr)
                        skipped += 1
                        continue
                    options = dict(tile=args.tile, multi_scale=args.multi_scale, precision=args.precision)
                    labels = segment(network, about, picture, name=describe(image), **options)
                    write_below(output / "masks" / f"{stem}.png", label_png(labels, about))
                    write_below(output / "overlays" / f"{stem}.jpg", overlay_jpeg(picture, labels, about))
                    writer.writerows(areas(labels, image, about))
                    file.flush()
            if skipped == len(taken) > 0:
                raise UserError(f"None of the {skipped} images can be read.")
        os.replace(temporary, output / "areas.csv")
    finally:
        temporary.unlink(missing_ok=True)
    print(f"look at {output}: masks/, overlays/ and areas.csv of {len(taken) - skipped} images")
