"""What a call's tensors and window must be: one rule for na2d and for direct calls of torch.ops.nat_models.

Backends index memory by what is checked here, so every call passes it before one runs. No size is compared but those
that a window or another tensor must fit: in an exported graph each comparison would be a limit on a symbol.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .window import window_pair

Window = tuple[tuple[int, int], tuple[int, int]]  # kernel_size, dilation

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_apart(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    *grad_output: Tensor,
) -> Window:
    """Checks a call with query, key and value apart; returns kernel_size and dilation as pairs.

    Raises:
        ValueError: What na2d refuses; the message has the rule and the values.
    """
    shape = _shape("query", query)
    if len(shape) != 5:
        raise ValueError(f"query must be [B, H, W, num_heads, head_dim], got shape {tuple(shape)}.")
    _check_match("key", key, "query", query, shape)
    _check_match("value", value, "query", query, shape)
    for x in grad_output:
        _check_match("grad_output", x, "query", query, shape)
    return _check_rest("query", query, shape, rpb, kernel_size, dilation)


def check_packed(
    qkv: Tensor,
    rpb: Tensor | None,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    *grad_output: Tensor,
) -> Window:
    """The same for a call with a packed qkv."""
    shape = _shape("qkv", qkv)
    if len(shape) != 6 or shape[3] != 3:
        raise ValueError(f"qkv must be [B, H, W, 3, num_heads, head_dim], got shape {tuple(shape)}.")
    for x in grad_output:
        _check_match("grad_output", x, "each view of qkv", qkv, shape[:3] + shape[4:])
    return _check_rest("qkv", qkv, shape, rpb, kernel_size, dilation)


def check_qk(
    query: Tensor,
    key: Tensor,
    rpb: Tensor | None,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
) -> Window:
    """The same for a call that asks for the logits of query and key."""
    return check_apart(query, key, key, rpb, kernel_size, dilation)


def check_av(weights: Tensor, value: Tensor, kernel_size: int | Sequence[int], dilation: int | Sequence[int]) -> Window:
    """The same for a call that applies weights to value."""
    shape = _shape("value", value)
    if len(shape) != 5:
        raise ValueError(f"value must be [B, H, W, num_heads, head_dim], got shape {tuple(shape)}.")
    kernel_size, dilation = _check_rest("value", value, shape, None, kernel_size, dilation)
    expected = (*shape[:4], kernel_size[0] * kernel_size[1])
    if _shape("weights", weights) != expected or weights.device != value.device:
        raise ValueError(
            f"weights must be [B, H, W, num_heads, K_h*K_w] = {expected} on {value.device}, "
            f"got {tuple(weights.shape)} on {weights.device}."
        )
    if weights.dtype not in (value.dtype, torch.float32):
        raise ValueError(f"weights must be {value.dtype}, as value is, or torch.float32, got {weights.dtype}.")
    _check_layout("weights", weights)
    return kernel_size, dilation


def as_row(name: str, x: Tensor) -> Tensor:
    """[B, L, num_heads, head_dim] -> [B, 1, L, num_heads, head_dim]: a sequence as a map of one row.

    Raises:
        ValueError: x has another number of axes.
    """
    if len(_shape(name, x)) != 4:
        raise ValueError(f"{name} must be [B, L, num_heads, head_dim], got shape {tuple(x.shape)}.")
    return x.unsqueeze(1)


def as_row_rpb(rpb: Tensor | None) -> Tensor | None:
    """[num_heads, 2*K-1] -> [num_heads, 1, 2*K-1]: the bias of a sequence as that of a map of one row.

    Raises:
        ValueError: rpb has another number of axes.
    """
    if rpb is None:
        return None
    if rpb.dim() != 2:
        raise ValueError(f"rpb of a sequence must be [num_heads, 2*K-1], got shape {tuple(rpb.shape)}.")
    return rpb.unsqueeze(1)


def _shape(name: str, x: Tensor) -> Sequence[int]:
    if x is None:  # PyTorch hands on None where an operator takes a tensor
        raise ValueError(f"{name} must be a tensor, got None.")
    return x.shape


def _check_match(name: str, x: Tensor, other_name: str, other: Tensor, shape: Sequence[int]) -> None:
    # One condition, which is all that a good call costs; it passes through here at each step of a training.
    if x is None or x.shape != shape or x.dtype != other.dtype or x.device != other.device or x.layout != torch.strided:
        actual = tuple(_shape(name, x))
        _check_layout(name, x)
        raise ValueError(
            f"{name} must match {other_name} in shape, dtype and device, got {name} {actual} {x.dtype} "
            f"on {x.device} and {other_name} {tuple(shape)} {other.dtype} on {other.device}."
        )


def _check_layout(name: str, x: Tensor) -> None:
    if x.layout != torch.strided:
        raise ValueError(f"{name} must be strided, got {x.layout}.")


def _check_rest(
    name: str,
    x: Tensor,
    shape: Sequence[int],
    rpb: Tensor | None,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
) -> Window:
    """What query and a packed qkv have in common."""
    kernel_size, dilation = window_pair(kernel_size, dilation)
    dtype = x.dtype
    if dtype not in _DTYPES:
        known = ", ".join(str(known).removeprefix("torch.") for known in _DTYPES)
        raise ValueError(f"{name} must be of a floating-point dtype, got {dtype}; known are {known}.")
    _check_layout(name, x)
    if shape[1] < kernel_size[0] * dilation[0] or shape[2] < kernel_size[1] * dilation[1]:
        raise ValueError(
            f"kernel_size * dilation must fit in the map, got a map of {shape[1]} x {shape[2]} with "
            f"{kernel_size=}, {dilation=}. NeighborhoodAttention2d pads smaller maps, na2d does not."
        )
    if rpb is not None:
        expected = (shape[-2], 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1)
        if rpb.shape != expected or rpb.device != x.device or rpb.dtype not in (dtype, torch.float32):
            raise ValueError(
                f"rpb must be [num_heads, 2*K_h-1, 2*K_w-1] = {expected}, {dtype} or torch.float32, on "
                f"{x.device}, got {tuple(rpb.shape)} {rpb.dtype} on {rpb.device}."
            )
        _check_layout("rpb", rpb)
    return kernel_size, dilation
