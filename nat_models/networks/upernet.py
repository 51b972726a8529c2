"""UPerNet: semantic segmentation on a backbone with four levels.

Source: Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018, arXiv:1807.10221; the form and the
settings of the NAT and DiNAT papers (arXiv:2204.07143, 2209.15001), which are those of mmsegmentation 0.20.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from ..checkpoints.segmentation import fit_upernet, num_classes_of, read_upernet
from ..ops.tracing import is_converting, is_exporting
from .features import make_backbone, moved_groups, normed_maps

POOL_SIZES = (1, 2, 3, 6)
_AUXILIARY_CHANNELS = 256

# What the published systems' backbones have on ADE20K. A level's pattern of dilations repeats over its blocks.
_MIXED = (1, 2, 1, 3, 1, 4, 1, 5, 1, 2, 1, 3, 1, 4, 1, 5, 1, 5)
_DINAT = ((1, 16), (1, 4, 1, 8), (1, 2, 1, 3, 1, 4), (1, 2))
_DINAT_S = ((1, 16), (1, 8), (1, 2, 1, 3, 1, 4), (1, 2))
PUBLISHED: Mapping[str, tuple[float, Sequence | None]] = {  # stochastic depth, patterns of dilations
    "nat_mini": (0.2, None),
    "nat_tiny": (0.3, None),
    "nat_small": (0.5, None),
    "nat_base": (0.5, None),
    "dinat_mini": (0.2, _DINAT),
    "dinat_tiny": (0.3, _DINAT),
    "dinat_small": (0.5, _DINAT),
    "dinat_base": (0.5, _DINAT),
    "dinat_large": (0.3, ((1, 20), (1, 5, 1, 10), _MIXED, (1, 2))),
    "dinat_s_tiny": (0.3, _DINAT_S),
    "dinat_s_small": (0.3, _DINAT_S),
    "dinat_s_base": (0.3, _DINAT_S),
    "dinat_s_large": (0.3, ((1, 20), (1, 10), _MIXED, (1, 2))),
}


class ConvBlock(nn.Sequential):
    """Convolution without a bias, BatchNorm, ReLU: [B, in_chans, H, W] -> [B, channels, H, W]."""

    def __init__(self, in_chans: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chans, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.act = nn.ReLU(inplace=True)


class PyramidPool(nn.AdaptiveAvgPool2d):
    """[B, C, H, W] -> [B, C, n, n], the means of n x n bins; an exported graph does it for any H and W."""

    def forward(self, x: Tensor) -> Tensor:
        if not (is_exporting() or is_converting()):
            return super().forward(x)
        # ONNX has no such pooling for a size that is not known: with weights of means that grow with the map.
        rows, cols = (_pooling(n, self.output_size, x) for n in x.shape[2:])
        # Not as a product of matrices: of that torch.export asks whether the map's height is 1.
        x = (x[:, :, None] * rows[:, :, None]).sum(3)  # [B, C, n, W]
        return (x[:, :, :, None] * cols).sum(4)


def _pooling(length: int, bins: int, like: Tensor) -> Tensor:
    """[bins, length] that takes means: bin i is from floor(i * length / bins) to ceil((i + 1) * length / bins)."""
    position = torch.arange(length, device=like.device)
    edge = torch.arange(bins, device=like.device)[:, None] * length
    inside = ((position + 1) * bins > edge) & (position * bins < edge + length)  # the same without a division
    return inside.to(like.dtype) / inside.sum(1, keepdim=True).to(like.dtype)


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


class UPerHead(nn.Module):
    """Pyramid pooling on the last level, a feature pyramid over all, and a classifier at the first level's stride.

    Args:
        in_chans: Channels of the levels' maps.
        num_classes: Of the logits.
        channels: Of everything between.
        drop_rate: Dropout of whole channels before the classifier.
    """

    def __init__(self, in_chans: Sequence[int], num_classes: int, channels: int, drop_rate: float) -> None:
        super().__init__()
        last = in_chans[-1]
        self.psp_modules = nn.ModuleList(
            nn.Sequential(PyramidPool(size), ConvBlock(last, channels, 1)) for size in POOL_SIZES
        )
        self.bottleneck = ConvBlock(last + len(POOL_SIZES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvBlock(n, channels, 1) for n in in_chans[:-1])
        self.fpn_convs = nn.ModuleList(ConvBlock(channels, channels, 3) for _ in in_chans[:-1])
        self.fpn_bottleneck = ConvBlock(len(in_chans) * channels, channels, 3)
        self.dropout = nn.Dropout2d(drop_rate)
        self.conv_seg = nn.Conv2d(channels, num_classes, 1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Maps [B, C_l, H_l, W_l], finest first -> logits [B, num_classes, H_0, W_0]."""
        last = maps[-1]
        pooled = [_resize(module(last), last.shape[2:]) for module in self.psp_modules]
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, maps[:-1], strict=True)]
        laterals.append(self.bottleneck(torch.cat([last, *pooled], 1)))
        for i in range(len(laterals) - 1, 0, -1):
            laterals[i - 1] = laterals[i - 1] + _resize(laterals[i], laterals[i - 1].shape[2:])
        outputs = [conv(x) for conv, x in zip(self.fpn_convs, laterals[:-1], strict=True)] + [laterals[-1]]
        size = outputs[0].shape[2:]
        x = torch.cat([outputs[0], *(_resize(x, size) for x in outputs[1:])], 1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(x)))


class FCNHead(nn.Module):
    """A convolution and a classifier on one level: the auxiliary loss of training."""

    def __init__(self, in_chans: int, num_classes: int, drop_rate: float) -> None:
        super().__init__()
        self.convs = nn.ModuleList([ConvBlock(in_chans, _AUXILIARY_CHANNELS, 3)])
        self.dropout = nn.Dropout2d(drop_rate)
        self.conv_seg = nn.Conv2d(_AUXILIARY_CHANNELS, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> logits [B, num_classes, H, W]."""
        for conv in self.convs:
            x = conv(x)
        return self.conv_seg(self.dropout(x))


class UPerNet(nn.Module):
    """A backbone of ours with per-level norms, the head, and an auxiliary head on the third level.

    Args:
        backbone: With four levels at strides 4, 8, 16, 32 and output_norms.
        num_classes: Of the logits.
        channels: Of the head.
        drop_rate: Dropout of whole channels before both classifiers.

    Attributes:
        keep_statistics: Train with BatchNorm's running statistics, not the batch's; False at first.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, channels: int = 512, drop_rate: float = 0.1) -> None:
        super().__init__()
        widths = [info["num_chs"] for info in backbone.feature_info]
        self.backbone = backbone
        self.num_classes = num_classes
        self.keep_statistics = False
        self.decode_head = UPerHead(widths, num_classes, channels, drop_rate)
        self.auxiliary_head = FCNHead(widths[2], num_classes, drop_rate)
        self.decode_head.apply(_init_head)
        self.auxiliary_head.apply(_init_head)

    def forward_features(self, x: Tensor) -> list[Tensor]:
        """[B, in_chans, H, W] -> the normed maps of the levels, NCHW at strides 4, 8, 16, 32."""
        return normed_maps(self.backbone, x)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """[B, in_chans, H, W] -> logits [B, num_classes, H, W]; in training those of the auxiliary head as well."""
        maps = self.forward_features(x)
        logits = _resize(self.decode_head(maps), x.shape[2:])
        return (logits, _resize(self.auxiliary_head(maps[2]), x.shape[2:])) if self.training else logits

    def train(self, mode: bool = True) -> "UPerNet":
        """Training or evaluation mode; with `keep_statistics` BatchNorm stays on its running ones in both."""
        super().train(mode)
        if self.keep_statistics:
            for module in self.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    def group_matcher(self, coarse: bool = False) -> dict:
        """Parameter groups for layer-wise learning rates: those of the backbone, then the heads."""
        return moved_groups(self.backbone.group_matcher(coarse), "backbone.")

    def get_classifier(self) -> nn.ModuleList:
        """Both heads: all that is not the backbone."""
        return nn.ModuleList([self.decode_head, self.auxiliary_head])

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that the paper's recipe does not decay besides norms: rpb."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)


def _init_head(module: nn.Module) -> None:
    """mmsegmentation's: Kaiming over outputs, and a classifier of small weights."""
    if isinstance(module, nn.Conv2d):
        if module.bias is None:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        else:
            nn.init.normal_(module.weight, std=0.01)
            nn.init.zeros_(module.bias)


def upernet(
    backbone: str,
    num_classes: int | None = None,
    channels: int = 512,
    weights: str | Path | Mapping | None = None,
    head_drop_rate: float = 0.1,
    **backbone_kwargs,
) -> UPerNet:
    """UPerNet on a registered network of ours; for any image size.

    Of the backbones that were published so, dilations and stochastic depth are those of the published system (ADE20K);
    `dilations` and `drop_path_rate` say otherwise.

    Args:
        backbone: timm's name; with pretrained=True its ImageNet weights, and norms of the levels that begin at 1 and 0.
        num_classes: None means those of `weights`, or 150 without. Another number than that of `weights` makes new
            classifiers; all else is loaded.
        channels: Of the head; 512 in the published systems.
        weights: A file, or what one holds: in mmsegmentation's layout, ours, or that of transformers'
            UperNetForSemanticSegmentation, with anything around it.
        head_drop_rate: Dropout of whole channels before the classifiers.
        **backbone_kwargs: More arguments of the backbone: pretrained, in_chans, dilations, ...

    Raises:
        ValueError: The backbone does not have maps at strides 4, 8, 16 and 32.
        CheckpointError: The weights cannot be read, or do not fit; nothing is loaded in part.
    """
    checkpoint = None if weights is None else read_upernet(weights)
    if num_classes is None:
        num_classes = 150 if checkpoint is None else num_classes_of(checkpoint)
    rate, patterns = PUBLISHED.get(backbone.partition(".")[0], (None, None))
    network = make_backbone(backbone, backbone_kwargs, system="UPerNet", drop_path_rate=rate, patterns=patterns)
    model = UPerNet(network, num_classes, channels, head_drop_rate)
    if checkpoint is not None:
        model.load_state_dict(fit_upernet(checkpoint, model))
    return model
