"""The C++ kernel against the reference, over a grid of shapes, windows, dtypes, strides, threads, instruction sets."""

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nat_models.ops import na2d_av, na2d_qk, na2d_qkvpacked
from nat_models.ops.backends import native, reference
from tests.ops.conftest import needs_native

pytestmark = needs_native

RESULTS = ("output", "grad_query", "grad_key", "grad_value", "grad_rpb")

# Low precision rounds each result once: half an ulp of the largest value, and some room for it to be an element's.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

# [B, H, W, num_heads, head_dim], kernel_size, dilation: primes, H != W, maps as large as their window, ragged dilation
# groups, odd head_dims, several strips, dense maps with and without masked keys.
GRID = [
    ((1, 7, 7, 2, 32), (7, 7), (1, 1)),
    ((2, 7, 8, 3, 20), (7, 7), (1, 1)),
    ((1, 8, 8, 2, 32), (7, 7), (1, 1)),
    ((2, 13, 7, 1, 32), (7, 7), (1, 1)),
    ((1, 11, 9, 2, 8), (3, 3), (1, 1)),
    ((1, 3, 3, 2, 9), (3, 3), (1, 1)),
    ((2, 5, 9, 2, 16), (5, 9), (1, 1)),
    ((1, 6, 39, 2, 8), (3, 13), (2, 3)),
    ((2, 17, 14, 2, 32), (7, 7), (1, 1)),
    ((1, 31, 37, 2, 16), (7, 7), (1, 1)),
    ((1, 56, 29, 2, 32), (7, 7), (1, 1)),
    ((1, 29, 56, 1, 24), (5, 7), (1, 1)),
    ((1, 23, 19, 1, 48), (7, 3), (1, 1)),
    ((1, 12, 10, 1, 80), (9, 9), (1, 1)),
    ((1, 13, 11, 1, 13), (11, 11), (1, 1)),
    ((1, 41, 27, 1, 8), (13, 13), (1, 1)),
    ((1, 60, 33, 1, 10), (3, 13), (1, 2)),
    ((1, 14, 15, 2, 8), (7, 7), (2, 2)),
    ((1, 30, 29, 1, 8), (7, 7), (4, 4)),
    ((1, 56, 57, 1, 32), (7, 7), (8, 8)),
    ((1, 40, 26, 2, 16), (5, 3), (1, 8)),
    ((2, 61, 21, 1, 12), (3, 5), (5, 1)),
    ((1, 19, 18, 1, 64), (7, 7), (1, 1)),
    ((1, 18, 19, 1, 96), (7, 7), (2, 1)),
    ((1, 15, 16, 1, 128), (7, 7), (1, 1)),
    ((1, 16, 17, 1, 1), (5, 5), (1, 1)),
    ((1, 25, 130, 1, 8), (7, 7), (1, 1)),
    # a window of one row or column: strips of one row, maps of one row, groups of one, maps as large as their window
    ((1, 40, 26, 2, 16), (1, 5), (1, 1)),
    ((2, 37, 11, 1, 12), (7, 1), (3, 2)),
    ((2, 1, 100, 2, 32), (1, 7), (1, 2)),
    ((1, 1, 9, 2, 8), (1, 9), (1, 1)),
    ((1, 3, 14, 1, 20), (1, 13), (3, 1)),
]


def _inputs(shape, kernel_size, dtype, with_rpb=True):
    """query, key, value as views of a packed qkv, rpb and the output's gradient."""
    batch, height, width, num_heads, head_dim = shape
    qkv = torch.randn(batch, height, width, 3, num_heads, head_dim).to(dtype)
    rpb = torch.randn(num_heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1).to(dtype) if with_rpb else None
    return *qkv.unbind(3), rpb, torch.randn(shape).to(dtype)


def _run(query, key, value, rpb, grad_output, kernel_size, dilation):
    window = (kernel_size, dilation, query.shape[-1] ** -0.5)
    output = native.na2d(query, key, value, rpb, *window)
    grads = torch.empty(*query.shape[:3], 3, *query.shape[3:], dtype=query.dtype).unbind(3)
    rpb_grad = native.na2d_backward(grad_output, query, key, value, rpb, *window, grads)
    return output, *grads, rpb_grad


def _expect(query, key, value, rpb, grad_output, kernel_size, dilation):
    inputs = [x.double().requires_grad_() for x in (query, key, value, rpb) if x is not None]
    window = (kernel_size, dilation, query.shape[-1] ** -0.5)
    output = reference.na2d(*inputs[:3], inputs[3] if rpb is not None else None, *window)
    return output.detach(), *torch.autograd.grad(output, inputs, grad_output.double())


def _magnitudes(query, key, value, rpb, grad_output, kernel_size, dilation):
    """Of output and gradients: sums of the magnitudes of the products that have a probability or its gradient in them.

    These factors are what the kernel rounds where operands are bfloat16.
    """
    query, key, value, grad_output = (x.double() for x in (query, key, value, grad_output))
    rpb = None if rpb is None else rpb.double()
    window, scale = dict(kernel_size=kernel_size, dilation=dilation), query.shape[-1] ** -0.5
    logits = na2d_qk(query, key, rpb=rpb, scale=scale, **window).requires_grad_()
    weights = logits.softmax(-1)
    (grads,) = torch.autograd.grad(na2d_av(weights, value, **window), logits, grad_output)
    weights, grads = weights.detach(), grads.abs()
    of_key, of_value = key.abs().requires_grad_(), value.abs().requires_grad_()
    of_query = scale * na2d_av(grads, key.abs(), **window)
    output = na2d_av(weights, of_value, **window)
    (of_key,) = torch.autograd.grad(scale * na2d_av(grads, of_key, **window), of_key, query.abs())
    (of_value,) = torch.autograd.grad(output, of_value, grad_output.abs())
    return output.detach(), of_query, of_key, of_value


def _allowed(name, expected, case):
    """The error that each element may have: relative to all where one rounding, that of the result, is all there is."""
    dtype = case[0].dtype
    if dtype != torch.bfloat16 or not native.available()[1].startswith("avx512_bf16,") or name == "grad_rpb":
        return TOLERANCE[dtype] * expected.abs().max()
    # Half a unit in the last of 8 bits: for each rounded factor, for the result, and for the output once more, which is
    # divided by the sum of the rounded probabilities.
    magnitude = _magnitudes(*case)[RESULTS.index(name)]
    roundings = 2 if name == "output" else 1
    return 2**-8 * (magnitude + roundings * expected.abs()) + TOLERANCE[torch.float32] * magnitude.max()


def _assert_near(actual, expected, case):
    for name, x, y in zip(RESULTS, actual, expected, strict=False):  # without rpb, there is no gradient of it
        excess = ((x.double() - y).abs() - _allowed(name, y, case)).max().item()
        assert excess <= 0, f"{name}: {excess:.2e} more than rounding allows"


@pytest.mark.parametrize("with_rpb", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "kernel_size", "dilation"), GRID)
def test_kernel_is_the_reference(shape, kernel_size, dilation, dtype, with_rpb):
    case = *_inputs(shape, kernel_size, dtype, with_rpb), kernel_size, dilation
    _assert_near(_run(*case), _expect(*case), case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_strides_give_the_same_bits(dtype):
    query, key, value, rpb, grad_output = _inputs((2, 12, 13, 2, 20), (5, 5), dtype)
    expected = _run(query, key, value, rpb, grad_output, (5, 5), (1, 1))
    actual = _run(
        query.permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4),  # heads first in memory
        torch.stack([key, key], -1)[..., 0],  # the last axis is not dense
        torch.cat([value, value], 2)[:, :, :13],
        rpb.mT.contiguous().mT,
        grad_output.transpose(1, 2).contiguous().transpose(1, 2),
        (5, 5),
        (1, 1),
    )
    for name, x, y in zip(RESULTS, actual, expected, strict=True):
        assert torch.equal(x, y), name


def _is_registered() -> bool:
    """Whether the kernel is where PyTorch finds it."""
    return native.available()[0] and all(native._registration_functions(native._load()))


@pytest.fixture
def registered():
    if not _is_registered():
        pytest.skip(f"PyTorch {torch.__version__} has no C shim to register kernels through, 2.7 has")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_without_gradients_the_operator_reaches_the_kernel_directly(dtype, monkeypatch):
    for (batch, height, width, num_heads, head_dim), kernel_size, dilation in GRID[::3]:
        rpb = torch.randn(num_heads, *(2 * k - 1 for k in kernel_size)).to(dtype)
        dense = torch.randn(batch, height, width, 3, num_heads, head_dim).to(dtype)
        apart = torch.randn(3, num_heads, batch, width, height, 2 * head_dim).to(dtype)[..., :head_dim]
        for qkv in (dense, apart.permute(2, 4, 3, 0, 1, 5), dense[:0]):
            expected = native.na2d(*qkv.unbind(3), rpb, kernel_size, dilation, head_dim**-0.5)
            with monkeypatch.context() as patch, torch.inference_mode():
                patch.setattr(native, "na2d", None)
                output = na2d_qkvpacked(qkv, kernel_size=kernel_size, dilation=dilation, rpb=rpb)
            assert torch.equal(output, expected)
            assert output.is_contiguous()


def test_the_first_call_of_a_process_and_those_after_it_give_the_same_bits():
    code = (
        "import torch; from nat_models.ops import na2d_qkvpacked; from torch._C import _dispatch_dump as dump\n"
        "torch.set_grad_enabled(False); qkv, rpb = torch.randn(1, 9, 11, 3, 2, 8), torch.randn(2, 5, 5)\n"
        "results = [na2d_qkvpacked(qkv, kernel_size=3, rpb=rpb) for _ in range(2)]; print(torch.equal(*results))\n"
        "print('CPU: registered at torch_shim.cpp' in dump('nat_models::na2d_qkvpacked_inference'))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["True", str(_is_registered())]


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    "change",
    [
        dict(rpb=torch.zeros(2, 5, 5, dtype=torch.float64)),
        dict(rpb=torch.zeros(2, 5, 5, dtype=torch.bfloat16)),
        dict(rpb=torch.zeros(2, 5, 5).half(), qkv=torch.zeros(1, 9, 11, 3, 2, 8).bfloat16()),
        dict(rpb=torch.zeros(2, 5, 7)),
        dict(rpb=torch.zeros(2, 5, 5).mT[:, ::2]),
        dict(qkv=torch.zeros(1, 9, 11, 2, 2, 8)),
        dict(qkv=torch.zeros(1, 9, 2, 3, 2, 8)),
        dict(qkv=torch.zeros(1, 9, 11, 3, 8, 2).mT),
        dict(qkv=torch.zeros(1, 9, 11, 3, 2, 8, dtype=torch.int32)),
        dict(rpb=torch.zeros(2, 7, 7), kernel_height=4, kernel_width=4),
        dict(dilation_height=0),
        dict(dilation_width=4),
        dict(dilation_height=(2**64 + 2) // 3),  # times 3, it overflows to 2
    ],
    ids=lambda change: " ".join(f"{x.dtype} {[*x.shape]}" if torch.is_tensor(x) else n for n, x in change.items()),
)
def test_the_kernel_called_directly_refuses_what_it_cannot_read(change):
    arguments = dict(qkv=torch.zeros(1, 9, 11, 3, 2, 8), rpb=torch.zeros(2, 5, 5), scale=1.0)
    arguments |= dict(kernel_height=3, kernel_width=3, dilation_height=1, dilation_width=1)
    torch.ops.nat_models.na2d_qkvpacked_inference(**arguments)
    with pytest.raises(RuntimeError, match="na2d_qkvpacked_inference: "):
        torch.ops.nat_models.na2d_qkvpacked_inference(**arguments | change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("shape", "kernel_size", "dilation"), GRID[::4])
def test_any_number_of_threads_gives_the_same_bits(shape, kernel_size, dilation, dtype):
    case = *_inputs(shape, kernel_size, dtype), kernel_size, dilation
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            results.append(_run(*case))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, x, y in zip(RESULTS, results[0], other, strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("size", [7, 14])
def test_gradients_in_bfloat16_point_where_those_of_float32_do(size):
    # Of the same inputs: roundings of 2**-9 on average, without a direction, leave a cosine of 1 - 2**-18 or so.
    case = *_inputs((2, size, size, 2, 32), (7, 7), torch.bfloat16), (7, 7), (1, 1)
    wide = [x.float() if torch.is_tensor(x) else x for x in case]
    for name, x, y in zip(RESULTS, _run(*case), _run(*wide), strict=True):
        assert torch.cosine_similarity(x.flatten().double(), y.flatten().double(), 0) > 0.999, name


@pytest.mark.parametrize("kernel_size", [(1, 5), (7, 7)])
@pytest.mark.parametrize("name", ["query", "key", "value", "grad_output"])
def test_what_is_not_a_number_spreads_in_bfloat16_as_in_float32(name, kernel_size):
    # 40 rows are three strips of 14; row 12 is the one before a strip's last, which sees key rows that no other sees.
    names = ("query", "key", "value", "rpb", "grad_output")
    case = dict(zip(names, _inputs((1, 40, 26, 1, 16), kernel_size, torch.bfloat16), strict=True))
    case[name][:, 12] = torch.nan
    results = [
        _run(*(x.to(dtype) for x in case.values()), kernel_size, (1, 1)) for dtype in (torch.bfloat16, torch.float32)
    ]
    for result, x, y in zip(RESULTS, *results, strict=True):
        assert torch.equal(x.isnan(), y.isnan()), result


def test_weights_of_equal_values_add_up_to_one_in_bfloat16():
    query, key, _, rpb, _ = _inputs((1, 9, 20, 2, 32), (7, 7), torch.bfloat16)
    value = torch.full_like(query, 1.5)
    output = native.na2d(query, key, value, rpb, (7, 7), (1, 1), 1.0)
    assert torch.equal(output, value)


def test_concurrent_calls_do_not_disturb_each_other():
    cases = [(*_inputs((1, 20 + i, 23, 2, 16), (7, 7), torch.float32), (7, 7), (1, 1)) for i in range(4)]
    expected = [_run(*case) for case in cases]

    def wrong(case, wanted):
        return sum(not all(map(torch.equal, _run(*case), wanted)) for _ in range(20))

    with ThreadPoolExecutor(len(cases)) as pool:  # which hands on what is raised, where a bare thread prints it
        assert list(pool.map(wrong, cases, expected)) == [0] * len(cases)


class _Attends(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        query = torch.randn(1, 16, 17, 1, 8, generator=generator)
        return native.na2d(query, query, query, None, (7, 7), (1, 1), 1.0)[0]


def test_forked_loader_workers_may_use_the_kernel():
    data = _Attends()
    expected = torch.stack([data[i] for i in range(4)])  # loaded, and its threads started, before the fork
    loader = torch.utils.data.DataLoader(data, batch_size=4, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.equal(next(iter(loader)), expected)


_GRID_TESTS = [
    f"{Path(__file__)}::{test.__name__}"
    for test in (
        test_kernel_is_the_reference,
        test_any_strides_give_the_same_bits,
        test_without_gradients_the_operator_reaches_the_kernel_directly,
    )
]


@pytest.mark.parametrize(("isa", "dtype"), [("baseline", "float32"), ("avx2", "float32"), ("avx512", "bfloat16")])
def test_every_instruction_set_passes_the_grid(isa, dtype):
    environment = {**os.environ, "NAT_MODELS_CPU_ISA": isa}
    code = "from nat_models.ops.backends import native; print(native.available())"
    probe = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    if "beyond this CPU" in probe.stdout or "unknown to this build" in probe.stdout:
        pytest.skip(probe.stdout)
    assert f"'{isa}," in probe.stdout
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-k", dtype, *_GRID_TESTS],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert f"{2 * len(GRID) + 1 + _is_registered()} passed" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512", "avx512_bf16"])
def test_sanitizers_find_nothing_in_the_grid(isa, sanitized):
    library, preloaded = sanitized
    environment = {**os.environ, **preloaded, "NAT_MODELS_CPU_ISA": isa}
    code = (
        "import sys, pathlib, pytest, nat_models.ops.backends.native as native\n"
        "native.library_path = lambda: pathlib.Path(sys.argv[1])\n"
        "print(native.available())\n"
        "sys.exit(pytest.main(['-q', '-x', '-p', 'no:cacheprovider', *sys.argv[2:]]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, library, *_GRID_TESTS], env=environment, capture_output=True, text=True
    )
    if "beyond this CPU" in run.stdout or "unknown to this build" in run.stdout:
        pytest.skip(run.stdout.splitlines()[0])
    assert run.returncode == 0, (run.stdout + run.stderr)[-5000:]
    assert f"{len(GRID) * len(TOLERANCE) * 2 + 2 + len(TOLERANCE) * _is_registered()} passed" in run.stdout


def test_an_unknown_instruction_set_is_refused_with_its_name():
    environment = {**os.environ, "NAT_MODELS_CPU_ISA": "mmx"}
    run = subprocess.run(
        [sys.executable, "-m", "nat_models", "info"], env=environment, capture_output=True, text=True, check=True
    )
    assert "na2d runs on blocked" in run.stdout
    assert "NAT_MODELS_CPU_ISA='mmx' is unknown to this build" in run.stdout


class _OtherVersion:
    """The library as built from other sources: the functions given replace its own."""

    def __init__(self, **functions):
        self.functions = functions
        self.library = ctypes.CDLL(str(native.library_path()))

    def __getattr__(self, name):
        return self.functions[name] if name in self.functions else getattr(self.library, name)


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (dict(nat_call_size=lambda: 8), f"its nat_na2d_call takes 8 bytes, not {native._CALL.size}"),
        (dict(nat_torch_size=lambda: 8), r"its nat_torch takes 8 bytes, not \d+"),
        (dict(nat_torch_size=None), "it has no nat_torch_size"),
    ],
    ids=["call", "torch", "missing"],
)
def test_a_library_of_another_version_is_refused_before_it_is_called(functions, message, monkeypatch):
    library = _OtherVersion(**functions)
    monkeypatch.setattr(native.ctypes, "CDLL", lambda path: library)
    with pytest.raises(RuntimeError, match=f"was built for another version: {message}.*pip install"):
        native._load.__wrapped__()


def test_a_missing_library_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "__file__", str(tmp_path / "backends" / "native.py"))
    monkeypatch.setattr(native.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"`apt install g\+\+`.*`xcode-select --install`.*`pip install"):
        native.library_path()
