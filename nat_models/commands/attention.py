"""Draws where a token looks: for each level, the attention weights of one pixel's token, their mean and each head's.

    nat-models attention --image photo.jpg --pixel 120,200 --model nat_tiny --output attention.png

The whole photograph is seen, upright, its short side resized to the model's input size. A level's token covers 4, 8, 16
or 32 pixels of that; the cross marks the pixel.
"""

import argparse
import re
from pathlib import Path

from timm.data import resolve_model_data_config
from torchvision.transforms.functional import normalize, resize, to_tensor

from ..errors import UserError
from ..networks.attention import attention_maps
from ..training.decoding import decode
from ..training.drawing import draw_attention, png
from ..training.models import add_model_flags, model_from_flags
from ..training.report import console
from ..training.splits import find_images
from ..writing import write_atomically, writing


def _pixel(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+,\d+", text):
        raise argparse.ArgumentTypeError(f"must be COLUMN,ROW in pixels of the upright photograph, got {text!r}")
    column, row = map(int, text.split(","))
    return column, row


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--image", type=Path, required=True)
    add("--pixel", type=_pixel, required=True, metavar="COLUMN,ROW", help="from the left and the top, as viewers count")
    add("--block", type=int, default=-1, help="of each level, from 0; the last by default")
    add("--output", type=Path, default=Path("attention.png"), help="PNG file to write")
    add_model_flags(parser)


def run(args: argparse.Namespace) -> None:
    if not args.image.is_file():
        raise UserError(f"There is no image {args.image}.")
    photograph = decode(find_images([args.image])[0], 3)
    column, row = args.pixel
    if column >= photograph.width or row >= photograph.height:
        size = f"{photograph.width} x {photograph.height}"
        raise UserError(f"The pixel {column},{row} is outside {args.image}, which has {size} pixels.")
    model = model_from_flags(args, num_classes=0)
    data = resolve_model_data_config(model)
    image = resize(photograph, min(data["input_size"][1:]), antialias=True)
    scaled = row * image.height // photograph.height, column * image.width // photograph.width
    pixels = normalize(to_tensor(image), data["mean"], data["std"])
    try:
        maps = attention_maps(model, pixels[None], *scaled, block=args.block)
    except ValueError as e:
        raise UserError(str(e)) from None
    strides = [info["reduction"] * photograph.height / image.height for info in model.feature_info]
    covered = [(stride * m.shape[1], stride * m.shape[2]) for stride, m in zip(strides, maps, strict=True)]
    figure = draw_attention(photograph, (column, row), [m.numpy() for m in maps], covered)
    with writing(args.output):
        write_atomically(args.output, png(figure))
    console.print(f"look at {args.output}")
