"""flex_attention: the window as a BlockMask, rpb as a score_mod, fused into one kernel by torch.compile.

flex_attention skips whole blocks of 128 x 128 query-key pairs, so tokens are put in an order in which a block of 128 is
a tile of the map: the window of a tile then lies in few other tiles. Dilation groups follow one another, each padded to
whole tiles with tokens outside every window. What depends on sizes alone is computed once per device and kept in a
bounded cache.
"""

import functools
import importlib.util
import operator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ..request import Request
from ..window import group_length, window_pair, window_start

SUMMARY = "flex_attention with rpb as its score_mod, compiled; CUDA and XPU"

_BLOCK = 128  # tokens; flex_attention's default, which the block sizes of all its kernels divide
_TILES = [2**i for i in range(_BLOCK.bit_length())]  # heights of a tile of _BLOCK tokens
_MIN_HEAD_DIM = 16  # of flex_attention's GPU kernels

# With two threads the process dies in 2.6 and 2.9, and 2.7 and 2.8 generate what a C++ compiler refuses.
_CPU_CODE_IS_SOUND = torch.__version__ >= "2.13"

# What a plan may hold on the host: [positions, positions] booleans of an axis and [blocks, blocks] integers of the map,
# up to 3 and 8 GB while they are made. More might end the process for want of memory, without an error.
_MAX_POSITIONS = 1 << 15
_MAX_BLOCKS = 1 << 14

# Every dtype, head count, size and mode is compiled once. PyTorch's limit of 8 would be an error within one model.
_RECOMPILE_LIMIT = 256


def why_not(request: Request) -> str | None:
    """Why flex_attention cannot run a kind of call; None if it can."""
    if request.dropout:
        return "it drops no attention weights"
    if request.transformed:
        return "flex_attention has neither forward mode nor a batching rule"
    if request.device.type == "cpu":
        if request.requires_grad:
            return "flex_attention has no backward on the CPU"
        if request.compiling and not _CPU_CODE_IS_SOUND:
            return "PyTorch before 2.13 compiles flex_attention for the CPU to code that corrupts memory"
        if request.compiling and request.dtype == torch.float64:
            return "compiled for the CPU, flex_attention does not compute in torch.float64"
        return None
    if request.dtype == torch.float64:
        return "flex_attention's kernels do not compute in torch.float64"
    if request.rpb and request.requires_grad and torch.are_deterministic_algorithms_enabled():
        return "it sums the gradient of rpb in any order, and torch.use_deterministic_algorithms is on"
    return _why_no_kernel(request.device)


@torch.compiler.assume_constant_result
def _why_no_kernel(device: torch.device) -> str | None:
    return _why_no_triton(device)


@functools.cache
def _why_no_triton(device: torch.device) -> str | None:
    if device.type not in ("cuda", "xpu"):
        return f"its fused kernels are Triton's, which does not run on {device.type}"
    if not getattr(torch, device.type).is_available():
        return f"there is no {device.type} device here"
    if importlib.util.find_spec("triton") is None:
        return "the package triton, which compiles its kernels, is not installed"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        major, minor = torch.cuda.get_device_capability(device)
        return f"PyTorch tests its kernels from compute capability 8.0 on, this device has {major}.{minor}"
    return None


class _Axis(NamedTuple):
    """One axis in tiled order: its dilation groups one after another, each padded to whole tiles; N positions in all.

    A key is in a query's window if start <= position < start + kernel_size. No padding is in any.
    """

    start: Tensor  # [N] int64, first key of each query's window; padding repeats the last query of its group
    touches: Tensor  # [T, T] bool, whether some query of a tile has a key in another tile


def _axis(length: int, kernel_size: int, dilation: int, tile: int) -> _Axis:
    padded = _padded(length, dilation, tile)
    position = torch.arange(dilation * padded)
    group = position // padded
    members = group_length(length, dilation, group)
    query = torch.minimum(position % padded, members - 1)
    start = group * padded + window_start(query, members, kernel_size)
    # Windows of neighbours overlap, so those of a tile cover one run of keys.
    first, last = start.view(-1, tile)[:, :1] // tile, (start.view(-1, tile)[:, -1:] + kernel_size - 1) // tile
    other = torch.arange(len(position) // tile)
    return _Axis(start, (other >= first) & (other <= last))


def _padded(length: int, dilation: int, tile: int) -> int:
    """Positions of a dilation group in tiled order."""
    return (group_length(length, dilation, 0) + tile - 1) // tile * tile


class _Plan(NamedTuple):
    tile: tuple[int, int]
    positions: Tensor  # [4, L] int32: row and column of each token, first row and column of its window, in tiled order
    # The blocks of BlockMask, [blocks] and [blocks, blocks] int32: of keys for each query, then transposed
    kv_num_blocks: Tensor
    kv_indices: Tensor
    q_num_blocks: Tensor
    q_indices: Tensor


def _tile_shapes(
    size: tuple[int, ...], kernel_size: tuple[int, ...], dilation: tuple[int, ...]
) -> list[tuple[int, int]]:
    """The shapes of a tile whose plan can be held. Checks what na2d has checked, for direct calls of the operator."""
    window_pair(kernel_size, dilation)
    if len(size) != 2 or any(n < k * d for n, k, d in zip(size, kernel_size, dilation, strict=True)):
        raise ValueError(f"kernel_size * dilation must fit in the map, got {size=}, {kernel_size=}, {dilation=}.")
    shapes = [(t, _BLOCK // t) for t in _TILES]
    positions = [[d * _padded(n, d, t) for n, d, t in zip(size, dilation, shape, strict=True)] for shape in shapes]
    fits = [rows * cols <= _MAX_BLOCKS * _BLOCK for rows, cols in positions]
    if not any(fits) or max(positions[0][0], positions[-1][1]) > _MAX_POSITIONS:  # a tile of one row, and of one column
        raise ValueError(
            f"flex_attention's mask is planned for up to {_MAX_BLOCKS} blocks of {_BLOCK} tokens and {_MAX_POSITIONS} "
            f"rows and columns, dilation groups padded, got {size=}, {dilation=}; the backend 'blocked' needs no plan."
        )
    return [shape for shape, fit in zip(shapes, fits, strict=True) if fit]


@functools.lru_cache(maxsize=64)
def _plan_of(
    size: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int], device: torch.device
) -> _Plan:
    tiles = _tile_shapes(size, kernel_size, dilation)
    # Cached plans must be real tensors, usable with and without gradients; the default device may be another.
    with unset_fake_temporarily(), torch.inference_mode(False), torch.device("cpu"):
        axes = [[_axis(*axis) for axis in zip(size, kernel_size, dilation, tile, strict=True)] for tile in tiles]
        # The shape that leaves the fewest blocks to compute. On a narrow map that is a wide one: a window spans most of
        # the width anyway.
        best = min(range(len(tiles)), key=lambda i: axes[i][0].touches.sum() * axes[i][1].touches.sum())
        (t, u), (rows, cols) = tiles[best], axes[best]

        def in_tiles(of_row: Tensor, of_col: Tensor) -> list[Tensor]:
            grid = torch.meshgrid(of_row, of_col, indexing="ij")
            return [x.view(-1, t, len(of_col) // u, u).transpose(1, 2).flatten() for x in grid]

        positions = in_tiles(torch.arange(len(rows.start)), torch.arange(len(cols.start)))
        positions += in_tiles(rows.start, cols.start)
        touches = torch.kron(rows.touches.int(), cols.touches.int())
        blocks = []
        for dense in (touches, touches.mT):
            blocks += [dense.sum(-1), dense.argsort(dim=-1, descending=True, stable=True)]
        return _Plan((t, u), *(x.to(device, torch.int32) for x in (torch.stack(positions), *blocks)))


@torch.compiler.assume_constant_result
def _tile(size: tuple[int, int], kernel_size: tuple[int, int], dilation: tuple[int, int]) -> tuple[int, int]:
    return _plan_of(size, kernel_size, dilation, torch.device("cpu")).tile


# A node of its own in a compiled graph: traced, what it does would run at each call, and torch.compile takes no more
# than one tensor of a function as a constant. PyTorch 2.6 infers no schema from collections.abc.Sequence and list.
@torch.library.custom_op(
    "nat_models::flex_plan",
    mutates_args=(),
    schema="(int[] size, int[] kernel_size, int[] dilation, Device device) -> Tensor[]",
)
def _plan_tensors(size, kernel_size, dilation, device) -> list[Tensor]:
    # Compiled code may reuse an operator's output buffer, so hand out copies.
    return [x.clone() for x in _plan_of(tuple(size), tuple(kernel_size), tuple(dilation), device)[1:]]


@_plan_tensors.register_fake
def _(size, kernel_size, dilation, device):
    plan = _plan_of(tuple(size), tuple(kernel_size), tuple(dilation), torch.device("cpu"))
    return [torch.empty(x.shape, dtype=x.dtype, device=device) for x in plan[1:]]


def _to_tiles(x: Tensor, tile: tuple[int, int], dilation: tuple[int, int], head_dim_pad: int) -> Tensor:
    """[B, H, W, num_heads, head_dim] -> [B, num_heads, L, head_dim + pad], the tokens of a tile next to each other."""
    batch, height, width, num_heads, head_dim = x.shape
    (t, u), (rows, cols) = tile, dilation
    padded_rows, padded_cols = _padded(height, rows, t), _padded(width, cols, u)
    x = F.pad(x, (0, 0, 0, 0, 0, padded_cols * cols - width, 0, padded_rows * rows - height))
    x = x.view(batch, padded_rows // t, t, rows, padded_cols // u, u, cols, num_heads, head_dim)
    x = x.permute(0, 7, 3, 1, 6, 4, 2, 5, 8)  # [B, num_heads, row group, T, column group, U, t, u, head_dim]
    return F.pad(x.reshape(batch, num_heads, -1, head_dim), (0, head_dim_pad))


def _from_tiles(x: Tensor, size: tuple[int, int], tile: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """The inverse: [B, num_heads, L, head_dim] -> [B, H, W, num_heads, head_dim]."""
    batch, num_heads, _, head_dim = x.shape
    (t, u), (rows, cols), (height, width) = tile, dilation, size
    padded_rows, padded_cols = _padded(height, rows, t), _padded(width, cols, u)
    x = x.view(batch, num_heads, rows, padded_rows // t, cols, padded_cols // u, t, u, head_dim)
    x = x.permute(0, 3, 6, 2, 5, 7, 4, 1, 8)  # [B, T, t, row group, U, u, column group, num_heads, head_dim]
    x = x.reshape(batch, padded_rows * rows, padded_cols * cols, num_heads, head_dim)
    return x[:, :height, :width]


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> Tensor:
    """Neighborhood attention of checked tensors [B, H, W, num_heads, head_dim]; see `nat_models.na2d`.

    On an accelerator it is compiled, by itself or with what surrounds it. On a CPU outside of torch.compile it is not
    and holds the matrix of all scores.
    """
    alone = query.device.type != "cpu" and not torch.compiler.is_compiling()
    return (_attend_compiled if alone else _attend)(query, key, value, rpb, kernel_size, dilation, scale)


def _attend_compiled(*args) -> Tensor:
    config, name = torch._dynamo.config, _recompile_limit_name()
    with config.patch({name: max(getattr(config, name), _RECOMPILE_LIMIT)}):
        return _compiled()(*args)


def _recompile_limit_name() -> str:
    return "recompile_limit" if hasattr(torch._dynamo.config, "recompile_limit") else "cache_size_limit"  # PyTorch 2.6


@functools.cache
def _compiled():
    return torch.compile(_attend, fullgraph=True)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> Tensor:
    from torch.nn.attention.flex_attention import BlockMask, flex_attention  # slow to import

    # Sizes of the map become constants of the compiled code; operator.index is how torch.compile takes that.
    size = operator.index(query.shape[1]), operator.index(query.shape[2])
    head_dim = operator.index(query.shape[4])
    tile = _tile(size, kernel_size, dilation)
    positions, *blocks = _plan_tensors(size, kernel_size, dilation, query.device)
    kv_num_blocks, kv_indices, q_num_blocks, q_indices = (x[None, None] for x in blocks)
    row, col, first_row, first_col = positions.unbind(0)
    tokens = positions.shape[1]

    def in_window(batch, head, q, k):
        below, right = row[k] - first_row[q], col[k] - first_col[q]
        return (below >= 0) & (below < kernel_size[0]) & (right >= 0) & (right < kernel_size[1])

    def add_rpb(score, batch, head, q, k):
        # Pairs outside the window are computed too, before they are masked: their offset must stay in the table.
        i = (row[k] - row[q] + kernel_size[0] - 1).clamp(0, 2 * kernel_size[0] - 2)
        j = (col[k] - col[q] + kernel_size[1] - 1).clamp(0, 2 * kernel_size[1] - 2)
        return score + bias[head, i, j]

    mask = BlockMask(
        seq_lengths=(tokens, tokens),
        kv_num_blocks=kv_num_blocks,
        kv_indices=kv_indices,
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=q_num_blocks,
        q_indices=q_indices,
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(_BLOCK, _BLOCK),
        mask_mod=in_window,
    )
    # Zeros up to a power of two, for versions whose kernels take no other head_dim. On a CPU always some: there the
    # compiler of PyTorch 2.15 takes no query that ends in a reshape.
    pad = max(_MIN_HEAD_DIM, 1 << (head_dim - (query.device.type != "cpu")).bit_length()) - head_dim
    q, k, v = (_to_tiles(x, tile, dilation, pad) for x in (query, key, value))
    if rpb is not None:
        # Here and not in the kernel, which would also sum the gradient in a low precision.
        bias = rpb.to(torch.promote_types(query.dtype, torch.float32))
    out = flex_attention(q, k, v, score_mod=None if rpb is None else add_rpb, block_mask=mask, scale=scale)
    return _from_tiles(out, size, tile, dilation)[..., :head_dim].contiguous()
