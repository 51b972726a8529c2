"""What `nat-models predict` does with a segmenter: label maps, overlays and areas in a folder."""

import argparse
import csv
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import torch

from ..errors import UserError
from ..training.decoding import Encoded, describe
from ..training.mask_sets import read_image
from ..training.report import track
from ..training.segmenters import load_segmenter
from ..training.segmenting import areas, check_tile, label_png, overlay_jpeg, segment
from ..writing import write_atomically, writing

_FIELDS = ("image", "class", "pixels", "percent")


def predict_masks(args: argparse.Namespace, chunks: Iterator[Sequence[Encoded]]) -> None:
    """Writes masks/NAME.png, overlays/NAME.jpg and areas.csv into args.output.

    Raises:
        UserError: An image cannot be read, the folder cannot be written, or two images would have one label map.
    """
    check_tile(args.tile)
    output = Path("segmented") if args.output is None else args.output
    for source in args.sources:
        if Path(source).is_dir() and output.resolve().is_relative_to(Path(source).resolve()):
            raise UserError(
                f"--output {output} must not lie in what is read, {source}: its pictures would be read too."
            )
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
                    stem = _stem(image, taken)
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
                    _write(output / "masks" / f"{stem}.png", label_png(labels, about))
                    _write(output / "overlays" / f"{stem}.jpg", overlay_jpeg(picture, labels, about))
                    writer.writerows(areas(labels, image, about))
                    file.flush()
            if skipped == len(taken) > 0:
                raise UserError(f"None of the {skipped} images can be read.")
        os.replace(temporary, output / "areas.csv")
    finally:
        temporary.unlink(missing_ok=True)
    print(f"look at {output}: masks/, overlays/ and areas.csv of {len(taken) - skipped} images")


def _stem(image: Encoded, taken: dict[str, str]) -> str:
    """The image's name without its suffix, below the folder that it was found in; of a single file the last part."""
    name = PurePosixPath(image.name)
    if name.is_absolute() or ".." in name.parts or image.name == Path(image.path).as_posix():
        name = PurePosixPath(name.name)
    stem = str(name.with_suffix(""))
    if (other := taken.setdefault(stem, describe(image))) != describe(image):
        raise UserError(f"{other} and {describe(image)} would both have the label map {stem}.png: rename one.")
    return stem


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)
