"""Mask R-CNN on NAT-Tiny against torchvision's on timm's Swin-Tiny: with as many proposals and detections."""

import argparse
from collections import OrderedDict
from functools import partial
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from nat_models import fuse
from nat_models.networks.cascade_rcnn import cascade_mask_rcnn
from nat_models.networks.mask_rcnn import mask_rcnn

from .measure import Call, interleaved, peak_mib

_CHANNELS = 256
PEER = "swin_tiny_patch4_window7_224"
MASK, CASCADE = "Mask R-CNN", "Cascade Mask R-CNN"
FORMS = ("eager", "fused", "bfloat16 autocast", "fused bfloat16 autocast")  # of each --models


class Work(NamedTuple):
    """What every detector has to do.

    Attributes:
        size: Height and width of images, px.
        proposals: Of an image.
        detections: Of an image.
        classes: Without the background.
    """

    size: tuple[int, int]
    proposals: int
    detections: int
    classes: int


WORK = Work((800, 1280), 1000, 100, 80)


class _Pyramid(nn.Module):
    """timm's Swin as torchvision's detectors take a backbone: normed maps of four levels and the pyramid on them."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.network = timm.create_model(PEER, features_only=True, img_size=size)
        widths = self.network.feature_info.channels()
        self.norms = nn.ModuleList(nn.LayerNorm(n) for n in widths)
        self.fpn = FeaturePyramidNetwork(widths, _CHANNELS, extra_blocks=LastLevelMaxPool())
        self.out_channels = _CHANNELS

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps = (norm(y).permute(0, 3, 1, 2) for norm, y in zip(self.norms, self.network(x), strict=True))
        return self.fpn(OrderedDict((str(i), y.contiguous()) for i, y in enumerate(maps)))


def _detector(system: str, name: str, work: Work) -> nn.Module:
    # With weights of no meaning, numbers decide how many boxes there are: here no threshold does, and none suppresses
    # another, so that there are as many as are allowed.
    fixed = dict(
        min_size=min(work.size),
        max_size=max(work.size),
        rpn_pre_nms_top_n_test=work.proposals,
        rpn_post_nms_top_n_test=work.proposals,
        rpn_nms_thresh=1.0,
        box_nms_thresh=1.0,
        box_score_thresh=0.0,
        box_detections_per_img=work.detections,
    )
    if name != PEER:
        return dict(zip((MASK, CASCADE), (mask_rcnn, cascade_mask_rcnn), strict=True))[system](
            name, work.classes, **fixed
        )
    sizes, ratios = ((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5
    return MaskRCNN(_Pyramid(work.size), work.classes + 1, rpn_anchor_generator=AnchorGenerator(sizes, ratios), **fixed)


def _run(system: str, name: str, form: str, work: Work, args: argparse.Namespace) -> Call:
    """A call of a detector in evaluation, to masks of 28 x 28 on the boxes; its images are not resized."""
    torch.manual_seed(0)
    network = _detector(system, name, work).to(args.device).eval()
    network = fuse(network) if form.startswith("fused") else network
    # Pasting is left out: what it costs goes with the boxes' areas, which mean nothing here.
    network.transform.postprocess = lambda result, *sizes: result
    images = list(torch.rand(args.batch, 3, *work.size, device=args.device))
    autocast = partial(torch.autocast, torch.device(args.device).type, torch.bfloat16, form.endswith("autocast"))

    def call() -> list[dict[str, Tensor]]:
        with autocast():
            return network(images)

    return call


def detection(args: argparse.Namespace) -> list[dict]:
    """Mask R-CNN, eager, fused and under autocast, against torchvision's with timm's Swin-Tiny; and the Cascade."""
    runs = [(MASK, PEER, form) for form in FORMS if not form.startswith("fused")]
    for name in args.models:
        runs += [*((MASK, name, form) for form in FORMS), *((CASCADE, name, form) for form in FORMS[:2])]
    makers = {run: partial(_run, *run, WORK, args) for run in runs}
    calls = {run: make() for run, make in makers.items()}
    for run, call in calls.items():
        if (found := {len(each["scores"]) for each in call()}) != {WORK.detections}:
            args.notes.append(f"{' '.join(run)} finds {sorted(found)}, not {WORK.detections} objects")
    ms = interleaved(calls, args.seconds, args.device)
    del calls
    try:
        peaks = dict(zip(runs, peak_mib(list(makers.values()), args.device), strict=True))
    except (OSError, AttributeError) as error:
        args.notes.append(f"peak memory cannot be read here: {error}")
        peaks = {}
    rows = []
    for run in runs:
        system, name, form = run
        row = {"backbone": name, "system": system, "form": form, "ms": ms[run]}
        row |= {"of eager": ms[run] / ms[system, name, "eager"], "of Swin's eager": ms[run] / ms[MASK, PEER, "eager"]}
        rows.append(row | ({"peak MiB": peaks[run]} if peaks else {}))
    return rows
