"""na2d for graphs that leave Python: tensor operations alone, in which batch, height and width may be symbols.

`blocked` decides in Python what a map of one size needs. An exported graph serves every size, so here the same tiles
and halos are laid out by arithmetic on tensors: no Python branch depends on a size and nothing is cached. Where sizes
are numbers, exporters fold all of it into constants.

PyTorch differentiates these operations to any order, forward and backward, and batches them: so they, and the gradient
written in the same way, are also what derivatives above the first and torch.func's transforms of the operator run on.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..request import Request
from ..window import group_length, window_start

SUMMARY = "blocked in operations that know no size; what exporters write down and torch.func transforms"

_TILE = 7


def why_not(request: Request) -> None:
    """It runs every kind of call."""


class _Axis(NamedTuple):
    """One axis of length L cut into T tiles of t queries, each with a halo of h keys, in every dilation group."""

    queries: Tensor  # [T, t] axis positions; a short tile repeats its last query
    keys: Tensor  # [T, h] axis positions; a short group repeats its last key
    offsets: Tensor  # [T, t, h] rpb index of each pair, 2 * K - 1 outside the query's window
    tile: Tensor  # [L] the tile of each position
    place: Tensor  # [L] and the place in it


def _axis(length: int, kernel_size: int, dilation: int, device: torch.device) -> _Axis:
    longest = group_length(length, dilation, 0)
    halo = _TILE + kernel_size - 1
    if isinstance(longest, int):
        halo = min(halo, longest)
    tile = torch.arange((longest + _TILE - 1) // _TILE * dilation, device=device).unsqueeze(1)
    group, first = (0, tile * _TILE) if dilation == 1 else (tile % dilation, tile // dilation * _TILE)
    members = group_length(length, dilation, group)
    query = (first + torch.arange(_TILE, device=device)).clamp(max=members - 1)
    key = (first - kernel_size // 2).clamp(max=members - halo).clamp(min=0) + torch.arange(halo, device=device)
    start = window_start(query, members, kernel_size).unsqueeze(2)
    pair = key.unsqueeze(1)
    inside = (pair >= start) & (pair < start + kernel_size)
    offset = pair - query.unsqueeze(2) + kernel_size - 1
    position = torch.arange(length, device=device)
    return _Axis(
        queries=query * dilation + group,
        keys=key.clamp(max=members - 1) * dilation + group,
        offsets=torch.where(inside, offset, 2 * kernel_size - 1),
        tile=position // (dilation * _TILE) * dilation + position % dilation,
        place=position // dilation % _TILE,
    )


def _runs(num_heads: int, height: int, rows: _Axis, cols: _Axis) -> Tensor:
    """Where the mask's runs of w stand among those of each (head, row of a table of `height` rows, C, u): int64."""
    _, t, h = rows.offsets.shape
    u = cols.offsets.shape[1]
    device = rows.offsets.device
    table_row = torch.arange(num_heads, device=device).view(-1, 1, 1, 1) * height
    table_row = table_row + rows.offsets.view(-1, 1, 1, t, 1, h)
    count = cols.queries.numel()  # C * u
    index = table_row * count + torch.arange(count, device=device).view(-1, 1, 1, u, 1)
    return index.flatten()  # [(R, C, num_heads, t, u, h)]


def _mask(rpb: Tensor, rows: _Axis, cols: _Axis) -> Tensor:
    """[num_heads, 2*K_h-1, 2*K_w-1] -> [R * C, num_heads, t * u, h * w]."""
    t, h, u, w = *rows.offsets.shape[1:], *cols.offsets.shape[1:]
    # The table gets one extra row and column of -inf; pairs outside the window index those. First its columns are
    # taken for every (C, u, w); then, as whole runs of w, those of every (R, C, num_heads, t, u, h).
    table = F.pad(rpb, (0, 1, 0, 1), value=float("-inf"))
    num_heads, height, _ = table.shape
    runs = table.index_select(2, cols.offsets.flatten()).view(-1, w)  # [(num_heads, table row, C, u), w]
    return runs.index_select(0, _runs(num_heads, height, rows, cols)).view(-1, num_heads, t * u, h * w)


def _mask_gradient(grad: Tensor, shape: torch.Size, rows: _Axis, cols: _Axis) -> Tensor:
    """The gradient of rpb, of `shape`, from that of its mask."""
    num_heads, height, width = shape
    w = cols.offsets.shape[2]
    runs = grad.new_zeros(num_heads * (height + 1) * cols.queries.numel(), w)
    runs = runs.index_add(0, _runs(num_heads, height + 1, rows, cols), grad.reshape(-1, w))
    table = grad.new_zeros(num_heads, height + 1, width + 1)
    table = table.index_add(2, cols.offsets.flatten(), runs.view(num_heads, height + 1, -1))
    return table[:, :height, :width]


def _places(rows: Tensor, cols: Tensor, width: int) -> Tensor:
    """Tokens, counted along the map's rows, at rows [R, t] and cols [C, u]: [(R, C, t, u)]."""
    index = (rows * width).view(-1, 1, rows.shape[1], 1) + cols.view(-1, 1, cols.shape[1])
    return index.flatten()


def _gather(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """[B, H, W, num_heads, head_dim] -> [B, R * C, num_heads, t * u, head_dim] for rows [R, t] and cols [C, u]."""
    batch, _, width, num_heads, head_dim = x.shape
    tokens = x.flatten(1, 2).index_select(1, _places(rows, cols, width))
    return tokens.view(batch, -1, rows.shape[1] * cols.shape[1], num_heads, head_dim).transpose(2, 3)


def _flatten(tiles: Tensor) -> Tensor:
    """[B, R * C, num_heads, t * u, head_dim] -> [B, R * C * t * u, num_heads, head_dim]."""
    batch, _, num_heads, _, head_dim = tiles.shape
    return tiles.transpose(2, 3).reshape(batch, -1, num_heads, head_dim)


def _add(tiles: Tensor, rows: Tensor, cols: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of x, of `shape`, from that of _gather(x, rows, cols)."""
    batch, height, width, num_heads, head_dim = shape
    total = tiles.new_zeros(batch, height * width, num_heads, head_dim)
    return total.index_add(1, _places(rows, cols, width), _flatten(tiles)).view(shape)


def _untile(tiles: Tensor, index: Tensor, shape: torch.Size) -> Tensor:
    return _flatten(tiles).index_select(1, index).view(shape)


class _Attention(NamedTuple):
    """A call in tiles, in float32 or wider."""

    rows: _Axis
    cols: _Axis
    query: Tensor  # [B, R * C, num_heads, t * u, head_dim], scaled
    key: Tensor  # [B, R * C, num_heads, h * w, head_dim], and so is value
    value: Tensor
    weights: Tensor  # [B, R * C, num_heads, t * u, h * w]
    untile: Tensor  # [H * W] where each token's query stands in the flattened tiles


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> _Attention:
    _, height, width, num_heads, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    if rpb is None:
        rpb = query.new_zeros(num_heads, *(2 * k - 1 for k in kernel_size))
    if query.dtype != wide:
        query, key, value = (x.to(wide) for x in (query, key, value))
    rows, cols = (_axis(n, k, d, query.device) for n, k, d in zip((height, width), kernel_size, dilation, strict=True))
    q = _gather(query, rows.queries, cols.queries) * scale
    k, v = (_gather(x, rows.keys, cols.keys) for x in (key, value))
    weights = (q @ k.transpose(-2, -1) + _mask(rpb.to(wide), rows, cols)).softmax(-1)
    row = rows.tile * (cols.queries.numel() * _TILE) + rows.place * _TILE
    col = cols.tile * _TILE**2 + cols.place
    return _Attention(rows, cols, q, k, v, weights, (row.unsqueeze(1) + col).flatten())


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    dropout_p: float = 0.0,
) -> Tensor:
    """Neighborhood attention without control flow on sizes, differentiable by autograd.

    `dropout_p` drops attention weights.
    """
    tiled = _attention(query, key, value, rpb, kernel_size, dilation, scale)
    weights = tiled.weights
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    out = _untile(weights @ tiled.value, tiled.untile, query.shape)
    return out if out.dtype == query.dtype else out.to(query.dtype)


def na2d_gradients(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of query, key, value and rpb, differentiable by autograd like na2d itself."""
    shape = query.shape
    rows, cols, q, k, v, weights, untile = _attention(query, key, value, rpb, kernel_size, dilation, scale)
    tokens = q.new_zeros(_flatten(q).shape).index_add(1, untile, grad_output.to(q.dtype).flatten(1, 2))
    grad = tokens.view(*q.transpose(2, 3).shape).transpose(2, 3)  # no gradient for a repeated query
    # d softmax: dS = P * (dP - <P, dP>)
    grad_weights = grad @ v.transpose(-2, -1)
    grad_logits = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    grad_query = _untile(grad_logits @ k * scale, untile, shape)
    grad_key = _add(grad_logits.transpose(-2, -1) @ q, rows.keys, cols.keys, shape)
    grad_value = _add(weights.transpose(-2, -1) @ grad, rows.keys, cols.keys, shape)
    grads = tuple(x.to(query.dtype) for x in (grad_query, grad_key, grad_value))
    return *grads, None if rpb is None else _mask_gradient(grad_logits.sum(0), rpb.shape, rows, cols).to(rpb.dtype)
