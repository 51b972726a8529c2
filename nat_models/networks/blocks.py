"""What the networks are made of: the stem, what stands between levels, blocks and levels; the rest is timm's."""

from collections.abc import Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import DropPath, LayerScale, PatchEmbed
from timm.models import checkpoint_seq
from timm.models.swin_transformer import PatchMerging
from torch import Tensor

from ..layers import NeighborhoodAttention2d
from ..ops.tracing import is_exporting
from .inference import infer, infers
from .parts import LeanMlp, MapNorm
from .stochastic_depth import add_branch, drops_images

DOWNSAMPLERS = ("conv", "merge", "none")  # create_model of timm drops arguments that are None


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


def patch_tokenizer(in_chans: int, embed_dim: int, patch_size: int, **dd) -> PatchEmbed:
    """Patches that do not overlap, of an image padded at the bottom and right: [B, in_chans, H, W] -> NHWC."""
    any_size = dict(img_size=None, strict_img_size=False, dynamic_img_pad=True)
    return PatchEmbed(
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        norm_layer=nn.LayerNorm,
        output_fmt="NHWC",
        **any_size,
        **dd,
    )


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


class GlobalAttention2d(NeighborhoodAttention2d):
    """Attention of every token to all of an NHWC map, with a relative position bias for a map of one size.

    For maps of another size the bias is interpolated (bicubic), as timm does for its networks with such a table.

    Args:
        dim: Channels C of input and output.
        num_heads: Must divide dim.
        map_size: Side of the map that `rpb` [num_heads, 2*map_size-1, 2*map_size-1] is for: the bias of query p and key
            r is rpb[key_row - query_row + map_size - 1, key_col - query_col + map_size - 1].
        **kwargs: As in NeighborhoodAttention2d.

    Source: Hassani and Shi, arXiv:2209.15001, the baseline "ViT-rpb" of its isotropic variants.
    """

    def __init__(self, dim: int, num_heads: int, *, map_size: int, device=None, dtype=None, **kwargs) -> None:
        super().__init__(dim, num_heads, rel_pos_bias=False, device=device, dtype=dtype, **kwargs)
        self.map_size = map_size
        self.rpb = nn.Parameter(torch.empty(num_heads, *(2 * [2 * map_size - 1]), device=device, dtype=dtype))
        self.reset_parameters()

    def forward(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, C]."""
        dropout_p = self.attn_drop if self.training else 0.0
        return self.proj_drop(self.proj(attend_to_all(self.qkv(x), self.rpb, self.num_heads, self.scale, dropout_p)))

    def attention_weights(self, x: Tensor) -> Tensor:
        """[B, H, W, C] -> [B, H, W, num_heads, H * W], keys row by row: the weights that `forward` gives them."""
        _, height, width, _ = x.shape
        q, k, _ = _tokens_by_head(self.qkv(x), self.num_heads)
        logits = self.scale * (q @ k.mT) + _global_bias(self.rpb, height, width)
        return logits.softmax(-1).to(x.dtype).permute(0, 2, 1, 3).unflatten(1, (height, width))

    def extra_repr(self) -> str:
        return f"dim={self.dim}, num_heads={self.num_heads}, map_size={self.map_size}"


@torch.fx.wrap  # its indices depend on sizes, which a symbolic trace does not know
@torch.jit.ignore
def attend_to_all(qkv: Tensor, rpb: Tensor, num_heads: int, scale: float, dropout_p: float) -> Tensor:
    """[B, H, W, 3 * C], as a projection makes it -> [B, H, W, C]."""
    batch, height, width, channels = qkv.shape
    q, k, v = _tokens_by_head(qkv, num_heads)
    bias = _global_bias(rpb, height, width).to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout_p, scale=scale)
    return out.transpose(1, 2).reshape(batch, height, width, channels // 3)


def _tokens_by_head(qkv: Tensor, num_heads: int) -> Tensor:
    """[B, H, W, 3 * C] -> [3, B, num_heads, H * W, head_dim]."""
    batch, height, width, channels = qkv.shape
    return qkv.reshape(batch, height * width, 3, num_heads, channels // (3 * num_heads)).permute(2, 0, 3, 1, 4)


def _global_bias(rpb: Tensor, height: int, width: int) -> Tensor:
    """The bias of every query and key of a map, [num_heads, H * W, H * W], float32 or wider."""
    table = rpb.to(torch.promote_types(rpb.dtype, torch.float32))
    # Of a table that fits already, interpolation gives the same bits.
    table = F.interpolate(table[None], (2 * height - 1, 2 * width - 1), mode="bicubic")[0]
    rows, cols = (torch.arange(n, device=rpb.device) for n in (height, width))
    rows, cols = rows - rows[:, None] + height - 1, cols - cols[:, None] + width - 1  # [query, key]
    bias = table[:, rows[:, None, :, None], cols[:, None, :]]  # [num_heads, H, W, H, W]
    return bias.flatten(3).flatten(1, 2)


class NATBlock(nn.Module):
    """Pre-norm attention and MLP, each with optional layer scale and stochastic depth, on [B, H, W, C].

    global_size makes the attention a global one, whose position bias is for maps of that side.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int | Sequence[int] = 7,
        dilation: int | Sequence[int] = 1,
        global_size: int | None = None,
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
        attn_args = dict(qkv_bias=qkv_bias, attn_drop=attn_drop, proj_drop=proj_drop, **dd)
        if global_size is None:
            self.attn = NeighborhoodAttention2d(dim, num_heads, kernel_size=kernel_size, dilation=dilation, **attn_args)
        else:
            self.attn = GlobalAttention2d(dim, num_heads, map_size=global_size, **attn_args)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values, **dd)
        self.drop_path1 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()
        self.norm2 = MapNorm(dim, **dd)
        self.mlp = LeanMlp(dim, int(dim * mlp_ratio), drop=proj_drop, **dd)
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values, **dd)
        self.drop_path2 = DropPath(drop_path) if drop_path > 0.0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            if infers(self, x):
                return infer(self, x)
            if drops_images(self, x):
                return self._forward_kept(x)
        shape = x.shape
        # The residual sums are [B, H * W, C]: with convolutions around, Inductor takes a 4-D sum for NCHW and stores it
        # channels-first. What a module takes and returns is a map all the same, for hooks.
        x = x.flatten(1, 2)
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x.view(shape))))).flatten(1, 2)
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x.view(shape))))).flatten(1, 2)
        return x.view(shape)

    @torch.jit.ignore
    def _forward_kept(self, x: Tensor) -> Tensor:
        x = add_branch(x, lambda x: self.ls1(self.attn(self.norm1(x))), self.drop_path1)
        return add_branch(x, lambda x: self.ls2(self.mlp(self.norm2(x))), self.drop_path2)


class NATLevel(nn.Module):
    """Blocks at one resolution, preceded by their downsampling: the level's output is its feature map.

    downsample is one of DOWNSAMPLERS; the first two take half the channels.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        num_heads: int,
        drop_path: Sequence[float],
        dilations: Sequence[int | Sequence[int]],
        downsample: str,
        device=None,
        dtype=None,
        **block_kwargs,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        self.grad_checkpointing = False
        if downsample == "none":
            self.downsample = nn.Identity()
        else:
            self.downsample = (ConvDownsampler if downsample == "conv" else PatchMerging)(dim // 2, **dd)
        self.blocks = nn.Sequential(
            *[
                NATBlock(dim, num_heads, drop_path=drop_path[i], dilation=dilations[i], **block_kwargs, **dd)
                for i in range(depth)
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.run_blocks(self.downsample(x))

    def run_blocks(self, x: Tensor) -> Tensor:
        """What comes after the downsampling."""
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return checkpoint_seq(self.blocks, x)
        return self.blocks(x)

    @torch.jit.ignore
    def run_blocks_with_attention(self, x: Tensor, block: int = -1) -> tuple[Tensor, Tensor]:
        """The same, and the attention weights of one of the blocks, [B, H, W, num_heads, K_h * K_w].

        Raises:
            ValueError: There is no such block.
        """
        if not -len(self.blocks) <= block < len(self.blocks):
            raise ValueError(f"The level has {len(self.blocks)} blocks, got {block=}.")
        attention, seen = self.blocks[block].attn, []
        handle = attention.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        try:
            x = self.run_blocks(x)
        finally:
            handle.remove()
        return x, attention.attention_weights(seen[0])
