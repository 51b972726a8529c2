"""Derivatives above the first, forward mode and torch.func: right on every backend, or refused."""

import functools
import sys
import types

import pytest
import timm
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vmap
from torch.utils.checkpoint import checkpoint

from nat_models import NeighborhoodAttention2d
from nat_models.networks import NAT
from nat_models.ops import explain, na2d, na2d_qkvpacked, use_backend
from nat_models.ops.backends import natten_fused, reference
from tests.ops.conftest import make_inputs

KERNEL, DILATION, SCALE = (3, 3), (1, 2), 0.7


def _apart(query, key, value, rpb=None):
    return na2d(query, key, value, kernel_size=KERNEL, dilation=DILATION, rpb=rpb, scale=SCALE)


def _packed(query, key, value, rpb=None):
    qkv = torch.stack([query, key, value], 3)
    return na2d_qkvpacked(qkv, kernel_size=KERNEL, dilation=DILATION, rpb=rpb, scale=SCALE)


def _operator(query, key, value, rpb=None):
    return torch.ops.nat_models.na2d(query, key, value, rpb, KERNEL, DILATION, SCALE)


def _packed_operator(query, key, value, rpb=None):
    qkv = torch.stack([query, key, value], 3)
    return torch.ops.nat_models.na2d_qkvpacked(qkv, rpb, KERNEL, DILATION, SCALE)


def _meaning(query, key, value, rpb=None):
    return reference.na2d(query, key, value, rpb, KERNEL, DILATION, SCALE)


FORMS = [_apart, _packed, _operator, _packed_operator]


def _inputs(with_rpb=True, requires_grad=False):
    inputs = make_inputs(1, 4, 6, 2, 2, KERNEL, requires_grad=requires_grad)
    return tuple(inputs if with_rpb else inputs[:3])


def _loss(function, *inputs):
    return function(*inputs).sin().sum()


def _penalty(function, *inputs):
    """The gradient of a gradient penalty, by autograd."""
    slopes = torch.autograd.grad(_loss(function, *inputs), inputs, create_graph=True)
    return torch.autograd.grad(sum((slope**2).sum() for slope in slopes), inputs)


def _functional_penalty(function, *inputs):
    """The same by torch.func."""
    every = tuple(range(len(inputs)))

    def penalty(*inputs):
        slopes = grad(functools.partial(_loss, function), every)(*inputs)
        return sum((slope**2).sum() for slope in slopes)

    return grad(penalty, every)(*inputs)


# Sums in another order, in float64
_close = functools.partial(torch.testing.assert_close, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", ["native", "blocked", "reference"])
@pytest.mark.parametrize("with_rpb", [True, False])
@pytest.mark.parametrize("form", [_apart, _packed])
def test_second_derivatives_are_those_of_finite_differences(form, with_rpb, name):
    with use_backend(name):
        assert gradgradcheck(form, _inputs(with_rpb, requires_grad=True))


@pytest.mark.parametrize("name", ["native", "blocked", "reference"])
@pytest.mark.parametrize("with_rpb", [True, False])
def test_second_derivatives_of_the_layer_are_those_of_finite_differences(with_rpb, name):
    layer = NeighborhoodAttention2d(
        4, 2, kernel_size=KERNEL, dilation=DILATION, rel_pos_bias=with_rpb, dtype=torch.float64
    )
    x = torch.randn(
        1, 3, 4, 4, dtype=torch.float64, requires_grad=True
    )  # it pads: the zero tokens have derivatives too
    with use_backend(name):
        assert gradgradcheck(lambda x, *parameters: layer(x), (x, *layer.parameters()))


@pytest.mark.parametrize("form", FORMS)
def test_every_mode_of_the_operator_is_that_of_finite_differences(form):
    inputs = _inputs(requires_grad=True)
    assert gradcheck(
        form, inputs, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True, fast_mode=True
    )
    assert gradgradcheck(form, inputs, check_fwd_over_rev=True, check_batched_grad=True, fast_mode=True)


@pytest.mark.parametrize("form", FORMS)
def test_jvp_is_the_difference_of_near_points(form):
    inputs = _inputs()
    tangents = tuple(map(torch.randn_like, inputs))
    output, tangent = jvp(form, inputs, tangents)
    step = 1e-6
    ahead, behind = (
        form(*(x + sign * step * t for x, t in zip(inputs, tangents, strict=True))) for sign in (1.0, -1.0)
    )
    torch.testing.assert_close(tangent, (ahead - behind) / (2 * step), rtol=0, atol=1e-5)
    _close(output, form(*inputs))


@pytest.mark.parametrize("form", FORMS)
def test_dual_numbers_carry_their_tangents(form):
    inputs = _inputs()
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(form(forward_ad.make_dual(inputs[0], inputs[1]), *inputs[1:]))
    zeros = tuple(map(torch.zeros_like, inputs[1:]))
    _close(tuple(dual), jvp(_meaning, inputs, (inputs[1], *zeros)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "transform", [jacrev, jacfwd, lambda function, every: hessian(lambda *x: _loss(function, *x), every)]
)
def test_jacobians_and_hessians_are_the_references(transform, form):
    inputs = _inputs()
    every = tuple(range(len(inputs)))
    _close(transform(form, every)(*inputs), transform(_meaning, every)(*inputs))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("in_dims", [(0, None, 1, None), (None, 2, None, 0), (0, 0, 0, 0)])
def test_vmap_is_a_loop(in_dims, form):
    base, count = _inputs(), 3
    inputs = [x if d is None else torch.stack([x, 0.3 * x, -x], d) for x, d in zip(base, in_dims, strict=True)]
    every = tuple(range(len(inputs)))
    for function in (form, grad(functools.partial(_loss, form), every)):
        actual = vmap(function, in_dims)(*inputs)
        loop = [
            function(*(x if d is None else x.select(d, i) for x, d in zip(inputs, in_dims, strict=True)))
            for i in range(count)
        ]
        expected = tuple(map(torch.stack, zip(*loop, strict=True))) if isinstance(actual, tuple) else torch.stack(loop)
        _close(actual, expected)


@pytest.mark.parametrize(
    "differentiate",
    [
        _penalty,
        _functional_penalty,
        lambda f, *x: _penalty(lambda *x: checkpoint(f, *x, use_reentrant=False), *x),
        lambda f, *x: torch.compile(_functional_penalty, backend="aot_eager", fullgraph=True)(f, *x),
    ],
    ids=["autograd", "torch.func", "checkpointed", "torch.func compiled"],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_gradient_penalty_has_the_references_gradient(differentiate, form):
    inputs = _inputs(requires_grad=True)
    torch._dynamo.reset()
    _close(differentiate(form, *inputs), _penalty(_meaning, *inputs))


def test_one_tensor_as_query_key_and_value_has_the_sum_of_their_second_derivatives():
    x, rpb = _inputs(requires_grad=True)[0], _inputs(requires_grad=True)[3]
    for form in FORMS:
        _close(
            _penalty(lambda x, rpb, form=form: form(x, x, x, rpb), x, rpb),
            _penalty(lambda x, rpb: _meaning(x, x, x, rpb), x, rpb),
        )


def test_compiled_code_refuses_a_second_derivative():
    inputs = _inputs(requires_grad=True)
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="double backward"):
        _penalty(torch.compile(_apart, backend="aot_eager"), *inputs)


@pytest.mark.parametrize("form", FORMS)
def test_an_empty_batch_has_empty_derivatives(form):
    inputs = make_inputs(0, 4, 6, 2, 2, KERNEL, requires_grad=True)
    slopes = torch.autograd.grad(form(*inputs).sum(), inputs, create_graph=True)
    assert torch.equal(slopes[3], torch.zeros_like(inputs[3]))
    tangents = tuple(map(torch.ones_like, inputs))
    assert jvp(form, tuple(x.detach() for x in inputs), tangents)[1].shape == inputs[0].shape


def test_low_precision_is_accumulated_in_float32_in_transforms_too():
    inputs = [x.to(torch.bfloat16) for x in _inputs()]
    slopes = grad(functools.partial(_loss, _apart), (0, 1, 2, 3))(*inputs)
    wide = grad(functools.partial(_loss, _meaning), (0, 1, 2, 3))(*(x.double() for x in inputs))
    for slope, expected in zip(slopes, wide, strict=True):
        assert slope.dtype == torch.bfloat16
        # A few roundings to 8 bits, of the output, of its gradient and of the result
        torch.testing.assert_close(slope.double(), expected, rtol=2**-6, atol=2**-6 * expected.abs().max().item())


def _small(**kwargs) -> NAT:
    model = NAT(embed_dim=16, depths=(1, 1), num_heads=(1, 2), num_classes=5, kernel_size=3, drop_path_rate=0, **kwargs)
    return model.double()


def test_per_sample_gradients_are_those_of_a_loop():
    model, images = _small(), torch.randn(3, 3, 32, 40, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1])
    parameters = dict(model.named_parameters())

    def loss(parameters, image, label):
        logits = functional_call(model, parameters, (image[None],))
        return torch.nn.functional.cross_entropy(logits, label[None])

    actual = vmap(grad(loss), (None, 0, 0))(parameters, images, labels)
    for i in range(3):
        model.zero_grad()
        loss(parameters, images[i], labels[i]).backward()
        for name, parameter in parameters.items():
            _close(actual[name][i], parameter.grad)


def test_an_ensemble_by_vmap_over_weights_is_its_members():
    models, images = [_small().eval() for _ in range(2)], torch.randn(2, 3, 32, 40, dtype=torch.float64)
    parameters, buffers = stack_module_state(models)

    def call(parameters, buffers, images):
        return functional_call(models[0], (parameters, buffers), (images,))

    _close(vmap(call, (0, 0, None))(parameters, buffers, images), torch.stack([model(images) for model in models]))


def _penalty_of_nat_mini(checkpointing=False):
    torch.manual_seed(0)
    model = timm.create_model("nat_mini", num_classes=3, drop_path_rate=0).double()
    model.set_grad_checkpointing(checkpointing)
    image = torch.randn(1, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(_loss(model, image), image, create_graph=True)
    grads = torch.autograd.grad(slope.norm(), list(model.parameters()))
    return {name: grad for (name, _), grad in zip(model.named_parameters(), grads, strict=True)}


@pytest.fixture(scope="module")
def penalty_of_nat_mini():
    with use_backend("reference"):
        return _penalty_of_nat_mini()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_gradient_penalty_on_nat_mini_has_the_references_gradient(checkpointing, penalty_of_nat_mini):
    _close(_penalty_of_nat_mini(checkpointing), penalty_of_nat_mini)


@pytest.mark.parametrize("sought", [lambda x, gain: x, lambda x, gain: gain], ids=["its input", "what follows it"])
def test_nattens_gradient_refuses_to_be_differentiated(sought, monkeypatch):
    class Kernel(torch.autograd.Function):  # as NATTEN's: what its backward computes has no history
        @staticmethod
        def forward(ctx, query, key, value):
            return query * 2

        @staticmethod
        def backward(ctx, grad):
            return grad.detach() * 2, None, None

    def fused(query, key, value, **window):
        return Kernel.apply(query, key, value)

    monkeypatch.setitem(sys.modules, "natten", types.SimpleNamespace(na2d=fused))
    x, gain = torch.randn(1, 4, 6, 2, 2, requires_grad=True), torch.ones((), requires_grad=True)
    output = gain * natten_fused.na2d(x, x, x, None, KERNEL, DILATION, SCALE)
    (slope,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
    assert torch.equal(slope, torch.full_like(x, 2.0))
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    assert torch.equal(slope, torch.full_like(x, 2.0))
    with pytest.raises(RuntimeError, match=r"NATTEN's backward has no derivative; use_backend\('blocked'\)"):
        torch.autograd.grad(slope.sum(), sought(x, gain))


@pytest.mark.parametrize(
    ("name", "reason"),
    [("flex", "neither forward mode nor a batching rule"), ("natten_fused", "neither forward mode nor batching rules")],
)
def test_a_backend_that_cannot_be_transformed_says_so(name, reason):
    query, key, value, _ = (x.float() for x in _inputs())
    with use_backend(name), pytest.raises(RuntimeError, match=reason):
        jvp(_apart, (query, key, value), (query, key, value))


@pytest.mark.parametrize("dropout", [False, True])
def test_a_transform_runs_on_what_is_explained(dropout):
    assert "under torch.func or forward mode), na2d runs on exportable" in explain(transformed=True)
    assert "na2d runs on exportable" in explain("cuda", transformed=True, dropout=dropout)


def test_dropped_attention_weights_have_tangents_too():
    query, key, value, rpb = _inputs()
    window = dict(kernel_size=KERNEL, rpb=rpb, dropout_p=0.5)

    def attend(query):
        torch.manual_seed(1)
        return na2d(query, key, value, **window)

    _, tangent = jvp(attend, (query,), (key,))
    step = 1e-6
    with use_backend("exportable"):  # drops the same weights
        difference = (attend(query + step * key) - attend(query - step * key)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=0, atol=1e-5)
