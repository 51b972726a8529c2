"""Counts parameters, GFLOPs as the papers count them, and plain GMACs; computes nothing, so any size takes a second.

    nat-models complexity nat_tiny dinat_mini      # classification networks
    nat-models complexity upernet nat_tiny         # UPerNet with this backbone
    nat-models complexity upernet                  # all its published systems
    nat-models complexity mask_rcnn nat_tiny       # a detector with this backbone; so cascade_mask_rcnn
    nat-models complexity output/best              # a model or segmenter that a run wrote

The papers' FLOPs are fvcore's: MACs, and 5 for each element of a LayerNorm, 2 of a BatchNorm, 4 of what is resized.
UPerNet's auxiliary head is among the parameters, and not in the FLOPs: only training runs it. Detectors are counted
with 1000 RoIs and 100 masks. By default a classification network sees an image of its own size; UPerNet one of
512 x 2048, with the Large backbones 640 x 2560; detectors one of 800 x 1280.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import nn

from ..complexity import count
from ..errors import UserError, unknown
from ..networks import cascade_rcnn, mask_rcnn, upernet
from ..training.models import make_model, parse_model_kwargs, positive
from ..training.segmenters import is_segmenter, segmenter_of

_SIZE, _SIZE_OF_LARGE = (512, 2048), (640, 2560)  # of UPerNet
_DETECTION_SIZE = (800, 1280)


class _System(NamedTuple):
    """What is built on a backbone."""

    make: Callable[..., nn.Module]
    published: Iterable[str]  # backbones
    size: Callable[[str], tuple[int, int]]


_SYSTEMS = {
    "upernet": _System(upernet.upernet, upernet.PUBLISHED, lambda name: _SIZE_OF_LARGE if "large" in name else _SIZE),
    "mask_rcnn": _System(mask_rcnn.mask_rcnn, mask_rcnn.PUBLISHED, lambda name: _DETECTION_SIZE),
    "cascade_mask_rcnn": _System(cascade_rcnn.cascade_mask_rcnn, cascade_rcnn.PUBLISHED, lambda name: _DETECTION_SIZE),
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("names", nargs="+", metavar="NAME", help=f"timm names or folders; after {', '.join(_SYSTEMS)}: its backbones")
    add("--img-size", nargs="+", type=positive, metavar=("HEIGHT", "WIDTH"), help="in pixels; one number is both")
    add("--num-classes", type=positive, help="the network's own by default; 150 for UPerNet, 80 for detectors")
    add("--channels", type=positive, help="of UPerNet's head, 512 by default")
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
    if (system := _SYSTEMS.get(args.names[0])) is not None:
        if args.channels is not None and args.names[0] != "upernet":
            raise UserError(f"--channels is of UPerNet's head, and {args.names[0]} has none such.")
        own = {} if args.channels is None else dict(channels=args.channels)
        for backbone in args.names[1:] or system.published:
            if not timm.is_model(backbone):
                raise unknown("backbone", backbone, system.published)
            try:
                network = system.make(backbone, args.num_classes, **own, **kwargs)
            except (TypeError, ValueError) as e:  # a TypeError is an argument that the backbone does not have
                raise UserError(str(e)) from None
            yield f"{args.names[0]} {backbone}", network, kwargs.get("in_chans", 3), system.size(backbone)
        return
    for name in args.names:
        if is_segmenter(Path(name)):
            about = segmenter_of(Path(name))
            yield name, about.make_network(), len(about.mean), _SIZE
        else:
            network = make_model(name, num_classes=args.num_classes, model_kwargs=kwargs)
            chans, *size = network.pretrained_cfg["input_size"]
            yield name, network, kwargs.get("in_chans", chans), tuple(size)
