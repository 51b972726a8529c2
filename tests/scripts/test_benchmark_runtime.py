"""Promises of the suites that run exported networks, on small networks."""

import json
from pathlib import Path

import pytest
import timm
import torch

from scripts.benchmark import __main__ as script
from scripts.benchmark import runtime, suites
from scripts.benchmark.published import FAMILIES, SWIN_TINY

SMALL = {
    "nat_mini": dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3),
    SWIN_TINY: dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), img_size=32, window_size=2),
    "convnext_tiny": dict(dims=(16, 32, 64, 128), depths=(1, 1, 1, 1)),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(runtime, "SIZE", 32)
    monkeypatch.setattr(runtime, "_network", lambda name: timm.create_model(name, **SMALL[name]).eval())


@pytest.fixture
def without_openvino(monkeypatch):
    find = runtime.importlib.util.find_spec
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name))


def run(folder: Path, suite: str, *flags: str) -> tuple[dict, list[str]]:
    """The rows by network and form, and the notes."""
    script.main([suite, "--seconds", "0.01", "--json", str(folder / "rows.json"), *flags])
    content = json.loads((folder / "rows.json").read_text())
    return {(row["model"], row["form"]): row for row in content["rows"]}, content["notes"]


def needs(*packages: str):
    missing = [name for name in packages if runtime.importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed")


@pytest.mark.slow  # half a minute, and several runtimes with threads of their own in one process
@needs("onnxruntime", "onnxscript", "openvino")
def test_each_form_is_compared_with_swin_in_the_same_form_at_both_batches(tmp_path):
    rows, notes = run(tmp_path, "runtime", "--batch", "2", "--models", SWIN_TINY, "convnext_tiny")
    assert notes == []
    assert {form for _, form in rows} == set(runtime.FORMS)
    for form in runtime.FORMS:
        ours, peer = rows["convnext_tiny", form], rows[SWIN_TINY, form]
        for batch in (1, 2):
            speeds = [row[f"images/s, batch {batch}"] for row in (ours, peer)]
            assert ours[f"over swin_tiny, batch {batch}"] == pytest.approx(speeds[0] / speeds[1])


@pytest.mark.slow  # half a minute, and several runtimes with threads of their own in one process
@needs("onnxruntime", "onnxscript", "openvino")
@torch.no_grad()
def test_every_form_computes_the_network(tmp_path):
    args = script.parse_args(["runtime", "--models", "nat_mini"])
    torch.manual_seed(0)
    found = runtime._contestants(args, args.models, list(runtime.FORMS), tmp_path)
    image = torch.randn(3, 3, 32, 32).numpy()
    expected = torch.as_tensor(found["nat_mini", "eager"](image))
    for (_, form), call in found.items():
        answer = call(image)
        logits = answer if isinstance(answer, torch.Tensor) else torch.from_numpy(answer[0])
        tolerance = {"float32": 1e-4, "bfloat16": 3e-2, "int8": 0.2}[runtime.FORMS[form].dtype]  # roundings of 8 bits
        assert (logits.float() - expected).abs().max() <= tolerance * expected.abs().max(), form


@pytest.mark.slow
def test_a_runtime_that_is_missing_is_noted(tmp_path, without_openvino):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    rows, notes = run(tmp_path, "runtime", "--models", "convnext_tiny")
    assert notes == ["openvino is not installed: its forms are left out"]
    assert {form for _, form in rows} == {name for name in runtime.FORMS if not name.startswith("OpenVINO")}


def test_a_network_that_fails_in_a_form_is_noted_and_the_others_go_on(tmp_path, monkeypatch, without_openvino):
    def fail(*args, **kwargs):
        raise RuntimeError("no such operator\nand a long story")

    monkeypatch.setattr(runtime, "write_onnx", fail)
    rows, notes = run(tmp_path, "runtime", "--models", "convnext_tiny")
    written = [name for name, form in runtime.FORMS.items() if form.package == "onnxruntime"]
    assert notes[1:] == [f"convnext_tiny is left out in {name}: RuntimeError: no such operator" for name in written]
    assert set(rows) == {("convnext_tiny", "eager"), ("convnext_tiny", "eager bfloat16")}


def test_the_field_is_each_network_in_its_fastest_form_over_swin_in_its_own(tmp_path, monkeypatch, without_openvino):
    speeds = {(SWIN_TINY, "eager"): 8.0, ("convnext_tiny", "eager"): 2.0, ("convnext_tiny", "ONNX Runtime"): 1.0}

    def contestants(args, names, forms, folder):
        return {key: print for key in speeds if key[0] in names}

    monkeypatch.setattr(runtime, "_contestants", contestants)
    monkeypatch.setattr(runtime, "interleaved", lambda calls, *rest: {key: speeds[key[:2]] for key in calls})
    rows, _ = run(tmp_path, "field", "--plot", str(tmp_path / "field.png"), "--models", SWIN_TINY, "convnext_tiny")
    assert {key: row["images/s"] for key, row in rows.items()} == {
        (SWIN_TINY, "eager"): 125.0,
        ("convnext_tiny", "ONNX Runtime"): 1000.0,
    }
    assert rows["convnext_tiny", "ONNX Runtime"]["over swin_tiny, batch 1"] == 8.0
    assert (tmp_path / "field.png").is_file()


@pytest.mark.parametrize("suite, ratio", [("runtime", None), ("field", 2.0)])
def test_where_swin_runs_in_one_form_alone_only_the_field_compares_others_with_it(
    suite, ratio, tmp_path, monkeypatch, without_openvino
):
    found = {(SWIN_TINY, "eager"): 2.0, ("convnext_tiny", "ONNX Runtime"): 1.0}  # nat_mini runs in none
    monkeypatch.setattr(runtime, "_contestants", lambda args, names, *rest: {k: print for k in found if k[0] in names})
    monkeypatch.setattr(runtime, "interleaved", lambda calls, *rest: {key: found[key[:2]] for key in calls})
    rows, _ = run(tmp_path, suite, "--models", SWIN_TINY, "convnext_tiny", "nat_mini")
    assert rows.keys() == found.keys()
    assert rows["convnext_tiny", "ONNX Runtime"]["over swin_tiny, batch 1"] == ratio


@pytest.mark.parametrize("name", [name for members in FAMILIES.values() for name in members])
def test_what_is_published_is_of_a_network_that_timm_has(name):
    assert timm.is_model(name)


def test_a_step_in_bfloat16_is_autocast_over_parameters_in_float32(monkeypatch):
    seen = []

    class Network(torch.nn.Linear):
        def forward(self, x):
            seen.append((self.weight.dtype, (output := super().forward(x)).dtype))
            return output

    monkeypatch.setattr(suites.timm, "create_model", lambda *args, **kwargs: Network(8, 8, dtype=kwargs["dtype"]))
    args = script.parse_args(["step", "--dtype", "bfloat16"])
    suites._step("nat_mini", args, 8)()
    assert seen == [(torch.float32, torch.bfloat16)]
