"""What a network becomes in tracers: the TorchScript exporter to ONNX, OpenVINO, a trace for another process."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from timm.utils.onnx import onnx_export

from nat_models.ops import use_backend
from tests.conftest import assert_same_logits

TINY = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
pytestmark = pytest.mark.filterwarnings(
    "ignore::torch.jit.TracerWarning",  # argument checks that a trace leaves out
    "ignore::DeprecationWarning",  # TorchScript's
    "ignore::FutureWarning",
)


def _onnx(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    session = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed").InferenceSession(path)
    (image,) = session.get_inputs()
    return lambda x: torch.from_numpy(session.run(None, {image.name: x.numpy()})[0])


def _with_logits_of_size_one(model: torch.nn.Module) -> torch.nn.Module:
    """Of which a difference of 1e-4 says something."""
    with torch.no_grad():
        model.head.fc.weight.div_(model(torch.randn(1, 3, 224, 224)).std())
    return model


@pytest.fixture
def path(tmp_path) -> Path:
    pytest.importorskip("onnx", reason="onnx is not installed")
    return tmp_path / "model.onnx"


def test_the_torchscript_exporter_writes_one_file_for_every_batch_and_size(path, network):
    import onnx

    model, image = _with_logits_of_size_one(network("nat_mini")), torch.randn(2, 3, 224, 224)
    sizes = {"image": {0: "batch", 2: "height", 3: "width"}}
    torch.onnx.export(model, image, str(path), dynamo=False, input_names=["image"], dynamic_axes=sizes)
    assert_same_logits(_onnx(path), model)
    assert {node.domain for node in onnx.load(path).graph.node} == {""}, "operators beyond plain ONNX"


@pytest.mark.parametrize("dynamic_size", [False, True])
def test_timms_own_export_works(dynamic_size, path, network):
    model = network("nat_mini", **TINY)
    onnx_export(model, str(path), batch_size=1, dynamic_size=dynamic_size, check=True, check_forward=True)
    for size in [(224, 224), (96, 160)] if dynamic_size else [(224, 224)]:
        image = torch.randn(3, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(_onnx(path)(image), model(image), atol=1e-4, rtol=1e-4)


# nat_mini takes half a minute, most of it OpenVINO's.
@pytest.mark.parametrize("arguments", [TINY, pytest.param({}, marks=pytest.mark.slow)], ids=["tiny", "nat_mini"])
def test_openvino_converts_a_network_for_every_batch_and_size(arguments, network):
    openvino = pytest.importorskip("openvino", reason="openvino is not installed")
    model = _with_logits_of_size_one(network("nat_mini", **arguments))
    converted = openvino.convert_model(model, example_input=torch.randn(2, 3, 224, 224))
    # By default it computes in what is fastest, bfloat16 on some processors.
    compiled = openvino.compile_model(converted, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    assert_same_logits(lambda x: torch.from_numpy(compiled(x.numpy())[0]), model)


def test_a_plain_trace_keeps_the_operator_and_one_on_request_runs_without_this_package(tmp_path, network):
    model = network("nat_mini", **TINY)
    image, other = torch.randn(1, 3, 64, 64), torch.randn(2, 3, 240, 96)
    assert "nat_models::na2d_qkvpacked" in str(torch.jit.trace(model, image).inlined_graph)
    with use_backend("exportable"):
        torch.jit.trace(model, image).save(tmp_path / "model.pt")
    torch.save(other, tmp_path / "image.pt")
    code = (
        "import sys, torch; sys.modules['nat_models'] = sys.modules['timm'] = None\n"
        "with torch.no_grad(): torch.save(torch.jit.load('model.pt')(torch.load('image.pt')), 'logits.pt')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), model(other), atol=1e-4, rtol=1e-4)
