"""na2d: the golden values, the contract of a PyTorch operator, and errors that say what is wrong."""

import functools
import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.attention.flex_attention
from safetensors.torch import load_file
from torch.autograd import gradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from nat_models.ops import blocked, cpu, explain, flex, fvcore_handles, na2d, na2d_packed, reference, use_backend
from nat_models.ops.window import window
from tests.conftest import FIXTURES, tensor

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
]


# What each backend of this list declines, the test is skipped for, with the reason that the backend gives.
BACKENDS = [
    "native",
    "reference",
    "blocked whole",  # the map is one tile
    "blocked 7",  # tiles that do and do not divide the map
    "blocked 4",
    "traced",
    "flex",
    pytest.param("flex compiled", marks=pytest.mark.slow),
    "natten",
]


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Runs a test on one backend."""
    name, _, variant = request.param.partition(" ")
    if name == "native" and not cpu.available()[0]:
        pytest.skip(cpu.available()[1])
    if name == "blocked":
        monkeypatch.setattr(blocked, "_WHOLE_MAP_QUERIES", 10**9 if variant == "whole" else 0)
        monkeypatch.setattr(blocked, "_TILE", 0 if variant == "whole" else int(variant))
        monkeypatch.setitem(blocked._CHUNK_ELEMENTS, "cpu", 1 << 10)  # so that batches are cut too
    if name == "flex":
        _let_flex_have_gradients_on_the_cpu(monkeypatch)
    for function in (na2d, na2d_packed):
        monkeypatch.setitem(globals(), function.__name__, _skip_what_is_declined(function, variant == "compiled"))
    with use_backend(name):
        yield name


def _let_flex_have_gradients_on_the_cpu(monkeypatch):
    """PyTorch refuses it on a CPU, and so do we, yet its eager form has the formulas that the GPU's kernels have."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *tensors: None)
    why_not = flex.why_not
    monkeypatch.setattr(flex, "why_not", lambda call: why_not(call._replace(requires_grad=False, compiling=False)))


def _skip_what_is_declined(function, compiled):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        try:
            if compiled:  # graphs, autograd and fake tensors as torch.compile has them, without its code generation
                torch._dynamo.reset()
                return torch.compile(function, fullgraph=True, backend="aot_eager")(*args, **kwargs)
            return function(*args, **kwargs)
        except RuntimeError as error:
            if "was asked for and cannot run" not in str(error):
                raise
            pytest.skip(str(error))

    return wrapper


def _relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def _inputs(batch, height, width, heads, head_dim, kernel_size, dtype=torch.float64, requires_grad=False):
    qkv = torch.randn(batch, height, width, 3, heads, head_dim, dtype=dtype)
    rpb = torch.randn(heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1, dtype=dtype)
    query, key, value = qkv.unbind(3)
    return [x.requires_grad_(requires_grad) for x in (query, key, value, rpb)]


def _gradients(output, inputs):
    # A fixed, uneven weighting, so that no gradient cancels.
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).sin().view_as(output)
    return torch.autograd.grad((output * weight).sum(), inputs)


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
        assert _relative_error(value, golden[name]) < (2e-6 if name == "output" else 2e-5), name


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
    query, key, value, rpb = (x.to(dtype) for x in _inputs(*shape, kernel_size))
    rpb = rpb.to(torch.promote_types(dtype, torch.float32)) if with_rpb else None
    inputs = [x.requires_grad_(requires_grad) for x in (query, key, value, rpb) if x is not None]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = reference.na2d(*exact[:3], exact[3] if with_rpb else None, kernel_size, dilation, 0.3)
    output = na2d(query, key, value, kernel_size=kernel_size, dilation=dilation, rpb=rpb, scale=0.3)
    assert (output.dtype, output.is_contiguous(), output.requires_grad) == (dtype, True, requires_grad)
    assert _relative_error(output.double(), expected) < TOLERANCES[dtype][0]
    if requires_grad:
        for x, actual, wide in zip(inputs, _gradients(output, inputs), _gradients(expected, exact), strict=True):
            assert actual.dtype == x.dtype
            assert _relative_error(actual.double(), wide) < TOLERANCES[dtype][1]


@pytest.mark.parametrize("case", GRID)
def test_blocked_is_differentiable_by_plain_autograd_too(case):
    # The path that attention dropout takes.
    *shape, kernel_size, dilation = case
    inputs = _inputs(*shape, kernel_size, requires_grad=True)
    window = (kernel_size, dilation, 0.3)
    actual, expected = blocked.na2d(*inputs, *window), reference.na2d(*inputs, *window)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(_gradients(actual, inputs), _gradients(expected, inputs), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("with_rpb", [True, False])
def test_packed_qkv_gives_the_same_result_and_a_packed_gradient(with_rpb, backend):
    qkv = torch.randn(2, 9, 12, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    rpb = torch.randn(2, 5, 9, dtype=torch.float64, requires_grad=True) if with_rpb else None
    inputs = [x for x in (qkv, rpb) if x is not None]
    window = dict(kernel_size=(3, 5), dilation=(2, 1), rpb=rpb)
    actual, expected = na2d_packed(qkv, **window), na2d(*qkv.unbind(3), **window)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(_gradients(actual, inputs), _gradients(expected, inputs), rtol=0, atol=0)


@pytest.mark.parametrize(("length", "kernel_size", "dilation"), [(7, 7, 1), (13, 5, 1), (29, 7, 4), (31, 3, 8)])
def test_every_query_has_exactly_k_distinct_keys_of_its_group(length, kernel_size, dilation):
    keys, offsets = window(length, kernel_size, dilation)
    for query in range(length):
        row = keys[query].tolist()
        assert len(set(row)) == kernel_size
        assert all(0 <= key < length and key % dilation == query % dilation for key in row)
        assert query in row
        assert offsets[query].tolist() == [(key - query) // dilation + kernel_size - 1 for key in row]


def test_large_logits_stay_finite(backend):
    query, key, value, rpb = _inputs(1, 9, 11, 1, 8, (7, 7), torch.float32, requires_grad=True)
    output = na2d(query, key, value, kernel_size=7, rpb=rpb, scale=1e4)
    grads = _gradients(output, [query, key, value, rpb])
    assert all(torch.isfinite(x).all() for x in (output, *grads))


def test_scale_zero_is_honoured(backend):
    query, key, value, _ = _inputs(1, 7, 7, 1, 8, (7, 7))
    output = na2d(query, key, value, kernel_size=7, scale=0.0)
    torch.testing.assert_close(output, value.mean((1, 2), keepdim=True).expand_as(value))


def test_views_of_a_packed_qkv_give_the_same_bits(backend):
    qkv = torch.randn(2, 9, 12, 3, 2, 8)
    packed = na2d(*qkv.unbind(3), kernel_size=3)
    apart = na2d(*(x.contiguous() for x in qkv.unbind(3)), kernel_size=3)
    assert torch.equal(packed, apart)


def test_empty_batch_gives_empty_result_and_zero_rpb_gradient(backend):
    query, key, value, rpb = _inputs(0, 9, 12, 2, 8, (3, 3), requires_grad=True)
    output = na2d(query, key, value, kernel_size=3, rpb=rpb)
    output.sum().backward()
    assert output.shape == (0, 9, 12, 2, 8)
    assert torch.equal(rpb.grad, torch.zeros_like(rpb))


def test_same_input_same_bits(backend):
    inputs = _inputs(2, 30, 25, 2, 16, (7, 7), torch.float32, requires_grad=True)

    def run():
        output = na2d(*inputs[:3], kernel_size=7, rpb=inputs[3])
        grads = _gradients(output, inputs)
        return output, *(grads[:3] if backend == "flex" else grads)  # flex: rpb's is summed in any order, as it says

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("with_rpb", [True, False])
def test_gradcheck(with_rpb, backend):
    query, key, value, rpb = _inputs(1, 5, 6, 2, 2, (3, 3), requires_grad=True)
    check = functools.partial(gradcheck, fast_mode=backend == "flex")  # each evaluation is traced anew, seconds in all
    if with_rpb:
        assert check(lambda q, k, v, r: na2d(q, k, v, kernel_size=3, rpb=r), (query, key, value, rpb))
    else:
        assert check(lambda q, k, v: na2d(q, k, v, kernel_size=3, dilation=(1, 2)), (query, key, value))


@pytest.mark.parametrize("with_rpb", [True, False])
def test_opcheck(with_rpb, backend):
    if backend not in ("native", "blocked"):
        pytest.skip(f"{backend} does not go through the operator")
    query, key, value, rpb = _inputs(1, 9, 12, 2, 8, (3, 5), torch.float32, requires_grad=True)
    args = (query, key, value, rpb if with_rpb else None, (3, 5), (2, 1), 0.25)
    opcheck(torch.ops.nat_models.na2d.default, args)
    opcheck(
        torch.ops.nat_models.na2d_backward.default, [x.detach() if torch.is_tensor(x) else x for x in (query, *args)]
    )


def test_opcheck_of_the_operator_without_gradients(backend):
    if backend not in ("native", "blocked"):
        pytest.skip(f"{backend} does not go through the operator")
    qkv, rpb = torch.randn(1, 9, 12, 3, 2, 8), torch.randn(2, 5, 9)
    opcheck(torch.ops.nat_models.na2d_qkvpacked_inference.default, (qkv, rpb, 3, 5, 2, 1, 0.25))


@pytest.mark.parametrize("grad", [False, True])
def test_packed_runs_and_counts_as_the_operator_of_its_purpose(grad):
    qkv = torch.randn(2, 9, 12, 3, 2, 8, requires_grad=True)
    rpb = torch.randn(2, 5, 9)
    with torch.set_grad_enabled(grad), FlopCounterMode(display=False) as counter:
        output = na2d_packed(qkv, kernel_size=(3, 5), rpb=rpb)
    assert output.requires_grad is grad
    name = "nat_models.na2d_packed" if grad else "nat_models.na2d_qkvpacked_inference"
    assert {str(op): count for op, count in counter.get_flop_counts()["Global"].items()} == {
        name: 2 * 2 * (2 * 9 * 12) * (3 * 5) * (2 * 8)
    }


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_one_graph(dynamic):
    inputs = _inputs(2, 9, 12, 2, 8, (3, 3), torch.float32, requires_grad=True)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def attend(query, key, value, rpb):
        return na2d(query, key, value, kernel_size=3, rpb=rpb)

    expected = na2d(*inputs[:3], kernel_size=3, rpb=inputs[3])
    output = attend(*inputs)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(_gradients(output, inputs), _gradients(expected, inputs))


@pytest.mark.parametrize(("name", "is_node"), [(None, False), ("native", True), ("blocked", True)])
def test_exports_as_tensor_operations_or_as_the_node_asked_for(name, is_node):
    class Attend(torch.nn.Module):
        def forward(self, query, key, value, rpb):
            return na2d(query, key, value, kernel_size=3, rpb=rpb)

    inputs = _inputs(2, 9, 12, 2, 8, (3, 3), torch.float32)
    with use_backend(name):
        program = torch.export.export(Attend(), tuple(inputs))
    assert ("nat_models" in {getattr(node.target, "namespace", "") for node in program.graph.nodes}) is is_node
    torch.testing.assert_close(program.module()(*inputs), Attend()(*inputs))


def test_autocast_computes_in_its_dtype_and_keeps_rpb_exact():
    query, key, value, rpb = _inputs(1, 9, 9, 1, 8, (3, 3), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = na2d(query, key, value, kernel_size=3, rpb=rpb)
    expected = na2d(*(x.bfloat16() for x in (query, key, value)), kernel_size=3, rpb=rpb)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_flop_counter_knows_forward_and_backward(requires_grad):
    query, key, value, _ = _inputs(2, 9, 12, 3, 8, (3, 5), torch.float32, requires_grad=requires_grad)
    with FlopCounterMode(display=False) as counter:
        output = na2d(query, key, value, kernel_size=(3, 5))
        if requires_grad:
            output.sum().backward()
    products = 2 + 5 * requires_grad  # of 2 FLOPs for each query, key of its window and channel
    assert counter.get_total_flops() == products * 2 * (2 * 9 * 12) * (3 * 5) * (3 * 8)


def test_a_backend_asked_for_that_cannot_run_says_why(monkeypatch):
    query = torch.zeros(1, 9, 12, 2, 8)
    with use_backend("native"):
        monkeypatch.setattr(cpu, "available", lambda: (False, "nat_cpu.so was not built"))
        with pytest.raises(RuntimeError, match=r"'native' was asked for and cannot run: nat_cpu\.so was not built"):
            na2d(query, query, query, kernel_size=3)
        assert "cannot run: nat_cpu.so was not built" in explain()


def test_fvcore_and_the_flop_counter_agree():
    flop_count = pytest.importorskip("fvcore.nn", reason="fvcore is not installed").FlopCountAnalysis

    class Attend(torch.nn.Module):
        def forward(self, query, key, value, rpb):
            return na2d(query, key, value, kernel_size=(3, 5), rpb=rpb)

    inputs = _inputs(2, 9, 12, 3, 8, (3, 5), torch.float32)
    operations = flop_count(Attend(), tuple(inputs)).set_op_handle(**fvcore_handles).total()
    with FlopCounterMode(display=False) as counter:
        Attend()(*inputs)
    assert 2 * operations == counter.get_total_flops()


def test_without_a_kernel_blocked_runs(monkeypatch):
    monkeypatch.setattr(cpu, "available", lambda: (False, "nat_cpu.so was not built"))
    monkeypatch.setattr(cpu, "na2d", None)
    query = torch.zeros(1, 9, 12, 2, 8)
    assert na2d(query, query, query, kernel_size=3).shape == query.shape
    assert "na2d runs on blocked, chosen automatically" in explain()


def test_meta_tensors_give_shapes():
    query = torch.empty(2, 9, 12, 3, 8, device="meta", dtype=torch.float16)
    output = na2d(query, query, query, kernel_size=7)
    assert (output.shape, output.dtype, output.device.type) == (query.shape, torch.float16, "meta")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kernel_size=4), r"odd and at least 3, got kernel_size=4"),
        (dict(kernel_size=1), r"odd and at least 3, got kernel_size=1"),
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


def test_an_unknown_backend_is_an_error():
    with (
        pytest.raises(
            ValueError, match="'fast', does not exist; known are native, natten, flex, blocked, traced, reference"
        ),
        use_backend("fast"),
    ):
        pass


def test_use_backend_is_undone():
    before = explain()
    with use_backend("reference"):
        assert "na2d runs on reference, asked for" in explain()
    assert explain() == before


def test_module_report_follows_the_environment(monkeypatch):
    monkeypatch.setenv("NAT_MODELS_BACKEND", "reference")
    run = subprocess.run([sys.executable, "-m", "nat_models"], capture_output=True, text=True, check=True)
    assert "na2d runs on reference, asked for by NAT_MODELS_BACKEND" in run.stdout


def test_plans_are_cached_within_bounds():
    assert blocked._plan_of.cache_info().maxsize == 64
