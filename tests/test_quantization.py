"""Promises of `nat-models export --int8`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import save_for_hf

import nat_models.commands.export as command
from nat_models import NeighborhoodAttention2d, quantization
from nat_models.cli import main
from nat_models.export import export, load_onnx
from tests.ops.conftest import needs_native

onnx = pytest.importorskip("onnx", reason="onnx is not installed")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
TINY = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3, num_classes=5)


@pytest.fixture
def saved(tmp_path, network) -> torch.nn.Module:
    """A small network in model/, images in images/: noise of different means, so that logits differ."""
    model = network("nat_mini", **TINY)
    config = dict(label_names=list("abcde"))
    save_for_hf(model, tmp_path / "model", safe_serialization=True, model_config=config)
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(20):
        pixels = random.normal(random.uniform(40, 210, 3), 40, (64, 64, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{i}.png")
    return model


def _export(folder: Path, *flags: str) -> int:
    path = str(folder / "model.onnx")
    return main(["export", "--model", f"local-dir:{folder / 'model'}", "--output", path, "--img-size", "64", *flags])


def test_an_int8_file_agrees_with_float32_on_images_it_was_not_calibrated_on(tmp_path, saved, capsys, monkeypatch):
    monkeypatch.setattr(command, "_CALIBRATION", 8)
    seen = []
    load = command.load_images
    monkeypatch.setattr(command, "load_images", lambda part, *rest: seen.append(part) or load(part, *rest))
    assert _export(tmp_path, "--int8", "--calibrate", str(tmp_path / "images")) == 0
    printed = capsys.readouterr().out
    assert "int8, calibrated on 8 images; cosine of logits 0.9" in printed
    assert "of 8 images" in printed
    assert len({image.path for part in seen for image in part}) == 16
    assert [path.name for path in tmp_path.glob("*.onnx")] == ["model.onnx"]
    exported = load_onnx(tmp_path / "model.onnx")
    assert json.loads(exported.metadata["label_names"]) == list("abcde")
    assert set(exported.metadata) == {"model", "preprocessing", "label_names"}
    for batch in (1, 3):
        image = torch.randn(batch, 3, 64, 64)
        with torch.no_grad():
            cosine = torch.nn.functional.cosine_similarity(exported.run(image), saved(image))
        assert cosine.min() > 0.99


@needs_native
def test_a_file_that_calls_the_kernel_is_quantised_too(tmp_path, saved):
    path = tmp_path / "model.onnx"
    export(saved, path, format="onnx", name="nat_mini", img_size=64, custom_op=True)
    image = torch.randn(2, 3, 64, 64)
    expected = load_onnx(path).run(image)
    assert quantization.quantize_onnx(path, [image]) == 2
    exported = load_onnx(path)
    logits = exported.run(image)
    assert torch.nn.functional.cosine_similarity(logits, expected).min() > 0.99 and not torch.equal(logits, expected)
    nodes = onnx.load(path).graph.node
    assert exported.metadata["model"] == "nat_mini"
    assert sum(node.domain == "nat_models" for node in nodes) == 4
    linear = sum(isinstance(m, torch.nn.Linear | torch.nn.Conv2d) for m in saved.modules())
    names = {node.output[0] for node in nodes if node.op_type == "DequantizeLinear"}
    layers = [node for node in nodes if node.op_type in ("MatMul", "Gemm", "Conv")]
    assert len(layers) == linear and all(names.issuperset(node.input[:2]) for node in layers)


def test_weights_are_int8_by_channel_and_products_of_the_attention_stay_in_float32(tmp_path, saved):
    path = tmp_path / "model.onnx"
    export(saved, path, format="onnx", name="nat_mini", img_size=64)
    products = {n.name for n in onnx.load(path).graph.node if n.op_type in ("MatMul", "Gemm", "Conv")}
    quantization.quantize_onnx(path, [torch.randn(2, 3, 64, 64)])
    graph = onnx.load(path).graph
    made_by = {name: node for node in graph.node for name in node.output}
    arrays = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer}
    quantized = 0
    for node in graph.node:
        if node.name not in products:
            continue
        weight = made_by.get(node.input[1])
        if weight is None or weight.op_type != "DequantizeLinear" or weight.input[0] not in arrays:
            assert all(made_by[name].op_type != "DequantizeLinear" for name in node.input), node.name
            continue
        quantized += 1
        assert arrays[weight.input[0]].dtype == np.int8
        assert arrays[weight.input[1]].size > 1, "one scale for all channels"
    linear = sum(isinstance(m, torch.nn.Linear | torch.nn.Conv2d) for m in saved.modules())
    attentions = sum(isinstance(m, NeighborhoodAttention2d) for m in saved.modules())
    assert quantized == linear + 2 * attentions < len(products)  # queries, keys and values have a layer each
    assert {node.domain for node in graph.node} == {""}, "operators beyond plain ONNX"


def test_a_file_that_lost_too_much_is_refused_and_not_written(tmp_path, saved, capsys, monkeypatch):
    agreement = quantization.Agreement(10, 0.9949, 0.2, 0.5)
    monkeypatch.setattr(quantization, "compare", lambda *args: agreement)
    (tmp_path / "model.onnx").write_text("before")
    assert _export(tmp_path, "--int8", "--calibrate", str(tmp_path / "images")) == 2
    assert "must be at least 0.995, got 0.99490 over 10 images" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*.onnx")] == ["model.onnx"]
    assert (tmp_path / "model.onnx").read_text() == "before"


def test_agreement_is_of_each_image(monkeypatch):
    logits = {"a": [[1.0, 0.0], [0.0, 2.0]], "b": [[3.0, 0.0], [1.0, 0.0]]}
    monkeypatch.setattr(
        quantization, "load_onnx", lambda path: type("_", (), dict(run=lambda _: torch.tensor(logits[path])))
    )
    found = quantization.compare("a", "b", [torch.zeros(2, 3, 1, 1)] * 2)
    assert found == quantization.Agreement(4, 0.5, 0.0, 0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--int8"], "--int8 and --calibrate DIR go together"),
        (["--calibrate", "."], "--int8 and --calibrate DIR go together"),
        (["--int8", "--calibrate", ".", "--dtype", "bfloat16"], "in float32, got onnx in bfloat16"),
        (["--int8", "--calibrate", ".", "--format", "pt2"], "--int8 is for --format onnx in float32, got pt2"),
        (["--int8", "--calibrate", "empty"], "There are no images in empty"),
        (["--int8", "--calibrate", "one"], "--calibrate needs 2 images at least, one holds 1."),
    ],
)
def test_what_cannot_be_quantised_is_named(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "one"):
        Path(name).mkdir()
    Image.new("RGB", (8, 8)).save("one/1.png")
    assert main(["export", "--model", "nat_mini", "--no-pretrained", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*.onnx"))
