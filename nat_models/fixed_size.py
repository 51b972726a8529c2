"""The networks for images of one size, in the fewest plain tensor operations: what an exported graph runs fast.

A graph that serves every size gathers queries, keys and values of each block and puts the outputs back. Where the size
is known, the tokens of a level stand in the order of the tiles from its first block to its last, so that only keys and
values are gathered; the tiles are those that cost least on that map. Weights are rewritten by operations on parameters
alone, which runtimes fold into constants: the parameters stay what they are.
"""

import copy
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple, TypeVar

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor

from .layers import NeighborhoodAttention2d
from .networks.blocks import NATBlock, NATLevel
from .networks.parts import LeanMlp, MapNorm
from .ops.window import window

_Model = TypeVar("_Model", bound=nn.Module)

# What a tile costs beside its pairs of query and key, in pairs (float32, onnxruntime on AVX-512): a key is gathered,
# with its value, and both are packed for the products; a token goes through the linear layers, per channel.
_PAIRS_PER_KEY, _PAIRS_PER_CHANNEL = 30, 2.8
_LONGEST_TILE = 32


class _Axis(NamedTuple):
    """One axis cut into T tiles of t queries, each with a halo of h keys; a tile is of one dilation group."""

    queries: Tensor  # [T, t] axis positions; a short tile repeats its last query
    keys: Tensor  # [T, h] positions on the axis, which is padded to the window where it is shorter
    offsets: Tensor  # [T, t, h] rpb index of each pair, 2 * K - 1 outside the query's window


def _axis(length: int, kernel_size: int, dilation: int, tile: int) -> _Axis:
    padded = max(length, kernel_size * dilation)
    queries = []
    for group in range(min(dilation, length)):
        members = range(group, length, dilation)
        firsts = range(0, len(members), tile)
        queries += [[members[min(first + i, len(members) - 1)] for i in range(tile)] for first in firsts]
    query = torch.tensor(queries)
    windows = window(padded, kernel_size, dilation)[0][query]  # [T, t, K]
    start, end = windows[:, :, :1], windows[:, :, -1:]
    first = start.amin(1)
    halo = int((end.amax(1) - first).max()) // dilation + 1
    key = first + dilation * torch.arange(halo)
    pair = key.unsqueeze(1)
    offset = (pair - query.unsqueeze(2)) // dilation + kernel_size - 1
    inside = (pair >= start) & (pair <= end)
    return _Axis(query, key.clamp(max=padded - 1), torch.where(inside, offset, 2 * kernel_size - 1))


@cache
def _best_tile(
    size: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int], dim: int
) -> tuple[int, int]:
    """The tile, [t, u] queries, that costs least on a map of this size."""

    def candidates(axis: int) -> list[tuple[int, int, int, int]]:
        members = -(-size[axis] // dilation[axis])
        tiles = range(1, min(members, _LONGEST_TILE) + 1)
        shapes = ((t, _axis(size[axis], kernel_size[axis], dilation[axis], t).offsets.shape) for t in tiles)
        return [(t, count, *queries_and_keys) for t, (count, *queries_and_keys) in shapes]

    def cost(row: Sequence[int], col: Sequence[int]) -> float:
        count, queries, keys = (r * c for r, c in zip(row[1:], col[1:], strict=True))
        return count * (queries * (keys + _PAIRS_PER_CHANNEL * dim) + _PAIRS_PER_KEY * keys)

    cols = candidates(1)
    row, col = min(((r, c) for r in candidates(0) for c in cols), key=lambda pair: cost(*pair))
    return row[0], col[0]


class _Tiling(nn.Module):
    """The tiles of a map, as indices: N tokens, of which some stand twice where a tile is short."""

    def __init__(
        self, size: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int], tile: tuple[int, int]
    ) -> None:
        super().__init__()
        height, width = size
        rows, cols = (_axis(*axis) for axis in zip(size, kernel_size, dilation, tile, strict=True))
        self.shape = tuple(len(axis.queries) for axis in (rows, cols))  # [R, C] tiles
        self.pairs = (*rows.offsets.shape[1:], *cols.offsets.shape[1:])  # t, h, u, w
        self.order = _places(rows.queries, cols.queries, width)  # [N] token of the map at each place
        self.place = torch.empty(height * width, dtype=torch.int64)  # [H * W] and the place of each token
        self.place[self.order] = torch.arange(len(self.order))
        key = _places(rows.keys, cols.keys, width)
        outside = _places((rows.keys >= height).long(), (cols.keys >= width).long(), 1) > 0
        key = torch.where(outside, len(self.order), self.place[key.where(~outside, 0)])
        self.padded = bool(outside.any())  # the zero token stands at place N then
        self.gathers = not torch.equal(key, torch.arange(len(self.order)))
        self.register_buffer("keys", key)  # [R * C * h * w] places
        self.register_buffer("row_offsets", rows.offsets.flatten())
        self.register_buffer("col_offsets", cols.offsets.flatten())

    def mask(self, rpb: Tensor) -> Tensor:
        """[num_heads, 2*K_h-1, 2*K_w-1] -> [1, num_heads * R * C, t * u, h * w]."""
        (t, h, u, w), heads = self.pairs, len(rpb)
        # One more row and column of -inf, which pairs outside the window index.
        table = F.pad(rpb, (0, 1, 0, 1), value=float("-inf"))
        table = table.index_select(2, self.col_offsets).index_select(1, self.row_offsets)
        table = table.view(heads, self.shape[0], t, h, self.shape[1], u, w).permute(0, 1, 4, 2, 5, 3, 6)
        return table.reshape(1, -1, t * u, h * w)


def _places(rows: Tensor, cols: Tensor, width: int) -> Tensor:
    """Positions row * width + col at rows [R, t] and cols [C, u]: [(R, C, t, u)]."""
    return ((rows * width)[:, None, :, None] + cols[:, None]).flatten()


class _TiledBlock(nn.Module):
    """A NATBlock in evaluation, on tokens [B, N, C] in the order of tiles."""

    def __init__(self, block: NATBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, tiling: _Tiling) -> Tensor:
        block = self.block
        x = x + self._attend(_norm(x, block.norm1), tiling)
        weight, bias = _scaled(block.mlp.fc2, block.ls2)
        hidden = block.mlp.act(_linear(_norm(x, block.norm2), block.mlp.fc1.weight, block.mlp.fc1.bias))
        return x + _linear(hidden, weight, bias)

    def _attend(self, x: Tensor, tiling: _Tiling) -> Tensor:
        attn = self.block.attn
        batch, count, dim = x.shape
        heads, head_dim = attn.num_heads, attn.head_dim
        q_weight, k_weight, v_weight = attn.qkv.weight.view(3, dim, dim).unbind(0)
        weight, bias = _scaled(attn.proj, self.block.ls1)
        q_bias = None
        if attn.qkv.bias is not None:
            # The bias of the keys adds the same to all logits of a query, so softmax drops it. Attention weights are 1
            # in sum, so that of the values goes through.
            q_bias, _, v_bias = attn.qkv.bias.view(3, dim).unbind(0)
            q_bias, bias = q_bias * attn.scale, bias + weight @ v_bias
        q = _by_head(x, q_weight * attn.scale, q_bias, heads)
        if tiling.padded:  # whose key and value are zero without the biases
            x = F.pad(x, (0, 0, 0, 1))
        k, v = (_by_head(x, w, None, heads) for w in (k_weight, v_weight))
        if tiling.gathers:
            k, v = (y.index_select(2, tiling.keys) for y in (k, v))
        t, h, u, w = tiling.pairs
        q = q.reshape(batch, -1, t * u, head_dim)  # tiles are heads of their own
        k, v = (y.reshape(batch, -1, h * w, head_dim) for y in (k, v))
        rpb = attn.rpb
        if rpb is None:
            rpb = x.new_zeros(heads, *(2 * n - 1 for n in attn.kernel_size))
        out = (q @ k.transpose(-2, -1) + tiling.mask(rpb)).softmax(-1) @ v
        out = out.view(batch, heads, count, head_dim).transpose(1, 2).reshape(batch, count, dim)
        return _linear(out, weight, bias)


def _by_head(x: Tensor, weight: Tensor, bias: Tensor | None, num_heads: int) -> Tensor:
    """[B, N, C] -> [B, num_heads, N, head_dim]."""
    return _linear(x, weight, bias).unflatten(2, (num_heads, -1)).transpose(1, 2)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """[B, N, C] -> [B, N, outputs]."""
    # On a matrix it becomes one Gemm in ONNX, which adds the bias; on [B, N, C] a MatMul and an Add.
    return F.linear(x.flatten(0, 1), weight, bias).view(-1, x.shape[1], len(weight))


def _norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _scaled(linear: nn.Linear, layer_scale: nn.Module) -> tuple[Tensor, Tensor]:
    """Weight and bias of a linear layer and the layer scale after it."""
    if not isinstance(layer_scale, LayerScale):
        return linear.weight, linear.bias
    return linear.weight * layer_scale.gamma[:, None], linear.bias * layer_scale.gamma


class _TiledBlocks(nn.Module):
    """The blocks of a level, on maps of one size: [B, H, W, C] -> [B, H, W, C]."""

    def __init__(self, blocks: Sequence[nn.Module], size: tuple[int, int]) -> None:
        super().__init__()
        self.tilings, self.blocks = nn.ModuleDict(), nn.ModuleList()
        self.names = []  # of each block's tiling; None where a block runs as it is
        here = None  # the tiling that tokens stand in the order of
        for i, block in enumerate(blocks):
            name = _tiling_name(block.attn) if _is_plain(block) else None
            if name is not None and name not in self.tilings:
                attn = block.attn
                tile = _best_tile(size, attn.kernel_size, attn.dilation, attn.dim)
                self.tilings[name] = _Tiling(size, attn.kernel_size, attn.dilation, tile)
            self.names.append(name)
            self.register_buffer(f"move{i}", self._move(here, name, size))
            self.blocks.append(block if name is None else _TiledBlock(block))
            here = name
        self.register_buffer(f"move{len(blocks)}", self._move(here, None, size))

    def _move(self, source: str | None, target: str | None, size: tuple[int, int]) -> Tensor | None:
        """Where tokens are taken that stand in one order and are to stand in another; None where they stay."""
        if source == target:
            return None
        tokens = torch.arange(size[0] * size[1])
        place = tokens if source is None else self.tilings[source].place
        order = tokens if target is None else self.tilings[target].order
        index = place[order]
        count = len(tokens) if source is None else len(self.tilings[source].order)
        return None if torch.equal(index, torch.arange(count)) else index

    def forward(self, x: Tensor) -> Tensor:
        shape = x.shape
        x = x.flatten(1, 2)
        for i, (block, name) in enumerate(zip(self.blocks, self.names, strict=True)):
            x = self._moved(x, i)
            x = block(x.view(shape)).flatten(1, 2) if name is None else block(x, self.tilings[name])
        return self._moved(x, len(self.blocks)).view(shape)

    def _moved(self, x: Tensor, i: int) -> Tensor:
        index = getattr(self, f"move{i}")
        return x if index is None else x.index_select(1, index)


def _tiling_name(attn: NeighborhoodAttention2d) -> str:
    return "_".join(str(n) for pair in (attn.kernel_size, attn.dilation) for n in pair)


def _is_plain(block: nn.Module) -> bool:
    """Whether a block is what _TiledBlock makes of it: one of ours, without layers of others or hooks in it."""
    if type(block) is not NATBlock or type(block.attn) is not NeighborhoodAttention2d or type(block.mlp) is not LeanMlp:
        return False
    attn, mlp = block.attn, block.mlp
    linear = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
    if any(type(x) is not nn.Linear for x in linear) or attn.qkv.out_features != 3 * attn.dim:
        return False
    if any(x.bias is None for x in linear[1:]) or type(mlp.norm) is not nn.Identity:
        return False
    if any(type(x) is not MapNorm for x in (block.norm1, block.norm2)):
        return False
    if any(type(x) not in (nn.Identity, LayerScale) for x in (block.ls1, block.ls2)):
        return False
    return not any(x._forward_hooks or x._forward_pre_hooks for x in block.modules())


@torch.no_grad()
def fix_size(model: _Model, image: Tensor) -> _Model:
    """A copy of a model, in evaluation, for images of one height and width, with the same parameters.

    It computes the same function, up to rounding. Levels of neighborhood attention take another form; what else is in
    the model, and a level that holds layers of others or sees maps of several sizes, stays.

    Args:
        model: A NAT or any module that has one inside.
        image: [B, C, H, W], what the model takes.
    """
    fixed = copy.deepcopy(model).eval()
    levels = [module for module in fixed.modules() if isinstance(module, NATLevel)]
    seen = [set() for _ in levels]
    handles = [
        level.blocks.register_forward_pre_hook(lambda module, args, sizes=sizes: sizes.add(tuple(args[0].shape[1:3])))
        for level, sizes in zip(levels, seen, strict=True)
    ]
    fixed(image[:1])
    for handle in handles:
        handle.remove()
    for level, sizes in zip(levels, seen, strict=True):
        if len(sizes) == 1 and any(_is_plain(block) for block in level.blocks):
            level.blocks = _TiledBlocks(level.blocks, sizes.pop())
    return fixed
