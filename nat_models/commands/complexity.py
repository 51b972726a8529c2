"""Counts parameters, GFLOPs as the papers count them, and plain GMACs; computes nothing, so any size takes a second.

    nat-models complexity nat_tiny dinat_mini      # classification networks
    nat-models complexity upernet nat_tiny         # UPerNet with this backbone
    nat-models complexity upernet                  # all its published systems
    nat-models complexity output/best              # a model or segmenter that a run wrote

The papers' FLOPs are fvcore's: MACs, and 5 for each element of a LayerNorm, 2 of a BatchNorm, 4 of what is resized.
UPerNet's auxiliary head is among the parameters, and not in the FLOPs: only training runs it. By default a
classification network sees an image of its own size; UPerNet one of 512 x 2048, with the Large backbones 640 x 2560.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from torch import nn

from ..complexity import count
from ..errors import UserError, unknown
from ..networks.upernet import PUBLISHED, upernet
from ..training.models import make_model, parse_model_kwargs, positive
from ..training.segmenters import is_segmenter, segmenter_of

_UPERNET = "upernet"
_SIZE, _SIZE_OF_LARGE = (512, 2048), (640, 2560)


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help="timm names or folders; after the word upernet, its backbones")
    add("--img-size", nargs="+", type=positive, metavar=("HEIGHT", "WIDTH"), help="in pixels; one number is both")
    add("--num-classes", type=positive, help="the network's own by default; 150 for UPerNet")
    add("--channels", type=positive, default=512, help="of UPerNet's head")
    add("--model-kwargs", nargs="+", default=[], metavar="KEY=VALUE", help="more arguments of the network or backbone")


def run(args: argparse.Namespace) -> None:
    if args.img_size is not None and len(args.img_size) > 2:
        raise UserError(f"--img-size takes a height and a width, got {len(args.img_size)} numbers.")
    given = None if args.img_size is None else (args.img_size[0], args.img_size[-1])
    with torch.device("meta"):
        systems = list(_systems(args))
    width = max(len(name) for name, *_ in systems)
    print(f"{'network':{width}}  {'image':>11}  {'parameters M':>12}  {'GFLOPs':>8}  {'GMACs':>8}")
    for name, network, chans, own in systems:
        size = given or own
        cost = count(network, (chans, *size))
        image = f"{size[0]} x {size[1]}"
        figures = f"{cost.parameters / 1e6:12.3f}  {cost.flops / 1e9:8.2f}  {cost.macs / 1e9:8.2f}"
        print(f"{name:{width}}  {image:>11}  {figures}")


def _systems(args: argparse.Namespace) -> Iterator[tuple[str, nn.Module, int, tuple[int, int]]]:
    """Name, network, channels of its images and the size at which it is counted by default."""
    kwargs = parse_model_kwargs(args.model_kwargs)
    if args.names[0] == _UPERNET:
        for backbone in args.names[1:] or PUBLISHED:
            if not timm.is_model(backbone):
                raise unknown("backbone", backbone, PUBLISHED)
            try:
                network = upernet(backbone, args.num_classes, args.channels, **kwargs)
            except ValueError as e:
                raise UserError(str(e)) from None
            large = "large" in backbone
            yield f"{_UPERNET} {backbone}", network, kwargs.get("in_chans", 3), _SIZE_OF_LARGE if large else _SIZE
        return
    for name in args.names:
        if is_segmenter(Path(name)):
            about = segmenter_of(Path(name))
            yield name, about.make_network(), len(about.mean), _SIZE
        else:
            network = make_model(name, num_classes=args.num_classes, model_kwargs=kwargs)
            chans, *size = network.pretrained_cfg["input_size"]
            yield name, network, kwargs.get("in_chans", chans), tuple(size)
