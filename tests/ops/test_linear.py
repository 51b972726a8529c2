"""Linear layers through oneDNN: the numbers of the module, and the module itself where someone could tell."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from nat_models.ops import linear as module
from nat_models.ops.linear import linear
from tests.ops.conftest import ONEDNN_DTYPES, needs_onednn

TOLERANCE = {torch.float32: dict(rtol=1e-5, atol=1e-5), torch.bfloat16: dict(rtol=1.6e-2, atol=1e-2)}


@pytest.fixture
def calls(monkeypatch):
    """The shapes of what oneDNN multiplied with weights."""
    made, run = [], module.product

    def record(x, *args, **kwargs):
        made.append((*x.shape,))
        return run(x, *args, **kwargs)

    monkeypatch.setattr(module, "product", record)
    return made


def _layer(out_features=24, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Linear(8, out_features, bias=bias, dtype=dtype)


def _image(*shape, dtype=torch.float32, requires_grad=False):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(1)).requires_grad_(requires_grad)


INPUTS = {
    "a matrix": lambda dtype: _image(6, 8, dtype=dtype),
    "a map": lambda dtype: _image(2, 3, 5, 8, dtype=dtype),
    "a vector": lambda dtype: _image(8, dtype=dtype),
    "part of a map": lambda dtype: _image(2, 3, 5, 16, dtype=dtype)[:, :, 1:4, 8:],
    "channels first": lambda dtype: _image(2, 8, 3, 5, dtype=dtype).permute(0, 2, 3, 1),
    "one row, expanded": lambda dtype: _image(8, dtype=dtype).expand(3, 4, 8),
}


@ONEDNN_DTYPES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", INPUTS)
def test_numbers_and_gradients_are_the_modules(dtype, bias, shape, calls):
    for out_features in (4, 24):
        layer, x = _layer(out_features, bias, dtype), INPUTS[shape](dtype)
        inputs = [x.detach().requires_grad_(), *layer.parameters()]
        upstream = _image(*layer(x).shape, dtype=dtype)
        outputs = [call(layer, inputs[0]) for call in (linear, lambda layer, x: layer(x))]
        torch.testing.assert_close(*outputs, **TOLERANCE[dtype])
        got, expected = (torch.autograd.grad(out, inputs, upstream) for out in outputs)
        torch.testing.assert_close(got, expected, **TOLERANCE[dtype])
    shape = (*x.shape[:-1],)
    assert calls == [(*shape, 8), (*shape, 4), (*shape, 8), (*shape, 24)]


@needs_onednn
@pytest.mark.parametrize("wanted", ["x", "weight", "bias", "nothing"])
def test_only_the_gradients_that_are_wanted_are_computed(wanted, calls):
    layer, x = _layer(), _image(5, 8)
    inputs = dict(x=x, **dict(layer.named_parameters()))
    for name, tensor in inputs.items():
        tensor.requires_grad_(name == wanted)
    out = linear(layer, x)
    assert out.requires_grad == (wanted != "nothing")
    if wanted != "nothing":
        (got,) = torch.autograd.grad(out.square().sum(), inputs[wanted])
        (expected,) = torch.autograd.grad(layer(x).square().sum(), inputs[wanted])
        torch.testing.assert_close(got, expected)
    assert len(calls) == 1 + (wanted == "x")


@needs_onednn
def test_gradients_that_are_one_number_expanded(calls):
    layer, x = _layer(), _image(2, 3, 8, requires_grad=True)
    got, expected = (torch.autograd.grad(out.sum(), [x, *layer.parameters()]) for out in (linear(layer, x), layer(x)))
    torch.testing.assert_close(got, expected)
    assert len(calls) == 2


@needs_onednn
def test_second_derivatives(calls):
    layer, x = _layer(), _image(5, 8, requires_grad=True)
    seconds = []
    for call in (linear, lambda layer, x: layer(x)):
        first = torch.autograd.grad(call(layer, x).pow(3).mean(), [x, *layer.parameters()], create_graph=True)
        seconds.append(torch.autograd.grad(sum(g.square().sum() for g in first), [x, *layer.parameters()]))
    torch.testing.assert_close(*seconds, rtol=1e-5, atol=1e-6)  # the largest are 0.1 to 0.3
    assert calls  # the first of the two was not the module


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def _hooked(register):
    layer = _layer()
    getattr(layer, register)(lambda module, *args: None)
    return layer


def _patched():
    layer = _layer()
    layer.forward = lambda x: torch.zeros((*x.shape[:-1], 24))
    return layer


def _subclassed_weight():
    class Weight(torch.Tensor):
        pass

    layer = _layer()
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Weight))
    return layer


MODULES = {
    "a subclass": lambda: _Doubled(8, 24),
    "a module of another kind": lambda: nn.Sequential(_layer(), nn.ReLU()),
    "a forward hook": lambda: _hooked("register_forward_hook"),
    "a pre-hook": lambda: _hooked("register_forward_pre_hook"),
    "a backward hook": lambda: _hooked("register_full_backward_hook"),
    "a backward pre-hook": lambda: _hooked("register_full_backward_pre_hook"),
    "forward replaced": _patched,
    "a weight of another class": _subclassed_weight,
    "float64": lambda: _layer().double(),
    "no output": lambda: nn.Linear(8, 0),
}


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_what_is_no_plain_layer_is_called_as_a_module(kind, calls):
    layer = MODULES[kind]()
    x = _image(3, 8, dtype=torch.float64 if kind == "float64" else torch.float32)
    torch.testing.assert_close(linear(layer, x), layer(x), rtol=0, atol=0)
    assert calls == []


HOOKS = ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_on_all_modules_are_called(hook, calls):
    seen, register = [], getattr(nn.modules.module, f"register_module_{hook}")
    handle = register(lambda module, *args: seen.append(type(module)))
    try:
        linear(_layer(), _image(3, 8, requires_grad=True)).sum().backward()
    finally:
        handle.remove()
    assert (seen, calls) == ([nn.Linear], [])


def test_autocast_keeps_what_it_cast_and_inference_its_modules(calls):
    layer, x = _layer(), _image(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(layer, x).dtype == torch.bfloat16
    with torch.no_grad():
        linear(layer, x)
    assert calls == []


def test_counters_tracers_and_transforms_see_the_operators_of_pytorch(calls):
    layer, x = _layer().requires_grad_(False), _image(3, 8)
    with FlopCounterMode(display=False) as counter:
        linear(layer, x)
    assert counter.get_total_flops() == 2 * 3 * 8 * 24
    traced = torch.jit.trace(lambda x: linear(layer, x), x, check_trace=False)
    assert "aten::linear" in str(traced.graph)
    torch.testing.assert_close(torch.vmap(lambda x: linear(layer, x))(x), layer(x))
    torch.testing.assert_close(torch.func.jvp(lambda x: linear(layer, x), (x,), (x,))[1], F.linear(x, layer.weight))
    assert torch.compile(lambda x: linear(layer, x), backend="eager", fullgraph=True)(x).shape == (3, 24)
    assert calls == []


def test_a_wrong_width_is_pytorchs_error(calls):
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        linear(_layer(), _image(3, 7))
    assert calls == []


def test_no_tokens_give_none(calls):
    assert linear(_layer(), _image(0, 8)).shape == (0, 24)


def test_without_the_operator_the_module_is_called(calls, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    module._has_dtype.cache_clear()
    try:
        linear(_layer(), _image(3, 8))
    finally:
        module._has_dtype.cache_clear()
    assert calls == []


def test_onednn_that_is_switched_off_stays_off(calls):
    with torch.backends.mkldnn.flags(enabled=False):
        linear(_layer(), _image(3, 8))
    assert calls == []
