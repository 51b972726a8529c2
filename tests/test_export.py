"""Promises of `nat-models export`, and of torch.compile for the networks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import save_for_hf

import nat_models.export as exporting
from nat_models.cli import main

NETWORKS = ["nat_mini", "nat_tiny", "nat_small", "nat_base"]
SIZES = [(224, 224), (160, 288), (96, 96)]  # the last ends in maps of 6 and 3 under a window of 7


@pytest.fixture
def network():
    """Makes a network whose biases and layer scales are of a size at which a mistake shows."""

    def make(name: str, **kwargs) -> torch.nn.Module:
        model = timm.create_model(name, **kwargs)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith((".gamma", ".rpb", ".bias")):
                    parameter.normal_(std=0.5)
        return model.eval()

    return make


@pytest.fixture
def saved(tmp_path, network):
    """A small network of ours in a folder, as train.py leaves one."""
    model = network("nat_mini", embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), kernel_size=7, num_classes=3)
    save_for_hf(model, tmp_path / "model", safe_serialization=True, model_config=dict(label_names=["a", "b", "c"]))
    return model


def _export(tmp_path: Path, *flags: str) -> int:
    return main(["export", "--model", f"local-dir:{tmp_path / 'model'}", *flags])


def _assert_close(run, model: torch.nn.Module, sizes=SIZES) -> None:
    for size in sizes:
        for batch in (1, 3):
            image = torch.randn(batch, 3, *size)
            with torch.no_grad():
                expected = model(image)
            torch.testing.assert_close(run(image), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "nat_mini" else pytest.mark.slow) for name in NETWORKS]
)
def test_one_onnx_file_is_the_network_at_every_batch_and_size(name, tmp_path, network):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    import onnx

    model, path = network(name), tmp_path / "model.onnx"
    # Logits of size 1, for which a difference of 1e-4 says something.
    with torch.no_grad():
        model.head.fc.weight.div_(model(torch.randn(1, 3, 224, 224)).std())
    exporting.write_onnx(model, torch.randn(2, 3, 224, 224), True, {"model": name}, path)
    _assert_close(exporting.load_onnx(path).run, model)
    domains = {node.domain for node in onnx.load(path).graph.node}
    assert domains == {""}, "operators beyond plain ONNX"


@pytest.mark.parametrize(
    ("format", "suffix", "load"),
    [
        ("pt2", ".pt2", "torch.export.load(sys.argv[1]).module()"),
        ("torchscript", ".pt", "torch.jit.load(sys.argv[1])"),
        pytest.param("aoti", ".pt2", "torch._inductor.aoti_load_package(sys.argv[1])", marks=pytest.mark.slow),
    ],
)
def test_an_exported_file_runs_without_this_package(format, suffix, load, tmp_path, saved):
    path = tmp_path / f"model{suffix}"
    fixed = format == "aoti"
    sizing = ["--img-size", "96"] if fixed else ["--dynamic-size"]
    assert _export(tmp_path, "--format", format, "--output", str(path), "--check", *sizing) == 0
    images = {size: torch.randn(3, 3, *size) for size in ([(96, 96)] if fixed else [(64, 96), (240, 224)])}
    torch.save(list(images.values()), tmp_path / "images.pt")
    code = (
        "import sys, torch; sys.modules['nat_models'] = sys.modules['timm'] = None\n"
        f"run = {load}\n"
        "with torch.no_grad(): torch.save([run(x) for x in torch.load(sys.argv[2])], sys.argv[3])"
    )
    files = [str(path), str(tmp_path / "images.pt"), str(tmp_path / "logits.pt")]
    done = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for image, logits in zip(images.values(), torch.load(tmp_path / "logits.pt"), strict=True):
        with torch.no_grad():
            torch.testing.assert_close(logits, saved(image), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("format", ["onnx", "pt2", "torchscript"])
def test_metadata_says_what_the_model_is_and_how_to_feed_it(format, tmp_path, saved):
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    suffix, _, load = exporting.FORMATS[format]
    path = tmp_path / f"model{suffix}"
    assert _export(tmp_path, "--format", format, "--output", str(path), "--img-size", "64") == 0
    metadata = load(path).metadata
    assert metadata["model"] == f"local-dir:{tmp_path / 'model'}"
    assert json.loads(metadata["label_names"]) == ["a", "b", "c"]
    preprocessing = json.loads(metadata["preprocessing"])
    assert preprocessing["input_size"] == [3, 64, 64]
    assert {"mean", "std", "interpolation", "crop_pct"} <= preprocessing.keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_weights_of_low_precision_halve_the_file(format, dtype, tmp_path, saved):
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    sizes = {}
    for each in ("float32", dtype):
        path = tmp_path / f"{each}{exporting.FORMATS[format][0]}"
        assert _export(tmp_path, "--format", format, "--output", str(path), "--dtype", each, "--check") == 0
        sizes[each] = path.stat().st_size
    assert sizes[dtype] < 0.7 * sizes["float32"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "model.pt"], "in the format onnx must end in .onnx, got model.pt"),
        (["--output", "nowhere/model.onnx"], "There is no folder nowhere"),
        (["--format", "aoti", "--dynamic-size"], "--dynamic-size is not for the format aoti"),
        (["--model", "nat_huge"], "nat_huge"),
    ],
)
def test_bad_arguments_are_named(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["export", "--no-pretrained", *flags]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_compile_as_one_graph(name, train, network):
    model = network(name, depths=(1, 1, 2, 1), drop_path_rate=0.0).train(train)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    image = torch.randn(2, 3, 96, 128)
    expected, actual = model(image), compiled(image)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    if train:
        inputs = list(model.parameters())
        gradients = (torch.autograd.grad(x.square().sum(), inputs) for x in (actual, expected))
        for x, y in zip(*gradients, strict=True):
            assert (x - y).norm() <= 1e-4 * y.norm()


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_networks_are_the_networks(name, network):
    model = network(name)
    with torch.no_grad():
        model.head.fc.weight.div_(model(torch.randn(1, 3, 224, 224)).std())
    torch._dynamo.reset()
    with torch.no_grad():
        _assert_close(torch.compile(model, fullgraph=True), model)


def test_another_batch_or_size_compiles_no_graph_of_its_own(network):
    model = network("nat_mini", depths=(1, 1, 1, 1))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        compiled(torch.randn(2, 3, 224, 256))
        with torch._dynamo.config.patch(error_on_recompile=True):
            for batch, *size in ((3, 224, 256), (7, 224, 256), (2, 256, 320)):
                image = torch.randn(batch, 3, *size)
                torch.testing.assert_close(compiled(image), model(image))


def test_attention_dropout_compiles(network):
    model = network("nat_mini", depths=(1, 1, 1, 1), attn_drop_rate=0.5, drop_path_rate=0.0).train()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    image = torch.randn(2, 3, 96, 96)
    first, second = compiled(image), compiled(image)
    assert not torch.equal(first, second)
    model.eval()
    torch.testing.assert_close(compiled(image), model(image), atol=1e-4, rtol=1e-4)
    second.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
