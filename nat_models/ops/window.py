"""The window rule of neighborhood attention, defined once (arXiv:2204.07143, section 3; dilation arXiv:2209.15001)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def window_pair(kernel_size: int | Sequence[int], dilation: int | Sequence[int]) -> tuple[tuple[int, int], ...]:
    """kernel_size and dilation as (height, width) pairs of ints.

    Raises:
        ValueError: Neither an int nor two ints; a kernel_size even or below 1; a dilation below 1.
    """
    kernel, spacing = _pair("kernel_size", kernel_size), _pair("dilation", dilation)
    if min(kernel) < 1 or kernel[0] % 2 == 0 or kernel[1] % 2 == 0:
        raise ValueError(f"kernel_size must be odd and at least 1, got {kernel_size=}.")
    if min(spacing) < 1:
        raise ValueError(f"dilation must be at least 1, got {dilation=}.")
    return kernel, spacing


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (tuple, list, Sequence)) and len(value) == 2:  # the first two are the usual, and faster to ask
        height, width = value
        if isinstance(height, int) and isinstance(width, int):
            return height, width
    raise ValueError(f"{name} must be an int or two ints (height, width), got {name}={value!r}.")


def row_window(kernel_size: int, dilation: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """kernel_size and dilation of a sequence, as those of a map of one row.

    Raises:
        ValueError: One of them is not an int.
    """
    for name, value in (("kernel_size", kernel_size), ("dilation", dilation)):
        if not isinstance(value, int):
            raise ValueError(f"{name} of a sequence must be an int, got {name}={value!r}.")
    return (1, kernel_size), (1, dilation)


def window_start(position: Tensor, length: Tensor | int, kernel_size: int) -> Tensor:
    """First key of each query's window: centred on the query, shifted inward at a border, never cut.

    Args:
        position: Query positions along one axis, counted inside their dilation group.
        length: Length of the axis (of the group); at least `kernel_size`.
        kernel_size: Odd window length.
    """
    return (position - kernel_size // 2).clamp(min=0).clamp(max=length - kernel_size)


def group_length(length: int, dilation: int, group: Tensor | int) -> Tensor | int:
    """Number of positions i < length with i % dilation == group."""
    return (length - group + dilation - 1) // dilation


def window(length: int, kernel_size: int, dilation: int = 1, *, device=None) -> tuple[Tensor, Tensor]:
    """Keys of every query along one axis.

    Returns:
        keys: [length, kernel_size], positions on the axis.
        offsets: [length, kernel_size], the rpb index of each key: key minus query in group positions, plus K - 1.
    """
    index = torch.arange(length, device=device)
    group, position = index % dilation, index // dilation
    start = window_start(position, group_length(length, dilation, group), kernel_size)
    member = start[:, None] + torch.arange(kernel_size, device=device)
    return member * dilation + group[:, None], member - position[:, None] + kernel_size - 1
