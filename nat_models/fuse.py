"""A form of the networks for inference alone: the same function with less to compute."""

import copy
from typing import TypeVar

import torch
import torch.nn as nn
from timm.layers import LayerScale
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.ops.misc import Conv2dNormActivation

from .networks.blocks import NATBlock
from .networks.upernet import ConvBlock

_Model = TypeVar("_Model", bound=nn.Module)


class PointwiseBlock(nn.Module):
    """A NATBlock in evaluation, on [B, H, W, C], with 1x1 convolutions for linear layers and NCHW views between them.

    What Inductor's freezing asks for: of convolutions it packs the weights for oneDNN, and it makes the GELU and the
    residual additions that follow them part of their kernels. For linear layers in float32 it does neither.
    """

    def __init__(self, block: NATBlock) -> None:
        super().__init__()
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.attn = block.attn
        self.attn.qkv, self.attn.proj = _NHWC(_pointwise(block.attn.qkv)), _NHWC(_pointwise(block.attn.proj))
        self.fc1, self.act, self.fc2 = _pointwise(block.mlp.fc1), block.mlp.act, _pointwise(block.mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        x = _to_nchw(x)  # one NCHW view throughout: with a second one Inductor would not add in place
        x = x + _to_nchw(self.attn(self.norm1(_to_nhwc(x))))
        hidden = self.act(self.fc1(_to_nchw(self.norm2(_to_nhwc(x)))))
        return _to_nhwc(x + self.fc2(hidden))


class _NHWC(nn.Sequential):
    """A convolution that takes and returns [B, H, W, C], as the attention layer asks of its projections."""

    def forward(self, x: Tensor) -> Tensor:
        return _to_nhwc(super().forward(_to_nchw(x)))


def _to_nchw(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def _to_nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def _use_pointwise_blocks(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, NATBlock):
            setattr(module, name, PointwiseBlock(child))


def _pointwise(linear: nn.Linear) -> nn.Conv2d:
    """A linear layer as a 1x1 convolution."""
    weight = linear.weight
    conv = nn.Conv2d(
        linear.in_features,
        linear.out_features,
        1,
        bias=linear.bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    conv.load_state_dict({key: x if x.ndim == 1 else x[:, :, None, None] for key, x in linear.state_dict().items()})
    return conv


@torch.no_grad()
def fuse(model: _Model, *, freezing: bool = False) -> _Model:
    """Folds what is linear into the weights next to it; returns a copy in evaluation mode.

    Layer scale moves into the projection it follows, the scale of the logits into the rows of the query projection, the
    BatchNorms of a segmenter or of a Cascade's box heads into their convolutions, and convolutions keep their weights
    channels last. The copy is a model of the same class and computes the same function, up to rounding in its dtype;
    its state dict no longer has the published keys. The given model is left as it is.

    Args:
        model: A NAT or any module that has NAT blocks inside, a features_only one, a segmenter or a detector say.
        freezing: Make the form for torch.compile with Inductor's freezing: 1x1 convolutions for the blocks' linear
            layers. Eager or compiled without freezing it is slower than without this, one image at a time.

    Raises:
        ValueError: There is no NAT block in it.
    """
    fused = copy.deepcopy(model).eval()
    blocks = [module for module in fused.modules() if isinstance(module, NATBlock)]
    if not blocks:
        raise ValueError(f"fuse takes a model with NAT blocks inside, got a {type(model).__name__} that has none.")
    for block in blocks:
        attn = block.attn
        query = [parameter[: attn.dim] for parameter in attn.qkv.parameters()]
        _scale(query, attn.scale)
        attn.scale = 1.0
        block.ls1 = _fold(block.ls1, attn.proj)
        block.ls2 = _fold(block.ls2, block.mlp.fc2)
    fold_batch_norms(fused)
    if freezing:
        fused = PointwiseBlock(fused) if isinstance(fused, NATBlock) else fused.apply(_use_pointwise_blocks)
    return fused.to(memory_format=torch.channels_last)


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> None:
    """Moves the BatchNorms of a segmenter, or of a Cascade's box heads, into the convolutions before them, in place.

    Args:
        model: In evaluation.
    """
    for module in model.modules():
        if isinstance(module, ConvBlock):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
        elif isinstance(module, Conv2dNormActivation) and any(isinstance(x, nn.BatchNorm2d) for x in module):
            module[0], module[1] = fuse_conv_bn_eval(module[0], module[1]), nn.Identity()


def _fold(layer_scale: nn.Module, linear: nn.Linear) -> nn.Module:
    if not isinstance(layer_scale, LayerScale):
        return layer_scale
    _scale([linear.weight, linear.bias], layer_scale.gamma)
    return nn.Identity()


def _scale(parameters: list[torch.Tensor], factor: torch.Tensor | float) -> None:
    """Multiplies the rows of a weight [out, in] and a bias [out]."""
    for parameter in parameters:
        rows = factor if isinstance(factor, float) or parameter.ndim == 1 else factor[:, None]
        parameter.mul_(rows)
