"""Writes the features of images to one file, or streams them into a folder of shards.

    nat-models features --data DIR --output features.safetensors --model nat_mini

The file holds "features", [N, num_features] in float32, and as metadata "files" (a JSON list of N paths relative to
DIR, sorted), "model" and "preprocessing" (JSON). Read it with nat_models.training.embeddings.load_features, or with
safetensors.safe_open. An --output without .safetensors, .npz or .parquet is a folder of shards: memory then does not
grow with the images, --resume goes on after a kill, and under `accelerate launch -m nat_models features ...` each
process writes its own shards.
"""

import argparse
from pathlib import Path

from ..errors import UserError
from ..training.embeddings import FORMATS, KINDS, Extractor, extract
from ..training.models import add_computing_flags, add_model_flags, fraction, model_from_flags
from ..training.splits import find_images, read_data


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, type=Path, help="images: a folder, at any depth, a table, a saved dataset, shards")
    add(
        "--split",
        choices=("train", "val", "test"),
        help="a part of labelled data, with its labels",
    )
    add("--val-fraction", type=fraction, default=0.1, help="with --split: what a run held out of data without parts")
    add("--seed", type=int, default=0, help="with --split: of what it held out")
    add("--output", default=Path("features.safetensors"), type=Path, help="file or folder to write")
    add_model_flags(parser)
    add("--kind", choices=KINDS, default="pooled", help="one vector per image, one per level, or a map")
    add("--level", type=int, help="of dense features, from 0; the last by default")
    add("--dtype", choices=("float32", "float16"), default="float32", help="of what is written")
    add("--shard-size", type=int, default=4096, help="images per shard")
    add("--shard-format", choices=[suffix[1:] for suffix in FORMATS], default="safetensors")
    add("--resume", action="store_true", help="go on with a folder of shards")
    add_computing_flags(parser)


def run(args: argparse.Namespace) -> None:
    if not args.output.parent.is_dir():  # better known now than after an hour
        raise UserError(f"There is no folder {args.output.parent} for the output.")
    if args.shard_size < 1:
        raise UserError(f"--shard-size must be at least 1, got {args.shard_size}.")
    labels = None
    if args.split is None:
        images = find_images([args.data])
    else:
        data = read_data(args.data, val_fraction=args.val_fraction, seed=args.seed)
        if args.split not in data.parts or data.multi_label:
            raise UserError(f"{args.data} has no part {args.split} with one label per image.")
        part = data.parts[args.split]
        images, labels = part.images, [data.names[target] for target in part.targets]
    extractor = Extractor(
        model_from_flags(args, num_classes=0),
        kind=args.kind,
        level=args.level,
        img_size=args.img_size,
        precision=args.precision,
        device=args.device,
    )
    extractor.name = args.model
    extract(
        extractor,
        images,
        args.output,
        labels=labels,
        batch_size=args.batch_size,
        workers=args.num_workers,
        dtype=args.dtype,
        shard_size=args.shard_size,
        suffix=f".{args.shard_format}",
        resume=args.resume,
        skip_unreadable=args.skip_unreadable,
    )
