"""Pooled features of images, in one safetensors file."""

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.data import create_transform
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn

from ..errors import UserError
from .images import Encoded, ImageSet, make_loader, read_batches
from .report import console, track

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@torch.inference_mode()
def extract(
    model: nn.Module,
    images: Sequence[Encoded],
    output: Path,
    *,
    name: str,
    img_size: int | None = None,
    batch_size: int = 64,
    workers: int = 0,
    precision: str = "float32",
    device: str = "cpu",
    skip_unreadable: bool = False,
) -> Tensor:
    """Computes the features, [N, num_features] in float32, writes them to `output` and returns them.

    The file holds "features", and as metadata "files" (a JSON list of their N names), "model"
    and "preprocessing" (JSON).

    Args:
        model: A timm model; put into eval mode on `device`.
        images: The images.
        output: The file to write.
        name: What the metadata call the model.
        img_size: Height and width; None means the model's.
        batch_size: Images per step.
        workers: Processes that load images.
        precision: Of the computation: float32, bfloat16 or float16.
        device: What to compute on.
        skip_unreadable: Leave out images that cannot be read, and say so; else the first one is an error.

    Raises:
        UserError: An image cannot be read; with skip_unreadable, none can.
    """
    device = torch.device(device)
    model = model.to(device).eval()
    data_config = resolve_input_data_config(model, dict(img_size=img_size))
    image_set = ImageSet(images, None, data_config["input_size"][0], create_transform(**data_config))
    loader = make_loader(image_set, batch_size, workers)
    dtype = PRECISIONS[precision]
    autocast = nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)
    started = time.perf_counter()
    features, kept = [], []
    for batch, indices in read_batches(track(loader, "images"), _skip if skip_unreadable else None):
        with autocast:
            pooled = model.forward_head(model.forward_features(batch.to(device)), pre_logits=True)
        features.append(pooled.float().cpu())
        kept += indices.tolist()
    if not kept:
        raise UserError(f"None of the {len(images)} images can be read.")
    features = torch.cat(features)

    metadata = dict(
        files=json.dumps([images[i].name for i in kept]),
        model=name,
        preprocessing=json.dumps(data_config),
    )
    temporary = output.with_name(f"{output.name}.tmp")
    save_file(dict(features=features), temporary, metadata=metadata)
    os.replace(temporary, output)
    console.print(f"{output}: {list(features.shape)} in {time.perf_counter() - started:.1f} s")
    return features


def _skip(error: UserError) -> None:
    print(f"skipped: {error}", file=sys.stderr)
