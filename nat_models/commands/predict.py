"""Names the classes of images.

    nat-models predict --model output/best photo.jpg more_photos/
    find . -name '*.jpg' | nat-models predict --model output/best - --format jsonl

Takes files, folders, tables, shards, or - for a path per line on standard input. Lines come as soon as their batch is
done. --sort-into DIR copies each image into DIR/CLASS/.
"""

import argparse
import csv
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TextIO

import torch
from timm.data import create_transform
from timm.data.model_config import resolve_input_data_config

from ..errors import UserError
from ..training.decoding import Encoded, ImageFile, describe
from ..training.evaluation import PRECISIONS
from ..training.images import ImageSet, make_loader, read_batches
from ..training.models import add_model_flags, class_names, is_multi_label, model_from_flags, readable
from ..training.run_state import writing
from ..training.splits import find_images

_CHUNK = 1024  # paths of standard input that are looked at together


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("sources", nargs="+", metavar="SOURCE", help="files, folders, tables, shards, or - for paths on standard input")
    add_model_flags(parser)
    add("--top-k", type=int, default=5, help="classes per image, the most probable ones")
    add("--threshold", type=float, default=0.5, help="for models of several labels: all classes above it")
    add("--format", choices=("table", "csv", "jsonl"), default="table")
    add("--output", type=Path, help="file to write; by default standard output")
    add("--sort-into", type=Path, metavar="DIR", help="copy each image into a folder of its class")
    add("--min-probability", type=float, default=0.0, help="with --sort-into: less sure ones go into DIR/_unsure")
    add("--batch-size", type=int, default=64)
    add("--num-workers", type=int, default=0, help="processes that load images")
    add("--precision", choices=PRECISIONS, default="float32", help="of the computation")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--skip-unreadable", action="store_true", help="leave out images that cannot be read, and say so")


def run(args: argparse.Namespace) -> None:
    if args.top_k < 1:
        raise UserError(f"--top-k must be at least 1, got {args.top_k}.")
    chunks = _chunks(args)  # better known before weights are loaded
    model = model_from_flags(args, None)
    names, skipped = class_names(model), []
    with _writer(args) as write:
        for images in chunks:
            for image, found in _predict(args, model, names, images, skipped):
                write(image, found)
                if args.sort_into is not None:
                    _sort_into(args.sort_into, image, found, args.min_probability)
    if skipped:
        print(f"skipped {len(skipped)} images that cannot be read", file=sys.stderr)


def _chunks(args: argparse.Namespace) -> Iterator[Sequence[Encoded]]:
    if args.sources != ["-"]:
        if args.sort_into is not None:
            folders = [source for source in args.sources if Path(source).is_dir()]
            inside = [f for f in folders if args.sort_into.resolve().is_relative_to(Path(f).resolve())]
            if inside:
                raise UserError(f"--sort-into {args.sort_into} must not lie in what is sorted, {inside[0]}.")
        return iter([find_images(args.sources)])
    return _from_stdin()


def _from_stdin() -> Iterator[list[Encoded]]:
    chunk = []
    for line in sys.stdin:
        if path := line.rstrip("\n"):
            chunk.append(ImageFile(Path(path).as_posix(), path))
        if len(chunk) == _CHUNK:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@torch.inference_mode()
def _predict(args, model, names: Sequence[str], images: Sequence[Encoded], skipped: list) -> Iterator[tuple]:
    """Each image with its classes and their probabilities, the greatest first."""

    def skip(error: UserError) -> None:
        print(f"skipped: {error}", file=sys.stderr)
        skipped.append(error)

    device = torch.device(args.device)
    model, data_config = model.to(device), resolve_input_data_config(model, dict(img_size=args.img_size))
    image_set = ImageSet(images, None, data_config["input_size"][0], create_transform(**data_config))
    loader = make_loader(image_set, args.batch_size, args.num_workers)
    dtype, several = PRECISIONS[args.precision], is_multi_label(model)
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    for batch, indices in read_batches(loader, skip if args.skip_unreadable else None):
        with autocast:
            logits = model(batch.to(device))
        logits = logits.float()
        probabilities = logits.sigmoid() if several else logits.softmax(dim=1)
        count = len(names) if several else min(args.top_k, len(names))
        values, classes = probabilities.topk(count)
        for index, row, found in zip(indices.tolist(), values.tolist(), classes.tolist(), strict=True):
            pairs = [(names[c], p) for c, p in zip(found, row, strict=True) if not several or p > args.threshold]
            yield images[index], pairs


@contextmanager
def _writer(args: argparse.Namespace):
    if args.output is None:
        yield _formatter(args, sys.stdout)
        return
    temporary = args.output.with_name(f"{args.output.name}.tmp")
    try:
        with writing(args.output), open(temporary, "w", newline="", encoding="utf-8") as file:
            yield _formatter(args, file)
        os.replace(temporary, args.output)
    finally:
        temporary.unlink(missing_ok=True)


def _formatter(args: argparse.Namespace, file: TextIO):
    if args.format == "csv":
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["image", "rank", "class", "probability"])

    def write(image: Encoded, found: list[tuple[str, float]]) -> None:
        if args.format == "jsonl":
            classes = [{"class": name, "probability": round(p, 6)} for name, p in found]
            print(
                json.dumps({"image": describe(image), "predictions": classes}, ensure_ascii=False),
                file=file,
                flush=True,
            )
        elif args.format == "csv":
            writer.writerows([describe(image), rank, name, f"{p:.6f}"] for rank, (name, p) in enumerate(found, start=1))
            file.flush()
        else:
            print(describe(image) + "  " + "  ".join(f"{readable(n)} {p:.1%}" for n, p in found), file=file, flush=True)

    return write


def _sort_into(folder: Path, image: Encoded, found: list[tuple[str, float]], minimum: float) -> None:
    """Copies the image whole or not at all; never over another one."""
    name, sure = found[0] if found else ("_unsure", 0.0)
    target = folder / ("_unsure" if sure < minimum else name.replace("/", "_"))
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        base = Path(image.name).name
        temporary = target / f".{base}.tmp"
        with image.open() as source, open(temporary, "wb") as copy:
            shutil.copyfileobj(source, copy)
        path, number = target / base, 1
        while path.exists():
            path, number = target / f"{Path(base).stem}_{number}{Path(base).suffix}", number + 1
        os.replace(temporary, path)
