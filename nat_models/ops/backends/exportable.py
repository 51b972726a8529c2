"""na2d for graphs that leave Python: tensor operations alone, in which batch, height and width may be symbols.

`blocked` decides in Python what a map of one size needs. An exported graph serves every size, so here the same tiles
and halos are laid out by arithmetic on tensors: no Python branch depends on a size and nothing is cached. Where sizes
are numbers, exporters fold all of it into constants.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..request import Request
from ..window import group_length, window_start

SUMMARY = "blocked in operations that know no size; what exporters write down"

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


def _mask(rpb: Tensor, rows: _Axis, cols: _Axis) -> Tensor:
    """[num_heads, 2*K_h-1, 2*K_w-1] -> [R * C, num_heads, t * u, h * w]."""
    t, h, u, w = *rows.offsets.shape[1:], *cols.offsets.shape[1:]
    # The table gets one extra row and column of -inf; pairs outside the window index those. First its columns are
    # taken for every (C, u, w); then, as whole runs of w, those of every (R, C, num_heads, t, u, h).
    table = F.pad(rpb, (0, 1, 0, 1), value=float("-inf"))
    num_heads, height, _ = table.shape
    runs = table.index_select(2, cols.offsets.flatten()).view(-1, w)  # [(num_heads, table row, C, u), w]
    count = cols.queries.numel()  # C * u
    table_row = torch.arange(num_heads, device=rpb.device).view(-1, 1, 1, 1) * height
    table_row = table_row + rows.offsets.view(-1, 1, 1, t, 1, h)
    index = table_row * count + torch.arange(count, device=rpb.device).view(-1, 1, 1, u, 1)
    return runs.index_select(0, index.flatten()).view(-1, num_heads, t * u, h * w)


def _gather(x: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """[B, H, W, num_heads, head_dim] -> [B, R * C, num_heads, t * u, head_dim] for rows [R, t] and cols [C, u]."""
    batch, _, width, num_heads, head_dim = x.shape
    (_, t), (_, u) = rows.shape, cols.shape
    index = (rows * width).view(-1, 1, t, 1) + cols.view(-1, 1, u)  # [R, C, t, u]
    x = x.flatten(1, 2).index_select(1, index.flatten())
    return x.view(batch, -1, t * u, num_heads, head_dim).transpose(2, 3)


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
    batch, height, width, num_heads, head_dim = query.shape
    dtype, wide = query.dtype, torch.promote_types(query.dtype, torch.float32)
    if rpb is None:
        rpb = query.new_zeros(num_heads, *(2 * k - 1 for k in kernel_size))
    if dtype != wide:
        query, key, value = (x.to(wide) for x in (query, key, value))
    rows, cols = (_axis(n, k, d, query.device) for n, k, d in zip((height, width), kernel_size, dilation, strict=True))
    q = _gather(query, rows.queries, cols.queries) * scale
    k, v = (_gather(x, rows.keys, cols.keys) for x in (key, value))
    weights = (q @ k.transpose(-1, -2) + _mask(rpb.to(wide), rows, cols)).softmax(-1)
    if dropout_p > 0.0:
        weights = F.dropout(weights, dropout_p)
    out = (weights @ v).transpose(2, 3).reshape(batch, -1, num_heads, head_dim)  # [B, R * C * t * u, ...]
    row = rows.tile * (cols.queries.numel() * _TILE) + rows.place * _TILE
    col = cols.tile * _TILE**2 + cols.place
    out = out.index_select(1, (row.unsqueeze(1) + col).flatten()).view(batch, height, width, num_heads, head_dim)
    return out if dtype == wide else out.to(dtype)
