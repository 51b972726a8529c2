"""Writes the pooled features of all images of a folder to one safetensors file.

    python scripts/extract_features.py --data DIR --output features.safetensors --model nat_mini

The file holds "features", [N, num_features] in float32, and as metadata "files" (a JSON list of N paths relative to
DIR, sorted), "model" and "preprocessing" (JSON). Read it with safetensors.safe_open.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from rich.progress import track
from safetensors.torch import save_file
from timm.data import create_transform
from timm.data.model_config import resolve_input_data_config
from torch import Tensor
from torch.utils.data import DataLoader, default_collate
from train import Config, ImageFiles, UserError, console, list_images, make_model, parse_model_kwargs

from nat_models.checkpoints import CheckpointError

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class SkippingImageFiles(ImageFiles):
    """Hands out None for an unreadable image and says so."""

    def __getitem__(self, index: int) -> tuple[Tensor, int] | None:
        try:
            return super().__getitem__(index)
        except UserError as e:
            print(f"skipped: {e}", file=sys.stderr)
            return None


def collate(batch: list) -> list[Tensor] | None:
    batch = [item for item in batch if item is not None]
    return default_collate(batch) if batch else None


@torch.inference_mode()
def extract(args: argparse.Namespace) -> Tensor:
    """Computes the features, writes them to args.output and returns them."""
    if (args.pretrained, args.checkpoint) == (False, None):
        console.print("the weights are random: neither --pretrained nor --checkpoint")
    folder, output = Path(args.data), Path(args.output)
    if not output.parent.is_dir():  # better known now than after an hour
        raise UserError(f"There is no folder {output.parent} for the output.")
    files = list_images(folder)
    names = ("data", "model", "pretrained", "checkpoint", "img_size")
    model_kwargs = parse_model_kwargs(args.model_kwargs)
    config = Config(**{name: getattr(args, name) for name in names}, model_kwargs=model_kwargs)
    device = torch.device(args.device)
    model = make_model(config, num_classes=0).to(device).eval()
    data_config = resolve_input_data_config(model, dict(img_size=args.img_size))

    dataset_class = SkippingImageFiles if args.skip_unreadable else ImageFiles
    samples = [(file, i) for i, file in enumerate(files)]
    dataset = dataset_class(samples, data_config["input_size"][0], create_transform(**data_config))
    loader = DataLoader(dataset, args.batch_size, num_workers=args.num_workers, collate_fn=collate)
    dtype = PRECISIONS[args.precision]
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    started = time.perf_counter()
    features, kept = [], []
    for batch in track(loader, "images", console=console, transient=True, disable=not console.is_terminal):
        if batch is None:
            continue
        images, indices = batch
        with autocast:
            pooled = model.forward_head(model.forward_features(images.to(device)), pre_logits=True)
        features.append(pooled.float().cpu())
        kept += indices.tolist()
    if not kept:
        raise UserError(f"None of the {len(files)} images in {folder} can be read.")
    features = torch.cat(features)

    metadata = dict(
        files=json.dumps([files[i].relative_to(folder).as_posix() for i in kept]),
        model=args.model,
        preprocessing=json.dumps(data_config),
    )
    temporary = output.with_name(f"{output.name}.tmp")
    save_file(dict(features=features), temporary, metadata=metadata)
    os.replace(temporary, output)
    console.print(f"{output}: {list(features.shape)} in {time.perf_counter() - started:.1f} s")
    return features


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--data", required=True, help="folder of images, at any depth")
    add("--output", default="features.safetensors", help="file to write")
    add("--model", default="nat_mini", help="timm name, or local-dir:FOLDER")
    add("--pretrained", action=argparse.BooleanOptionalAction, default=True, help="load the published weights")
    add("--checkpoint", help="load this weights file instead")
    add("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="more arguments of the model")
    add("--img-size", type=int, help="height and width; the model's by default")
    add("--batch-size", type=int, default=64)
    add("--num-workers", type=int, default=4, help="processes that load images")
    add("--precision", choices=PRECISIONS, default="float32", help="of the computation; what is written is float32")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--skip-unreadable", action="store_true", help="leave out images that cannot be read")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        extract(parse_args(argv))
    except (UserError, CheckpointError) as e:
        # From a worker process of the loader the message arrives behind a traceback.
        print(f"error: {str(e).rpartition('UserError: ')[2].strip()}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
