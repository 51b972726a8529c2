"""NATTEN's old names: what repositories do with them, in our own words, against a gather; and what is refused."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from nat_models.integrations import natten_legacy
from nat_models.integrations.natten_legacy import NeighborhoodAttention1D, NeighborhoodAttention2D
from nat_models.ops.window import window


def _gather(x, kernel_size, dilation):
    """[B, num_heads, *map, head_dim] -> [B, num_heads, *map, K**axes, head_dim]: every key of every window."""
    axes = x.dim() - 3
    for axis in range(axes):
        # Each step puts the keys along an axis after what is left of the map.
        keys, _ = window(x.shape[2 + axis], kernel_size, dilation)
        x = x.movedim(2 + axis, 0)[keys].movedim(1, -2).movedim(0, 2 + axis)
    return x.flatten(2 + axes, -2)


def _logits(query, key, rpb, kernel_size, dilation):
    logits = (query.unsqueeze(-2) * _gather(key, kernel_size, dilation)).sum(-1)
    if rpb is None:
        return logits
    offsets = [window(n, kernel_size, dilation)[1] for n in query.shape[2:-1]]
    if len(offsets) == 1:
        return logits + rpb[:, offsets[0]]
    rows, cols = offsets
    return logits + rpb[:, rows[:, None, :, None], cols[None, :, None, :]].flatten(3)


def _blend(attn, value, kernel_size, dilation):
    return (attn.unsqueeze(-1) * _gather(value, kernel_size, dilation)).sum(-2)


def _assert_same(actual, expected, inputs):
    torch.testing.assert_close(actual, expected)
    weight = torch.linspace(-1, 1, actual.numel(), dtype=actual.dtype).sin().view_as(actual)
    grads = [torch.autograd.grad((x * weight).sum(), inputs) for x in (actual, expected)]
    assert all(x.abs().max() > 0 for x in grads[1])
    torch.testing.assert_close(*grads)


def _inputs(*shapes):
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("dilation", [1, 2, 4])
def test_all_in_one_attends_over_time_and_over_instruments(dilation):
    # Spectra of several instruments: 1-D along time, then 2-D over [instruments, time].
    time, instruments, heads, dim, kernel_size = 23, 5, 2, 6, 5
    query, key, value, rpb = inputs = _inputs(*[(instruments, heads, time, dim)] * 3, (heads, 2 * kernel_size - 1))

    def attend(logits, blend):
        scores = logits(query / dim**0.5, key, rpb, kernel_size, dilation)
        return blend(scores.softmax(-1), value, kernel_size, dilation)

    _assert_same(attend(natten_legacy.natten1dqkrpb, natten_legacy.natten1dav), attend(_logits, _blend), inputs)

    query, key, value, rpb = inputs = _inputs(*[(1, heads, instruments, time, dim)] * 3, (heads, 9, 9))
    if dilation == 1:
        _assert_same(attend(natten_legacy.natten2dqkrpb, natten_legacy.natten2dav), attend(_logits, _blend), inputs)
    else:  # five instruments hold no wider window
        with pytest.raises(ValueError, match="fit in the map, got a map of 5 x 23"):
            attend(natten_legacy.natten2dqkrpb, natten_legacy.natten2dav)


def test_stylenat_gives_every_group_of_heads_its_own_window():
    heads, dim, windows = 4, 6, [(3, 1), (5, 2)]
    groups = [(heads // 2, 2 * kernel_size - 1, 2 * kernel_size - 1) for kernel_size, _ in windows]
    query, key, value, *biases = inputs = _inputs(*[(2, heads, 11, 13, dim)] * 3, *groups)

    def attend(logits, blend):
        parts = zip(*(x.chunk(2, dim=1) for x in (query * dim**-0.5, key, value)), biases, windows, strict=True)
        outputs = [blend(logits(q, k, rpb, *size).softmax(-1), v, *size) for q, k, v, rpb, size in parts]
        return torch.cat(outputs, dim=1)

    _assert_same(attend(natten_legacy.natten2dqkrpb, natten_legacy.natten2dav), attend(_logits, _blend), inputs)


def test_overlock_applies_weights_that_a_convolution_made():
    batch, heads, height, width, kernel_size = 2, 3, 8, 9, 5
    features, projection, value = inputs = _inputs(
        (batch, 4, height, width), (heads * kernel_size**2, 4, 1, 1), (batch, heads, height, width, 7)
    )

    def mix(blend):
        weights = nn.functional.conv2d(features, projection).unflatten(1, (heads, kernel_size**2)).movedim(2, -1)
        return blend(weights, value)

    expected = mix(lambda weights, value: _blend(weights, value, kernel_size, 1))
    _assert_same(mix(lambda weights, value: natten_legacy.na2d_av(weights, value, kernel_size=5)), expected, inputs)


def test_forecast_mae_trains_the_1d_module_with_its_bias():
    module = NeighborhoodAttention1D(dim=12, num_heads=2, kernel_size=5, dilation=1).double()
    assert {name: tuple(x.shape) for name, x in module.state_dict().items()} == {
        "qkv.weight": (36, 12),
        "qkv.bias": (36,),
        "rpb": (2, 9),
        "proj.weight": (12, 12),
        "proj.bias": (12,),
    }
    nn.init.normal_(module.rpb)
    for length in (20, 3):  # the histories of agents are short
        x = torch.randn(2, length, 12, dtype=torch.float64, requires_grad=True)
        padded = nn.functional.pad(x, (0, 0, 0, max(0, 5 - length)))
        query, key, value = module.qkv(padded).unflatten(-1, (3, 2, 6)).permute(2, 0, 3, 1, 4)
        attn = _logits(query * 6**-0.5, key, module.rpb, 5, 1).softmax(-1)
        expected = module.proj(_blend(attn, value, 5, 1).transpose(1, 2).flatten(2)[:, :length])
        _assert_same(module(x), expected, [x, *module.parameters()])


@pytest.mark.parametrize("axes", [1, 2])
def test_every_name_of_a_function_is_the_same_function(axes):
    size, heads, kernel_size = (11, 12)[:axes], 2, 3
    query, key = torch.randn(2, 1, heads, *size, 4)
    value, rpb = torch.randn(1, heads, *size, 4), torch.randn(heads, *[5] * axes)
    named = lambda pattern: getattr(natten_legacy, pattern.format(axes))  # noqa: E731
    expected = _logits(query, key, rpb, kernel_size, 2)
    for logits in (
        named("natten{}dqkrpb")(query, key, rpb, kernel_size, 2),
        named("NATTEN{}DQKRPBFunction").apply(query, key, rpb, kernel_size, 2),
        named("na{}d_qk_with_bias")(query, key, rpb, kernel_size, 2),
        named("na{}d_qk")(query, key, kernel_size, 2, rpb=rpb),
        named("na{}d_qk")(query, key, (kernel_size,) * axes, (2,) * axes, None, False, rpb),
    ):
        torch.testing.assert_close(logits, expected)
        assert logits.is_contiguous()
    plain = _logits(query, key, None, kernel_size, 1)
    torch.testing.assert_close(named("natten{}dqk")(query, key, kernel_size, 1), plain)
    torch.testing.assert_close(named("natten{}dqkrpb")(query, key, None, kernel_size, 1), plain)
    torch.testing.assert_close(named("na{}d_qk")(query, key, kernel_size), plain)
    for output in (
        named("natten{}dav")(expected, value, kernel_size, 2),
        named("NATTEN{}DAVFunction").apply(expected, value, kernel_size, 2),
        named("na{}d_av")(expected, value, kernel_size, 2),
    ):
        torch.testing.assert_close(output, _blend(expected, value, kernel_size, 2))
        assert output.is_contiguous()
    heads_last = [x.movedim(1, -2) for x in (query, key, value)]
    output = named("na{}d")(*heads_last, kernel_size, 2, False, rpb, 1.0).movedim(-2, 1)
    torch.testing.assert_close(output, _blend(expected.softmax(-1), value, kernel_size, 2))


def test_dtypes_are_those_of_the_arguments_whatever_autocast_says():
    query, key, value = torch.randn(3, 1, 2, 7, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = natten_legacy.natten2dqkrpb(query, key, torch.randn(2, 5, 5), 3, 1)
        half = natten_legacy.natten2dav(logits.softmax(-1), value.bfloat16(), 3, 1)
        fused = natten_legacy.na2d(*(x.movedim(1, -2) for x in (query, key, value)), 3)
    assert (logits.dtype, half.dtype, fused.dtype) == (torch.float32, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("version", ["0.14", "0.17"])
@pytest.mark.parametrize("module", [NeighborhoodAttention1D, NeighborhoodAttention2D])
def test_defaults_are_those_of_the_version(module, version):
    layer = module(8, 2, 3, version=version)
    assert (layer.rpb is not None) is (version == "0.14")
    assert layer.qkv.bias is not None and layer.scale == 0.5 and layer.attn_drop == 0.0
    small = torch.randn(1, *[2] * layer.axes, 8)
    if version == "0.14":
        assert layer(small).shape == small.shape
    else:
        with pytest.raises(ValueError, match=r"fit in the map, got x \(1, 2.*NATTEN 0.17 does not pad"):
            layer(small)


def test_arguments_stand_in_the_order_of_the_version():
    old = NeighborhoodAttention2D(8, 2, 3, None, False, False, 0.3, 0.1, 0.2)
    new = NeighborhoodAttention2D(8, 2, (3, 5), (1, 2), (False, False), True, False, 0.3, 0.1, 0.2, version="0.17")
    assert (old.rpb, new.rpb.shape) == (None, (2, 5, 9))
    for layer in (old, new):
        assert (layer.qkv.bias, layer.scale, layer.attn_drop, layer.proj_drop.p) == (None, 0.3, 0.1, 0.2)


X = torch.zeros(1, 2, 9, 8, 4)
ATTN = torch.zeros(1, 2, 9, 8, 9)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda n: n.na2d_qk(X, X, 3, is_causal=True), NotImplementedError, "no causal masks here, got is_causal=True"),
        (lambda n: n.na2d_av(ATTN, X, 3, 1, None, (False, True)), NotImplementedError, "no causal masks"),
        (lambda n: n.na1d_qk(X[0], X[0], 3, additional_keys=X[0]), NotImplementedError, "Keys and values beyond"),
        (lambda n: n.na1d_av(X[0], X[0], 3, additional_values=X[0]), NotImplementedError, "Keys and values beyond"),
        (lambda n: n.na2d(X, X, X, 3, is_causal=True), NotImplementedError, "no causal masks"),
        (
            lambda n: n.natten2dqkrpb(X[0], X[0], None, 3, 1),
            ValueError,
            r"query must be \[B, num_heads, H, W, ",
        ),
        (lambda n: n.natten2dav(ATTN[0], X, 3, 1), ValueError, r"attn must be \[B, num_heads, H, W, K_h\*K_w\]"),
        (lambda n: n.natten1dav(X, X[0], 3, 1), ValueError, r"attn must be \[B, num_heads, L, K\]"),
        (lambda n: n.natten2dqk(X, X, 9, 1), ValueError, "fit in the map, got a map of 9 x 8"),
        (lambda n: n.natten2dav(ATTN, X, 5, 1), ValueError, "weights must be"),
        (lambda n: n.NeighborhoodAttention2D(8, 2, 3, rel_pos_bias=True), TypeError, "rel_pos_bias"),
        (lambda n: n.NeighborhoodAttention2D(8, 2, 3, bias=True, version="0.17"), TypeError, "bias"),
        (lambda n: n.NeighborhoodAttention2D(8, 2, 3, is_causal=True, version="0.17"), NotImplementedError, "causal"),
        (
            lambda n: n.NeighborhoodAttention2D(8, 2, 3, version="0.20"),
            ValueError,
            "one of '0.14', '0.17', got ",
        ),
        (lambda n: n.NeighborhoodAttention2D(8, 2, 3)(X), ValueError, r"x must be \[B, H, W, C\], got shape"),
        (lambda n: n.NeighborhoodAttention1D(8, 2, 3)(X), ValueError, r"x must be \[B, L, C\], got shape"),
        (lambda n: n.install("0.20"), ValueError, "one of '0.14', '0.17', got version='0.20'"),
    ],
)
def test_what_cannot_be_computed_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(natten_legacy)


def _run(code: str) -> str:
    """In a process of its own: what `natten` is there stays there."""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_installed_it_serves_code_that_imports_natten():
    code = """
from nat_models.integrations import natten_legacy
natten_legacy.install(version="0.17")
natten_legacy.install(version="0.17")  # again does nothing
import importlib.util, pickle, torch, natten
from natten import NeighborhoodAttention1D, NeighborhoodAttention2D, use_autotuner, use_fused_na
from natten.functional import NATTEN2DAVFunction, na1d, na2d_qk_with_bias, natten1dqkrpb, natten2dav
from natten.natten2d import NeighborhoodAttention2D as same
import natten.context
assert importlib.util.find_spec("natten") is not None
assert natten.__version__ == "0.17.5" and natten.functional.natten2dav is natten2dav and same is NeighborhoodAttention2D
use_fused_na(True, kv_parallel=True), use_autotuner(True)
layer = NeighborhoodAttention2D(dim=8, num_heads=2, kernel_size=3)
assert layer.rpb is None
pickle.loads(pickle.dumps(layer))(torch.randn(1, 5, 6, 8))
try:
    natten_legacy.install(version="0.14")
except RuntimeError as error:
    print(error)
from nat_models.ops import explain
print(explain("cuda", rpb=False))
"""
    output = _run(code)
    assert "natten 0.17.5 was installed here already, got version='0.14'" in output
    assert "natten_legacy.install() put its own functions at natten" in output


def test_installed_as_0_14_it_is_told_apart_and_has_its_defaults_and_its_import_alone_installs_nothing():
    code = """
import sys
from nat_models.integrations import natten_legacy
print("natten" in sys.modules)
natten_legacy.install("0.14")
import natten
print(natten.__version__, hasattr(natten, "context"), natten.NeighborhoodAttention1D(8, 2, 3).rpb.shape)
"""
    assert _run(code).splitlines() == ["False", "0.14.6 False torch.Size([2, 5])"]


def test_it_takes_no_place_of_a_natten_that_is_imported(monkeypatch):
    real = ModuleType("natten")
    real.__version__ = "0.21.7"
    monkeypatch.setitem(sys.modules, "natten", real)
    with pytest.raises(RuntimeError, match=r"natten 0\.21\.7 is imported already: call install before"):
        natten_legacy.install(version="0.17")
    assert sys.modules["natten"] is real
