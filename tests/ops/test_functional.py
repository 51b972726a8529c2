"""na2d: the golden values, the reference's values and gradients on every backend, errors that say what is wrong."""

import functools
import itertools

import pytest
import torch
from safetensors.torch import load_file
from torch.autograd import gradcheck

from nat_models.ops import na2d, na2d_qkvpacked
from nat_models.ops.backends import blocked, reference
from tests.conftest import FIXTURES, tensor
from tests.ops.conftest import gradients, make_inputs, relative_error

# name: B, heads, H, W, head_dim, K, dilation
GOLDEN = {
    "whole": (1, 2, 7, 7, 8, 7, 1),
    "square": (2, 2, 12, 12, 8, 7, 1),
    "wide": (1, 2, 8, 15, 16, 7, 1),
    "tall": (1, 1, 13, 7, 32, 7, 1),
    "k3": (1, 2, 9, 11, 8, 3, 1),
    "k5": (1, 3, 6, 5, 8, 5, 1),
    "k9": (1, 1, 10, 12, 8, 9, 1),
    "k11": (1, 1, 11, 13, 8, 11, 1),
    "k13": (1, 1, 13, 14, 8, 13, 1),
    "dil2": (1, 2, 14, 15, 8, 7, 2),
    "dil3": (1, 1, 10, 11, 8, 3, 3),
    "dil4_ragged": (1, 1, 30, 29, 8, 7, 4),
    "nobias": (1, 2, 9, 10, 8, 7, 1),
}

# B, H, W, heads, head_dim, kernel_size, dilation: H != W, primes, windows and dilations that differ by axis
GRID = [
    (2, 11, 17, 2, 8, (3, 7), (1, 1)),
    (1, 23, 19, 1, 20, (7, 7), (1, 1)),
    (1, 29, 31, 2, 4, (5, 3), (2, 5)),
    (3, 21, 8, 1, 8, (7, 3), (3, 1)),
    (1, 16, 33, 1, 8, (9, 11), (1, 3)),
    (1, 7, 40, 2, 8, (7, 5), (1, 8)),
    # one axis: a window of one row or one column, on maps of several rows and of one
    (2, 11, 17, 2, 8, (1, 5), (1, 1)),
    (1, 23, 10, 2, 4, (7, 1), (2, 3)),
    (2, 1, 61, 2, 8, (1, 7), (1, 3)),
    (1, 9, 1, 1, 8, (9, 1), (1, 1)),
]


@pytest.mark.parametrize("case", GOLDEN)
def test_values_and_gradients_of_the_authors_operator(case, backend):
    batch, heads, height, width, head_dim, kernel_size, dilation = GOLDEN[case]
    shape = (batch, heads, height, width, head_dim)
    golden = {k.removeprefix(f"{case}/"): v for k, v in load_file(FIXTURES / "na2d.safetensors").items()}
    # The fixtures have heads before the map.
    query, key, value, grad = (
        tensor(f"{case}/{name}", shape).permute(0, 2, 3, 1, 4).contiguous().requires_grad_()
        for name in ("query", "key", "value", "grad_output")
    )
    rpb = None
    if case != "nobias":
        rpb = tensor(f"{case}/rpb", (heads, 2 * kernel_size - 1, 2 * kernel_size - 1)).requires_grad_()
    output = na2d(query, key, value, kernel_size=kernel_size, dilation=dilation, rpb=rpb)
    output.backward(grad.detach())
    actual = {"output": output, "grad_query": query.grad, "grad_key": key.grad, "grad_value": value.grad}
    actual = {name: x.detach().permute(0, 3, 1, 2, 4) for name, x in actual.items()}
    if rpb is not None:
        actual["grad_rpb"] = rpb.grad
    assert actual.keys() == {name.split("/")[-1] for name in golden if name.startswith(("output", "grad"))}
    for name, value in actual.items():
        # float32 rounding over a few dozen terms; the fixtures were computed in float64.
        assert relative_error(value, golden[name]) < (2e-6 if name == "output" else 2e-5), name


# dtype: how far output and gradients may be off, relative to the largest value. Low precision rounds a few times.
TOLERANCES = {torch.float64: (1e-12, 1e-11), torch.float32: (2e-6, 2e-5)}
TOLERANCES |= {dtype: 2 * [4 * torch.finfo(dtype).eps] for dtype in (torch.bfloat16, torch.float16)}
SMALL = (2, 9, 13, 2, 32, (3, 5), (2, 1))
# case, dtype, with rpb, with gradients
KINDS = [(case, torch.float64, True, True) for case in GRID]
KINDS += itertools.product([SMALL], TOLERANCES, [True, False], [True, False])


@pytest.mark.parametrize(("case", "dtype", "with_rpb", "requires_grad"), KINDS)
def test_every_backend_is_the_reference(case, dtype, with_rpb, requires_grad, backend):
    *shape, kernel_size, dilation = case
    query, key, value, rpb = (x.to(dtype) for x in make_inputs(*shape, kernel_size))
    rpb = rpb.to(torch.promote_types(dtype, torch.float32)) if with_rpb else None
    inputs = [x.requires_grad_(requires_grad) for x in (query, key, value, rpb) if x is not None]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference.na2d(*exact[:3], exact[3] if with_rpb else None, kernel_size, dilation, 0.3)
    output = na2d(query, key, value, kernel_size=kernel_size, dilation=dilation, rpb=rpb, scale=0.3)
    assert (output.dtype, output.is_contiguous(), output.requires_grad) == (dtype, True, requires_grad)
    assert relative_error(output.double(), expected) < TOLERANCES[dtype][0]
    if requires_grad:
        for x, actual, wide in zip(inputs, gradients(output, inputs), gradients(expected, exact), strict=True):
            assert actual.dtype == x.dtype
            assert relative_error(actual.double(), wide) < TOLERANCES[dtype][1]


@pytest.mark.parametrize("case", GRID)
def test_blocked_is_differentiable_by_plain_autograd_too(case):
    # The path that attention dropout takes.
    *shape, kernel_size, dilation = case
    inputs = make_inputs(*shape, kernel_size, requires_grad=True)
    window = (kernel_size, dilation, 0.3)
    actual, expected = blocked.na2d(*inputs, *window), reference.na2d(*inputs, *window)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("with_rpb", [True, False])
def test_packed_qkv_gives_the_same_result_and_a_packed_gradient(with_rpb, backend):
    qkv = torch.randn(2, 9, 12, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    rpb = torch.randn(2, 5, 9, dtype=torch.float64, requires_grad=True) if with_rpb else None
    inputs = [x for x in (qkv, rpb) if x is not None]
    window = dict(kernel_size=(3, 5), dilation=(2, 1), rpb=rpb)
    actual, expected = na2d_qkvpacked(qkv, **window), na2d(*qkv.unbind(3), **window)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs), rtol=0, atol=0)


def test_a_window_of_one_key_gives_the_value_and_no_gradient_but_that_of_it(backend):
    query, key, value, rpb = make_inputs(2, 3, 10, 2, 8, (1, 1), requires_grad=True)
    output = na2d(query, key, value, kernel_size=1, dilation=(2, 3), rpb=rpb)
    torch.testing.assert_close(output, value)
    grads = gradients(output, [query, key, value, rpb])
    for x in (*grads[:2], grads[3]):
        torch.testing.assert_close(x, torch.zeros_like(x))
    torch.testing.assert_close(grads[2], *gradients(value * 1, [value]))


def test_large_logits_stay_finite(backend):
    query, key, value, rpb = make_inputs(1, 9, 11, 1, 8, (7, 7), torch.float32, requires_grad=True)
    output = na2d(query, key, value, kernel_size=7, rpb=rpb, scale=1e4)
    grads = gradients(output, [query, key, value, rpb])
    assert all(torch.isfinite(x).all() for x in (output, *grads))


def test_scale_zero_is_honoured(backend):
    query, key, value, _ = make_inputs(1, 7, 7, 1, 8, (7, 7))
    output = na2d(query, key, value, kernel_size=7, scale=0.0)
    torch.testing.assert_close(output, value.mean((1, 2), keepdim=True).expand_as(value))


def test_views_of_a_packed_qkv_give_the_same_bits(backend):
    qkv = torch.randn(2, 9, 12, 3, 2, 8)
    packed = na2d(*qkv.unbind(3), kernel_size=3)
    apart = na2d(*(x.contiguous() for x in qkv.unbind(3)), kernel_size=3)
    assert torch.equal(packed, apart)


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_the_output_is_contiguous_whatever_strides_come_in(axis, backend):
    # As the operator's fake promises: compiled code reads it by those strides.
    shape = [1, 3, 4, 2, 8]
    shape[axis], shape[-1] = shape[-1], shape[axis]
    query, key, value = torch.randn(3, *shape).transpose(axis + 1, -1).unbind()
    output = na2d(query, key, value, kernel_size=3)
    assert output.is_contiguous()
    torch.testing.assert_close(output, na2d(*(x.contiguous() for x in (query, key, value)), kernel_size=3))


def test_empty_batch_gives_empty_result_and_zero_rpb_gradient(backend):
    query, key, value, rpb = make_inputs(0, 9, 12, 2, 8, (3, 3), requires_grad=True)
    output = na2d(query, key, value, kernel_size=3, rpb=rpb)
    output.sum().backward()
    assert output.shape == (0, 9, 12, 2, 8)
    assert torch.equal(rpb.grad, torch.zeros_like(rpb))


def test_same_input_same_bits(backend):
    inputs = make_inputs(2, 30, 25, 2, 16, (7, 7), torch.float32, requires_grad=True)

    def run():
        output = na2d(*inputs[:3], kernel_size=7, rpb=inputs[3])
        grads = gradients(output, inputs)
        return output, *(grads[:3] if backend == "flex" else grads)  # flex: rpb's is summed in any order, as it says

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("with_rpb", [True, False])
def test_gradcheck(with_rpb, backend):
    query, key, value, rpb = make_inputs(1, 5, 6, 2, 2, (3, 3), requires_grad=True)
    check = functools.partial(gradcheck, fast_mode=backend == "flex")  # each evaluation is traced anew, seconds in all
    if with_rpb:
        assert check(lambda q, k, v, r: na2d(q, k, v, kernel_size=3, rpb=r), (query, key, value, rpb))
    else:
        assert check(lambda q, k, v: na2d(q, k, v, kernel_size=3, dilation=(1, 2)), (query, key, value))


def test_autocast_computes_in_its_dtype_and_keeps_rpb_exact():
    query, key, value, rpb = make_inputs(1, 9, 9, 1, 8, (3, 3), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = na2d(query, key, value, kernel_size=3, rpb=rpb)
    expected = na2d(*(x.bfloat16() for x in (query, key, value)), kernel_size=3, rpb=rpb)
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kernel_size=4), r"odd and at least 1, got kernel_size=4"),
        (dict(kernel_size=(3, -1)), r"odd and at least 1, got kernel_size=\(3, -1\)"),
        (dict(kernel_size=(3, 3, 3)), r"int or two ints.*\(3, 3, 3\)"),
        (dict(kernel_size=3.0), r"kernel_size must be an int or two ints"),
        (dict(dilation=0), r"at least 1, got dilation=0"),
        (dict(kernel_size=13), r"fit in the map.*9 x 12.*\(13, 13\)"),
        (dict(kernel_size=3, dilation=4), r"fit in the map.*9 x 12.*\(4, 4\)"),
        (dict(key=torch.zeros(1, 9, 12, 2, 4)), r"key must match query.*\(1, 9, 12, 2, 4\).*\(1, 9, 12, 2, 8\)"),
        (dict(value=torch.zeros(1, 9, 12, 2, 8).double()), r"value must match query.*torch.float64"),
        (dict(rpb=torch.zeros(2, 5, 6)), r"rpb must be.*\(2, 5, 5\).*got \(2, 5, 6\)"),
        (dict(rpb=torch.zeros(2, 5, 5).double()), r"rpb must be.*torch.float64"),
        (dict(query=torch.zeros(9, 12, 2, 8)), r"query must be \[B, H, W, num_heads, head_dim\].*\(9, 12, 2, 8\)"),
    ],
)
def test_bad_arguments_are_named_with_the_rule(change, message):
    x = torch.zeros(1, 9, 12, 2, 8)
    arguments = dict(query=x, key=x, value=x, kernel_size=3) | change
    with pytest.raises(ValueError, match=message):
        na2d(**arguments)


def test_integer_tensors_are_refused():
    x = torch.zeros(1, 9, 12, 2, 8, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"floating-point dtype, got torch.int64"):
        na2d(x, x, x, kernel_size=3)


@pytest.mark.parametrize("packed", [False, True])
def test_dropout_leaves_bias_and_scale_alone(packed):
    query, key, value, rpb = make_inputs(1, 9, 12, 2, 8, (3, 5))
    window = dict(kernel_size=(3, 5), rpb=rpb, scale=0.3)
    never = dict(window, dropout_p=1e-12)
    qkv = torch.stack([query, key, value], 3)
    output = na2d_qkvpacked(qkv, **never) if packed else na2d(query, key, value, **never)
    torch.testing.assert_close(output, na2d(query, key, value, **window))
    always = na2d(query, key, value, **dict(window, dropout_p=1.0))
    assert torch.equal(always, torch.zeros_like(always))


@pytest.mark.parametrize("dropout_p", [-0.1, 1.5, float("nan")])
def test_a_dropout_that_is_no_probability_is_refused(dropout_p):
    x = torch.zeros(1, 9, 12, 2, 8)
    with pytest.raises(ValueError, match=r"dropout_p must lie in \[0, 1\], got dropout_p="):
        na2d(x, x, x, kernel_size=3, dropout_p=dropout_p)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(qkv=torch.zeros(1, 9, 12, 3, 8)), r"qkv must be \[B, H, W, 3, .*got shape \(1, 9, 12, 3, 8\)"),
        (dict(qkv=torch.zeros(1, 9, 12, 2, 2, 8)), r"qkv must be \[B, H, W, 3, .*got shape \(1, 9, 12, 2, 2, 8\)"),
        (dict(qkv=torch.zeros(1, 9, 12, 3, 2, 8, dtype=torch.int64)), r"^qkv must be of a floating-point dtype"),
        (dict(rpb=torch.zeros(2, 5, 6)), r"rpb must be.*\(2, 5, 5\).*got \(2, 5, 6\)"),
        (dict(kernel_size=13), r"fit in the map.*9 x 12"),
        (dict(dropout_p=2.0), r"got dropout_p=2.0"),
    ],
)
def test_bad_packed_arguments_are_named_with_the_rule(change, message):
    arguments = dict(qkv=torch.zeros(1, 9, 12, 3, 2, 8), kernel_size=3) | change
    with pytest.raises(ValueError, match=message):
        na2d_qkvpacked(arguments.pop("qkv"), **arguments)


@pytest.mark.parametrize("grad", [False, True])
def test_packed_defaults_are_those_of_na2d_and_its_scale_is_honoured(grad):
    qkv, rpb = torch.randn(1, 9, 12, 3, 2, 8, requires_grad=grad), torch.randn(2, 5, 5)
    for window in (dict(kernel_size=3, rpb=rpb), dict(kernel_size=3, rpb=rpb, scale=0.7)):
        torch.testing.assert_close(na2d_qkvpacked(qkv, **window), na2d(*qkv.unbind(3), **window))
