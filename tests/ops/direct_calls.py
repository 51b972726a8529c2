"""Random direct calls of torch.ops.nat_models, in a process of their own, which a signal may end: test_direct_calls.py.

A call is described in plain values before it is made, so that the last one can be told after a death. It is drawn legal
and then changed in up to three ways, most of which make it illegal.
"""

import sys
import warnings
from contextlib import ExitStack
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, reject, settings
from hypothesis import strategies as st

from nat_models.ops import use_backend
from nat_models.ops.backends import flex, native, reference
from nat_models.ops.window import window

NUMBERS = [*range(-3, 10), 2**31 - 1, 2**31, 2**62, 2**63 - 1]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
OTHER_DTYPES = [torch.float8_e5m2, torch.complex64, torch.int64, torch.bool]
# Relative to the largest value or to 1: rounding over some dozens of terms, and of each result.
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 4 * 2**-8, torch.float16: 4 * 2**-11}

# What is done to one tensor. Those of the first list must not change an answer.
VIEWS = ["transposed", "sparse last axis", "overlapping", "expanded", "requires grad", "inference"]
BREAKS = ["rank below", "rank above", "longer", "empty axis", "dtype", "meta", "none"]
ODDITIES = ["coo", "csr", "mkldnn", "nested", "jagged", "negative", "zero tensor", "misaligned"]
# Those that copy nothing.
MEMORYLESS = {"overlapping", "expanded", "requires grad", "rank below", "rank above", "empty axis", "meta", "none"}


def _names(operator: str, with_rpb: bool) -> list[str]:
    names = ["qkv"] if "qkvpacked" in operator else ["query", "key", "value"]
    return ["grad_output"] * ("backward" in operator) + names + ["rpb"] * with_rpb


@st.composite
def calls(draw, operator: str) -> dict:
    """The description of a call."""
    pick = lambda *values: draw(st.sampled_from(values))  # noqa: E731
    number = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    kernel, dilation = [pick(1, 3, 3, 5, 7), pick(1, 3, 3, 5, 7)], [pick(1, 1, 2, 3), pick(1, 1, 2, 4)]
    call = dict(
        operator=operator,
        shape=[
            number(0, 3),
            *(k * d + number(0, 9) for k, d in zip(kernel, dilation, strict=True)),
            number(0, 3),
            number(0, 20),
        ],
        kernel_size=kernel,
        dilation=dilation,
        scale=pick(0.25, 0.25, 1.0, -1.0, 0.0, float("inf"), float("nan")),
        dtype=pick(*DTYPES),
        with_rpb=operator.endswith("inference") or pick(True, True, False),
        rpb_dtype=None if operator.endswith("inference") else pick(None, torch.float32),
        seed=number(0, 2**20),
        backend=pick(None, None, "native", "blocked"),
        grad=pick(True, True, False),
        default_device=pick("cpu", "cpu", "cpu", "meta"),
        huge=None,
        changes=[],
    )
    if pick(*[False] * 9, True):  # a map far beyond any memory: without elements it is legal
        call["shape"][0] = pick(0, 0, 0, 1)
        for axis in (1, 2, 3, 4):
            call["shape"][axis] = pick(call["shape"][axis], 1, 2**31 - 1, 2**31, 2**62)
        # A table for 2**31 - 1 keys might just fit in memory, and fill it.
        kernel[:] = [pick(3, 7, 2**45 + 1 if call["with_rpb"] else 2**31 - 1, 2**61 + 1) for _ in kernel]
        call["huge"] = True
    for _ in range(pick(0, 0, 1, 1, 2, 3)):
        kind = pick("window", "view", "view", "break", "break", "oddity")
        if kind == "window":
            name = pick("kernel_size", "dilation")
            call[name] = draw(
                st.sampled_from([call[name], [0, 5], []]) | st.lists(st.sampled_from(NUMBERS), max_size=3)
            )
            continue
        change = pick(*{"view": VIEWS, "break": BREAKS, "oddity": ODDITIES}[kind])
        if call["huge"] and change not in MEMORYLESS:
            continue
        axis, dtype = number(0, 5), pick(*DTYPES, *OTHER_DTYPES)
        call["changes"].append((pick(*_names(operator, call["with_rpb"])), change, axis, dtype))
    return call


def _tensors(call: dict) -> dict[str, torch.Tensor]:
    batch, height, width, heads, dim = call["shape"]
    generator = torch.Generator().manual_seed(call["seed"])
    tensors = {}
    for name in _names(call["operator"], call["with_rpb"]):
        shape, dtype = call["shape"], call["dtype"]
        if name == "qkv":
            shape = [batch, height, width, 3, heads, dim]
        if name == "rpb":
            # As the window is, where there is one; a longer or negative one is called with some table all the same.
            pair = (call["kernel_size"] + [3, 3])[:2]
            shape = [heads, *(2 * k - 1 if 0 < k < 10 or call["huge"] else 5 for k in pair)]
            dtype = call["rpb_dtype"] or dtype
            if call["operator"].endswith("inference"):
                dtype = torch.promote_types(dtype, torch.float32)
        if call["huge"]:
            x = torch.zeros([min(shape[0], 1)] + [1] * (len(shape) - 1), dtype=dtype).expand(shape)
        else:
            x = torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)
        for which, change, axis, other in call["changes"]:
            if which == name and x is not None:
                x = _change(x, change, axis % max(x.ndim, 1), other)
        tensors[name] = x
    return tensors


def _change(x: torch.Tensor, change: str, axis: int, dtype: torch.dtype) -> torch.Tensor | None:
    if change == "transposed":
        return x.transpose(axis, -1).clone(memory_format=torch.contiguous_format).transpose(axis, -1)
    if change == "sparse last axis":
        return torch.stack([x, x], -1)[..., 0]
    if change == "overlapping":
        return x.as_strided(x.shape, [min(stride, 1) for stride in x.stride()])
    if change == "expanded":
        return x.narrow(axis, 0, min(1, x.shape[axis])).expand(x.shape)
    if change == "requires grad":
        return x.requires_grad_()
    if change == "inference":
        with torch.inference_mode():
            return x.clone()
    if change == "rank below":
        return x.select(axis, 0)
    if change == "rank above":
        return x.unsqueeze(axis)
    if change == "longer":
        return torch.cat([x, x.narrow(axis, 0, 1)], axis)
    if change == "empty axis":
        return x.narrow(axis, 0, 0)
    if change == "dtype":
        return x.to(dtype)
    if change == "meta":
        return x.to("meta")
    if change == "coo":
        return x.to_sparse()
    if change == "csr":
        return x.to_sparse_csr(dense_dim=x.ndim - 2)
    if change == "mkldnn":
        return x.to_mkldnn()
    if change in ("nested", "jagged"):
        layout = torch.strided if change == "nested" else torch.jagged
        return torch.nested.nested_tensor(list(x), layout=layout)
    if change == "negative":
        return torch._neg_view(x)
    if change == "zero tensor":
        return torch._efficientzerotensor(x.shape, dtype=x.dtype)
    if change == "misaligned":
        memory = torch.empty(x.numel() * x.element_size() + 1, dtype=torch.uint8).numpy()
        memory = torch.frombuffer(memory, dtype=x.dtype, offset=1, count=x.numel()).view(x.shape)
        return memory.copy_(x)
    assert change == "none"
    return None


def _is_legal(call: dict, tensors: dict) -> bool:
    """What the operators promise to compute, said apart from how they check it."""
    kernel, dilation, shape = call["kernel_size"], call["dilation"], list(call["shape"])
    if [len(kernel), len(dilation)] != [2, 2]:
        return False
    if any(x is None for name, x in tensors.items() if name != "rpb"):
        return False
    first = tensors.get("query", tensors.get("qkv"))
    shape = list(first.shape)
    if "qkv" in tensors:
        if len(shape) != 6 or shape[3] != 3:
            return False
        del shape[3]
    for name, x in tensors.items():
        if x is None:
            continue
        expected = shape
        if name == "qkv":
            expected = [*shape[:3], 3, *shape[3:]]
        if name == "rpb":
            expected = [shape[3], *(2 * k - 1 for k in kernel)] if len(shape) == 5 else None
        dtypes = {first.dtype, torch.float32} if name == "rpb" else {first.dtype}
        if list(x.shape) != expected or x.dtype not in dtypes or x.device != first.device:
            return False
    if len(shape) != 5 or first.dtype not in DTYPES:
        return False
    return all(_fits(*axis) for axis in zip(shape[1:3], kernel, dilation, strict=True))


def _fits(length: int, kernel: int, dilation: int) -> bool:
    return kernel >= 1 and kernel % 2 == 1 and dilation >= 1 and kernel * dilation <= length


def _arguments(call: dict, tensors: dict) -> list:
    values = list(tensors.values()) + [None] * (not call["with_rpb"])
    if call["operator"].endswith("inference"):
        pairs = [[*x, 3, 3][:2] for x in (call["kernel_size"], call["dilation"])]
        call.update(kernel_size=pairs[0], dilation=pairs[1])
        return [*values, *pairs[0], *pairs[1], call["scale"]]
    return [*values, call["kernel_size"], call["dilation"], call["scale"]]


def _plain(x: torch.Tensor) -> torch.Tensor:
    return x.detach().clone().contiguous().double()


def _expected(call: dict, tensors: dict) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The reference's output, and its gradients in the order of the operator's inputs."""
    inputs = [_plain(x).requires_grad_() for n, x in tensors.items() if n != "grad_output" and x is not None]
    query, key, value = inputs[0].unbind(3) if "qkv" in tensors else inputs[:3]
    rpb = inputs[-1] if tensors.get("rpb") is not None else None
    kernel, dilation = call["kernel_size"], call["dilation"]
    if query.numel() == 0:
        return [torch.zeros(query.shape)], [torch.zeros(x.shape) for x in inputs]
    output = reference.na2d(query, key, value, rpb, kernel, dilation, call["scale"])
    weight = _plain(tensors["grad_output"]) if "grad_output" in tensors else torch.ones_like(output)
    return [output.detach()], list(torch.autograd.grad(output, inputs, weight))


def _assert_near(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.shape == expected.shape and actual.dtype == dtype, (actual.shape, actual.dtype)
    if expected.numel():
        error, size = (actual.detach().double() - expected).abs().max().item(), expected.abs().max().item()
        assert error <= TOLERANCES[dtype] * max(size, 1), f"{error:.1e} of {size:.1e}"


def attempt(call: dict) -> str:
    """Makes a call: what came of it. Raises AssertionError for a wrong answer."""
    try:
        tensors = _tensors(call)
    except (RuntimeError, ValueError, IndexError, NotImplementedError, TypeError):
        reject()  # PyTorch makes no such tensor
    inference = call["operator"].endswith("inference")
    kinds = {change for _, change, *_ in call["changes"]}
    wants_grad = call["grad"] and any(x is not None and x.requires_grad for x in tensors.values())
    arguments = _arguments(call, tensors)
    operator = getattr(torch.ops.nat_models, call["operator"])
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(call["grad"]))
        stack.enter_context(use_backend(call["backend"]))
        stack.enter_context(torch.device(call["default_device"]))
        try:
            output = operator(*arguments)
        except (RuntimeError, ValueError, TypeError, MemoryError) as error:
            refusal = f"{type(error).__name__}: {error}"
            output = None
    odd = kinds & set(ODDITIES)
    legal = not odd - {"negative", "zero tensor"} and _is_legal(call, tensors)
    if output is None:
        # The C++ of the inference operator reads dense and wide tensors only; a legal map may fit no memory, or its
        # strides no integer.
        excused = inference and (wants_grad or kinds & {*VIEWS, *ODDITIES, "dtype", "meta", "none"})
        excused = excused or call["huge"] or any(x is not None and x.device.type == "meta" for x in tensors.values())
        excused = excused or (wants_grad and "inference" in kinds)  # autograd saves no such tensor
        assert not legal or excused, f"refused a legal call: {refusal}"
        return "refused"
    # An oddity may be refused. Where it is answered, the answer is compared like any.
    assert _is_legal(call, tensors), "answered an illegal call"
    assert not (inference and wants_grad), "computed without the derivative that is wanted"
    _compare(call, tensors, output, wants_grad)
    return "answered"


def _compare(call: dict, tensors: dict, output, wants_grad: bool) -> None:
    outputs = list(output) if isinstance(output, tuple) else [output]
    inputs = [x for name, x in tensors.items() if name != "grad_output" and x is not None]
    finite = abs(call["scale"]) < float("inf")
    if call["huge"] or not finite or inputs[0].device.type == "meta":
        for x, y in zip(outputs, inputs, strict=False):
            assert x.device == y.device
        return
    output, grads = _expected(call, tensors)
    if "backward" in call["operator"]:
        if tensors.get("rpb") is None:
            assert outputs.pop().numel() == 0
        for x, y, given in zip(outputs, grads, inputs, strict=True):
            _assert_near(x, y, given.dtype)
        return
    _assert_near(outputs[0], output[0], inputs[0].dtype)
    assert outputs[0].is_contiguous()
    wanted = [i for i, x in enumerate(inputs) if x.requires_grad]
    if wants_grad and wanted:
        actual = torch.autograd.grad(outputs[0].sum(), [inputs[i] for i in wanted])
        for i, x in zip(wanted, actual, strict=True):
            _assert_near(x, grads[i], inputs[i].dtype)


@st.composite
def plan_calls(draw) -> dict:
    """The description of a call of flex_plan."""
    pair = lambda *values: [draw(st.sampled_from(values)) for _ in range(2)]  # noqa: E731
    call = dict(size=pair(*range(7, 60)), kernel_size=pair(1, 3, 5, 7), dilation=pair(1, 1, 2, 5))
    for name in draw(st.lists(st.sampled_from(list(call)), max_size=2)):
        call[name] = draw(st.lists(st.sampled_from(NUMBERS), max_size=3))
    return call | dict(device=draw(st.sampled_from(["cpu", "cpu", "meta", "cuda"])))


def attempt_plan(call: dict) -> str:
    """The same for flex_plan."""
    size, kernel, dilation = call["size"], call["kernel_size"], call["dilation"]
    legal = [len(size), len(kernel), len(dilation)] == [2, 2, 2]
    legal = legal and all(_fits(*axis) for axis in zip(size, kernel, dilation, strict=True))
    try:
        plan = torch.ops.nat_models.flex_plan(*call.values())
    except (RuntimeError, ValueError, TypeError, AssertionError):
        assert not legal or max(size) > 1000 or call["device"] == "cuda", "refused a legal call"
        return "refused"
    assert legal, "answered an illegal call"
    if call["device"] == "cpu":
        tile = flex._plan_of(tuple(size), tuple(kernel), tuple(dilation), torch.device("cpu")).tile
        _check_plan(plan, tile, size, kernel, dilation)
    return "answered"


def _check_plan(plan, tile, size, kernel, dilation) -> None:
    """Every token has the windows of the rule, and every pair of a window lies in a block that is not skipped."""
    row, col, first_row, first_col = plan[0]
    index = torch.arange(size[0] * size[1]).view(1, *size, 1, 1) + 1.0
    token = flex._to_tiles(index, tile, dilation, 0).flatten().long() - 1  # -1 is padding
    place = torch.empty(size[0] * size[1], dtype=torch.int64)
    place[token[token >= 0]] = torch.arange(len(token))[token >= 0]
    (rows, _), (cols, _) = (window(*axis) for axis in zip(size, kernel, dilation, strict=True))
    keys = place[(rows[:, None, :, None] * size[1] + cols[None, :, None, :]).flatten(2).flatten(0, 1)]  # [tokens, K*K]
    below, right = row[keys] - first_row[place, None], col[keys] - first_col[place, None]
    numbers = torch.arange(kernel[0] * kernel[1])
    assert torch.equal((below * kernel[1] + right).long(), numbers.expand(len(keys), -1))
    kept = torch.zeros(len(plan[1]), len(plan[1]), dtype=torch.bool)
    for block, (count, order) in enumerate(zip(plan[1], plan[2], strict=True)):
        kept[block, order[:count].long()] = True
    assert kept[place[:, None] // 128, keys // 128].all()


def main(operators: str, examples: str, log: str, library: str | None = None) -> None:
    """Makes random calls of operators; `log` holds the last of them. Prints how many were answered and refused."""
    if library is not None:
        native.library_path = lambda: Path(library)
        assert native.available()[0], native.available()[1]
    warnings.simplefilter("ignore")  # of PyTorch, on nested and sparse tensors
    for operator in operators.split(","):
        print(operator, *_run(operator, int(examples), Path(log)))


def _run(operator: str, examples: int, log: Path) -> list[int]:
    outcomes = dict(answered=0, refused=0)

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        print_blob=False,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(plan_calls() if operator == "flex_plan" else calls(operator))
    def run(call):
        log.write_text(repr(call))
        outcomes[(attempt_plan if operator == "flex_plan" else attempt)(call)] += 1

    run()
    return list(outcomes.values())


if __name__ == "__main__":
    main(*sys.argv[1:])
