"""The meaning of na2d: every key is gathered, every step is spelled out. Slow and obvious, for tests."""

import torch
from torch import Tensor

from ..request import Request
from ..window import window

SUMMARY = "every key gathered, in plain autograd; slow, the meaning of the operator"


def why_not(request: Request) -> str | None:
    """Why it cannot run a kind of call; None if it can."""
    return "it drops no attention weights" if request.dropout else None


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> Tensor:
    """Neighborhood attention by gathering; differentiable to any order, K*K times the memory of the keys."""
    _, height, width, _, _ = query.shape
    # Low precision is accumulated in float32, as in every backend.
    wide = torch.promote_types(query.dtype, torch.float32)
    rows, row_offsets = window(height, kernel_size[0], dilation[0], device=query.device)  # [H, K_h]
    cols, col_offsets = window(width, kernel_size[1], dilation[1], device=query.device)  # [W, K_w]

    keys = key.to(wide)[:, rows][:, :, :, cols]  # [B, H, K_h, W, K_w, num_heads, head_dim]
    values = value.to(wide)[:, rows][:, :, :, cols]
    logits = scale * torch.einsum("bhwnd,bhiwjnd->bhwnij", query.to(wide), keys)
    if rpb is not None:
        bias = rpb.to(wide)[:, row_offsets][:, :, :, col_offsets]  # [num_heads, H, K_h, W, K_w]
        logits = logits + bias.permute(1, 3, 0, 2, 4)
    weights = logits.flatten(-2).softmax(-1).view_as(logits)
    return torch.einsum("bhwnij,bhiwjnd->bhwnd", weights, values).to(query.dtype)
