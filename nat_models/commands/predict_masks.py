"""What `nat-models predict` does with a segmenter: label maps, overlays and areas in a folder."""

import argparse
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ..training.decoding import Encoded, describe
from ..training.segmenters import load_segmenter
from ..training.segmenting import areas, check_tile, label_png, overlay_jpeg, segment
from ..writing import text_file, writing
from .outputs import check_output, read_pictures, write_below

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
    options = dict(tile=args.tile, multi_scale=args.multi_scale, precision=args.precision)
    count = 0
    with text_file(output / "areas.csv") as file:
        writer = csv.DictWriter(file, _FIELDS, lineterminator="\n")
        writer.writeheader()
        pictures = read_pictures(chunks, len(about.mean), "label map .png", skip_unreadable=args.skip_unreadable)
        for image, stem, picture in pictures:
            labels = segment(network, about, picture, name=describe(image), **options)
            write_below(output / "masks" / f"{stem}.png", label_png(labels, about))
            write_below(output / "overlays" / f"{stem}.jpg", overlay_jpeg(picture, labels, about))
            writer.writerows(areas(labels, image, about))
            file.flush()
            count += 1
    print(f"look at {output}: masks/, overlays/ and areas.csv of {count} images")
