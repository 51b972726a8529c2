"""Where a token looks, against the rule of the window and the operator."""

import pytest
import torch

from nat_models.networks.attention import attention_maps
from tests.networks.zoo import tiny


def _noisy(name: str, **kwargs) -> torch.nn.Module:
    model = tiny(name, **kwargs).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(".rpb"):
                parameter.normal_()
    return model


def test_maps_are_in_the_window_of_the_pixels_token_and_sum_to_one():
    model = _noisy("nat_mini")
    maps = attention_maps(model, torch.randn(1, 3, 320, 448), row=50, col=447)
    sizes = [(80, 112), (40, 56), (20, 28), (10, 14)]
    assert [tuple(m.shape) for m in maps] == [(n, *size) for n, size in zip((1, 2, 4, 8), sizes, strict=True)]
    for level, (found, (_, width)) in enumerate(zip(maps, sizes, strict=True)):
        torch.testing.assert_close(found.sum((1, 2)), torch.ones(len(found)))
        rows, cols = (found[0] > 0).nonzero(as_tuple=True)
        first = max(0, 50 // 4 // 2**level - 3)
        assert sorted(set(rows.tolist())) == list(range(first, first + 7)), f"level {level}"
        assert sorted(set(cols.tolist())) == list(range(width - 7, width)), f"level {level}"


def test_a_dilated_blocks_map_has_gaps():
    model = _noisy("dinat_mini", depths=(2, 1, 1, 1))
    first, *_ = attention_maps(model, torch.randn(1, 3, 256, 256), row=0, col=0)
    rows, cols = (first[0] > 0).nonzero(as_tuple=True)
    assert sorted(set(rows.tolist())) == sorted(set(cols.tolist())) == list(range(0, 56, 8))
    undilated, *_ = attention_maps(model, torch.randn(1, 3, 256, 256), row=0, col=0, block=0)
    assert undilated[0, :7, :7].gt(0).all() and undilated[0].gt(0).sum() == 49


@pytest.mark.parametrize("name", ["dinat_mini", "vitrpb_small"])
def test_maps_blend_values_as_the_layer_does(name):
    model = _noisy(name, drop_path_rate=0.0)
    attn = model.levels[-1].blocks[-1].attn
    seen = []
    attn.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    # The last level's map is as large as its window, so nothing is padded.
    *_, last = attention_maps(model, torch.randn(1, 3, 224, 224), row=100, col=30)
    x, output = seen[0]
    values = attn.qkv(x)[0, ..., 2 * attn.dim :].unflatten(-1, (attn.num_heads, -1))  # [H, W, heads, head_dim]
    blended = torch.einsum("nhw,hwnd->nd", last, values).flatten()
    size = x.shape[1]
    token = (100 * size // 224, 30 * size // 224)
    torch.testing.assert_close(attn.proj(blended), output[0, token[0], token[1]])


def test_what_falls_on_padding_is_left_out():
    *_, last = attention_maps(_noisy("nat_mini"), torch.randn(1, 3, 64, 64), row=0, col=0)
    assert last.shape == (8, 2, 2) and (last.sum((1, 2)) > 0).all() and (last.sum((1, 2)) < 1).all()


@pytest.mark.parametrize("place", [(64, 0), (0, 96), (-1, 0)])
def test_a_pixel_outside_the_image_is_an_error(place):
    with pytest.raises(ValueError, match="must be in the image of 64 x 96, got row="):
        attention_maps(_noisy("nat_mini"), torch.randn(1, 3, 64, 96), *place)


def test_a_block_that_is_not_there_is_an_error():
    with pytest.raises(ValueError, match="has 1 blocks, got block=1"):
        attention_maps(_noisy("nat_mini"), torch.randn(1, 3, 64, 64), 0, 0, block=1)
