"""Names the classes of images, of their pixels where the model is a segmenter, or finds objects with a detector.

    nat-models predict --model output/best photo.jpg more_photos/
    find . -name '*.jpg' | nat-models predict --model output/best - --format jsonl

Takes files, folders, tables, shards, or - for a path per line on standard input. Lines come as soon as their batch is
done. --sort-into DIR copies each image into DIR/CLASS/.

    nat-models predict --model output photo.jpg more_photos/ --output segmented

Of a segmenter, a run's folder that `train --task segment` wrote, the output is a folder: masks/ holds label maps, PNG
files of 8 bits whose values are the classes, overlays/ pictures to look at, and areas.csv pixels and percent of each
class. --tile 1024 sees a large image at its own resolution, in tiles that overlap, in memory that does not grow with
it.

    nat-models predict --model output photo.jpg more_photos/ --output detected

Of a detector, a run's folder that `train --task detect` wrote, too: detections.json holds what is found as COCO's
results, with the category ids of the training data and masks as run lengths; images.json says which image has which id;
objects.csv has a row for each object, pictures/ shows them. --image-ids annotations.json takes the images' ids from
COCO's JSON, by file_name. Pictures and objects.csv hold scores from 0.5 on, detections.json all that the detector
finds, as average precision needs it; --threshold is one least score for all of them. --tile joins what a seam cuts.
"""

import argparse
import csv
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TextIO

from timm.data.model_config import resolve_input_data_config

from ..errors import UserError
from ..training.decoding import Encoded, ImageFile, describe
from ..training.detectors import is_detector
from ..training.evaluation import classify
from ..training.mask_files import with_arrays
from ..training.models import (
    add_computing_flags,
    add_model_flags,
    add_preprocessing_flags,
    class_names,
    is_multi_label,
    model_from_flags,
    positive,
    probability,
    readable,
    refuse_flags,
)
from ..training.segmenters import is_segmenter
from ..training.splits import find_images
from ..writing import text_file, writing
from .predict_boxes import predict_boxes
from .predict_masks import predict_masks

UNSURE = "_unsure"
_CHUNK = 64  # batches of paths from standard input for which workers are started; without workers it is one


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="files, folders, tables, shards, or - for paths on standard input")
    add_model_flags(parser)
    add_preprocessing_flags(parser)
    add("--top-k", type=positive, default=5, help="classes per image, the most probable ones")
    add(
        "--threshold",
        type=probability,
        help="for models of several labels: all classes above it (0.5); of a detector: least score",
    )
    add("--format", choices=("table", "csv", "jsonl"), default="table")
    add(
        "--output",
        type=Path,
        help="file to write; by default standard output. Of others a folder, segmented/ or detected/",
    )
    add("--sort-into", type=Path, metavar="DIR", help="copy each image into a folder of its class")
    add("--min-probability", type=probability, default=0.0, help="with --sort-into: less sure ones go into DIR/_unsure")
    add("--tile", type=positive, metavar="PX", help="of a segmenter or detector: see images in tiles of this side")
    add("--multi-scale", action="store_true", help="of a segmenter: the mean of 6 sizes, each also mirrored")
    add("--image-ids", type=Path, metavar="FILE", help="of a detector: COCO's JSON that gives images their ids")
    add_computing_flags(parser, workers=0)


_SEVERAL_LABELS = 0.5  # the threshold, unless it is given
_FLAGS = {
    "classifier": (
        *("top_k", "threshold", "format", "sort_into", "min_probability", "img_size", "crop_pct", "interpolation"),
        *("checkpoint", "model_kwargs", "pretrained"),
    ),
    "segmenter": ("tile", "multi_scale"),
    "detector": ("tile", "threshold", "image_ids"),
}


def run(args: argparse.Namespace) -> None:
    kind = _kind(Path(args.model))
    wrong = [flag for flags in _FLAGS.values() for flag in flags if flag not in _FLAGS[kind]]
    refuse_flags(args, wrong, add_flags, f"a {kind}, as {args.model} is one")
    chunks = _chunks(args, None if kind == "classifier" else with_arrays())  # better known before weights are loaded
    if kind != "classifier":
        (predict_masks if kind == "segmenter" else predict_boxes)(args, chunks)
        return
    model = model_from_flags(args, None)
    names, skipped, count = class_names(model), [], 0
    folders = {} if args.sort_into is None else _folders(names)
    with _writer(args) as write:
        for images in chunks:
            for image, found in _predict(args, model, names, images, skipped):
                write(image, found)
                count += 1
                if args.sort_into is not None:
                    sure = bool(found) and found[0][1] >= args.min_probability
                    _copy(image, args.sort_into / (folders[found[0][0]] if sure else UNSURE))
        if skipped and not count:
            raise UserError(f"None of the {len(skipped)} images can be read.")
    if skipped:
        print(f"skipped {len(skipped)} images that cannot be read", file=sys.stderr)


def _kind(folder: Path) -> str:
    if is_segmenter(folder):
        return "segmenter"
    return "detector" if is_detector(folder) else "classifier"


def _chunks(args: argparse.Namespace, kinds: frozenset[str] | None) -> Iterator[Sequence[Encoded]]:
    if args.sources != ["-"]:
        if args.sort_into is not None:
            folders = [source for source in args.sources if Path(source).is_dir()]
            inside = [f for f in folders if args.sort_into.resolve().is_relative_to(Path(f).resolve())]
            if inside:
                raise UserError(f"--sort-into {args.sort_into} must not lie in what is sorted, {inside[0]}.")
        if missing := [source for source in args.sources if not Path(source).exists()]:
            if missing[0] == "-":
                raise UserError("-, standard input, must be the only source.")
            if "{" not in missing[0]:  # train-{000..009}.tar names shards
                raise UserError(f"There is no file or folder {missing[0]}.")
        return iter([find_images(args.sources, kinds=kinds)])
    return _from_stdin(args.batch_size * (_CHUNK if args.num_workers else 1))


def _from_stdin(size: int) -> Iterator[list[Encoded]]:
    """The images of standard input, as many at a time. A path is bytes, in whatever encoding its file was named."""
    paths = filter(None, (os.fsdecode(line.rstrip(b"\r\n")) for line in sys.stdin.buffer))
    while chunk := [ImageFile(Path(path).as_posix(), path) for path in islice(paths, size)]:
        yield chunk


def _predict(args, model, names: Sequence[str], images: Sequence[Encoded], skipped: list) -> Iterator[tuple]:
    """Each image with its classes and their probabilities, the greatest first."""

    def skip(error: UserError) -> None:
        print(f"skipped: {error}", file=sys.stderr)
        skipped.append(error)

    several = is_multi_label(model)
    threshold = _SEVERAL_LABELS if args.threshold is None else args.threshold
    asked = {key: getattr(args, key) for key in ("img_size", "crop_pct", "interpolation")}
    batches = classify(
        model,
        images,
        resolve_input_data_config(model, asked),
        multi_label=several,
        batch_size=args.batch_size,
        workers=args.num_workers,
        precision=args.precision,
        device=args.device,
        on_error=skip if args.skip_unreadable else None,
    )
    for indices, probabilities in batches:
        values, classes = probabilities.topk(len(names) if several else min(args.top_k, len(names)))
        for index, row, found in zip(indices, values.tolist(), classes.tolist(), strict=True):
            pairs = [(names[c], p) for c, p in zip(found, row, strict=True) if not several or p > threshold]
            yield images[index], pairs


@contextmanager
def _writer(args: argparse.Namespace):
    if args.output is None:
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="surrogateescape")  # names of files are bytes, whatever the terminal's are
        yield _formatter(args, sys.stdout)
        return
    with text_file(args.output) as file:
        yield _formatter(args, file)


def _formatter(args: argparse.Namespace, file: TextIO):
    if args.format == "csv":
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "rank", "class", "probability"])

    def write(image: Encoded, found: list[tuple[str, float]]) -> None:
        if args.format == "jsonl":
            classes = [{"class": name, "probability": round(p, 6)} for name, p in found]
            print(
                json.dumps({"image": describe(image), "predictions": classes}),
                file=file,
                flush=True,
            )
        elif args.format == "csv":
            rows = [[rank, name, f"{p:.6f}"] for rank, (name, p) in enumerate(found, start=1)]
            writer.writerows([describe(image), *row] for row in rows or [["", "", ""]])  # an image without a label
            file.flush()
        else:
            print(describe(image) + "  " + "  ".join(f"{readable(n)} {p:.1%}" for n, p in found), file=file, flush=True)

    return write


def _folders(names: Sequence[str]) -> dict[str, str]:
    """A folder for each class: its name, with _ for what the name of a folder cannot hold."""
    folders = {}
    for name in names:
        folder = re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", name)
        folder = folder if folder.strip(". ") else "_"  # "." and ".." lead elsewhere
        if folder == UNSURE or folder in folders.values():
            raise UserError(f"--sort-into cannot give the class {name!r} a folder of its own: {folder} is taken.")
        folders[name] = folder
    return folders


def _copy(image: Encoded, folder: Path) -> None:
    """Copies the image whole or not at all; never over another one."""
    with writing(folder, "choose another --sort-into"):
        folder.mkdir(parents=True, exist_ok=True)
        base = Path(image.name).name
        temporary = folder / f".{base}.tmp"
        try:
            with image.open() as source, open(temporary, "wb") as copy:
                shutil.copyfileobj(source, copy)
            path, number = folder / base, 1
            while path.exists():
                path, number = folder / f"{Path(base).stem}_{number}{Path(base).suffix}", number + 1
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
