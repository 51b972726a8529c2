"""Promises of `nat-models export`, and of torch.compile for the networks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.models import save_for_hf

import nat_models.export as exporting
from nat_models import fuse
from nat_models.cli import main
from nat_models.networks.upernet import PyramidPool, upernet
from nat_models.training.segmenters import Segmenter, load_segmenter, save_segmenter
from tests.conftest import assert_same_logits

# The first block of a level is not dilated by default.
TINY = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), dilations=((1,), (1,), (2,), (1,)))
NETWORKS = ["nat_mini", "nat_tiny", "nat_small", "nat_base"]
SHALLOW = dict(depths=(1, 1, 1, 1))  # a block more of a kind says nothing new of the file, and takes seconds


@pytest.fixture
def saved(tmp_path, network):
    """A small network of ours in a folder, as train.py leaves one."""
    model = network("nat_mini", embed_dim=64, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), kernel_size=7, num_classes=3)
    save_for_hf(model, tmp_path / "model", safe_serialization=True, model_config=dict(label_names=["a", "b", "c"]))
    return model


def _export(tmp_path: Path, *flags: str) -> int:
    return main(["export", "--model", f"local-dir:{tmp_path / 'model'}", *flags])


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("nat_mini", SHALLOW), *(pytest.param(name, {}, marks=pytest.mark.slow) for name in NETWORKS)],
)
def test_one_onnx_file_is_the_network_at_every_batch_and_size(name, kwargs, tmp_path, network):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    import onnx

    model, path = network(name, **kwargs), tmp_path / "model.onnx"
    # Logits of size 1, for which a difference of 1e-4 says something.
    with torch.no_grad():
        model.head.fc.weight.div_(model(torch.randn(1, 3, 224, 224)).std())
    exporting.write_onnx(model, torch.randn(2, 3, 224, 224), True, {"model": name}, path)
    assert_same_logits(exporting.load_onnx(path).run, model)
    domains = {node.domain for node in onnx.load(path).graph.node}
    assert domains == {""}, "operators beyond plain ONNX"


@pytest.mark.parametrize(
    ("format", "suffix", "load"),
    [
        pytest.param("pt2", ".pt2", "torch.export.load(sys.argv[1]).module()", marks=pytest.mark.slow),
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


@pytest.mark.parametrize(
    ("format", "dtype"),
    [
        *(("onnx", "bfloat16"), ("pt2", "float16")),
        *(pytest.param(*case, marks=pytest.mark.slow) for case in (("onnx", "float16"), ("pt2", "bfloat16"))),
    ],
)
def test_weights_of_low_precision_halve_the_file(format, dtype, tmp_path, saved):
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    path = tmp_path / f"{dtype}{exporting.FORMATS[format][0]}"
    assert _export(tmp_path, "--format", format, "--output", str(path), "--dtype", dtype, "--check") == 0
    in_float32 = 4 * sum(p.numel() for p in saved.parameters())
    assert path.stat().st_size < 0.7 * in_float32


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


def _segmenter_folder(folder: Path) -> Path:
    """A small segmenter in a folder, as a run leaves one; its BatchNorms have seen something."""
    about = Segmenter("dinat_mini", TINY, 16, ["sky", "sea"], [(0, 0, 255), (0, 99, 0)], [0.5] * 3, [0.2] * 3, 64, 256)
    network = about.make_network().eval()
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.5)
            module.running_var.uniform_(0.5, 2)
    folder.mkdir()
    save_segmenter(network, folder, about)
    return folder


@pytest.mark.parametrize(
    "format", [*(pytest.param(format, marks=pytest.mark.slow) for format in ("onnx", "pt2")), "torchscript"]
)
def test_one_file_is_the_segmenter_at_every_batch_and_size(format, tmp_path, capsys):
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folder, (suffix, _, load) = _segmenter_folder(tmp_path / "run"), exporting.FORMATS[format]
    path, flags = tmp_path / f"segmenter{suffix}", ["--img-size", "64", "--dynamic-size", "--check"]
    assert main(["export", "--model", str(folder), "--format", format, "--output", str(path), *flags]) == 0
    assert "largest difference at 64x64, 160x288, 96x96, 75x107: " in capsys.readouterr().out
    exported = load(path)
    assert json.loads(exported.metadata["label_names"]) == ["sky", "sea"]
    preprocessing = json.loads(exported.metadata["preprocessing"])
    assert (preprocessing["mean"], preprocessing["short_side"], preprocessing["input_size"]) == (
        [0.5] * 3,
        64,
        [3, 64, 64],
    )
    network, _ = load_segmenter(folder)
    for size in ((32, 130), (100, 32)):  # last levels of one row, or one column
        image = torch.randn(2, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(exported.run(image), network(image), atol=1e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "fused"), [("nat_mini", False), ("nat_tiny", True)])
def test_one_onnx_file_is_the_published_segmenter_at_every_size(name, fused, tmp_path):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, path = upernet(name).eval(), tmp_path / "model.onnx"
    model = fuse(model) if fused else model
    with torch.no_grad():
        # Logits of size 1 or more, for which a difference of 1e-3 says something.
        model.decode_head.conv_seg.weight.div_(model(torch.randn(1, 3, 96, 128)).std())
        exporting.export(model, path, format="onnx", name=name, dynamic_size=True)
        run = exporting.load_onnx(path).run
        for size in ((512, 512), (480, 640), (96, 128)):
            image = torch.randn(1, 3, *size)
            torch.testing.assert_close(run(image), model(image), atol=1e-3, rtol=0)


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(1, 2), (4, 7), (16, 25)])
def test_pooling_for_an_export_is_adaptive_pooling(bins, size, monkeypatch):
    x, pool = torch.randn(2, 3, *size), PyramidPool(bins)
    expected = pool(x)
    monkeypatch.setattr("nat_models.networks.upernet.is_exporting", lambda: True)
    monkeypatch.setattr(torch.nn.functional, "adaptive_avg_pool2d", lambda *args: pytest.fail("it ran"))
    torch.testing.assert_close(pool(x), expected)


def test_a_segmenters_folder_says_what_it_is(tmp_path, capsys):
    folder = _segmenter_folder(tmp_path / "run")
    assert main(["export", "--model", str(folder), "--num-classes", "3"]) == 2
    assert "--num-classes is not for a segmenter" in capsys.readouterr().err
