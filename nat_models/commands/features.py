"""Writes the pooled features of all images of a folder to one safetensors file.

    nat-models features --data DIR --output features.safetensors --model nat_mini

The file holds "features", [N, num_features] in float32, and as metadata "files" (a JSON list of N paths relative to
DIR, sorted), "model" and "preprocessing" (JSON). Read it with safetensors.safe_open.
"""

import argparse
from pathlib import Path

import torch

from ..errors import UserError
from ..training.embeddings import PRECISIONS, extract
from ..training.images import list_images
from ..training.models import add_model_flags, model_from_flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", required=True, type=Path, help="folder of images, at any depth")
    add("--output", default=Path("features.safetensors"), type=Path, help="file to write")
    add_model_flags(parser)
    add("--batch-size", type=int, default=64)
    add("--num-workers", type=int, default=4, help="processes that load images")
    add("--precision", choices=PRECISIONS, default="float32", help="of the computation; what is written is float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--skip-unreadable", action="store_true", help="leave out images that cannot be read")


def run(args: argparse.Namespace) -> None:
    if not args.output.parent.is_dir():  # better known now than after an hour
        raise UserError(f"There is no folder {args.output.parent} for the output.")
    images = list_images(args.data)
    extract(
        model_from_flags(args, num_classes=0),
        images,
        args.output,
        name=args.model,
        img_size=args.img_size,
        batch_size=args.batch_size,
        workers=args.num_workers,
        precision=args.precision,
        device=args.device,
        skip_unreadable=args.skip_unreadable,
    )
