"""The choice of a backend: automatic, by name, explained, refused with the reason; that of a GPU is tested by fakes."""

import importlib.metadata
import importlib.util
import subprocess
import sys
import types

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nat_models.ops import BACKENDS, explain, functional, na2d, na2d_qkvpacked, use_backend
from nat_models.ops.backends import flex, native, natten_fused
from tests.conftest import needs_torch
from tests.ops.conftest import needs_native


@pytest.fixture
def gpus(monkeypatch):
    """A machine with every accelerator, and with all that natten and flex need there."""
    why_no_triton, why_no_natten = flex._why_no_triton, natten_fused._why_no_natten
    monkeypatch.setattr(
        flex, "_why_no_triton", lambda device: None if device.type in ("cuda", "xpu") else why_no_triton(device)
    )
    monkeypatch.setattr(
        natten_fused,
        "_why_no_natten",
        lambda device, compiling: None if device == "cuda" else why_no_natten(device, compiling),
    )


# What explain is asked, what runs
CHOICES = [
    (dict(device="cuda"), "flex"),
    (dict(device="cuda", compiling=True, requires_grad=True), "flex"),
    (dict(device="cuda:1", dtype=torch.bfloat16), "flex"),
    (dict(device="cuda", dtype=torch.float64), "blocked"),
    (dict(device="cuda", rpb=False), "natten_fused"),
    (dict(device="cuda", rpb=False, kernel_size=(1, 7)), "flex"),
    (dict(device="cuda", rpb=False, dtype=torch.float16, requires_grad=True, compiling=True), "natten_fused"),
    (dict(device="cuda", rpb=False, dtype=torch.float64), "blocked"),
    (dict(device="cuda", rpb=False, head_dim=20), "flex"),
    (dict(device="cuda", rpb=False, scale=0.0), "flex"),
    (dict(device="xpu"), "flex"),
    (dict(device="xpu", rpb=False), "flex"),
    (dict(device="mps"), "blocked"),
    (dict(device="mps", rpb=False, compiling=True), "blocked"),
]


@pytest.mark.parametrize(("kind", "chosen"), CHOICES)
def test_an_accelerator_runs_natten_without_rpb_flex_with_it_and_blocked_otherwise(kind, chosen, gpus):
    report = explain(**kind)
    assert f"na2d runs on {chosen}, chosen automatically" in report
    assert f"* {chosen}" in report


def test_a_cpu_never_chooses_what_a_gpu_does():
    for rpb in (True, False):
        assert "the first that can of native, blocked, exportable." in explain("cpu", rpb=rpb)


def test_deterministic_algorithms_leave_flex_out_of_training_with_rpb(gpus):
    torch.use_deterministic_algorithms(True)
    try:
        assert "na2d runs on blocked" in explain("cuda", requires_grad=True)
        assert "sums the gradient of rpb in any order" in explain("cuda", requires_grad=True)
        assert "na2d runs on flex" in explain("cuda")
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture
def fake(monkeypatch):
    """Makes tensors without data on any device, which na2d takes for real ones."""
    # As what they are they would go to the operator, which knows their shapes; nothing runs.
    monkeypatch.setattr(functional, "FakeTensor", type(None))

    def make(device, dtype=torch.float32, rpb=True, requires_grad=False, head_dim=32, scale=None, kernel_size=(3, 3)):
        with FakeTensorMode():
            query = torch.empty(1, 9, 12, 2, head_dim, device=device, dtype=dtype, requires_grad=requires_grad)
            table = torch.empty(2, *(2 * k - 1 for k in kernel_size), device=device, dtype=dtype) if rpb else None
        return (query, query, query), dict(kernel_size=kernel_size, rpb=table, scale=scale)

    return make


@pytest.mark.parametrize(
    ("kind", "chosen"), [case for case in CHOICES if not case[0].keys() & {"compiling", "requires_grad"}]
)
def test_tensors_run_on_what_is_explained(kind, chosen, gpus, fake, monkeypatch):
    ran = []
    for module in (natten_fused, flex):
        name = module.__name__.split(".")[-1]
        monkeypatch.setattr(module, "na2d", lambda query, *args, name=name: ran.append(name) or query)
    tensors, window = fake(**kind)
    assert na2d(*tensors, **window).shape == tensors[0].shape
    assert ran == ([] if chosen == "blocked" else [chosen])


# The backend asked for, the call, the reason why it cannot run
REFUSALS = [
    ("native", dict(device="cuda"), "it runs on the CPU, not on cuda"),
    ("natten_fused", dict(device="cuda"), "NATTEN has no relative position bias"),
    ("natten_fused", dict(device="mps", rpb=False), "NATTEN runs on CUDA and the CPU, not on mps"),
    (
        "natten_fused",
        dict(device="cuda", rpb=False, dtype=torch.float64),
        "float32, bfloat16 and float16, not in torch.float64",
    ),
    ("natten_fused", dict(device="cuda", rpb=False, head_dim=20), "head_dim divisible by 8, not 20"),
    ("natten_fused", dict(device="cuda", rpb=False, kernel_size=(1, 7)), "kernel_size of at least 2 on each axis"),
    ("natten_fused", dict(device="cuda", rpb=False, scale=0.0), "takes a scale of 0.0 for none given"),
    ("natten_fused", dict(device="cpu", rpb=False, requires_grad=True), "NATTEN has no backward on the CPU"),
    ("natten_fused", dict(device="cpu", rpb=False, head_dim=40), "a power of two from 32 to 512, not 40"),
    ("flex", dict(device="cpu", requires_grad=True), "flex_attention has no backward on the CPU"),
    ("flex", dict(device="cuda", dtype=torch.float64), "do not compute in torch.float64"),
    ("flex", dict(device="mps"), "Triton's, which does not run on mps"),
]


@pytest.mark.parametrize(("name", "kind", "reason"), REFUSALS)
def test_a_backend_asked_for_that_cannot_run_says_why(name, kind, reason, gpus, fake, monkeypatch):
    monkeypatch.setattr(natten_fused, "_why_no_natten", lambda device, compiling: None)
    tensors, window = fake(**kind)
    with use_backend(name):
        with pytest.raises(RuntimeError, match=f"The backend '{name}' was asked for and cannot run: .*{reason}"):
            na2d(*tensors, **window)
        assert f"na2d raises an error on {name}, asked for" in explain(**kind)
        assert reason in explain(**kind)


@pytest.mark.parametrize("name", BACKENDS)
def test_no_backend_takes_a_window_larger_than_the_map(name):
    query = torch.zeros(1, 9, 12, 2, 32)
    with use_backend(name), pytest.raises(ValueError, match=r"fit in the map.*9 x 12.*\(13, 13\)"):
        na2d(query, query, query, kernel_size=13)


@needs_torch("2.9", "compiles to full graphs or says 'Observed exception' without its message")
def test_a_refusal_reads_the_same_under_torch_compile(monkeypatch):
    query = torch.zeros(1, 9, 12, 2, 32, requires_grad=True)
    torch._dynamo.reset()
    with use_backend("flex"), pytest.raises(Exception, match="flex_attention has no backward on the CPU"):
        torch.compile(na2d, fullgraph=True, backend="eager")(query, query, query, kernel_size=3)


@pytest.mark.parametrize("name", ["natten_fused", "flex", "reference"])
def test_the_operator_itself_refuses_what_it_has_no_kernel_for(name):
    query = torch.zeros(1, 9, 12, 2, 32)
    with use_backend(name), pytest.raises(RuntimeError, match=f"'{name}'.*native and blocked kernels"):
        torch.ops.nat_models.na2d(query, query, query, None, (3, 3), (1, 1), 1.0)


def test_a_gradient_outlives_the_request_for_a_backend():
    query = torch.randn(1, 9, 12, 2, 32, requires_grad=True)
    output = na2d(query, query, query, kernel_size=3)
    with use_backend("flex"):
        output.sum().backward()
    assert query.grad.shape == query.shape


@pytest.fixture
def natten_package(monkeypatch):
    """Sets what is found of the package natten."""

    def find(version=None, importable=True, libnatten=True):
        natten_fused._why_no_natten.cache_clear()
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: version and object())
        monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(flex, "_why_no_triton", lambda device: None)
        package = types.SimpleNamespace(HAS_LIBNATTEN=libnatten) if importable else None
        monkeypatch.setitem(sys.modules, "natten", package)

    yield find
    natten_fused._why_no_natten.cache_clear()


@pytest.mark.parametrize(
    ("package", "device", "reason"),
    [
        (dict(), "cpu", "the package natten is not installed"),
        (dict(), "cuda", "the package natten is not installed"),
        (dict(version="0.17.5+torch260cu126"), "cuda", "natten 0.17.5.* is installed, .* from 0.20 on"),
        (dict(version="0.21.7", importable=False), "cuda", "natten 0.21.7 cannot be imported: "),
        (dict(version="0.21.7", libnatten=False), "cuda", "natten 0.21.7 was built without its CUDA kernels"),
    ],
)
def test_natten_is_refused_where_the_package_is_missing_old_or_without_kernels(
    package, device, reason, natten_package, fake
):
    natten_package(**package)
    tensors, window = fake(device, rpb=False)
    with (
        use_backend("natten_fused"),
        pytest.raises(RuntimeError, match=f"'natten_fused' was asked for and cannot run: {reason}"),
    ):
        na2d(*tensors, **window)


@pytest.mark.parametrize(
    ("version", "runs"),
    [("0.20.1", False), ("0.21.5", True), ("0.21.5rc1+torch290cu130", True), ("0.22.0", True)],
)
def test_natten_is_compiled_from_the_version_that_torch_compile_can_trace(version, runs, natten_package):
    natten_package(version=version)
    assert ("na2d runs on natten_fused" in explain("cuda", rpb=False, compiling=True)) is runs
    assert "na2d runs on natten_fused" in explain("cuda", rpb=False)


@pytest.mark.parametrize(
    ("capability", "reason"), [((7, 5), "from compute capability 8.0 on, this device has 7.5"), ((8, 0), None)]
)
def test_flex_is_for_gpus_that_pytorch_tests_it_on(capability, reason, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    why = flex._why_no_triton.__wrapped__(torch.device("cuda"))
    assert why is None if reason is None else reason in why


def test_flex_needs_triton(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "the package triton" in flex._why_no_triton.__wrapped__(torch.device("cuda"))


@pytest.fixture
def cuda_autocast():
    """Turns autocast on for CUDA; torch.autocast does not where there is no such device."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")

    def switch(enabled, dtype):
        torch.set_autocast_enabled("cuda", enabled)
        torch.set_autocast_dtype("cuda", dtype)

    yield lambda dtype: switch(True, dtype)
    switch(*before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_autocast_computes_in_its_dtype_and_leaves_rpb_and_float64_alone(
    dtype, gpus, fake, monkeypatch, cuda_autocast
):
    cuda_autocast(dtype)
    ran = []
    monkeypatch.setattr(
        flex, "na2d", lambda query, key, value, rpb, *args: ran.append((query, key, value, rpb)) or query
    )
    tensors, window = fake("cuda")
    assert na2d(*tensors, **window).dtype == dtype
    assert [x.dtype for x in ran[0]] == [dtype] * 3 + [torch.float32]
    tensors, window = fake("cuda", dtype=torch.float64)
    assert na2d(*tensors, **window).dtype == torch.float64


def test_a_report_names_every_backend():
    assert all(f" {name} " in explain() for name in BACKENDS)


def test_a_kernel_that_was_not_built_is_refused_with_the_reason(monkeypatch):
    query = torch.zeros(1, 9, 12, 2, 8)
    with use_backend("native"):
        monkeypatch.setattr(native, "available", lambda: (False, "nat_cpu.so was not built"))
        with pytest.raises(RuntimeError, match=r"'native' was asked for and cannot run: nat_cpu\.so was not built"):
            na2d(query, query, query, kernel_size=3)
        assert "cannot run: nat_cpu.so was not built" in explain()


def test_without_a_kernel_blocked_runs(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: (False, "nat_cpu.so was not built"))
    monkeypatch.setattr(native, "na2d", None)
    query = torch.zeros(1, 9, 12, 2, 8)
    assert na2d(query, query, query, kernel_size=3).shape == query.shape
    assert "na2d runs on blocked, chosen automatically" in explain()


def test_an_unknown_backend_is_an_error():
    with (
        pytest.raises(
            ValueError,
            match="'fast', does not exist; known are native, natten_fused, flex, blocked, exportable, reference",
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
    run = subprocess.run([sys.executable, "-m", "nat_models", "info"], capture_output=True, text=True, check=True)
    assert "na2d runs on reference, asked for by NAT_MODELS_BACKEND" in run.stdout


@pytest.mark.parametrize(
    ("kind", "line"),
    [
        (dict(), "On cpu (float32, with rpb), na2d runs on native, chosen automatically"),
        (
            dict(dtype=torch.bfloat16, rpb=False, requires_grad=True),
            "On cpu (bfloat16, without rpb, with gradient), na2d runs on native, chosen automatically",
        ),
        (dict(dropout=True), "On cpu (float32, with rpb, with dropout), na2d runs on blocked, chosen automatically"),
        (
            dict(dropout=True, compiling=True),
            "On cpu (float32, with rpb, with dropout, under torch.compile), na2d runs on exportable, chosen",
        ),
        (dict(exporting=True), "On cpu (float32, with rpb, under torch.export), na2d runs on exportable, chosen"),
    ],
)
@needs_native
def test_the_first_line_of_a_report_names_the_call_the_backend_and_the_order(kind, line):
    order = "exportable" if "exporting" in kind else "native, blocked, exportable"
    first = explain(**kind).splitlines()[0]
    assert first.startswith(line)
    assert first.endswith(f"chosen automatically, the first that can of {order}.")


def test_a_report_lists_every_backend_once_with_its_reason_below_it():
    with use_backend("reference"):
        first, *lines = explain(dropout=True).splitlines()
    assert first.endswith("na2d raises an error on reference, asked for by NAT_MODELS_BACKEND or use_backend.")
    names = [line[2:].split()[1 if line.startswith("  *") else 0] for line in lines if line[4] != " "]
    assert names == list(BACKENDS)
    assert [line for line in lines if line.startswith("  *")] == [
        f"  * reference    {BACKENDS['reference'].SUMMARY}",
    ]
    assert all(line.startswith(" " * 17 + "cannot run: ") for line in lines if line[4] == " ")
    assert lines[-1] == " " * 17 + "cannot run: it drops no attention weights"
    assert "instruction set" not in "".join(lines)  # native declines


@needs_native
def test_a_report_says_what_the_kernel_runs_on():
    lines = explain().splitlines()
    below = lines[next(i for i, line in enumerate(lines) if line.startswith("  * native")) + 1]
    assert below == f"{'':16} instruction set and threads: {native.available()[1]}"
    assert sum("instruction set" in line for line in lines) == 1


@pytest.mark.parametrize(
    ("name", "kind", "reason"),
    [
        ("natten_fused", dict(rpb=torch.zeros(2, 5, 5)), "NATTEN has no relative position bias"),
        ("flex", dict(requires_grad=True), "flex_attention has no backward on the CPU"),
        ("flex", dict(dropout_p=0.5), "it drops no attention weights"),
        ("native", dict(dropout_p=0.5), "it drops no attention weights"),
    ],
)
def test_a_packed_call_is_refused_with_the_same_reasons(name, kind, reason):
    window = dict(kind, kernel_size=3)
    qkv = torch.zeros(1, 9, 12, 3, 2, 32, requires_grad=window.pop("requires_grad", False))
    with use_backend(name), pytest.raises(RuntimeError, match=f"'{name}' was asked for and cannot run: {reason}"):
        na2d_qkvpacked(qkv, **window)


def test_an_inner_use_backend_gives_the_outer_one_back():
    with use_backend("blocked"):
        with use_backend("reference"):
            assert "na2d runs on reference, asked for" in explain()
        assert "na2d runs on blocked, asked for" in explain()
        with pytest.raises(KeyError), use_backend("reference"):
            raise KeyError
        assert "na2d runs on blocked, asked for" in explain()
        with use_backend(None):
            assert "chosen automatically" in explain()


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_dropout_under_torch_compile_has_a_backend_everywhere(device):
    assert "na2d runs on exportable, chosen automatically" in explain(device, dropout=True, compiling=True)
