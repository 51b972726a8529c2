"""UPerNet on NAT-Tiny against transformers' on timm's Swin-Tiny: the same head of 512 channels for 150 classes."""

import argparse
from functools import partial
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from nat_models import fuse
from nat_models.networks.upernet import upernet

from .measure import Call, interleaved, peak_mib

_CLASSES = 150
PEER = "swin_tiny_patch4_window7_224"
FORMS = ("eager", "fused", "bfloat16", "fused bfloat16")  # of each --models


class Work(NamedTuple):
    """What every segmenter has to do.

    Attributes:
        size: Height and width of images, px.
        channels: Of the head.
    """

    size: int
    channels: int


WORK = Work(512, 512)  # what the published systems were trained at, and with


class _Maps(nn.Module):
    """timm's Swin as transformers' UPerNet takes a backbone: the maps of four levels, NCHW, here views of NHWC."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.network = timm.create_model(PEER, features_only=True, img_size=size)

    def forward_with_filtered_kwargs(self, x: Tensor, **kwargs):
        from transformers.modeling_outputs import BackboneOutput

        return BackboneOutput(feature_maps=tuple(y.permute(0, 3, 1, 2) for y in self.network(x)))


def _peer(work: Work) -> nn.Module:
    """transformers' class, without the auxiliary head, which it would run in evaluation too."""
    from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

    levels = [f"stage{i}" for i in range(1, 5)]
    config = UperNetConfig(
        backbone_config=SwinConfig(embed_dim=96, depths=[2, 2, 6, 2], num_heads=[3, 6, 12, 24], out_features=levels),
        hidden_size=work.channels,
        num_labels=_CLASSES,
        use_auxiliary_head=False,
    )
    network = UperNetForSemanticSegmentation(config)
    network.backbone = _Maps(work.size)
    return network


def _segmenter(name: str, form: str, work: Work, args: argparse.Namespace) -> Call:
    """A call of a segmenter in evaluation."""
    torch.manual_seed(0)
    network = _peer(work) if name == PEER else upernet(name, _CLASSES, work.channels)
    network = network.to(args.device).eval()
    network = fuse(network) if form.startswith("fused") else network
    dtype = torch.bfloat16 if form.endswith("bfloat16") else torch.float32
    return partial(network.to(dtype), torch.randn(args.batch, 3, work.size, work.size, device=args.device, dtype=dtype))


def segmentation(args: argparse.Namespace) -> list[dict]:
    """UPerNet, eager, fused and in bfloat16, against transformers' with timm's Swin-Tiny: time and peak memory."""
    runs = [(name, form) for name in args.models for form in FORMS]
    try:
        import transformers  # noqa: F401
    except ModuleNotFoundError:
        args.notes.append("transformers is not installed: its UPerNet is left out")
    else:
        runs = [(PEER, "eager"), (PEER, "bfloat16"), *runs]
    makers = {run: partial(_segmenter, *run, WORK, args) for run in runs}
    ms = interleaved({run: make() for run, make in makers.items()}, args.seconds, args.device)
    try:
        peaks = dict(zip(runs, peak_mib(list(makers.values()), args.device), strict=True))
    except (OSError, AttributeError) as error:
        args.notes.append(f"peak memory cannot be read here: {error}")
        peaks = {}
    rows = []
    for name, form in runs:
        row = {"backbone": name, "form": form, "ms": ms[name, form]}
        row["of eager"] = ms[name, form] / ms[name, "eager"]
        if (PEER, "eager") in ms:
            row["of Swin's eager"] = ms[name, form] / ms[PEER, "eager"]
        rows.append(row | ({"peak MiB": peaks[name, form]} if peaks else {}))
    return rows
