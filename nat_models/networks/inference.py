"""A block in inference on a CPU: what its modules compute, in seven operations and without a call of a module.

One image at a time, a fifth of the networks' time is Python's and PyTorch's between operations.
"""

from collections.abc import Iterator
from itertools import chain

import torch
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from ..layers import NeighborhoodAttention2d, attend, with_zero_token
from ..ops.backends import autocast_enabled
from ..ops.linear import add_product, match, product, supports
from ..ops.tracing import is_observed, is_plain
from .parts import LeanMlp, MapNorm

_BLOCK = dict(norm1=MapNorm, attn=NeighborhoodAttention2d, norm2=MapNorm, mlp=LeanMlp)
_AROUND = ("ls1", "drop_path1", "ls2", "drop_path2")
_ATTENTION = dict(qkv=nn.Linear, proj=nn.Linear, proj_drop=nn.Dropout)
_MLP = dict(fc1=nn.Linear, act=nn.GELU, drop1=nn.Dropout, norm=nn.Identity, fc2=nn.Linear, drop2=nn.Dropout)


def infers(block: nn.Module, x: Tensor) -> bool:
    """Whether `infer` computes what the block's modules do with x, and nobody looks on.

    Args:
        block: A NATBlock; any module in it may be another one, have hooks, or be in training.
        x: [B, H, W, C].
    """
    if torch.is_grad_enabled() or is_observed() or not supports(x) or autocast_enabled(x):
        return False
    modules = block._modules
    if not _compute(modules, _BLOCK) or not all(_scales_at_most(modules.get(name)) for name in _AROUND):
        return False
    attention, mlp = modules["attn"]._modules, modules["mlp"]._modules
    return _compute(attention, _ATTENTION) and _compute(mlp, _MLP) and match(x, _parameters(modules, attention, mlp))


def _compute(modules: dict[str, nn.Module], kinds: dict[str, type[nn.Module]]) -> bool:
    """Whether the modules of these names compute what their classes say, in evaluation."""
    return all(is_plain(modules.get(name), kind) and not modules[name].training for name, kind in kinds.items())


def _scales_at_most(module: nn.Module | None) -> bool:
    """Whether it is a layer scale, or does nothing in evaluation."""
    return any(is_plain(module, kind) for kind in (nn.Identity, DropPath, LayerScale)) and not module.training


def _parameters(*modules: dict[str, nn.Module]) -> Iterator[Tensor]:
    for module in chain.from_iterable(children.values() for children in modules):
        for parameter in module._parameters.values():
            if parameter is not None:
                yield parameter


def infer(block: nn.Module, x: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, H, W, C], where `infers`."""
    shape, attn, mlp = x.shape, block.attn, block.mlp
    x = x.reshape(-1, shape[-1])  # of more axes the product would make two, and then as many again
    y = _normalise(block.norm1, x).view(shape)
    tokens = with_zero_token(y, attn.kernel_size, attn.dilation)
    qkv = product(tokens.view(-1, shape[-1]), attn.qkv.weight, attn.qkv.bias).view(*tokens.shape[:3], -1)
    y = attend(qkv, y, attn.rpb, attn.num_heads, attn.kernel_size, attn.dilation, attn.scale, 0.0)
    x = _add(x, block.ls1, y.view(x.shape), attn.proj)
    y = product(_normalise(block.norm2, x), mlp.fc1.weight, mlp.fc1.bias, gelu=mlp.act.approximate)
    return _add(x, block.ls2, y, mlp.fc2).view(shape)


def _normalise(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _add(x: Tensor, layer_scale: nn.Module, y: Tensor, layer: nn.Linear) -> Tensor:
    """x + layer_scale(layer(y))."""
    if isinstance(layer_scale, LayerScale):
        return torch.addcmul(x, product(y, layer.weight, layer.bias), layer_scale.gamma)
    return add_product(x, y, layer.weight, layer.bias)
