"""Converts a checkpoint of any layout to a folder that timm, transformers or the authors' code loads.

    nat-models convert --checkpoint nat_tiny.pth --model nat_tiny --to transformers --output nat_tiny_hf --check

It reads the authors' .pth, folders and files in transformers' and timm's layouts, and training checkpoints, whatever
stands around the network: a prefix, an optimizer, a detector. Per-level norms of backbones are kept. Pickles are read
without running code from them. The folder holds model.safetensors and

timm          config.json: timm.create_model("local-dir:FOLDER", pretrained=True)
transformers  config.json and preprocessor_config.json, for Auto classes with nat_models.integrations.hf_transformers
original      nothing else: the authors' names
"""

import argparse
from pathlib import Path

from ..conversion import FORMS, convert
from ..training.models import parse_model_kwargs


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--checkpoint", type=Path, required=True, help="file or folder of weights")
    add("--to", choices=FORMS, required=True)
    add("--output", type=Path, required=True, help="folder to write")
    add("--model", help="timm name of the network; told by the config.json beside the weights, where there is one")
    add("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="more of its arguments, such as dilations")
    add("--check", action="store_true", help="load both, run both, and print the largest difference")


def run(args: argparse.Namespace) -> None:
    done = convert(
        args.checkpoint,
        args.output,
        to=args.to,
        name=args.model,
        model_kwargs=parse_model_kwargs(args.model_kwargs),
        check=args.check,
    )
    megabytes = done.path.stat().st_size / 1e6
    print(f"{done.path}: {done.parameters / 1e6:.1f} M numbers, {megabytes:.1f} MB, read as {done.source}")
    print(f"sha256 {done.sha256}")
    if done.difference is not None:
        print(f"largest difference {done.difference:.1e}")
