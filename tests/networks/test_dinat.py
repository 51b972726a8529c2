"""DiNAT, DiNAT_s and the isotropic networks: the published ones exactly, and what only they have."""

import pytest
import torch
from safetensors.torch import load_file
from timm.models import create_model, list_models
from torch.utils.flop_counter import FlopCounterMode

from nat_models import fuse
from nat_models.networks.blocks import GlobalAttention2d
from tests.conftest import FIXTURES
from tests.networks.zoo import assert_golden_logits, golden_cases, tiny

GOLDEN = load_file(FIXTURES / "dinat_models.safetensors")
# The published table: millions of parameters, GMACs at the size of the default_cfg.
PUBLISHED = {
    "dinat_mini": (20, 2.7),
    "dinat_tiny": (28, 4.3),
    "dinat_small": (51, 7.8),
    "dinat_base": (90, 13.7),
    "dinat_large": (200, 30.6),
    "dinat_large_384": (200, 89.7),
    "dinat_large_11x11_384": (200, 92.4),
    "dinat_s_tiny": (28, 4.5),
    "dinat_s_small": (50, 8.7),
    "dinat_s_base": (88, 15.4),
    "dinat_s_large": (197, 34.5),
    "dinat_s_large_384": (197, 101.5),
    "nat_isotropic_small": (22, 4.3),
    "nat_isotropic_base": (86, 16.9),
    "dinat_isotropic_small": (22, 4.3),
    "dinat_isotropic_base": (86, 16.9),
    "vitrpb_small": (22, 4.6),
    "vitrpb_base": (86, 17.5),
}
KINDS = ["dinat_mini", "dinat_s_tiny", "dinat_isotropic_small", "vitrpb_small"]


@pytest.mark.parametrize("case", golden_cases(GOLDEN))
def test_logits_of_the_authors_networks(case):
    assert_golden_logits(GOLDEN, case)


@pytest.mark.parametrize("name", PUBLISHED)
def test_size_and_cost_are_the_published_ones(name):
    millions, gmacs = PUBLISHED[name]
    model = create_model(name, device="meta").eval()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, abs=1.2e6)  # 200.94 is "200"
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, *model.default_cfg["input_size"], device="meta"))
    # Published with one digit, and with norms and the addition of the bias, which PyTorch's counter leaves out.
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, rel=0.005, abs=0.05)


def test_the_zoo_is_registered():
    assert set(list_models(module="dinat")) == set(PUBLISHED)
    tags = {name: "shi_in22k_ft_in1k" if "large" in name else "shi_in1k" for name in PUBLISHED}
    known = {f"{name}.{tag}" for name, tag in tags.items()} | {"dinat_large.shi_in22k", "dinat_s_large.shi_in22k"}
    assert set(list_models(module="dinat", pretrained=True)) == known


@pytest.mark.parametrize(
    "name, expected",
    [
        ("dinat_mini", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]),
        ("dinat_large_384", [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]),
        ("dinat_large_11x11_384", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        ("dinat_s_small", [[1, 8], [1, 4], [1, 2] * 9, [1, 1]]),
        ("dinat_s_large_384", [[1, 13], [1, 6], [1, 3] * 9, [1, 1]]),
        ("dinat_isotropic_base", [[1], [2]] * 6),
        ("nat_isotropic_small", [[1]] * 12),
    ],
)
def test_every_other_block_is_dilated_as_published(name, expected):
    model = create_model(name, device="meta")
    assert [[block.attn.dilation for block in level.blocks] for level in model.levels] == [
        [(d, d) for d in level] for level in expected
    ]
    kernel = 11 if "11x11" in name else 7
    assert {block.attn.kernel_size for level in model.levels for block in level.blocks} == {(kernel, kernel)}


def test_dilations_are_the_callers_to_set():
    model = tiny("dinat_mini", dilations=[1, 16, [1, 3], [(2, 1)]])
    assert [block.attn.dilation for level in model.levels for block in level.blocks] == [
        (1, 1),
        (16, 16),
        (1, 1),
        (3, 3),
        (2, 1),
    ]
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 1000)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(dilations=[1, 2, 3]), "name the same levels"),
        (dict(dilations=2), "name the same levels"),
        (dict(dilations=[1, 1, [1, 2, 3], 1]), "a number for each block"),
        (dict(downsample="pool"), "downsample must be one of"),
        (dict(global_size=7), "Global attention has no window"),
        (dict(output_stride=16), "output_stride must be 32"),
    ],
)
def test_data_that_contradict_each_other_are_errors(wrong, message):
    with pytest.raises(ValueError, match=message):
        tiny("dinat_mini", **wrong)


def test_a_window_for_global_attention_is_an_error():
    with pytest.raises(ValueError, match="no window, got kernel_size=5"):
        tiny("vitrpb_small", kernel_size=5)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (100, 260), (225, 40)])
def test_any_image_size_runs_forward_and_backward(name, size):
    model = tiny(name, num_classes=10)
    logits = model(torch.randn(1, 3, *size))
    assert logits.shape == (1, 10) and torch.isfinite(logits).all()
    logits.sum().backward()


@pytest.mark.parametrize("name, stride", [("dinat_s_tiny", 4), ("nat_isotropic_small", 16)])
def test_an_image_of_ragged_size_is_padded_at_the_bottom_and_right(name, stride):
    model = tiny(name).eval()
    image = torch.randn(1, 3, 3 * stride - 1, 4 * stride - 3)
    padded = torch.zeros(1, 3, 3 * stride, 4 * stride)
    padded[:, :, : image.shape[2], : image.shape[3]] = image
    tokens = model.patch_embed(image)
    assert tokens.shape[1:3] == (3, 4) and torch.equal(tokens, model.patch_embed(padded))


@pytest.mark.parametrize("name", KINDS)
def test_every_form_of_a_network_computes_the_same(name, network):
    model = tiny(name, num_classes=10).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith((".rpb", ".bias")):
                parameter.normal_(std=0.5)
        x = torch.randn(2, 3, 70, 99)
        expected = model(x)
        for freezing in (False, True):
            torch.testing.assert_close(fuse(model, freezing=freezing)(x), expected, msg=lambda m: f"fused: {m}")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), expected, msg=lambda m: f"compiled: {m}")
        torch.testing.assert_close(torch.jit.script(model)(x), expected, msg=lambda m: f"scripted: {m}")


def test_the_bias_of_global_attention_is_looked_up_by_offset():
    layer = GlobalAttention2d(8, 2, map_size=4).double()
    with torch.no_grad():
        layer.rpb.normal_()
    x = torch.randn(1, 4, 4, 8, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(16, 3, 2, 4).unbind(1)  # [tokens, heads, channels]
    out = torch.empty(16, 2, 4, dtype=torch.float64)
    for query in range(16):
        offsets = [(key // 4 - query // 4 + 3, key % 4 - query % 4 + 3) for key in range(16)]
        for head in range(2):
            bias = torch.stack([layer.rpb[head, row, col] for row, col in offsets])
            weights = (k[:, head] @ q[query, head] * 4**-0.5 + bias).softmax(0)
            out[query, head] = weights @ v[:, head]
    torch.testing.assert_close(layer(x), layer.proj(out.view(1, 4, 4, 8)))
    weights = layer.attention_weights(x)  # [1, 4, 4, heads, tokens]
    assert weights.shape == (1, 4, 4, 2, 16)
    blended = torch.einsum("qhk,khd->qhd", weights.view(16, 2, 16), v)
    torch.testing.assert_close(blended, out)


def test_for_other_maps_the_bias_of_global_attention_is_interpolated():
    layer, larger = GlobalAttention2d(8, 2, map_size=3), GlobalAttention2d(8, 2, map_size=6)
    with torch.no_grad():
        layer.rpb.normal_()
        table = torch.nn.functional.interpolate(layer.rpb[None], (11, 11), mode="bicubic")[0]
        larger.load_state_dict(layer.state_dict() | {"rpb": table})
        x = torch.randn(1, 6, 6, 8)
        torch.testing.assert_close(layer(x), larger(x))
    assert layer(torch.randn(2, 5, 3, 8)).shape == (2, 5, 3, 8)


def test_global_attention_has_no_derivative_of_its_own_to_be_wrong():
    layer = GlobalAttention2d(4, 1, map_size=3).double()
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(layer, x)


def test_features_of_one_resolution_are_those_of_blocks_the_last_three_by_default():
    model = tiny("nat_isotropic_small", features_only=True).eval()
    assert (model.feature_info.reduction(), model.feature_info.module_name()) == (
        [16] * 3,
        [f"levels.{i}" for i in (1, 2, 3)],
    )
    assert [tuple(m.shape) for m in model(torch.randn(1, 3, 64, 96))] == [(1, 32, 4, 6)] * 3
    first = tiny("nat_isotropic_small", features_only=True, out_indices=(0,)).eval()
    assert len(first(torch.randn(1, 3, 64, 64))) == 1


@pytest.mark.parametrize("name", ["nat_mini", *KINDS])
def test_output_norms_apply_to_the_maps_handed_out_alone(name):
    torch.manual_seed(0)
    plain = tiny(name).eval()
    torch.manual_seed(0)
    model = tiny(name, output_norms=True).eval()
    with torch.no_grad():
        for norm in model.output_norms:
            norm.weight.normal_()
            norm.bias.normal_()
    model.load_state_dict(plain.state_dict(), strict=False)
    x = torch.randn(1, 3, 64, 96)
    for norm in (False, True):
        last, maps = model.forward_intermediates(x, norm=norm, output_fmt="NHWC")
        plain_last, plain_maps = plain.forward_intermediates(x, output_fmt="NHWC")
        torch.testing.assert_close(last, plain_last)
        for own, normed, raw in zip(model.output_norms, maps, plain_maps, strict=True):
            torch.testing.assert_close(normed, own(raw))
    torch.testing.assert_close(model(x), plain(x))


def test_features_only_hands_out_normed_maps_and_keeps_no_norm_without_a_gradient():
    model = tiny("dinat_mini", features_only=True, output_norms=True, out_indices=(0, 2), drop_path_rate=0.0)
    maps = model(torch.randn(1, 3, 64, 64))
    for feature in maps:  # a fresh LayerNorm: mean 0, deviation 1 over channels
        torch.testing.assert_close(feature.mean(1), torch.zeros_like(feature[:, 0]), atol=1e-5, rtol=0)
        torch.testing.assert_close(feature.std(1, unbiased=False), torch.ones_like(feature[:, 0]), atol=1e-2, rtol=0)
    sum(m.square().sum() + m.sum() for m in maps).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("feature_cls", ["list", "dict", "hook", "fx"])
def test_classes_that_would_leave_norms_out_are_refused(feature_cls):
    with pytest.raises(ValueError, match=f"'getter', got '{feature_cls}'"):
        tiny("dinat_mini", features_only=True, output_norms=True, feature_cls=feature_cls)
