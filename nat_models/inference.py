"""A form of the networks for inference alone: the same function with less to compute."""

import copy
from typing import TypeVar

import torch
import torch.nn as nn
from timm.layers import LayerScale

from .nat import NATBlock

_Model = TypeVar("_Model", bound=nn.Module)


@torch.no_grad()
def fuse(model: _Model) -> _Model:
    """Folds what is linear into the weights next to it; returns a copy in evaluation mode.

    Layer scale moves into the projection it follows, the scale of the logits into the rows of the query projection, and
    convolutions keep their weights channels last. The copy is a model of the same class and computes the same function,
    up to rounding in its dtype; its state dict no longer has the published keys. The given model is left as it is.

    Args:
        model: A NAT or any module that has NAT blocks inside, a features_only one or a segmentation model say.

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
    return fused.to(memory_format=torch.channels_last)


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
