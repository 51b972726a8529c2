"""What users call: na2d, 2-D neighborhood attention, its form for a packed qkv, and na1d, its form for sequences."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from .backends import BACKENDS, KERNELS, autocast_enabled, autocast_off, native
from .checks import as_row, as_row_rpb, check_apart, check_packed
from .request import Request
from .selection import select
from .tracing import is_converting, is_exporting, is_transformed
from .window import row_window

_Window = tuple[tuple[int, int], tuple[int, int], float]  # kernel_size, dilation, scale


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """2-D neighborhood attention: every token attends to its K_h x K_w nearest tokens.

    At a border the window is shifted inward, never cut, so each query has exactly K_h * K_w keys. Under autocast,
    query, key and value are cast to its dtype and rpb is not: the bias is added to logits kept in float32 or wider.

    Args:
        query: [B, H, W, num_heads, head_dim]; may be a view into a packed qkv.
        key: Shape, dtype and device of query.
        value: Shape, dtype and device of query.
        kernel_size: Odd; an int serves both axes. 1 on an axis confines the window to the query's own row or column.
        dilation: At least 1; kernel_size * dilation must fit in (H, W). Nothing is padded here.
        rpb: [num_heads, 2*K_h-1, 2*K_w-1], added to the scaled logits; its centre is offset (0, 0). query's dtype or
            float32.
        scale: Multiplies the logits; None means head_dim ** -0.5, and 0.0 is honoured.
        dropout_p: Probability of dropping an attention weight, in training and evaluation alike, as in
            scaled_dot_product_attention. Above 0 the call runs in plain PyTorch operations.

    Returns:
        [B, H, W, num_heads, head_dim], contiguous, query's dtype.

    Raises:
        ValueError: Shapes, dtypes or devices differ; kernel_size even; window larger than the map; dropout_p outside
            [0, 1].
        RuntimeError: The backend that was asked for cannot run here; the message says why.

    Source: Hassani et al., CVPR 2023, arXiv:2204.07143, section 3; dilation arXiv:2209.15001.
    """
    query, key, value = map(autocast, (query, key, value))
    window = *check_apart(query, key, value, rpb, kernel_size, dilation), _scale(query, scale)
    _check_dropout(dropout_p)
    requires_grad = torch.is_grad_enabled() and (
        query.requires_grad or key.requires_grad or value.requires_grad or (rpb is not None and rpb.requires_grad)
    )
    backend = select(_request(query, rpb, window, requires_grad, dropout_p))
    if dropout_p > 0.0 or backend not in KERNELS:
        return _call(backend, query, key, value, rpb, window, dropout_p)
    return torch.ops.nat_models.na2d.default(query, key, value, rpb, *window)


def na2d_qkvpacked(
    qkv: Tensor,
    *,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`na2d` of the query, key and value in one tensor, [B, H, W, 3, num_heads, head_dim], as a projection makes it.

    The same result; its gradient is packed too, where that of three views would be three tensors and a copy.
    """
    qkv = autocast(qkv)
    window = *check_packed(qkv, rpb, kernel_size, dilation), _scale(qkv, scale)
    _check_dropout(dropout_p)
    requires_grad = torch.is_grad_enabled() and (qkv.requires_grad or (rpb is not None and rpb.requires_grad))
    request = _request(qkv, rpb, window, requires_grad, dropout_p)
    backend = select(request)
    if dropout_p > 0.0 or backend not in KERNELS:
        return _call(backend, *qkv.unbind(3), rpb, window, dropout_p)
    # torch.jit.trace traces with gradients, and checks what it traced without.
    wants_derivative = requires_grad or request.transformed or request.traced
    if backend == "native" and not wants_derivative and rpb is not None and qkv.stride(-1) == 1:
        return _call_inference(qkv, native.as_inference_rpb(rpb, qkv.dtype), *window)
    return torch.ops.nat_models.na2d_qkvpacked.default(qkv, rpb, *window)


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel_size: int,
    dilation: int = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """1-D neighborhood attention: `na2d` of sequences, as maps of one row and length L.

    Args:
        query: [B, L, num_heads, head_dim].
        key: Shape, dtype and device of query.
        value: Shape, dtype and device of query.
        kernel_size: Odd; an int.
        dilation: At least 1; kernel_size * dilation must fit in L.
        rpb: [num_heads, 2*K-1], added to the scaled logits; its centre is offset 0. query's dtype or float32.
        scale: As in na2d.
        dropout_p: As in na2d.

    Returns:
        [B, L, num_heads, head_dim], contiguous, query's dtype.

    Raises:
        ValueError: kernel_size or dilation is no int; what na2d refuses.
        RuntimeError: The backend that was asked for cannot run here; the message says why.

    Source: as na2d; one axis of it.
    """
    query, key, value = as_row("query", query), as_row("key", key), as_row("value", value)
    kernel, spacing = row_window(kernel_size, dilation)
    rpb = as_row_rpb(rpb)
    window = dict(kernel_size=kernel, dilation=spacing, rpb=rpb, scale=scale, dropout_p=dropout_p)
    return na2d(query, key, value, **window).squeeze(1)


def _call_inference(
    qkv: Tensor, rpb: Tensor, kernel_size: tuple[int, int], dilation: tuple[int, int], scale: float
) -> Tensor:
    operator, args = torch.ops.nat_models.na2d_qkvpacked_inference.default, (*kernel_size, *dilation, scale)
    if torch.compiler.is_compiling():  # Dynamo does not trace the guard
        return operator(qkv, rpb, *args)
    # No gradient is wanted, so the Python that refuses one (registration.py) is passed by.
    with torch._C._AutoDispatchBelowAutograd():
        return operator(qkv, rpb, *args)


def _request(x: Tensor, rpb: Tensor | None, window: _Window, requires_grad: bool, dropout_p: float) -> Request:
    """The kind of a call with query or a packed qkv `x`."""
    compiling = torch.compiler.is_compiling()
    traced = not compiling and torch.jit.is_tracing()
    exporting = is_exporting() if compiling else traced and is_converting()
    return Request(
        x.device,
        x.dtype,
        x.shape[-1],
        window[-1],
        window[0],
        rpb=rpb is not None,
        requires_grad=requires_grad,
        dropout=dropout_p > 0.0,
        compiling=compiling,
        exporting=exporting,
        transformed=is_transformed(),
        traced=traced,
        # Tracers and dispatch modes must see one operator (FLOP counters, torch.jit.trace); explain() documents this.
        observed=traced or (not compiling and torch._C._len_torch_dispatch_stack() > 0),
        # Comparing a symbolic size would bake the answer into the exported graph.
        empty=not exporting
        and (x.device.type == "meta" or x.numel() == 0 or (not compiling and isinstance(x, FakeTensor))),
    )


def _call(
    backend: str, query: Tensor, key: Tensor, value: Tensor, rpb: Tensor | None, window: _Window, dropout_p: float
) -> Tensor:
    """Runs a backend in place of the operator."""
    with autocast_off(query):
        if dropout_p > 0.0:
            return BACKENDS[backend].na2d(query, key, value, rpb, *window, dropout_p=dropout_p)
        return BACKENDS[backend].na2d(query, key, value, rpb, *window)


def autocast(x: Tensor) -> Tensor:
    """x in the dtype that autocast computes in; float64 stays."""
    if not autocast_enabled(x) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _check_dropout(dropout_p: float) -> None:
    if not 0.0 <= dropout_p <= 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1], got {dropout_p=}.")


def _scale(x: Tensor, scale: float | None) -> float:
    return x.shape[-1] ** -0.5 if scale is None else scale
