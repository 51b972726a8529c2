"""na2d, 2-D neighborhood attention: the operator, its registration with PyTorch and the choice of backend."""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import blocked, reference
from .window import window_pair

__all__ = ["BACKENDS", "explain", "na2d", "use_backend"]

BACKENDS = {
    "blocked": "tiles of queries against their halo through scaled_dot_product_attention; any device",
    "reference": "every key gathered, in plain autograd; slow, the meaning of the operator",
}

_requested: str | None = os.environ.get("NAT_MODELS_BACKEND") or None


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Runs na2d on one backend inside a `with` block, in every thread of the process; None means automatic choice.

    The environment variable NAT_MODELS_BACKEND sets the same for a whole process.

    Raises:
        ValueError: No backend has that name.
    """
    global _requested
    if name is not None:
        _check_backend(name, "use_backend")
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def _check_backend(name: str, origin: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{origin} asks for the backend {name!r}, known are {', '.join(BACKENDS)}.")


def _backend() -> str:
    if _requested is None:
        return "blocked"
    _check_backend(_requested, "NAT_MODELS_BACKEND")
    return _requested


def explain() -> str:
    """Which backend runs, which others there are, and how the choice was made. `python -m nat_models` prints it."""
    chosen = _backend()
    origin = "chosen automatically" if _requested is None else "asked for by NAT_MODELS_BACKEND or use_backend"
    lines = [f"na2d runs on {chosen}, {origin}."]
    lines += [f"  {'*' if name == chosen else ' '} {name:10} {what}" for name, what in BACKENDS.items()]
    return "\n".join(lines)


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """2-D neighborhood attention: every token attends to its K_h x K_w nearest tokens.

    At a border the window is shifted inward, never cut, so each query has exactly K_h * K_w keys. Under autocast,
    query, key and value are cast to its dtype and rpb is not: the bias is added to logits kept in float32 or wider.

    Args:
        query: [B, H, W, num_heads, head_dim]; may be a view into a packed qkv.
        key: Shape, dtype and device of query.
        value: Shape, dtype and device of query.
        kernel_size: Odd, at least 3; an int serves both axes.
        dilation: At least 1; kernel_size * dilation must fit in (H, W). Nothing is padded here.
        rpb: [num_heads, 2*K_h-1, 2*K_w-1], added to the scaled logits; its centre is offset (0, 0). query's dtype or
            float32.
        scale: Multiplies the logits; None means head_dim ** -0.5, and 0.0 is honoured.

    Returns:
        [B, H, W, num_heads, head_dim], contiguous, query's dtype.

    Raises:
        ValueError: Shapes, dtypes or devices differ; kernel_size even; window larger than the map.

    Source: Hassani et al., CVPR 2023, arXiv:2204.07143, section 3; dilation arXiv:2209.15001.
    """
    kernel_size, dilation = window_pair(kernel_size, dilation)
    if _autocast_enabled(query) and query.dtype != torch.float64:
        query, key, value = (x.to(torch.get_autocast_dtype(x.device.type)) for x in (query, key, value))
    _check(query, key, value, rpb, kernel_size, dilation)
    if scale is None:
        scale = query.shape[-1] ** -0.5
    if _backend() == "reference":
        with _autocast_off(query):
            return reference.na2d(query, key, value, rpb, kernel_size, dilation, scale)
    return torch.ops.nat_models.na2d(query, key, value, rpb, kernel_size, dilation, scale)


def _autocast_enabled(x: Tensor) -> bool:
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def _autocast_off(x: Tensor) -> AbstractContextManager:
    """Inside the operator dtypes are settled: an autocast left on would round the mask to its dtype."""
    return torch.autocast(x.device.type, enabled=False) if _autocast_enabled(x) else nullcontext()


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
) -> None:
    if query.ndim != 5:
        raise ValueError(f"query must be [B, H, W, num_heads, head_dim], got shape {tuple(query.shape)}.")
    if not query.is_floating_point():
        raise ValueError(f"query must be of a floating-point dtype, got {query.dtype}.")
    for name, x in (("key", key), ("value", value)):
        if (x.shape, x.dtype, x.device) != (query.shape, query.dtype, query.device):
            raise ValueError(
                f"{name} must match query in shape, dtype and device, got {name} {tuple(x.shape)} {x.dtype} "
                f"on {x.device} and query {tuple(query.shape)} {query.dtype} on {query.device}."
            )
    _, height, width, num_heads, _ = query.shape
    if height < kernel_size[0] * dilation[0] or width < kernel_size[1] * dilation[1]:
        raise ValueError(
            f"kernel_size * dilation must fit in the map, got a map of {height} x {width} with "
            f"{kernel_size=}, {dilation=}. NeighborhoodAttention2d pads smaller maps, na2d does not."
        )
    if rpb is not None:
        expected = (num_heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1)
        if tuple(rpb.shape) != expected or rpb.device != query.device or rpb.dtype not in (query.dtype, torch.float32):
            raise ValueError(
                f"rpb must be [num_heads, 2*K_h-1, 2*K_w-1] = {expected}, {query.dtype} or torch.float32, on "
                f"{query.device}, got {tuple(rpb.shape)} {rpb.dtype} on {rpb.device}."
            )


_ARGUMENTS = "Tensor query, Tensor key, Tensor value, Tensor? rpb, int[2] kernel_size, int[2] dilation, float scale"
torch.library.define("nat_models::na2d", f"({_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
# The gradient of rpb has no elements where rpb is None: a schema cannot return an optional tensor.
torch.library.define(
    "nat_models::na2d_backward",
    f"(Tensor grad_output, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl("nat_models::na2d", "CompositeExplicitAutograd")
def _na2d(query, key, value, rpb, kernel_size, dilation, scale):
    with _autocast_off(query):
        return blocked.na2d(query, key, value, rpb, tuple(kernel_size), tuple(dilation), scale)


@torch.library.impl("nat_models::na2d_backward", "CompositeExplicitAutograd")
def _na2d_backward(grad_output, query, key, value, rpb, kernel_size, dilation, scale):
    with _autocast_off(query):
        *grads, rpb_grad = blocked.na2d_backward(
            grad_output, query, key, value, rpb, tuple(kernel_size), tuple(dilation), scale
        )
    return *grads, query.new_empty(0) if rpb_grad is None else rpb_grad


@torch.library.register_fake("nat_models::na2d")
def _na2d_fake(query, key, value, rpb, kernel_size, dilation, scale):
    return torch.empty_like(query, memory_format=torch.contiguous_format)


@torch.library.register_fake("nat_models::na2d_backward")
def _na2d_backward_fake(grad_output, query, key, value, rpb, kernel_size, dilation, scale):
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    rpb_grad = query.new_empty(0) if rpb is None else torch.empty_like(rpb, memory_format=torch.contiguous_format)
    return *grads, rpb_grad


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kernel_size, ctx.dilation, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad_output):
    query, key, value, rpb = ctx.saved_tensors
    *grads, rpb_grad = torch.ops.nat_models.na2d_backward(
        grad_output, query, key, value, rpb, ctx.kernel_size, ctx.dilation, ctx.scale
    )
    return *grads, None if rpb is None else rpb_grad, None, None, None


torch.library.register_autograd("nat_models::na2d", _autograd, setup_context=_setup_context)


def _pair_flops(query_shape, kernel_size) -> int:
    """FLOPs of one product over all query-key pairs, a multiply and an add each."""
    batch, height, width, num_heads, head_dim = query_shape
    return 2 * batch * height * width * num_heads * kernel_size[0] * kernel_size[1] * head_dim


@register_flop_formula(torch.ops.nat_models.na2d)
def _na2d_flops(query_shape, key_shape, value_shape, rpb_shape, kernel_size, *args, **kwargs) -> int:
    return 2 * _pair_flops(query_shape, kernel_size)  # QK^T and PV


@register_flop_formula(torch.ops.nat_models.na2d_backward)
def _na2d_backward_flops(grad_shape, query_shape, key_shape, value_shape, rpb_shape, kernel_size, *a, **kw) -> int:
    return 5 * _pair_flops(query_shape, kernel_size)  # QK^T again, then dV, dP, dQ, dK
