"""Where a token looks: attention weights of one place of an image, laid out as maps."""

import torch
from torch import Tensor, nn

from ..ops.window import window
from .blocks import GlobalAttention2d


@torch.no_grad()
def attention_maps(model: nn.Module, image: Tensor, row: int, col: int, block: int = -1) -> list[Tensor]:
    """For each level, the weights that the token of one pixel gives every token, before any dropout.

    Args:
        model: A NAT in evaluation.
        image: [1, in_chans, H, W].
        row: Of the pixel, counted from the top.
        col: Of the pixel, counted from the left.
        block: Of each level; the last one by default.

    Returns:
        For each level [num_heads, H_l, W_l], zero outside the token's window. A head's sum is 1, or less where the map
        is smaller than the window and padded: what falls on the padding is left out.

    Raises:
        ValueError: The pixel is not in the image; a level has no such block.
    """
    _, _, height, width = image.shape
    if not (0 <= row < height and 0 <= col < width):
        raise ValueError(f"The pixel must be in the image of {height} x {width}, got {row=}, {col=}.")
    maps = []
    x = model.patch_embed(image)
    for level in model.levels:
        x = level.downsample(x)
        _, rows, cols, _ = x.shape
        stride = model.feature_info[len(maps)]["reduction"]
        token = min(row // stride, rows - 1), min(col // stride, cols - 1)
        x, weights = level.run_blocks_with_attention(x, block)
        maps.append(_lay_out(weights[0, token[0], token[1]], (rows, cols), token, level.blocks[block].attn))
    return maps


def _lay_out(weights: Tensor, size: tuple[int, int], token: tuple[int, int], attention: nn.Module) -> Tensor:
    """[num_heads, keys] of a token -> [num_heads, H, W]."""
    if isinstance(attention, GlobalAttention2d):
        return weights.unflatten(1, size)
    windows = zip(size, attention.kernel_size, attention.dilation, token, strict=True)
    keys = [window(max(length, k * d), k, d, device=weights.device)[0][at] for length, k, d, at in windows]
    padded = weights.new_zeros(len(weights), *(max(n, int(k.max()) + 1) for n, k in zip(size, keys, strict=True)))
    padded[:, keys[0][:, None], keys[1]] = weights.unflatten(1, [len(k) for k in keys])
    return padded[:, : size[0], : size[1]]
