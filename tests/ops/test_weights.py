"""na2d_qk and na2d_av: the two halves of na2d, their derivatives to any order, and errors that say what is wrong."""

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jvp, vmap

from nat_models.ops import na1d, na1d_av, na1d_qk, na2d_av, na2d_qk
from nat_models.ops.backends import reference
from nat_models.ops.window import window
from tests.ops.conftest import gradients, make_inputs, relative_error

# B, H, W, heads, head_dim, kernel_size, dilation
GRID = [
    (2, 9, 13, 2, 8, (3, 5), (2, 1)),
    (1, 7, 8, 1, 4, (7, 7), (1, 1)),
    (1, 11, 10, 2, 3, (5, 3), (2, 3)),
    (2, 1, 12, 2, 8, (1, 5), (1, 2)),
    (1, 4, 5, 1, 8, (1, 1), (1, 1)),
]


def _gathered(x, kernel_size, dilation):
    """[B, H, W, num_heads, K_h*K_w, head_dim]: every key of every window."""
    (rows, _), (cols, _) = (window(*axis) for axis in zip(x.shape[1:3], kernel_size, dilation, strict=True))
    return x[:, rows][:, :, :, cols].permute(0, 1, 3, 5, 2, 4, 6).flatten(4, 5)


@pytest.mark.parametrize("case", GRID)
def test_the_softmax_of_the_logits_applied_to_values_is_na2d(case):
    *shape, kernel_size, dilation = case
    query, key, value, rpb = inputs = make_inputs(*shape, kernel_size, requires_grad=True)
    logits = na2d_qk(query, key, kernel_size=kernel_size, dilation=dilation, rpb=rpb, scale=0.3)
    output = na2d_av(logits.softmax(-1), value, kernel_size=kernel_size, dilation=dilation)
    expected = reference.na2d(*inputs, kernel_size, dilation, 0.3)
    assert relative_error(output, expected) < 1e-12
    for actual, wanted in zip(gradients(output, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", GRID)
def test_logits_are_the_scaled_products_with_every_key_in_order(case):
    *shape, kernel_size, dilation = case
    query, key, *_ = make_inputs(*shape, kernel_size)
    logits = na2d_qk(query, key, kernel_size=kernel_size, dilation=dilation, scale=2.0)
    keys = _gathered(key, kernel_size, dilation)
    torch.testing.assert_close(logits, 2 * (query.unsqueeze(-2) * keys).sum(-1))
    usual = na2d_qk(query, key, kernel_size=kernel_size, dilation=dilation)
    torch.testing.assert_close(usual, logits / 2 * query.shape[-1] ** -0.5)
    none = na2d_qk(query, key, kernel_size=kernel_size, dilation=dilation, scale=0.0)
    assert torch.equal(none, torch.zeros_like(none))


def test_the_bias_of_a_key_is_that_of_its_offset():
    query, key, _, rpb = make_inputs(1, 5, 6, 2, 4, (3, 3))
    logits = na2d_qk(query, key, kernel_size=3, rpb=rpb, scale=0.0)
    # The query at (4, 1) sees rows 2 to 4 and columns 0 to 2.
    expected = [rpb[:, row - 4 + 2, col - 1 + 2] for row in (2, 3, 4) for col in (0, 1, 2)]
    torch.testing.assert_close(logits[0, 4, 1], torch.stack(expected, -1))


@pytest.mark.parametrize("case", GRID)
def test_weights_that_are_no_softmax_are_applied_as_they_are(case):
    *shape, kernel_size, dilation = case
    _, _, value, _ = make_inputs(*shape, kernel_size, requires_grad=True)
    weights = torch.randn(*shape[:4], kernel_size[0] * kernel_size[1]).double().requires_grad_()
    output = na2d_av(weights, value, kernel_size=kernel_size, dilation=dilation)
    expected = (weights.unsqueeze(-1) * _gathered(value, kernel_size, dilation)).sum(-2)
    torch.testing.assert_close(output, expected)
    inputs = [weights, value]
    torch.testing.assert_close(gradients(output, inputs), gradients(expected, inputs))


def _halves(query, key, value, rpb):
    weights = na2d_qk(query, key, kernel_size=(3, 1), dilation=(1, 2), rpb=rpb)
    return na2d_av(weights, value, kernel_size=(3, 1), dilation=(1, 2))


def test_first_and_second_derivatives():
    inputs = make_inputs(1, 4, 3, 2, 2, (3, 1), requires_grad=True)
    assert gradcheck(_halves, inputs)
    assert gradgradcheck(_halves, inputs)


def test_torch_func_batches_and_pushes_forward():
    inputs, tangents = make_inputs(1, 4, 5, 2, 3, (3, 1)), make_inputs(1, 4, 5, 2, 3, (3, 1))
    _, tangent = jvp(_halves, tuple(inputs), tuple(tangents))
    step = 1e-6
    sides = [_halves(*(x + sign * step * t for x, t in zip(inputs, tangents, strict=True))) for sign in (1, -1)]
    torch.testing.assert_close(tangent, (sides[0] - sides[1]) / (2 * step), rtol=1e-6, atol=1e-6)
    query, key, value, rpb = inputs
    keys = torch.stack([key, 2 * key])

    def gradient(key):
        return torch.func.grad(lambda *x: _halves(*x).sin().sum(), argnums=(0, 1, 2, 3))(query, key, value, rpb)

    for together, *apart in zip(vmap(gradient)(keys), *map(gradient, keys), strict=True):
        torch.testing.assert_close(together, torch.stack(apart))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_accumulated_in_float32_and_rounded_once(dtype):
    query, key, value, _ = (x.to(dtype) for x in make_inputs(1, 7, 9, 2, 64, (7, 7)))
    window = dict(kernel_size=7)
    logits, exact = na2d_qk(query, key, **window), na2d_qk(query.double(), key.double(), **window)
    assert logits.dtype == dtype
    # Half a unit in the last place of each.
    torch.testing.assert_close(logits.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)
    weights = exact.softmax(-1).float()
    output = na2d_av(weights, value, **window)
    assert output.dtype == dtype
    exact = na2d_av(weights.double(), value.double(), **window)
    torch.testing.assert_close(output.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_autocast_casts_as_na2d_does_but_no_weights_in_float32():
    query, key, value, rpb = make_inputs(1, 7, 9, 2, 8, (3, 3), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logits = na2d_qk(query, key, kernel_size=3, rpb=rpb)
        output = na2d_av(logits.float().softmax(-1), value, kernel_size=3)
    assert torch.equal(logits, na2d_qk(query.bfloat16(), key.bfloat16(), kernel_size=3, rpb=rpb))
    assert torch.equal(output, na2d_av(logits.float().softmax(-1), value.bfloat16(), kernel_size=3))


def test_a_sequence_is_a_map_of_one_row():
    query, key, value = torch.randn(3, 2, 11, 2, 8).unbind()
    rpb, window = torch.randn(2, 9), dict(kernel_size=5, dilation=2)
    weights = na1d_qk(query, key, rpb=rpb, scale=0.3, **window).softmax(-1)
    assert weights.shape == (2, 11, 2, 5)
    expected = na1d(query, key, value, rpb=rpb, scale=0.3, **window)
    torch.testing.assert_close(na1d_av(weights, value, **window), expected)


def test_autograd_keeps_no_gathered_keys():
    query, key, value, _ = make_inputs(1, 9, 9, 1, 32, (7, 7), torch.float32, requires_grad=True)
    kept = {}

    def keep(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        na2d_av(na2d_qk(query, key, kernel_size=7).softmax(-1), value, kernel_size=7)
    # query, key and value in one storage, and the weights twice over; the keys of all windows are 49 times the keys.
    assert sum(kept.values()) < 3 * 4 * (key.numel() + 49 * 9 * 9)


def test_both_compile_whole():
    query, key, value, rpb = make_inputs(1, 5, 6, 2, 4, (3, 1), torch.float32, requires_grad=True)
    inputs, compiled = [query, key, value, rpb], torch.compile(_halves, fullgraph=True, backend="aot_eager")
    output, expected = compiled(*inputs), _halves(*inputs)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(gradients(output, inputs), gradients(expected, inputs))


def test_empty_batches_give_empty_results():
    query, key, value, rpb = make_inputs(0, 9, 12, 2, 8, (3, 3), requires_grad=True)
    weights = na2d_qk(query, key, kernel_size=3, rpb=rpb)
    output = na2d_av(weights, value, kernel_size=3)
    output.sum().backward()
    assert (weights.shape, output.shape) == ((0, 9, 12, 2, 9), (0, 9, 12, 2, 8))
    assert torch.equal(rpb.grad, torch.zeros_like(rpb))


X = torch.zeros(1, 9, 12, 2, 8)
W = torch.zeros(1, 9, 12, 2, 9)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: na2d_qk(X, X, kernel_size=4), r"odd and at least 1, got kernel_size=4"),
        (lambda: na2d_qk(X, X, kernel_size=3, dilation=4), r"fit in the map.*9 x 12.*\(4, 4\)"),
        (lambda: na2d_qk(X, X[:, :, 1:], kernel_size=3), r"key must match query.*\(1, 9, 11, 2, 8\)"),
        (lambda: na2d_qk(X[0], X, kernel_size=3), r"query must be \[B, H, W, num_heads, head_dim\], got shape"),
        (lambda: na2d_qk(X, X, kernel_size=3, rpb=torch.zeros(2, 5, 3)), r"rpb must be .* = \(2, 5, 5\)"),
        (lambda: na2d_av(W, X[0], kernel_size=3), r"value must be \[B, H, W, num_heads, head_dim\], got shape"),
        (
            lambda: na2d_av(W, X, kernel_size=5),
            r"weights must be .*\(1, 9, 12, 2, 25\) on cpu, got \(1, 9, 12, 2, 9\)",
        ),
        (lambda: na2d_av(W.double(), X, kernel_size=3), r"weights must be torch.float32, as value is.*torch.float64"),
        (lambda: na2d_av(W, X.long(), kernel_size=3), r"value must be of a floating-point dtype, got torch.int64"),
        (lambda: na2d_av(W, X, kernel_size=(3, 3), dilation=(1, 5)), r"fit in the map.*9 x 12"),
        (lambda: na1d_av(W, X[0], kernel_size=3), r"weights must be \[B, L, num_heads, head_dim\]"),
        (lambda: na1d_qk(X[0], X[0], kernel_size=(3, 3)), r"kernel_size of a sequence must be an int"),
    ],
)
def test_bad_arguments_are_named_with_the_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call()
