"""Attention weights themselves: na2d_qk, the logits of every query's window, and na2d_av, their application to values.

For those who look at weights or change them between the two. Plain PyTorch, on any device, one key of the windows at a
time: what is held is the weights, [B, H, W, num_heads, K_h*K_w], and no K_h*K_w-fold copy of keys or values, which
autograd would keep too. Where nobody needs the weights, na2d is faster and holds none. On CUDA the gradients of keys,
values and rpb are summed in any order, unless torch.use_deterministic_algorithms is on.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .backends import autocast_off
from .checks import as_row, as_row_rpb, check_av, check_qk
from .functional import autocast
from .tracing import is_transformed
from .window import row_window, window


def na2d_qk(
    query: Tensor,
    key: Tensor,
    *,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The logits of 2-D neighborhood attention: what `na2d` takes the softmax of.

    `na2d_av(na2d_qk(query, key, ...).softmax(-1), value, ...)` is `na2d(query, key, value, ...)`. Low precision is
    accumulated in float32 and rounded once, to query's dtype; na2d does not round its logits. Under autocast query and
    key are cast to its dtype, as in na2d.

    Args:
        query: [B, H, W, num_heads, head_dim].
        key: Shape, dtype and device of query.
        kernel_size: Odd; an int serves both axes.
        dilation: At least 1; kernel_size * dilation must fit in (H, W). Nothing is padded here.
        rpb: [num_heads, 2*K_h-1, 2*K_w-1], added to the scaled logits; its centre is offset (0, 0). query's dtype or
            float32.
        scale: Multiplies the logits; None means head_dim ** -0.5, and 0.0 is honoured.

    Returns:
        [B, H, W, num_heads, K_h*K_w], query's dtype. The keys of a window come row by row, from its top left corner;
        that of key k is (start_row + k // K_w * dilation, start_col + k % K_w * dilation).

    Raises:
        ValueError: What na2d refuses.

    Source: Hassani et al., CVPR 2023, arXiv:2204.07143, section 3; dilation arXiv:2209.15001.
    """
    query, key = autocast(query), autocast(key)
    kernel_size, dilation = check_qk(query, key, rpb, kernel_size, dilation)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with autocast_off(query):
        keys, offsets = _windows(query, kernel_size, dilation)
        logits = scale * _bilinear(_Products, *_widen(query, key), *keys)
        if rpb is not None:
            rows, cols = offsets
            bias = rpb.to(logits.dtype)[:, rows][:, :, :, cols]  # [num_heads, H, K_h, W, K_w]
            logits = logits + bias.permute(1, 3, 0, 2, 4).flatten(3)
        return logits.to(query.dtype)


def na2d_av(
    weights: Tensor, value: Tensor, *, kernel_size: int | Sequence[int], dilation: int | Sequence[int] = 1
) -> Tensor:
    """Weighted sums over the windows of 2-D neighborhood attention: the second half of `na2d`.

    The weights may be anything: no softmax is expected. Low precision is accumulated in float32.

    Args:
        weights: [B, H, W, num_heads, K_h*K_w], value's dtype or float32, which softmax gives under CUDA's autocast; the
            order of keys is that of na2d_qk.
        value: [B, H, W, num_heads, head_dim].
        kernel_size: Odd; an int serves both axes.
        dilation: At least 1; kernel_size * dilation must fit in (H, W). Nothing is padded here.

    Returns:
        [B, H, W, num_heads, head_dim], value's dtype.

    Raises:
        ValueError: weights do not fit value and kernel_size; what na2d refuses.

    Source: Hassani et al., CVPR 2023, arXiv:2204.07143, section 3; dilation arXiv:2209.15001.
    """
    value = autocast(value)
    if weights.dtype != torch.float32:
        weights = autocast(weights)
    kernel_size, dilation = check_av(weights, value, kernel_size, dilation)
    with autocast_off(value):
        keys, _ = _windows(value, kernel_size, dilation)
        return _bilinear(_Blends, *_widen(weights, value), *keys).to(value.dtype)


def na1d_qk(
    query: Tensor,
    key: Tensor,
    *,
    kernel_size: int,
    dilation: int = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """The logits of 1-D neighborhood attention: `na2d_qk` of sequences, as maps of one row and length L.

    Args:
        query: [B, L, num_heads, head_dim].
        key: Shape, dtype and device of query.
        kernel_size: Odd; an int.
        dilation: At least 1; kernel_size * dilation must fit in L.
        rpb: [num_heads, 2*K-1], added to the scaled logits; its centre is offset 0. query's dtype or float32.
        scale: As in na2d_qk.

    Returns:
        [B, L, num_heads, K], query's dtype.

    Raises:
        ValueError: kernel_size or dilation is no int; what na2d refuses.

    Source: as na2d_qk; one axis of it.
    """
    query, key = as_row("query", query), as_row("key", key)
    kernel, spacing = row_window(kernel_size, dilation)
    return na2d_qk(query, key, kernel_size=kernel, dilation=spacing, rpb=as_row_rpb(rpb), scale=scale).squeeze(1)


def na1d_av(weights: Tensor, value: Tensor, *, kernel_size: int, dilation: int = 1) -> Tensor:
    """Weighted sums over the windows of 1-D neighborhood attention: `na2d_av` of sequences.

    Args:
        weights: [B, L, num_heads, K], value's dtype or float32.
        value: [B, L, num_heads, head_dim].
        kernel_size: Odd; an int.
        dilation: At least 1; kernel_size * dilation must fit in L.

    Returns:
        [B, L, num_heads, head_dim], value's dtype.

    Raises:
        ValueError: weights do not fit value and kernel_size; kernel_size or dilation is no int; what na2d refuses.

    Source: as na2d_av; one axis of it.
    """
    kernel, spacing = row_window(kernel_size, dilation)
    weights, value = as_row("weights", weights), as_row("value", value)
    return na2d_av(weights, value, kernel_size=kernel, dilation=spacing).squeeze(1)


_Keys = tuple[Tensor, Tensor]  # of each axis: [H, K_h] and [W, K_w], positions of the keys of each query


def _windows(x: Tensor, kernel_size: tuple[int, int], dilation: tuple[int, int]) -> tuple[_Keys, _Keys]:
    """The keys of both axes, and their rpb indices."""
    axes = zip(x.shape[1:3], kernel_size, dilation, strict=True)
    keys, offsets = zip(*(window(*axis, device=x.device) for axis in axes), strict=True)
    return keys, offsets


def _widen(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(y.dtype, torch.float32)
    return x.to(wide), y.to(wide)


# Three bilinear functions of maps and weights. The derivatives of each are the other two, so that autograd keeps their
# two arguments and nothing of what is gathered on the way, to any order.


def _gathered(x: Tensor, rows: Tensor, cols: Tensor) -> Iterator[Tensor]:
    """x at each key of the windows in turn: K_h * K_w times [B, H, W, num_heads, head_dim]."""
    for row in rows.unbind(1):
        strip = x.index_select(1, row)
        for col in cols.unbind(1):
            yield strip.index_select(2, col)


class _Bilinear(torch.autograd.Function):
    @staticmethod
    def setup_context(ctx, inputs, output):
        x, y, *ctx.keys = inputs
        ctx.save_for_backward(x, y)


class _Products(_Bilinear):
    """Every query with the keys of its window: two [B, H, W, num_heads, head_dim] -> [B, H, W, num_heads, K_h*K_w]."""

    @staticmethod
    def forward(queries: Tensor, keys: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        return torch.stack([(queries * key).sum(-1) for key in _gathered(keys, rows, cols)], -1)

    @staticmethod
    def backward(ctx, grad):
        queries, keys = ctx.saved_tensors
        for_queries, for_keys, *_ = ctx.needs_input_grad
        return (
            _bilinear(_Blends, grad, keys, *ctx.keys) if for_queries else None,
            _bilinear(_Spreads, grad, queries, *ctx.keys) if for_keys else None,
            None,
            None,
        )


class _Blends(_Bilinear):
    """The weighted sum of the values in each query's window: [..., K_h*K_w] and [..., head_dim] -> [..., head_dim]."""

    @staticmethod
    def forward(weights: Tensor, values: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        pairs = zip(weights.split(1, -1), _gathered(values, rows, cols), strict=True)
        weight, value = next(pairs)
        total = weight * value
        for weight, value in pairs:
            total += weight * value
        return total

    @staticmethod
    def backward(ctx, grad):
        weights, values = ctx.saved_tensors
        for_weights, for_values, *_ = ctx.needs_input_grad
        return (
            _bilinear(_Products, grad, values, *ctx.keys) if for_weights else None,
            _bilinear(_Spreads, weights, grad, *ctx.keys) if for_values else None,
            None,
            None,
        )


class _Spreads(_Bilinear):
    """The transpose: every key gets the weighted sum of the queries whose window it is in."""

    @staticmethod
    def forward(weights: Tensor, queries: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
        weight = iter(weights.split(1, -1))
        zeros = torch.zeros_like(weights[..., :1] * queries)  # batched by vmap where either is
        total = zeros.clone()
        for row in rows.unbind(1):
            strip = zeros.clone()
            for col in cols.unbind(1):
                strip.index_add_(2, col, next(weight) * queries)
            total.index_add_(1, row, strip)
        return total

    @staticmethod
    def backward(ctx, grad):
        weights, queries = ctx.saved_tensors
        for_weights, for_queries, *_ = ctx.needs_input_grad
        return (
            _bilinear(_Products, queries, grad, *ctx.keys) if for_weights else None,
            _bilinear(_Blends, weights, grad, *ctx.keys) if for_queries else None,
            None,
            None,
        )


def _bilinear(function: type[_Bilinear], x: Tensor, y: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    # torch.func and forward mode see the operations themselves.
    return (function.forward if is_transformed() else function.apply)(x, y, rows, cols)
