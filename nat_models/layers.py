"""The attention layer: projections, relative position bias and the padding of small maps around na2d."""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import register_notrace_module
from torch import Tensor

from .ops import na2d_qkvpacked
from .ops.window import window_pair


@register_notrace_module  # reads H and W to pad, which a symbolic trace cannot follow
class NeighborhoodAttention2d(nn.Module):
    """Multi-head 2-D neighborhood attention with its projections, on NHWC maps.

    A map smaller than kernel_size * dilation is padded at the bottom and right with zero tokens *before* the qkv
    projection, attended and cropped. Padded tokens take part in the softmax: their key and value are the projection's
    bias. The published weights were trained and evaluated so.

    Args:
        dim: Channels C of input and output.
        num_heads: Must divide dim.
        kernel_size: Odd, at least 3; an int serves both axes.
        dilation: At least 1; an int serves both axes.
        qkv_bias: Bias in the qkv projection.
        rel_pos_bias: Learn `rpb` [num_heads, 2*K_h-1, 2*K_w-1], added to the logits.
        scale: Multiplies the logits; None means head_dim ** -0.5.
        attn_drop: Dropout rate of the attention weights. When above 0, training runs in plain PyTorch operations.
        proj_drop: Dropout rate of the output.

    Raises:
        ValueError: num_heads does not divide dim; kernel_size is even or below 3; dilation is below 1.

    Source: Hassani et al., CVPR 2023, arXiv:2204.07143, section 3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        qkv_bias: bool = True,
        rel_pos_bias: bool = True,
        scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads must divide dim, got {dim=}, {num_heads=}.")
        self.dim = dim
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.kernel_size, self.dilation = window_pair(kernel_size, dilation)
        self.scale = self.head_dim**-0.5 if scale is None else scale
        self.attn_drop = attn_drop

        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        if rel_pos_bias:
            self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * k - 1 for k in self.kernel_size), **dd))
        else:
            self.register_parameter("rpb", None)
        self.proj = nn.Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.rpb is not None:
            trunc_normal_(self.rpb, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        x = self.attend(self.qkv(x))
        return self.proj_drop(self.proj(x))

    # TorchScript calls back into Python here, so a scripted model runs and trains but cannot be saved.
    @torch.jit.ignore
    def attend(self, qkv: Tensor) -> Tensor:
        """The attention between the projections: [B, H, W, 3 * C] -> [B, H, W, C]."""
        batch, height, width, _ = qkv.shape
        rows, cols = (k * d for k, d in zip(self.kernel_size, self.dilation, strict=True))
        # Comparing a symbolic size would bake the answer into the exported graph; always pad then.
        fits = isinstance(height, int) and isinstance(width, int) and height >= rows and width >= cols
        if fits:
            qkv = qkv.view(batch, height, width, 3, self.num_heads, self.head_dim)
        else:
            qkv = _pad(qkv, self.qkv.bias, _at_least(rows, height), _at_least(cols, width))
            # Not unflatten: of its result the TorchScript exporter to ONNX takes the sizes for constants.
            qkv = qkv.view(*qkv.shape[:3], 3, self.num_heads, self.head_dim)
        x = na2d_qkvpacked(
            qkv,
            kernel_size=self.kernel_size,
            dilation=self.dilation,
            rpb=self.rpb,
            scale=self.scale,
            dropout_p=self.attn_drop if self.training else 0.0,
        )
        if not fits:
            x = x[:, :height, :width].clone(memory_format=torch.contiguous_format)
        return x.flatten(3)

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"


def _at_least(minimum: int, length: int | torch.SymInt | Tensor) -> int | torch.SymInt | Tensor:
    """max(minimum, length) without a branch: length is a symbol under torch.export, a tensor in torch.jit.trace."""
    if isinstance(length, Tensor):
        return length.clamp(min=minimum)
    # Dynamo knows max of what it takes for an int; sym_max of two ints PyTorch 2.6 does not trace.
    return max(minimum, length) if isinstance(length, int) else torch.sym_max(minimum, length)


def _pad(qkv: Tensor, bias: Tensor | None, padded_height: int, padded_width: int) -> Tensor:
    """Grows a small map [B, H, W, 3 * C] with what the projection makes of a zero token, its bias."""
    _, height, width, _ = qkv.shape
    qkv = F.pad(qkv, (0, 0, 0, padded_width - width, 0, padded_height - height))
    if bias is None:
        return qkv
    row, col = (torch.arange(n, device=qkv.device) for n in (padded_height, padded_width))
    real = (row < height)[:, None, None] & (col < width)[:, None]  # [H, W, 1]
    return torch.where(real, qkv, bias.to(qkv.dtype))
