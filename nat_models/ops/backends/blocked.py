"""The portable fast path: tiles of queries attend to their halo of keys through scaled_dot_product_attention.

A tile of t x u queries needs the (t + K_h - 1) x (u + K_w - 1) keys around it, its halo. rpb and the window fold into
one additive mask, so the result is exact, on any device and in any float dtype, without a K*K-fold copy of keys and
values. Rows of tiles that see the same window pattern (the top one, all inner ones, the bottom one) share one mask
and run as one batch. What depends on sizes alone is computed once per device and kept in bounded caches.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# By its name, which deepspeed's profiler does not patch: it counts the operator, and must not count its tiles too.
from torch.nn.functional import scaled_dot_product_attention

from ..request import Request
from ..window import group_length, window_start

SUMMARY = "tiles of queries against their halo through scaled_dot_product_attention; any device"

# On small maps one tile wins: masked-out work costs less than gathering halos (the benchmark's suite "tiles").
_WHOLE_MAP_QUERIES = 256
_TILE = 7
# Elements of the largest intermediate per chunk of the batch. On a CPU, fresh pages dominate once a chunk outgrows the
# caches.
_CHUNK_ELEMENTS = {"cpu": 1 << 20}
_CHUNK_ELEMENTS_DEFAULT = 1 << 26


def why_not(request: Request) -> str | None:
    """Why it cannot run a kind of call; None if it can."""
    if not request.dropout:
        return None
    if request.compiling:
        return "torch.compile cannot trace its attention dropout"
    return "scaled_dot_product_attention has no forward mode" if request.transformed else None


class _Axis(NamedTuple):
    """One axis of length L cut into T tiles of t queries, each with a halo of h keys; indices are int64.

    Tiles with equal offsets stand next to each other, `patterns` says where.
    """

    queries: Tensor  # [T, t] axis positions; a short tile repeats its last query
    real: Tensor  # [T, t] False where a query is such a repetition
    keys: Tensor  # [T, h] axis positions
    offsets: Tensor  # [T, t, h] rpb index of each pair, -1 outside the query's window
    untile: Tensor  # [L] where each position's query stands in [T * t]
    overlaps: tuple[tuple[Tensor, Tensor], ...]  # (axis positions, places in [T * h]); positions unique in each pair
    patterns: tuple[tuple[int, int], ...]  # (first, end) tile of each run of equal offsets
    whole: bool  # one tile that is the axis itself: nothing to gather

    @property
    def padded(self) -> bool:
        return self.untile.numel() < self.queries.numel()


def _axis(length: int, kernel_size: int, dilation: int, tile: int, device: torch.device) -> _Axis:
    longest = group_length(length, dilation, 0)
    tile = min(tile, longest)
    halo = min(tile + kernel_size - 1, longest)
    tiles = []
    for group in range(dilation):
        members = group_length(length, dilation, group)
        for first in range(0, members, tile):
            position = first + torch.arange(tile)
            query = position.clamp(max=members - 1)
            key = min(max(first - kernel_size // 2, 0), max(members - halo, 0)) + torch.arange(halo)
            start = window_start(query, members, kernel_size)[:, None]
            inside = (key >= start) & (key < start + kernel_size)
            offset = torch.where(inside, key - query[:, None] + kernel_size - 1, -1)
            key = key.clamp(max=members - 1)  # past a short group: outside every window, any valid position serves
            tiles.append((query * dilation + group, position < members, key * dilation + group, offset))
    tiles.sort(key=lambda x: x[3].flatten().tolist())
    queries, real, keys, offsets = map(torch.stack, zip(*tiles, strict=True))
    changes = [i for i in range(1, len(tiles)) if not torch.equal(offsets[i], offsets[i - 1])]
    patterns = tuple(zip([0, *changes], [*changes, len(tiles)], strict=True))

    untile = torch.empty(length, dtype=torch.int64)
    untile[queries[real]] = torch.arange(queries.numel()).view_as(queries)[real]
    # A key stands in several halos. The r-th appearance of every key makes overlap r: adding gradients overlap by
    # overlap touches no position twice at a time, so the order of the sum, hence its bits, is the same every time.
    places = (offsets >= 0).any(1).flatten().nonzero().squeeze(1)
    places = places[keys.flatten()[places].argsort(stable=True)]
    positions = keys.flatten()[places]
    appearance = torch.arange(len(positions)) - torch.searchsorted(positions, positions)
    overlaps = tuple(
        (positions[appearance == r].to(device), places[appearance == r].to(device))
        for r in range(int(appearance.max()) + 1)
    )
    return _Axis(
        queries=queries.to(device),
        real=real.to(device),
        keys=keys.to(device),
        offsets=offsets.to(device),
        untile=untile.to(device),
        overlaps=overlaps,
        patterns=patterns,
        whole=dilation == 1 and tile == length,
    )


class _Plan(NamedTuple):
    rows: _Axis
    cols: _Axis
    # How the rpb table becomes masks, int32. First its columns for every (C, u, w); then, as whole runs of w, for each
    # pattern of tile rows, the run of every (num_heads, C, t, u, h). Copying runs beats gathering element by element.
    col_index: Tensor
    run_indices: tuple[Tensor, ...]
    # A map as large as its window has no pair outside: one gather over (t, u, h, w) is faster there.
    flat_index: Tensor | None
    mask_shape: tuple[int, int, int, int]  # 1, num_heads * C, t * u, h * w
    whole: bool  # one tile that is the map: nothing to gather


def _plan(query: Tensor, kernel_size: tuple[int, int], dilation: tuple[int, int]) -> _Plan:
    _, height, width, num_heads, _ = query.shape
    # A dilated map is a set of smaller ones, so the question is asked per dilation group.
    queries = group_length(height, dilation[0], 0) * group_length(width, dilation[1], 0)
    tile = max(height, width) if queries <= _WHOLE_MAP_QUERIES else _TILE
    return _plan_of((height, width), num_heads, kernel_size, dilation, tile, query.device)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # a cached plan serves training too
def _plan_of(
    size: tuple[int, int],
    num_heads: int,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    tile: int,
    device: torch.device,
) -> _Plan:
    with torch.device("cpu"):  # where an axis is made before it goes to `device`; the default may be another
        rows, cols = (_axis(n, k, d, tile, device) for n, k, d in zip(size, kernel_size, dilation, strict=True))
    (_, t, h), (tiles, u, w) = rows.offsets.shape, cols.offsets.shape
    height, width = (2 * k - 1 for k in kernel_size)
    # Pairs outside the window (-1) index the extra row or column of -inf.
    row_offsets, col_offsets = rows.offsets % (height + 1), cols.offsets % (width + 1)
    head = torch.arange(num_heads, device=device).view(-1, 1, 1, 1, 1)
    tile_col = torch.arange(tiles * u, device=device).view(1, tiles, 1, u, 1)
    run_indices = []
    for first, _ in rows.patterns:
        table_row = head * (height + 1) + row_offsets[first].view(1, 1, t, 1, h)
        run_indices.append((table_row * (tiles * u) + tile_col).flatten().to(torch.int32))
    whole = rows.whole and cols.whole
    flat_index = None
    if whole and size == kernel_size:
        flat_index = (row_offsets.view(t, 1, h, 1) * width + col_offsets.view(1, u, 1, w)).flatten().to(torch.int32)
    return _Plan(
        rows,
        cols,
        col_index=col_offsets.flatten().to(torch.int32),
        run_indices=tuple(run_indices),
        flat_index=flat_index,
        mask_shape=(1, num_heads * tiles, t * u, h * w),
        whole=whole,
    )


def _masks(query: Tensor, rpb: Tensor | None, kernel_size: tuple[int, int], plan: _Plan) -> list[Tensor]:
    """One additive mask for each pattern of tile rows: [1, num_heads * C, t * u, h * w], float32 or wider."""
    wide = torch.promote_types(query.dtype, torch.float32)
    if rpb is None:
        rpb = query.new_zeros(query.shape[3], *(2 * k - 1 for k in kernel_size))
    rpb = rpb.to(wide)
    if plan.flat_index is not None:
        return [rpb.flatten(1).index_select(1, plan.flat_index).view(plan.mask_shape)]
    table = F.pad(rpb, (0, 1, 0, 1), value=float("-inf")).index_select(2, plan.col_index)
    runs = table.view(-1, plan.cols.keys.shape[1])  # [(num_heads, table row, C, u), w]
    return [runs.index_select(0, index).view(plan.mask_shape) for index in plan.run_indices]


def _gather(x: Tensor, rows: Tensor, cols: Tensor, plan: _Plan) -> Tensor:
    """[B, H, W, num_heads, head_dim] -> [B * R, num_heads * C, t * u, head_dim] for rows [R, t] and cols [C, u]."""
    if plan.whole:
        return x.flatten(1, 2).transpose(1, 2)
    batch, _, _, num_heads, head_dim = x.shape
    x = x[:, rows[:, None, :, None], cols[:, None, :]]  # [B, R, C, t, u, num_heads, head_dim]
    x = x.permute(0, 1, 5, 2, 3, 4, 6)
    return x.reshape(batch * len(rows), num_heads * len(cols), rows.shape[1] * cols.shape[1], head_dim)


def _split(x: Tensor, batch: int, rows: Tensor, cols: Tensor) -> Tensor:
    """[B * R, num_heads * C, t * u, head_dim] -> [B, R, t, C, u, num_heads, head_dim], the axes of the map in order."""
    x = x.view(batch, len(rows), -1, len(cols), rows.shape[1], cols.shape[1], x.shape[-1])
    return x.permute(0, 1, 4, 3, 5, 2, 6)


def _chunks(batch: int, elements_per_image: int, device: torch.device) -> Iterator[slice]:
    """Slices of the batch that bound what is held at once."""
    step = max(1, _CHUNK_ELEMENTS.get(device.type, _CHUNK_ELEMENTS_DEFAULT) // elements_per_image)
    for first in range(0, batch, step):
        yield slice(first, first + step)


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
    """Neighborhood attention in plain PyTorch operations, differentiable by autograd.

    `dropout_p` drops attention weights, which no kernel does.
    """
    if query.numel() == 0:
        return torch.empty_like(query, memory_format=torch.contiguous_format)
    plan = _plan(query, kernel_size, dilation)
    masks = _masks(query, rpb, kernel_size, plan)
    if plan.whole:
        q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (query, key, value))
        out = scaled_dot_product_attention(q, k, v, attn_mask=masks[0], dropout_p=dropout_p, scale=scale)
        return out.transpose(1, 2).reshape(query.shape).contiguous()  # reshape may give a view, as query's strides are
    rows, cols = plan.rows, plan.cols
    outputs = []
    for chunk in _chunks(len(query), rows.keys.numel() * cols.keys.numel() * query[0, 0, 0].numel(), query.device):
        q, k, v = query[chunk], key[chunk], value[chunk]
        tiles = []
        for (first, end), mask in zip(rows.patterns, masks, strict=True):
            queries, keys = rows.queries[first:end], rows.keys[first:end]
            out = scaled_dot_product_attention(
                _gather(q, queries, cols.queries, plan),
                _gather(k, keys, cols.keys, plan),
                _gather(v, keys, cols.keys, plan),
                attn_mask=mask,
                dropout_p=dropout_p,
                scale=scale,
            )
            tiles.append(_split(out, len(q), queries, cols.queries))
        outputs.append(_untile(tiles, plan))
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).contiguous()


def _untile(tiles: list[Tensor], plan: _Plan) -> Tensor:
    """Tiles of queries, [B, R, t, C, u, num_heads, head_dim] per pattern -> [B, H, W, num_heads, head_dim]."""
    if plan.whole:
        return tiles[0].flatten(3, 4).flatten(1, 2).contiguous()
    x = torch.cat(tiles, 1).flatten(3, 4).flatten(1, 2)
    return x[:, plan.rows.untile[:, None], plan.cols.untile]


def _add_halos(tiles: list[Tensor], plan: _Plan, size: tuple[int, int]) -> Tensor:
    """Sums what the halos say of each key: [B, R, h, C, w, num_heads, head_dim] per pattern -> [B, H, W, ...]."""
    x = torch.cat(tiles, 1).flatten(3, 4).flatten(1, 2)  # [B, T * h, C * w, num_heads, head_dim]
    for dim, axis, length in ((1, plan.rows, size[0]), (2, plan.cols, size[1])):
        total = x.new_zeros([length if i == dim else n for i, n in enumerate(x.shape)])
        for positions, places in axis.overlaps:
            total.index_add_(dim, positions, x.index_select(dim, places))
        x = total
    return x


def _one_hot(offsets: Tensor, kernel_size: int, dtype: torch.dtype) -> Tensor:
    """[...] rpb indices -> [numel, 2 * K - 1]; a pair outside the window is a row of zeros."""
    return (offsets.flatten()[:, None] == torch.arange(2 * kernel_size - 1, device=offsets.device)).to(dtype)


def na2d_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    grads: Sequence[Tensor],
) -> Tensor | None:
    """Writes the gradients of query, key and value into `grads`; returns that of rpb.

    Attention weights are recomputed, nothing of the forward is kept.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    rpb_grad = None if rpb is None else torch.zeros_like(rpb, dtype=wide, memory_format=torch.contiguous_format)
    if query.numel() == 0:
        return None if rpb is None else rpb_grad.to(rpb.dtype)
    _, height, width, num_heads, _ = query.shape
    plan = _plan(query, kernel_size, dilation)
    rows, cols = plan.rows, plan.cols
    masks = _masks(query, rpb, kernel_size, plan)
    logits = rows.offsets.numel() * cols.offsets.numel() * num_heads
    for chunk in _chunks(len(query), logits, query.device):
        q, k, v, g = (x[chunk].to(wide) for x in (query, key, value, grad_output))
        q_tiles, k_tiles, v_tiles = [], [], []
        for (first, end), mask in zip(rows.patterns, masks, strict=True):
            queries, keys = rows.queries[first:end], rows.keys[first:end]
            qt = _gather(q, queries, cols.queries, plan)
            gt = _gather(g, queries, cols.queries, plan)
            kt = _gather(k, keys, cols.keys, plan)
            vt = _gather(v, keys, cols.keys, plan)
            if rows.padded or cols.padded:  # a repeated query must not count twice
                real = rows.real[first:end, None, :, None] & cols.real[:, None, :]  # [R, C, t, u]
                real = real.flatten(2)[:, None, :, :, None]  # [R, 1, C, t * u, 1]
                gt = (gt.view(len(q), -1, num_heads, len(cols.queries), *gt.shape[2:]) * real).view_as(gt)
            weights = torch.add(mask, qt @ kt.mT, alpha=scale).softmax(-1)
            # d softmax: dS = P * (dP - <P, dP>)
            grad_logits = gt @ vt.mT
            v_tiles.append(_split(weights.mT @ gt, len(q), keys, cols.keys))
            grad_logits.sub_((weights * grad_logits).sum(-1, keepdim=True)).mul_(weights)
            q_tiles.append(_split(grad_logits @ kt * scale, len(q), queries, cols.queries))
            k_tiles.append(_split(grad_logits.mT @ qt * scale, len(q), keys, cols.keys))
            if rpb_grad is not None:
                # [N, C, t, u, h, w] -> [N, (t, h), (C, u, w)]: one-hot matrices sum the pairs of each offset without
                # atomics, first over columns, then over rows.
                t, h = queries.shape[1], keys.shape[1]
                pairs = grad_logits.sum(0).view(num_heads, len(cols.queries), t, -1, h, cols.keys.shape[1])
                pairs = pairs.permute(0, 2, 4, 1, 3, 5).reshape(num_heads, t * h, -1)
                by_col = pairs @ _one_hot(cols.offsets, kernel_size[1], wide)
                rpb_grad += _one_hot(rows.offsets[first], kernel_size[0], wide).mT @ by_col
        grads[0][chunk] = _untile(q_tiles, plan)
        grads[1][chunk] = _add_halos(k_tiles, plan, (height, width))
        grads[2][chunk] = _add_halos(v_tiles, plan, (height, width))
    return None if rpb is None else rpb_grad.to(rpb.dtype)
