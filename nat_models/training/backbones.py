"""What the settings say of the backbone of a segmenter or a detector, and of the images that it sees."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from .decoding import Encoded
from .mask_sets import IMAGENET_MEAN, IMAGENET_STD, band_statistics
from .settings import Settings


def backbone_kwargs(settings: Settings) -> dict:
    """timm's arguments of the network, none that fetch weights; images are RGB unless in_chans says otherwise."""
    kwargs = dict(settings.model_kwargs, in_chans=3 if settings.in_chans is None else settings.in_chans)
    if settings.drop_path is not None:
        kwargs["drop_path_rate"] = settings.drop_path
    return kwargs


def weights_kwargs(settings: Settings, initial_weights: bool) -> dict:
    """timm's arguments that fetch the weights that training begins with; none where it does not begin."""
    if not initial_weights:
        return {}
    if settings.checkpoint is not None:
        return dict(pretrained=True, pretrained_cfg_overlay=dict(file=settings.checkpoint, source=""))
    return dict(pretrained=settings.pretrained)


def mean_and_std(settings: Settings, images: Sequence[Encoded], in_chans: int) -> tuple[list[float], list[float]]:
    """Of each channel: those of the settings, or else ImageNet's for RGB, or else the images' own."""
    mean, std = settings.mean, settings.std
    if mean is None or std is None:
        mean, std = (IMAGENET_MEAN, IMAGENET_STD) if in_chans == 3 else band_statistics(images, in_chans)
    return list(mean), list(std)


def synchronised(network: nn.Module) -> nn.Module:
    """The network, whose BatchNorms share their statistics where several processes train it on GPUs."""
    if dist.is_available() and dist.is_initialized() and torch.cuda.is_available():
        return nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network
