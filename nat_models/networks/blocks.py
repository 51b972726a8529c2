"""What the networks are made of: the stem, what stands between levels, blocks and levels."""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, Mlp
from timm.models import checkpoint_seq
from torch import Tensor

from ..layers import NeighborhoodAttention2d
from ..ops.tracing import is_exporting


def _exporting() -> bool:
    """Whether torch.export traces this call, in a form that TorchScript can read."""
    if not torch.jit.is_scripting():
        return is_exporting()
    return False


class ConvTokenizer(nn.Module):
    """Two stride-2 convolutions without an activation between: [B, in_chans, H, W] -> [B, ceil(H/4), ceil(W/4), C]."""

    def __init__(self, in_chans: int, embed_dim: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.proj = nn.Sequential(
            nn.Conv2d(in_chans, embed_dim // 2, 3, stride=2, padding=1, **dd),
            nn.Conv2d(embed_dim // 2, embed_dim, 3, stride=2, padding=1, **dd),
        )
        self.norm = nn.LayerNorm(embed_dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        # Channels last, so that the convolutions hand out what the norm reads, without a copy.
        if _exporting():  # torch.export would guard on B == 1 for the views below
            x = x.contiguous(memory_format=torch.channels_last)
        else:  # torch.vmap knows no memory formats
            x = x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
        return self.norm(self.proj(x).permute(0, 2, 3, 1))  # [B, H, W, C]


class ConvDownsampler(nn.Module):
    """A stride-2 convolution that doubles the channels: [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), 2 * C]."""

    def __init__(self, dim: int, device=None, dtype=None) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.reduction = nn.Conv2d(dim, 2 * dim, 3, stride=2, padding=1, bias=False, **dd)
        self.norm = nn.LayerNorm(2 * dim, **dd)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 3, 1, 2)
        if _exporting():  # torch.export guards on B == 1 for a channels-last map; a contiguous clone avoids that
            x = x.clone(memory_format=torch.contiguous_format)
        return self.norm(self.reduction(x).permute(0, 2, 3, 1))


class MapNorm(nn.LayerNorm):
    """A LayerNorm that takes and returns [B, H, W, C], for hooks, and computes on [B, H * W, C], for Inductor."""

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = F.layer_norm(x.flatten(1, 2), self.normalized_shape, self.weight, self.bias, self.eps)
        return x.view(shape)


class NATBlock(nn.Module):
    """Pre-norm attention and MLP, each with optional layer scale and stochastic depth, on [B, H, W, C]."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int] = 7,
        mlp_ratio: float = 3.0,
        qkv_bias: bool = True,
        init_values: float | None = None,
        proj_drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.norm1 = MapNorm(dim, **dd)
        self.attn = NeighborhoodAttention2d(
            dim,
            num_heads,
            kernel_size=kernel_size,
            qkv_bias=qkv_bias,
            attn_drop=attn_drop,
            proj_drop=proj_drop,
            **dd,
        )
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = MapNorm(dim, **dd)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        # The residual sums are [B, H * W, C]: with convolutions around, Inductor takes a 4-D sum for NCHW and stores it
        # channels-first. What a module takes and returns is a map all the same, for hooks.
        x = x.flatten(1, 2)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x.view(shape))))).flatten(1, 2)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x.view(shape))))).flatten(1, 2)
        return x.view(shape)


class NATLevel(nn.Module):
    """Blocks at one resolution, preceded by their downsampling: the level's output is its feature map."""

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        drop_path: Sequence[float],
        downsample: bool,
        device=None,
        dtype=None,
        **block_kwargs,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.grad_checkpointing = False
        self.downsample = ConvDownsampler(dim // 2, **dd) if downsample else nn.Identity()
        self.blocks = nn.Sequential(
            *[NATBlock(dim, num_heads, drop_path=drop_path[i], **block_kwargs, **dd) for i in range(depth)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)
