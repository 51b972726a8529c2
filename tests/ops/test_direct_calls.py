"""torch.ops.nat_models called directly, with anything: an error or a right answer, never a signal or garbage."""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.autograd import forward_ad

from nat_models.ops import na2d_qkvpacked, registration, use_backend
from nat_models.ops.backends import flex, native, reference
from tests.ops.conftest import needs_native

ROOT = Path(__file__).parents[2]
OPERATORS = ["na2d", "na2d_backward", "na2d_qkvpacked", "na2d_qkvpacked_backward", "na2d_qkvpacked_inference"]


def _make_random_calls(operators: list[str], examples: int, folder: Path, *library: str, **environment: str) -> None:
    """In a process of their own: a signal ends it, and the last call that was begun is told."""
    pytest.importorskip("hypothesis", reason="hypothesis is not installed")
    log = folder / "last_call"
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.direct_calls", ",".join(operators), str(examples), log, *library],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    last = log.read_text() if log.exists() else "none was begun"
    assert run.returncode == 0, f"ended with {run.returncode}, last call: {last}\n{(run.stdout + run.stderr)[-5000:]}"
    counts = {
        name: (int(answered), int(refused)) for name, answered, refused in map(str.split, run.stdout.splitlines())
    }
    # Calls that all end in the same way would keep half of the promise untried.
    assert [name for name, outcomes in counts.items() if min(outcomes) > examples // 10] == operators, counts


def test_random_calls_are_errors_or_right(tmp_path):
    _make_random_calls([*OPERATORS, "flex_plan"], 100, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("operator", [*OPERATORS, "flex_plan"])
def test_two_thousand_random_calls_are_errors_or_right(operator, tmp_path):
    _make_random_calls([operator], 2000, tmp_path)


@needs_native
@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_sanitizers_find_nothing_in_random_calls(operator, tmp_path, sanitized):
    library, environment = sanitized
    _make_random_calls([operator], 2000, tmp_path, library, **environment)


def _arguments(operator: str, **changes) -> list:
    x = torch.randn(1, 9, 11, 2, 8)
    tensors = dict(query=x, key=x, value=x)
    if "qkvpacked" in operator:
        tensors = dict(qkv=torch.randn(1, 9, 11, 3, 2, 8))
    if "backward" in operator:
        tensors = dict(grad_output=x) | tensors
    window = dict(kernel_size=[3, 3], dilation=[1, 1])
    arguments = dict(tensors, rpb=torch.randn(2, 5, 5), **window, scale=0.3)
    arguments |= {name: value for name, value in changes.items() if name in arguments}
    if operator.endswith("inference"):
        kernel_size, dilation = arguments.pop("kernel_size"), arguments.pop("dilation")
        scale = arguments.pop("scale")
        return [*arguments.values(), *kernel_size, *dilation, scale]
    return list(arguments.values())


def _call(operator: str, **changes):
    return getattr(torch.ops.nat_models, operator)(*_arguments(operator, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(kernel_size=[0, 5]), "odd and at least 1"),
        (dict(kernel_size=[2**63 - 1, 3]), "must fit in the map"),
        (dict(dilation=[1, 2**62]), "must fit in the map"),
        (dict(dilation=[0, 1]), "at least 1"),
        (dict(rpb=torch.randn(2, 5, 7)), r"rpb must be \[num_heads, 2\*K_h-1, 2\*K_w-1\]"),
        (
            dict(rpb=torch.zeros(2, 5, 5, device="meta")),
            "rpb must be .* on cpu, got .* on meta",
        ),  # no memory of its own
        (dict(rpb=torch.randn(2, 5, 5).to_sparse()), "rpb must be strided, got torch.sparse_coo"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(value),
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_the_error_of_a_direct_call_says_the_rule(operator, changes, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        _call(operator, **changes)


@pytest.mark.parametrize("kernel_size", [[1, 5], [5, 1], [1, 1]])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_window_of_one_row_or_column_is_an_answer_and_no_division_by_zero(operator, kernel_size):
    tensors = _arguments(operator, rpb=torch.randn(2, *(2 * k - 1 for k in kernel_size)), kernel_size=kernel_size)
    outputs = getattr(torch.ops.nat_models, operator)(*tensors)
    grad_output = [tensors.pop(0)] if "backward" in operator else []
    inputs = [x.clone().requires_grad_() for x in tensors if torch.is_tensor(x)]
    query, key, value = inputs[0].unbind(3) if "qkvpacked" in operator else inputs[:3]
    expected = reference.na2d(query, key, value, inputs[-1], kernel_size, [1, 1], 0.3)
    if grad_output:
        torch.testing.assert_close(outputs, torch.autograd.grad(expected, inputs, grad_output), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(outputs, expected.detach())


@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.complex64, torch.int32], ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_other_dtypes_are_refused(operator, dtype):
    tensors = [x.to(dtype) if torch.is_tensor(x) else x for x in _arguments(operator)]
    with pytest.raises((ValueError, RuntimeError), match=r"floating-point dtype, got|must be float32, float64"):
        getattr(torch.ops.nat_models, operator)(*tensors)


@pytest.mark.parametrize("backend", ["native", "blocked"])
def test_another_default_device_changes_nothing(backend):
    if backend == "native" and not native.available()[0]:
        pytest.skip(native.available()[1])
    arguments = _arguments("na2d")
    with use_backend(backend), torch.device("meta"):
        output = torch.ops.nat_models.na2d(*arguments)
    torch.testing.assert_close(output, reference.na2d(*arguments))


@needs_native
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_tensor_whose_memory_was_given_back_is_refused(operator):
    arguments = _arguments(operator)
    arguments[0].untyped_storage().resize_(0)
    with use_backend("native"), pytest.raises(RuntimeError, match=r"data .* must be there|storage of size 0"):
        getattr(torch.ops.nat_models, operator)(*arguments)


def test_more_elements_than_any_memory_holds_are_refused_before_anything_is_planned():
    x = torch.zeros(1).expand(1, 2**31, 2**20, 1, 1)
    with use_backend("blocked"), pytest.raises(ValueError, match="more than any memory holds"):
        torch.ops.nat_models.na2d(x, x, x, None, [3, 3], [1, 1], 1.0)


@pytest.mark.parametrize(
    ("size", "dilation"),
    [
        ([2**31, 2**31], [1, 1]),
        ([flex._MAX_POSITIONS + 1, 3], [1, 1]),
        ([1500, 1500], [1, 1]),
        ([1000, 1000], [300, 300]),  # of mostly padding
    ],
)
def test_a_plan_that_could_not_be_held_is_refused(size, dilation):
    with pytest.raises(ValueError, match=r"planned for up to \d+ blocks .* got size="):
        torch.ops.nat_models.flex_plan(size, [3, 3], dilation, torch.device("cpu"))


@pytest.mark.parametrize("change", ["qkv", "rpb", "tangent"])
def test_the_inference_operator_refuses_what_wants_a_derivative(change):
    qkv, rpb, *window = _arguments("na2d_qkvpacked_inference")
    operator = torch.ops.nat_models.na2d_qkvpacked_inference
    expected = operator(qkv, rpb, *window)
    with forward_ad.dual_level():
        if change == "tangent":
            qkv = forward_ad.make_dual(qkv, qkv)
        else:
            (qkv if change == "qkv" else rpb).requires_grad_()
        with pytest.raises(RuntimeError, match="has no derivative"):
            operator(qkv, rpb, *window)
    with torch.no_grad():
        assert torch.equal(operator(qkv, rpb, *window), expected)


@pytest.mark.parametrize("transform", [torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))])
def test_the_inference_operator_gives_no_zeros_to_a_transform(transform):
    qkv, *rest = _arguments("na2d_qkvpacked_inference")
    with pytest.raises(RuntimeError, match="has no derivative"):
        transform(lambda qkv: torch.ops.nat_models.na2d_qkvpacked_inference(qkv, *rest).sum())(qkv)


@needs_native
def test_networks_pass_by_the_python_that_refuses_a_derivative(monkeypatch):
    calls = []
    monkeypatch.setattr(registration, "_has_tangent", lambda *tensors: calls.append(tensors))
    qkv, rpb = torch.randn(1, 9, 11, 3, 2, 8), torch.randn(2, 5, 5)
    torch.ops.nat_models.na2d_qkvpacked_inference(qkv, rpb, 3, 3, 1, 1, 0.3)
    assert len(calls) == 1
    with torch.no_grad():
        na2d_qkvpacked(qkv, kernel_size=3, rpb=rpb)
    assert len(calls) == 1


@needs_native
@pytest.mark.parametrize("wrong", [False, True])
def test_a_direct_call_keeps_no_tensor(wrong):
    qkv, rpb = torch.randn(1, 9, 11, 3, 2, 8), torch.randn(2, 5, 7 if wrong else 5)
    references = [weakref.ref(qkv), weakref.ref(rpb)]
    try:
        output = torch.ops.nat_models.na2d_qkvpacked_inference(qkv, rpb, 3, 3, 1, 1, 0.3)
        references.append(weakref.ref(output))
        del output
    except (RuntimeError, ValueError):
        assert wrong
    assert len(references) == 2 + (not wrong)
    del qkv, rpb
    assert [reference() for reference in references] == [None] * len(references)


# nat_na2d_call: what the C entry is given, at the place of each in native._CALL.
_STRUCT = dict(query=0, rpb=40, batch=42, height=43, width=44, heads=45, head_dim=46, kernel=47, dilation=49, dtype=51)
NO_MEMORY, BAD_DTYPE, BAD_CALL = 1, 2, 3


@needs_native
@pytest.mark.parametrize(
    ("field", "value", "status"),
    [
        ("kernel", 0, BAD_CALL),
        ("kernel", -3, BAD_CALL),
        ("kernel", 4, BAD_CALL),
        ("kernel", 11, BAD_CALL),
        ("kernel", 2**63 - 1, BAD_CALL),
        ("dilation", 0, BAD_CALL),
        ("dilation", 2**62, BAD_CALL),
        ("batch", -1, BAD_CALL),
        ("head_dim", 2**62, BAD_CALL),
        ("dtype", 7, BAD_DTYPE),
        ("query", 0, BAD_CALL),
        ("query", 2, BAD_CALL),  # not aligned to float32
        ("rpb", 2, BAD_CALL),
        ("batch", 0, 0),
    ],
)
def test_the_c_entry_is_safe_by_itself(field, value, status):
    x = torch.randn(1, 9, 11, 2, 8)
    packed = native._call(torch.empty_like(x), x, x, x, x, None, (3, 3), (1, 1), 0.3, (x.clone(),) * 3)
    values = list(native._CALL.unpack(packed))
    values[_STRUCT[field]] = value
    changed = native._CALL.pack(*values)
    library = native._load()
    assert library.nat_na2d_forward(changed) == library.nat_na2d_backward(changed) == status


@needs_native
def test_scratch_beyond_any_number_is_no_memory_and_no_overflow():
    x = torch.zeros(1).expand(1, 2**31, 3, 1, 1)  # logits of 2**68 elements
    call = native._call(torch.empty(1).expand_as(x), None, x, x, x, None, (2**31 - 1, 3), (1, 1), 1.0)
    assert native._load().nat_na2d_forward(call) == NO_MEMORY
