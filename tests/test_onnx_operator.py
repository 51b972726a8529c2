"""Promises of the operator nat_models::na2d in ONNX Runtime, and of `nat-models export --custom-op`."""

import ctypes
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from timm.models import save_for_hf

import nat_models
from nat_models import export as exporting
from nat_models.cli import main
from nat_models.errors import UserError
from nat_models.ops.backends import native, reference
from tests.conftest import FIXTURES, assert_same_logits, tensor
from tests.ops.conftest import make_inputs, needs_native, relative_error
from tests.ops.test_functional import GOLDEN, GRID

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")

TOLERANCE = 2e-6  # float32 rounding over a few dozen terms


def _model(*, rpb=None, dtype=onnx.TensorProto.FLOAT, inputs=("qkv",), **attributes) -> bytes:
    """A file of one node, whose rpb is a constant where it is given and an input where `inputs` says so."""
    constants = [] if rpb is None else [onnx.numpy_helper.from_array(rpb.numpy(), "rpb")]
    node = onnx.helper.make_node(
        "na2d", [*inputs, *(c.name for c in constants)], ["output"], domain="nat_models", **attributes
    )
    values = [onnx.helper.make_tensor_value_info(name, dtype, None) for name in inputs]
    outputs = [onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, None)]
    graph = onnx.helper.make_graph([node], "graph", values, outputs, constants)
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("nat_models", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()


def _session(model: bytes, threads: int = 0, path: str | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised too
    options.register_custom_ops_library(path or nat_models.custom_ops_library())
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _run(session: onnxruntime.InferenceSession, **inputs: torch.Tensor) -> torch.Tensor:
    (output,) = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return torch.from_numpy(output)


WINDOW = dict(kernel_size=[3, 5], dilation=[2, 1], scale=0.3)
SHAPE = (2, 9, 13, 3, 2, 8)  # of qkv


@needs_native
@pytest.mark.parametrize("case", GOLDEN)
def test_values_of_the_authors_operator(case):
    batch, heads, height, width, head_dim, kernel_size, dilation = GOLDEN[case]
    shape = (batch, heads, height, width, head_dim)
    qkv = torch.stack([tensor(f"{case}/{name}", shape).permute(0, 2, 3, 1, 4) for name in ("query", "key", "value")], 3)
    rpb = None
    if case != "nobias":
        rpb = tensor(f"{case}/rpb", (heads, 2 * kernel_size - 1, 2 * kernel_size - 1))
    window = dict(kernel_size=[kernel_size] * 2, dilation=[dilation] * 2, scale=head_dim**-0.5)
    output = _run(_session(_model(rpb=rpb, **window)), qkv=qkv.contiguous())
    golden = load_file(FIXTURES / "na2d.safetensors")[f"{case}/output"]
    assert relative_error(output.permute(0, 3, 1, 2, 4), golden) < TOLERANCE


@needs_native
@pytest.mark.parametrize("bias", ["constant", "input", "absent"])
@pytest.mark.parametrize("case", GRID)
def test_the_operator_is_the_reference(case, bias):
    *shape, kernel_size, dilation = case
    query, key, value, rpb = make_inputs(*shape, kernel_size, torch.float32)
    tensors = {"qkv": torch.stack((query, key, value), 3)} | ({"rpb": rpb} if bias == "input" else {})
    window = dict(kernel_size=kernel_size, dilation=dilation, scale=0.3)
    session = _session(_model(rpb=rpb if bias == "constant" else None, inputs=tuple(tensors), **window))
    exact = [x.double() for x in (query, key, value, rpb)]
    for _ in range(2):  # nothing that a call leaves changes the next
        expected = reference.na2d(*exact[:3], None if bias == "absent" else exact[3], kernel_size, dilation, 0.3)
        assert relative_error(_run(session, **tensors), expected) < TOLERANCE


@needs_native
def test_a_session_takes_maps_and_batches_of_any_size():
    rpb = torch.randn(2, 5, 9)
    session = _session(_model(rpb=rpb, **WINDOW))
    for batch, height, width in ((1, 6, 5), (3, 40, 21), (0, 9, 9), (1, 7, 70)):
        qkv = torch.randn(batch, height, width, 3, 2, 8)
        output = _run(session, qkv=qkv)
        assert output.shape == (batch, height, width, 2, 8)
        if batch:
            expected = reference.na2d(*qkv.double().unbind(3), rpb.double(), (3, 5), (2, 1), 0.3)
            assert relative_error(output, expected) < TOLERANCE


@needs_native
@pytest.mark.parametrize(
    ("qkv", "rpb", "message"),
    [
        ((2, 9, 13, 3, 16), (2, 5, 9), "qkv must be [B, H, W, 3, num_heads, head_dim], got qkv [2, 9, 13, 3, 16]"),
        ((2, 9, 13, 4, 2, 8), (2, 5, 9), "qkv must be [B, H, W, 3, num_heads, head_dim]"),
        ((2, 5, 13, 3, 2, 8), (2, 5, 9), "kernel_size * dilation must fit in the map, got qkv [2, 5, 13, 3, 2, 8]"),
        (SHAPE, (2, 5, 8), "rpb must be [num_heads, 2*K_h-1, 2*K_w-1], got qkv [2, 9, 13, 3, 2, 8], rpb [2, 5, 8], "),
        (SHAPE, (3, 5, 9), "kernel_size (3, 5), dilation (2, 1)"),
        (SHAPE, (5, 9), "rpb must be"),
        (SHAPE, (), "rpb must be"),
        ((), (2, 5, 9), "qkv must be"),
    ],
)
def test_wrong_shapes_are_errors_and_the_session_lives_on(qkv, rpb, message):
    session = _session(_model(inputs=("qkv", "rpb"), **WINDOW))
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument) as error:
        _run(session, qkv=torch.randn(qkv), rpb=torch.randn(rpb))
    assert "nat_models::na2d: " in str(error.value) and message in str(error.value)
    assert _run(session, qkv=torch.randn(SHAPE), rpb=torch.randn(2, 5, 9)).isfinite().all()


@needs_native
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(kernel_size=[3, 4]), "kernel_size must be odd and at least 1, got kernel_size (3, 4), dilation (2, 1)"),
        (dict(kernel_size=[-3, 3]), "kernel_size must be odd"),
        (dict(dilation=[0, 1]), "dilation must be at least 1"),
        (dict(kernel_size=[3]), "kernel_size must be two ints"),
        (dict(dilation=[1, 1, 1]), "dilation must be two ints"),
        (dict(dilation=None), "dilation must be two ints"),
        (dict(scale=None), "scale must be a float"),
        (dict(scale="large"), "scale must be a float"),
        (dict(kernel_size=[3.0, 3.0]), "kernel_size must be two ints"),
        (dict(dtype=onnx.TensorProto.DOUBLE), "double"),
        (dict(inputs=()), "na2d"),
        (dict(inputs=("qkv", "rpb", "more")), "na2d"),
    ],
)
def test_wrong_nodes_are_errors_when_they_are_loaded(change, message):
    with pytest.raises(Exception, match="ONNXRuntimeError") as error:
        _session(_model(**{name: x for name, x in {**WINDOW, **change}.items() if x is not None}))
    assert message in str(error.value)


@needs_native
def test_sessions_and_threads_at_once_have_the_results_of_one():
    qkv, rpb = torch.randn(2, 29, 31, 3, 4, 16), torch.randn(4, 5, 9)
    model = _model(rpb=rpb, **WINDOW)
    expected = _run(_session(model, threads=1), qkv=qkv)
    sessions = [_session(model, threads=n) for n in (1, 2, 3)]
    with ThreadPoolExecutor(6) as pool:
        outputs = list(pool.map(lambda session: _run(session, qkv=qkv), 8 * sessions))
    assert all(torch.equal(output, expected) for output in outputs)
    sessions.clear()  # and with them ONNX Runtime's hold on the library
    assert torch.equal(_run(_session(model), qkv=qkv), expected)


_ALONE = """
import os, sys
sys.modules["torch"] = sys.modules["nat_models"] = None
import numpy, onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = int(sys.argv[3])
options.register_custom_ops_library(sys.argv[1])
session = onnxruntime.InferenceSession(sys.argv[2], options)
before = len(os.listdir("/proc/self/task"))
for _ in range(3):
    session.run(None, {"qkv": numpy.ones((2, 40, 40, 3, 4, 16), "float32")})
print(len(os.listdir("/proc/self/task")) - before)
"""


@needs_native
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
@pytest.mark.parametrize("threads", [1, 3])
def test_it_runs_without_pytorch_on_the_sessions_threads_alone(threads, tmp_path):
    (tmp_path / "model.onnx").write_bytes(_model(**WINDOW))
    command = [sys.executable, "-c", _ALONE, nat_models.custom_ops_library(), tmp_path / "model.onnx", str(threads)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (run.returncode, run.stdout.strip()) == (0, "0"), run.stderr


@needs_native
def test_an_instruction_set_that_is_not_there_is_an_error(monkeypatch):
    # os.environ reaches the C library's environment.
    monkeypatch.setenv("NAT_MODELS_CPU_ISA", "mmx")
    with pytest.raises(Exception, match="NAT_MODELS_CPU_ISA=mmx is unknown"):
        onnxruntime.SessionOptions().register_custom_ops_library(str(native.library_path()))
    monkeypatch.setenv("NAT_MODELS_CPU_ISA", "baseline")
    qkv = torch.randn(SHAPE)
    expected = reference.na2d(*qkv.double().unbind(3), None, (3, 5), (2, 1), 0.3)
    assert relative_error(_run(_session(_model(**WINDOW)), qkv=qkv), expected) < TOLERANCE
    monkeypatch.delenv("NAT_MODELS_CPU_ISA")
    onnxruntime.SessionOptions().register_custom_ops_library(str(native.library_path()))  # the best again


@needs_native
def test_an_onnxruntime_that_is_too_old_is_an_error():
    said = []
    # Pointers are returned as integers, which ctypes keeps no objects for.
    create_status = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p)(
        lambda code, message: said.append((code, message.decode())) or 1
    )
    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))
    version = ctypes.create_string_buffer(b"1.16.3")
    get_api = ctypes.CFUNCTYPE(ctypes.c_size_t, ctypes.c_uint32)(lambda v: ctypes.addressof(table) if v <= 16 else 0)
    get_version = ctypes.CFUNCTYPE(ctypes.c_size_t)(lambda: ctypes.addressof(version))
    base = (ctypes.c_void_p * 2)(*(ctypes.cast(f, ctypes.c_void_p) for f in (get_api, get_version)))
    register = ctypes.CDLL(nat_models.custom_ops_library()).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, base) is not None
    assert said == [(1, "nat_models::na2d needs ONNX Runtime 1.17 or newer, this is 1.16.3")]


def test_a_library_that_was_not_built_is_an_error(monkeypatch):
    monkeypatch.setattr(native, "available", lambda: (False, "nat_cpu.so was not built"))
    with pytest.raises(RuntimeError, match=r"no library of custom operators: nat_cpu\.so was not built"):
        nat_models.custom_ops_library()


def test_a_file_without_its_library_is_one_clear_error(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    path.write_bytes(_model(**WINDOW))
    with pytest.raises(Exception, match="nat_models:na2d"):  # ONNX Runtime's own, which docs/export.md quotes
        onnxruntime.InferenceSession(path)
    monkeypatch.setattr(native, "available", lambda: (False, "nat_cpu.so was not built"))
    with pytest.raises(UserError, match=r"calls the C\+\+ kernel, which cannot run here: nat_cpu\.so was not"):
        exporting.load_onnx(path)


KWARGS = dict(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))


@needs_native
def test_one_file_is_the_network_at_every_batch_and_size(tmp_path, network, capsys):
    model, path = network("nat_mini", num_classes=5, **KWARGS), tmp_path / "model.onnx"
    with torch.no_grad():  # logits of size 1, for which a difference of 1e-4 says something
        model.head.fc.weight.div_(model(torch.randn(1, 3, 224, 224)).std())
    save_for_hf(model, tmp_path / "model", safe_serialization=True)
    flags = ["--output", str(path), "--custom-op", "--dynamic-size", "--check"]
    assert main(["export", "--model", f"local-dir:{tmp_path / 'model'}", *flags]) == 0
    assert "largest difference at " in capsys.readouterr().out
    exported = exporting.load_onnx(path)
    assert_same_logits(exported.run, model)
    assert "nat_models.custom_ops_library()" in exported.metadata["custom_ops_library"]
    assert json.loads(exported.metadata["preprocessing"])["input_size"] == [3, 224, 224]
    nodes = [node for node in onnx.load(path).graph.node if node.domain]
    assert [(node.domain, node.op_type) for node in nodes] == 4 * [("nat_models", "na2d")]
    assert all("nat_models.custom_ops_library()" in node.doc_string for node in nodes)


@needs_native
def test_a_file_of_one_size_takes_any_batch_and_has_nothing_but_attention_beyond_onnx(tmp_path, network):
    model, path = network("dinat_mini", num_classes=5, **KWARGS), tmp_path / "model.onnx"
    exporting.export(model, path, format="onnx", name="dinat_mini", custom_op=True, check=True)
    nodes = onnx.load(path).graph.node
    assert {node.domain for node in nodes} == {"", "nat_models"}
    # Two around each attention; at the beginning and at the end of each of four levels.
    assert sum(node.op_type == "Reshape" for node in nodes) == 2 * 4 + 2 * 4
    session = exporting.load_onnx(path)
    for batch in (1, 4):
        image = torch.randn(batch, 3, 224, 224)
        with torch.no_grad():
            torch.testing.assert_close(session.run(image), model(image), atol=1e-4, rtol=1e-4)


def test_what_the_operator_cannot_compute_is_refused(tmp_path, network):
    model, image = network("nat_mini", **KWARGS), torch.randn(2, 3, 64, 64)
    with pytest.raises(UserError, match=r"computes in float32, got a model in torch\.float64"):
        exporting.write_onnx(model.double(), image.double(), False, {}, tmp_path / "model.onnx", custom_op=True)
    with pytest.raises(UserError, match="--custom-op is for models with neighborhood attention"):
        exporting.write_onnx(torch.nn.Conv2d(3, 4, 3), image, False, {}, tmp_path / "model.onnx", custom_op=True)
    with pytest.raises(UserError, match="--custom-op is for the format onnx, got pt2"):
        exporting.export(model, tmp_path / "model.pt2", format="pt2", name="nat_mini", custom_op=True)
    assert list(tmp_path.iterdir()) == []


def test_weights_of_low_precision_are_computed_with_in_float32(tmp_path, network):
    model, path = network("nat_mini", num_classes=5, **KWARGS), tmp_path / "model.onnx"
    exporting.export(model, path, format="onnx", name="nat_mini", img_size=64, dtype="float16", custom_op=True)
    assert path.stat().st_size < 0.7 * 4 * sum(p.numel() for p in model.parameters())
    assert np.isfinite(exporting.load_onnx(path).run(torch.randn(1, 3, 64, 64)).numpy()).all()
