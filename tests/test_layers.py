"""NeighborhoodAttention2d: projections, padding of small maps, dropout, precision."""

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as prune
from torch._subclasses.fake_tensor import FakeTensorMode

from nat_models import NeighborhoodAttention1d, NeighborhoodAttention2d, layers, na1d, na2d
from nat_models.ops import na1d_av, na2d_av, use_backend
from tests.conftest import needs_torch


def _pad_then_project(layer: NeighborhoodAttention2d, x: torch.Tensor) -> torch.Tensor:
    """The published rule, to the letter: pad the input with zeros, project, attend, crop, project."""
    _, height, width, _ = x.shape
    rows, cols = (max(0, k * d - n) for k, d, n in zip(layer.kernel_size, layer.dilation, (height, width), strict=True))
    qkv = layer.qkv(F.pad(x, (0, 0, 0, cols, 0, rows))).unflatten(-1, (3, layer.num_heads, -1))
    out = na2d(*qkv.unbind(3), kernel_size=layer.kernel_size, dilation=layer.dilation, rpb=layer.rpb, scale=layer.scale)
    return layer.proj(out[:, :height, :width].flatten(3))


@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (3, 9), (9, 2), (6, 6), (7, 8)])
def test_small_maps_are_padded_as_published(size, qkv_bias):
    layer = NeighborhoodAttention2d(16, 2, kernel_size=(7, 5), qkv_bias=qkv_bias)
    torch.nn.init.normal_(layer.rpb)
    x = torch.randn(2, *size, 16, requires_grad=True)
    output, expected = layer(x), _pad_then_project(layer, x)
    torch.testing.assert_close(output, expected)
    names = [name for name, _ in layer.named_parameters()]
    weight = torch.randn_like(output)
    for name, actual, wanted in zip(
        ["x", *names],
        torch.autograd.grad((output * weight).sum(), [x, *layer.parameters()]),
        torch.autograd.grad((expected * weight).sum(), [x, *layer.parameters()]),
        strict=True,
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_dilated_small_maps_are_padded_too():
    layer = NeighborhoodAttention2d(8, 1, kernel_size=3, dilation=(2, 4))
    x = torch.randn(1, 5, 9, 8)
    torch.testing.assert_close(layer(x), _pad_then_project(layer, x))


def _hooked(layer: NeighborhoodAttention2d) -> None:
    # Of each image something else, as an adapter that looks at the image makes.
    layer.qkv.register_forward_hook(lambda module, inputs, out: 2 * out + torch.arange(len(out)).view(-1, 1, 1, 1))


def _pruned(layer: NeighborhoodAttention2d) -> None:
    for name in ("weight", "bias"):
        prune.random_unstructured(layer.qkv, name, amount=0.5)


def _quantised(layer: NeighborhoodAttention2d) -> None:
    if torch.backends.quantized.engine == "none":
        pytest.skip("PyTorch was built without a library for int8")
    torch.ao.quantization.quantize_dynamic(layer, {torch.nn.Linear}, inplace=True)


class _Adapted(torch.nn.Module):
    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        self.linear, self.more = linear, torch.nn.Linear(linear.in_features, linear.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.more(x)


def _adapted(layer: NeighborhoodAttention2d) -> None:
    layer.qkv = _Adapted(layer.qkv)


@pytest.mark.parametrize("size", [(3, 9), (1, 1)])
@pytest.mark.parametrize("change", [_hooked, _pruned, _quantised, _adapted])
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated")
def test_a_padded_token_is_what_the_module_at_qkv_makes_of_a_zero_token(change, size):
    layer, calls = NeighborhoodAttention2d(16, 2), []
    torch.nn.init.normal_(layer.qkv.bias)
    change(layer)
    x = torch.randn(2, *size, 16)
    expected = _pad_then_project(layer, x)
    layer.qkv.register_forward_hook(lambda *args: calls.append(args))
    torch.testing.assert_close(layer(x), expected)
    assert len(calls) == 1  # a hook that counts or collects sees one


def test_a_trace_asks_the_module_at_qkv_for_the_padded_token_too():
    layer = NeighborhoodAttention2d(16, 2)
    _hooked(layer)
    trace = torch.jit.trace(layer, torch.randn(2, 9, 8, 16), check_trace=False)
    for size in ((3, 9), (1, 1), (20, 7)):
        x = torch.randn(2, *size, 16)
        torch.testing.assert_close(trace(x), _pad_then_project(layer, x))


def test_attention_dropout_drops_in_training_alone():
    layer = NeighborhoodAttention2d(8, 1, kernel_size=3, attn_drop=0.5)
    plain = NeighborhoodAttention2d(8, 1, kernel_size=3)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(1, 16, 20, 8)
    torch.testing.assert_close(layer.eval()(x), plain(x))
    layer.train()
    samples = torch.stack([layer(x) for _ in range(256)])
    assert samples.std(0).min() > 0  # every output varies
    # The mean over 256 draws nears the value without dropout: five standard errors.
    assert ((samples.mean(0) - plain(x)).abs() < 5 * samples.std(0) / 16).float().mean() > 0.99


def test_training_with_dropout_follows_inference():
    layer = NeighborhoodAttention2d(8, 1, kernel_size=3, attn_drop=0.5)
    x = torch.randn(1, 16, 21, 8)
    with torch.inference_mode(), use_backend("blocked"):
        layer.eval()(x)
    layer.train()(x).sum().backward()  # what the first call cached serves the second
    assert layer.qkv.weight.grad is not None


@pytest.mark.parametrize("size", [(9, 8), (3, 9)])
def test_a_scale_other_than_the_usual_is_honoured(size):
    layer = NeighborhoodAttention2d(16, 2, scale=0.0)
    usual = NeighborhoodAttention2d(16, 2)
    usual.load_state_dict(layer.state_dict())
    x = torch.randn(2, *size, 16)
    torch.testing.assert_close(layer(x), _pad_then_project(layer, x))
    assert not torch.allclose(layer(x), usual(x), atol=1e-4)


def test_without_rpb_there_is_no_parameter():
    layer = NeighborhoodAttention2d(8, 2, kernel_size=3, rel_pos_bias=False)
    assert layer.rpb is None and "rpb" not in layer.state_dict()
    assert layer(torch.randn(1, 4, 5, 8)).shape == (1, 4, 5, 8)


def test_backends_agree():
    layer = NeighborhoodAttention2d(16, 2).eval()
    x = torch.randn(2, 20, 18, 16)
    with use_backend("reference"):
        expected = layer(x)
    torch.testing.assert_close(layer(x), expected)


def test_autocast_runs_in_its_dtype():
    layer = NeighborhoodAttention2d(16, 2)
    x = torch.randn(2, 9, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    assert output.dtype == torch.bfloat16
    # bfloat16 keeps 8 bits: three roundings along the way.
    torch.testing.assert_close(output.float(), layer(x), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_heads=3), r"num_heads must divide dim, got dim=16, num_heads=3"),
        (dict(num_heads=2, kernel_size=6), r"odd and at least 1, got kernel_size=6"),
        (dict(num_heads=2, dilation=0), r"at least 1, got dilation=0"),
    ],
)
def test_bad_arguments_are_errors_at_construction(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention2d(16, **kwargs)


@pytest.mark.parametrize("length", [3, 7, 20])
def test_a_length_grows_to_the_window_for_numbers_and_for_the_tensors_of_a_trace(length):
    assert layers._at_least(7, length) == max(7, length)
    assert layers._at_least(7, torch.tensor(length)).item() == max(7, length)


@needs_torch("2.13", "has no fake CUDA tensors where there is no driver")
def test_a_small_map_is_padded_where_it_is():
    with FakeTensorMode():  # which refuses to mix devices, as a GPU does
        layer = NeighborhoodAttention2d(16, 2, device="cuda", dtype=torch.float16)
        output = layer(torch.empty(1, 3, 9, 16, device="cuda", dtype=torch.float16))
    assert (output.shape, output.dtype, output.device.type) == ((1, 3, 9, 16), torch.float16, "cuda")


@pytest.mark.parametrize("rel_pos_bias", [True, False])
@pytest.mark.parametrize("length", [1, 9, 10, 23])
def test_a_sequence_is_attended_along_its_length_and_padded_where_it_is_short(length, rel_pos_bias):
    layer = NeighborhoodAttention1d(16, 2, kernel_size=5, dilation=2, rel_pos_bias=rel_pos_bias)
    x = torch.randn(2, length, 16)
    if rel_pos_bias:
        assert layer.rpb.shape == (2, 9)
        torch.nn.init.normal_(layer.rpb)
    padded = F.pad(x, (0, 0, 0, max(0, 10 - length)))
    query, key, value = layer.qkv(padded).unflatten(-1, (3, 2, 8)).unbind(2)
    expected = na1d(query, key, value, kernel_size=5, dilation=2, rpb=layer.rpb)
    output = layer(x)
    torch.testing.assert_close(output, layer.proj(expected[:, :length].flatten(2)))
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_a_layer_of_sequences_says_what_it_cannot_be():
    with pytest.raises(ValueError, match=r"kernel_size of a sequence must be an int, got kernel_size=\(1, 7\)"):
        NeighborhoodAttention1d(16, 2, kernel_size=(1, 7))
    with pytest.raises(TypeError, match="window_size"):
        NeighborhoodAttention1d(16, 2, window_size=7)


@pytest.mark.parametrize("layer", [NeighborhoodAttention1d, NeighborhoodAttention2d])
def test_a_layer_is_compiled_whole_and_scripted(layer):
    x = torch.randn(2, 9, 16) if layer is NeighborhoodAttention1d else torch.randn(2, 9, 8, 16)
    layer = layer(16, 2, kernel_size=3).eval()
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.jit.script(layer)(x), expected)


@pytest.mark.parametrize("size", [(9, 8), (3, 9), (1, 1)])
def test_the_layers_weights_are_those_it_attends_with(size):
    layer = NeighborhoodAttention2d(16, 2, kernel_size=(7, 5), scale=0.7)
    torch.nn.init.normal_(layer.rpb)
    x = torch.randn(2, *size, 16)
    weights = layer.attention_weights(x)
    assert weights.shape == (2, *size, 2, 35)
    # Applied to the values of the padded map.
    padded = F.pad(x, (0, 0, 0, max(0, 5 - size[1]), 0, max(0, 7 - size[0])))
    value = layer.qkv(padded).unflatten(-1, (3, 2, 8))[..., 2, :, :]
    weights = F.pad(weights, (0, 0, 0, 0, 0, max(0, 5 - size[1]), 0, max(0, 7 - size[0])))
    output = na2d_av(weights, value, kernel_size=(7, 5))[:, : size[0], : size[1]]
    torch.testing.assert_close(layer.proj(output.flatten(3)), layer(x))


def test_the_weights_of_a_sequence_are_those_it_attends_with():
    layer = NeighborhoodAttention1d(16, 2, kernel_size=5, dilation=2)
    torch.nn.init.normal_(layer.rpb)
    x = torch.randn(2, 23, 16)
    value = layer.qkv(x).unflatten(-1, (3, 2, 8))[..., 2, :, :]
    output = na1d_av(layer.attention_weights(x), value, kernel_size=5, dilation=2)
    torch.testing.assert_close(layer.proj(output.flatten(2)), layer(x))
