"""What the operator's tests share: every backend in turn, inputs, gradients."""

import functools
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.attention.flex_attention

from nat_models.ops import na1d, na2d, na2d_qkvpacked, use_backend
from nat_models.ops.backends import blocked, flex, native

# What each backend of this list declines, the test is skipped for, with the reason that the backend gives.
BACKENDS = [
    "native",
    "reference",
    "blocked whole",  # the map is one tile
    "blocked 7",  # tiles that do and do not divide the map
    "blocked 4",
    "exportable",
    "flex",
    pytest.param("flex compiled", marks=pytest.mark.slow),
    "natten_fused",
]

# Of the machine, not of what nat_models/ops/linear.py says of it: were that mistaken, its tests fail.
_HAS_ONEDNN = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
needs_onednn = pytest.mark.skipif(not _HAS_ONEDNN, reason="PyTorch has no oneDNN here")
needs_onednn_bfloat16 = pytest.mark.skipif(
    not (_HAS_ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    reason="PyTorch has no oneDNN here, or the CPU no bfloat16",
)
ONEDNN_DTYPES = pytest.mark.parametrize(
    "dtype",
    [
        pytest.param(torch.float32, id="float32", marks=needs_onednn),
        pytest.param(torch.bfloat16, id="bfloat16", marks=needs_onednn_bfloat16),
    ],
)
needs_native = pytest.mark.skipif(not native.available()[0], reason=f"no kernel: {native.available()[1]}")


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    """Runs a test on one backend."""
    name, _, variant = request.param.partition(" ")
    if name == "native" and not native.available()[0]:
        pytest.skip(native.available()[1])
    if name == "blocked":
        monkeypatch.setattr(blocked, "_WHOLE_MAP_QUERIES", 10**9 if variant == "whole" else 0)
        monkeypatch.setattr(blocked, "_TILE", 0 if variant == "whole" else int(variant))
        monkeypatch.setitem(blocked._CHUNK_ELEMENTS, "cpu", 1 << 10)  # so that batches are cut too
    if name == "flex":
        _let_flex_have_gradients_on_the_cpu(monkeypatch)
    for function in (na1d, na2d, na2d_qkvpacked):
        if hasattr(request.module, function.__name__):
            declining = _skip_what_is_declined(function, variant == "compiled")
            monkeypatch.setattr(request.module, function.__name__, declining)
    with use_backend(name):
        yield name


def _let_flex_have_gradients_on_the_cpu(monkeypatch):
    """PyTorch refuses it on a CPU, and so do we, yet its eager form has the formulas that the GPU's kernels have."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *tensors: None)
    why_not = flex.why_not
    monkeypatch.setattr(
        flex, "why_not", lambda request: why_not(request._replace(requires_grad=False, compiling=False))
    )


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


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def make_inputs(batch, height, width, heads, head_dim, kernel_size, dtype=torch.float64, requires_grad=False):
    qkv = torch.randn(batch, height, width, 3, heads, head_dim, dtype=dtype)
    rpb = torch.randn(heads, 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1, dtype=dtype)
    query, key, value = qkv.unbind(3)
    return [x.requires_grad_(requires_grad) for x in (query, key, value, rpb)]


def gradients(output, inputs):
    # A fixed, uneven weighting, so that no gradient cancels.
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).sin().view_as(output)
    return torch.autograd.grad((output * weight).sum(), inputs)


@pytest.fixture(scope="session")
def sanitized(tmp_path_factory):
    """The kernel built with ASan and UBSan, and the environment in which a Python built without runs it."""
    missing = [tool for tool in ("cmake", "g++") if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"cannot build the kernel: no {' and no '.join(missing)}")
    build = tmp_path_factory.mktemp("sanitized")
    source = Path(__file__).parents[2] / "nat_models" / "ops" / "csrc"
    for command in (["-S", source, "-B", build, "-DNAT_SANITIZE=ON"], ["--build", build]):
        subprocess.run(["cmake", *map(str, command)], check=True, capture_output=True, text=True)
    find = [f"-print-file-name=lib{name}.so" for name in ("asan", "ubsan")]
    paths = [subprocess.run(["g++", flag], check=True, capture_output=True, text=True).stdout.strip() for flag in find]
    environment = {
        "LD_PRELOAD": " ".join(paths),
        # Python itself never frees all it has; memory that is refused is an error of PyTorch's, not the end.
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    return str(build / "nat_cpu.so"), environment
