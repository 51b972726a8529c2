"""The convolutions of the networks: the stem, and what stands between levels."""

import torch
import torch.nn as nn
from torch import Tensor

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
