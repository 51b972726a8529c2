"""Stochastic depth that does not compute what it drops: an image whose residual branch is dropped does not enter it.

On a CPU it costs nothing to know which images those are; a GPU would have to wait for the answer.
"""

from collections.abc import Callable, Iterator

import torch
from timm.layers import DropPath, LayerScale
from torch import Tensor, nn

from ..layers import NeighborhoodAttention2d
from ..ops.tracing import is_observed, is_plain
from .parts import LeanMlp, MapNorm

# Each treats every image by itself.
_BY_IMAGE = (
    *(MapNorm, NeighborhoodAttention2d, LeanMlp, LayerScale, DropPath),
    *(nn.Linear, nn.GELU, nn.Dropout, nn.Identity),
)


def drops_images(block: nn.Module, x: Tensor) -> bool:
    """Whether the block drops images from its branches, and nobody looks on who would miss them there.

    Args:
        block: A NATBlock; any module in it may be another one, or have hooks.
        x: [B, H, W, C].
    """
    if not (_is_at_work(block.drop_path1) or _is_at_work(block.drop_path2)):
        return False
    if type(x) is not Tensor or not x.is_cpu or is_observed():
        return False
    return all(_is_by_image(child) for child in block.children())


def _is_at_work(module: nn.Module) -> bool:
    return isinstance(module, DropPath) and module.training and module.drop_prob > 0.0


def _is_by_image(module: nn.Module) -> bool:
    return all(type(part) in _BY_IMAGE and is_plain(part, type(part)) for part in module.modules())


def add_branch(x: Tensor, branch: Callable[[Tensor], Tensor], drop_path: nn.Module) -> Tensor:
    """x + drop_path(branch(x)), its numbers by rounding, from the same random numbers, where `drops_images`.

    Args:
        x: [B, ...].
        branch: Keeps the shape, and treats every image by itself.
        drop_path: A DropPath, or an Identity.
    """
    if not _is_at_work(drop_path):
        return x + branch(x)
    scales = drop_path(x.new_ones(len(x), *[1] * (x.ndim - 1)))  # of each image's branch: 0, or the same for all
    kept = scales.flatten().nonzero().flatten()
    if len(kept) == 0:  # the parameters' gradients are zero, not missing
        return x + branch(x) * scales
    scale = scales.max().item()
    if len(kept) == len(x):
        return torch.add(x, branch(x), alpha=scale)
    x, part = _Split.apply(x, kept)
    return _Join.apply(x, branch(part), kept, scale)


class _Split(torch.autograd.Function):
    """x [B, ...], kept [K] -> x, and x at the kept images [K, ...]."""

    @staticmethod
    def forward(ctx, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(kept)
        return x.view_as(x), x.index_select(0, kept)

    @staticmethod
    def backward(ctx, grad: Tensor, part_grad: Tensor) -> tuple[Tensor, None]:
        return _add_at(grad, part_grad, *ctx.saved_tensors, 1.0), None


class _Join(torch.autograd.Function):
    """x [B, ...], part [K, ...], kept [K] -> x with scale * part added at the kept images."""

    @staticmethod
    def forward(ctx, x: Tensor, part: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return _add_at(x, part, kept, scale)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return grad, grad.index_select(0, kept) * ctx.scale, None, None


def _add_at(x: Tensor, part: Tensor, kept: Tensor, scale: float) -> Tensor:
    dtype = torch.promote_types(x.dtype, part.dtype)  # under autocast they may differ
    if torch.is_grad_enabled():  # with create_graph, a gradient needs a derivative itself
        return x.to(dtype).index_add(0, kept, part.to(dtype), alpha=scale)
    out, done = torch.empty_like(x, dtype=dtype), 0
    for start, end, first in _runs(kept.tolist()):  # in one pass, where index_add copies x first
        out[done:start] = x[done:start]
        torch.add(x[start:end], part[first : first + end - start], alpha=scale, out=out[start:end])
        done = end
    out[done:] = x[done:]
    return out


def _runs(indices: list[int]) -> Iterator[tuple[int, int, int]]:
    """Of ascending indices, each run of successive ones: its start and end, and where in the list it begins."""
    first = 0
    for i in range(1, len(indices) + 1):
        if i == len(indices) or indices[i] != indices[i - 1] + 1:
            yield indices[first], indices[i - 1] + 1, first
            first = i
