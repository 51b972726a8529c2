"""The attention layer: projections, relative position bias and the padding of small maps around na2d."""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor

from .ops import na2d_qk, na2d_qkvpacked
from .ops.checks import as_row_rpb
from .ops.linear import linear
from .ops.window import row_window, window_pair


class NeighborhoodAttention2d(nn.Module):
    """Multi-head 2-D neighborhood attention with its projections, on NHWC maps.

    A map smaller than kernel_size * dilation is padded at the bottom and right with zero tokens *before* the qkv
    projection, attended and cropped. Padded tokens take part in the softmax; the published weights were trained and
    evaluated so. Their key and value are what `qkv` makes of a zero token, whatever module it is. It is called once, on
    [B, H * W + 1, 1, C] then: the map's tokens and a zero token.

    Args:
        dim: Channels C of input and output.
        num_heads: Must divide dim.
        kernel_size: Odd; an int serves both axes.
        dilation: At least 1; an int serves both axes.
        qkv_bias: Bias in the qkv projection.
        rel_pos_bias: Learn `rpb` [num_heads, 2*K_h-1, 2*K_w-1], added to the logits.
        scale: Multiplies the logits; None means head_dim ** -0.5.
        attn_drop: Dropout rate of the attention weights. When above 0, training runs in plain PyTorch operations.
        proj_drop: Dropout rate of the output.

    Raises:
        ValueError: num_heads does not divide dim; kernel_size is even or below 1; dilation is below 1.

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
        self.scale = float(self.head_dim**-0.5 if scale is None else scale)
        self.attn_drop = float(attn_drop)

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
        return self._attend(x, self.rpb)

    def _attend(self, x: Tensor, rpb: Tensor | None) -> Tensor:
        tokens = with_zero_token(x, self.kernel_size, self.dilation)
        x = attend(
            self.qkv(tokens) if torch.jit.is_scripting() else linear(self.qkv, tokens),
            x,
            rpb,
            self.num_heads,
            self.kernel_size,
            self.dilation,
            self.scale,
            self.attn_drop if self.training else 0.0,
        )
        return self.proj_drop(self.proj(x) if torch.jit.is_scripting() else linear(self.proj, x))

    def attention_weights(self, x: Tensor) -> Tensor:
        """Where each token looks: the weights that `forward` gives its keys, before any dropout.

        Args:
            x: [B, H, W, C].

        Returns:
            [B, H, W, num_heads, K_h*K_w], each 1 in sum; the order of keys is that of na2d_qk. A map smaller than
            kernel_size * dilation is padded: its windows, and so the keys, are those of the padded map, with tokens
            beyond x's height and width among them.
        """
        return self._weights(x, self.rpb)

    def _weights(self, x: Tensor, rpb: Tensor | None) -> Tensor:
        qkv = self.qkv(with_zero_token(x, self.kernel_size, self.dilation))
        if not _fits(x, self.kernel_size, self.dilation):
            qkv = _pad(qkv, x, self.kernel_size, self.dilation)
        query, key, _ = _by_head(qkv, self.num_heads).unbind(3)
        logits = na2d_qk(query, key, kernel_size=self.kernel_size, dilation=self.dilation, rpb=rpb, scale=self.scale)
        return logits.softmax(-1)[:, : x.shape[1], : x.shape[2]]

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, kernel_size={self.kernel_size}, dilation={self.dilation}"


class NeighborhoodAttention1d(NeighborhoodAttention2d):
    """The layer for sequences: NeighborhoodAttention2d on maps of one row and length L.

    A sequence shorter than kernel_size * dilation is padded at its end, as a map is. The attributes `kernel_size` and
    `dilation` are those of the map, (1, K) and (1, dilation); `rpb` is [num_heads, 2*K-1].

    Args:
        dim: Channels C of input and output.
        num_heads: Must divide dim.
        kernel_size: Odd; an int.
        dilation: At least 1; an int.
        **kwargs: As in NeighborhoodAttention2d.

    Raises:
        ValueError: kernel_size or dilation is no int; what NeighborhoodAttention2d refuses.

    Source: Hassani et al., CVPR 2023, arXiv:2204.07143, section 3; one axis of it.
    """

    def __init__(self, dim: int, num_heads: int, *, kernel_size: int = 7, dilation: int = 1, **kwargs) -> None:
        kernel, spacing = row_window(kernel_size, dilation)
        super().__init__(dim, num_heads, kernel_size=kernel, dilation=spacing, **kwargs)
        if self.rpb is not None:
            self.rpb = nn.Parameter(self.rpb.detach().squeeze(1))

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, C]."""
        rpb = self.rpb
        return self._attend(x.unsqueeze(1), None if rpb is None else rpb.unsqueeze(1)).squeeze(1)

    def attention_weights(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, num_heads, K]; see NeighborhoodAttention2d."""
        return self._weights(x.unsqueeze(1), as_row_rpb(self.rpb)).squeeze(1)


# The two functions below ask about sizes, which neither torch.fx nor TorchScript can follow. A symbolic trace records a
# call of each; TorchScript calls back into Python, so a scripted model runs and trains but cannot be saved.


@torch.fx.wrap
@torch.jit.ignore
def with_zero_token(x: Tensor, kernel_size: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """[B, H, W, C] as it is where the window fits, else its tokens and a zero token: [B, H * W + 1, 1, C]."""
    return x if _fits(x, kernel_size, dilation) else F.pad(x.flatten(1, 2), (0, 0, 0, 1)).unsqueeze(2)


@torch.fx.wrap
@torch.jit.ignore
def attend(
    qkv: Tensor,
    x: Tensor,
    rpb: Tensor | None,
    num_heads: int,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    dropout_p: float,
) -> Tensor:
    """The attention between the projections: `qkv` is what the first made of `with_zero_token(x, ...)`.

    Returns [B, H, W, C], x's height and width.
    """
    fits = _fits(x, kernel_size, dilation)
    if not fits:
        qkv = _pad(qkv, x, kernel_size, dilation)
    output = na2d_qkvpacked(
        _by_head(qkv, num_heads),
        kernel_size=kernel_size,
        dilation=dilation,
        rpb=rpb,
        scale=scale,
        dropout_p=dropout_p,
    )
    if not fits:
        output = output[:, : x.shape[1], : x.shape[2]].clone(memory_format=torch.contiguous_format)
    return output.flatten(3)


def _by_head(qkv: Tensor, num_heads: int) -> Tensor:
    """[B, H, W, 3 * C] -> [B, H, W, 3, num_heads, head_dim]."""
    # Not unflatten: of its result the TorchScript exporter to ONNX takes the sizes for constants.
    return qkv.view(*qkv.shape[:3], 3, num_heads, qkv.shape[3] // (3 * num_heads))


def _fits(x: Tensor, kernel_size: tuple[int, int], dilation: tuple[int, int]) -> bool:
    """Whether the window fits in x; no where sizes are symbols, for comparing one bakes the answer into the graph."""
    _, height, width, _ = x.shape
    if not (isinstance(height, int) and isinstance(width, int)):
        return False
    return height >= kernel_size[0] * dilation[0] and width >= kernel_size[1] * dilation[1]


def _pad(qkv: Tensor, x: Tensor, kernel_size: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """[B, H * W + 1, 1, 3 * C] -> [B, H or more, W or more, 3 * C], grown with what stands last in qkv."""
    _, height, width, _ = x.shape
    padded_height, padded_width = (
        _at_least(k * d, n) for k, d, n in zip(kernel_size, dilation, (height, width), strict=True)
    )
    tokens, zero_token = qkv[:, :-1, 0], qkv[:, -1:]
    tokens = tokens.unflatten(1, (height, width))
    tokens = F.pad(tokens, (0, 0, 0, padded_width - width, 0, padded_height - height))
    row, col = (torch.arange(n, device=qkv.device) for n in (padded_height, padded_width))
    real = (row < height)[:, None, None] & (col < width)[:, None]  # [H, W, 1]
    return torch.where(real, tokens, zero_token)


def _at_least(minimum: int, length: int | torch.SymInt | Tensor) -> int | torch.SymInt | Tensor:
    """max(minimum, length) without a branch: length is a symbol under torch.export, a tensor in torch.jit.trace."""
    if isinstance(length, Tensor):
        return length.clamp(min=minimum)
    # Dynamo knows max of what it takes for an int; sym_max of two ints PyTorch 2.6 does not trace.
    return max(minimum, length) if isinstance(length, int) else torch.sym_max(minimum, length)
