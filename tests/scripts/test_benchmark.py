"""Promises of `python -m scripts.benchmark`, on maps and images small enough for seconds."""

import functools
import io
import json
import sys
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from nat_models.ops.backends import native
from scripts.benchmark import __main__ as script
from scripts.benchmark import detection, measure, segmentation, suites
from scripts.benchmark.measure import interleaved, peak_mib

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory on a CPU is read from Linux")


@pytest.fixture(scope="module", autouse=True)
def _small():
    small = dict(LEVELS=[(8, 9, 1)], LAYERS=[(32, 14)], GEMM_SIZE=64, SIZE=32, SIZES=[32, 64])
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in small.items():
            monkeypatch.setattr(suites, name, value)
        monkeypatch.setattr(segmentation, "WORK", segmentation.Work(64, 16))
        monkeypatch.setattr(detection, "WORK", detection.Work((64, 96), 4, 6, 3))
        yield


@contextmanager
def no_peers():
    """Neither a compiler nor NATTEN."""

    def fail(*args, **kwargs):
        raise RuntimeError("no compiler\nand a long story")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch, "compile", fail)
        monkeypatch.setitem(sys.modules, "natten", None)
        yield


class Clock:
    """Stands in for time.perf_counter: time passes in contestants alone."""

    def __init__(self, monkeypatch):
        self.now, self.log = 0.0, []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def contestant(self, name: str, seconds: float, cold: float = 0.0):
        """Takes `cold` longer when another contestant ran before it."""

        def run():
            self.now += seconds + (cold if self.log[-1:] != [name] else 0.0)
            self.log.append(name)

        return run

    def turns(self) -> list[str]:
        return [name for name, before in zip(self.log, [None, *self.log], strict=False) if name != before]


def test_times_are_those_of_a_contestant_that_runs_alone(monkeypatch):
    clock = Clock(monkeypatch)
    contestants = {name: clock.contestant(name, t, cold=0.2) for name, t in (("a", 0.05), ("b", 0.0004), ("c", 3.0))}
    assert interleaved(contestants, 1.0, "cpu") == pytest.approx({"a": 50.0, "b": 0.4, "c": 3000.0})


def test_contestants_alternate_and_a_slow_one_has_three_turns(monkeypatch):
    clock = Clock(monkeypatch)
    contestants = {name: clock.contestant(name, t) for name, t in (("a", 0.01), ("slow", 0.65), ("b", 0.01))}
    interleaved(contestants, 1.0, "cpu")
    assert clock.turns()[3:10] == ["a", "slow", "b", "a", "b", "a", "b"]  # behind the calls that estimate
    assert clock.log.count("slow") == 3 + 3 * 2
    assert clock.log.count("a") == clock.log.count("b") == 3 + 17 * 6  # the 17th turn of 0.06 s completes the second


def test_one_outlier_does_not_move_the_median(monkeypatch):
    clock = Clock(monkeypatch)
    steady = clock.contestant("a", 0.01)

    def run():
        clock.now += 5.0 if len(clock.log) == 5 else 0.0
        steady()

    assert interleaved({"a": run}, 0.5, "cpu") == pytest.approx({"a": 10.0})


def allocates_in_pytorch():
    kept = torch.ones(64 << 18)  # held before the call: not its own

    def call():
        torch.ones(16 << 18)  # freed before the peak, which is two of the next three
        return torch.ones(32 << 18) + 1 + kept[0]

    return call


def allocates_in_numpy():
    return lambda: (np.ones(48 << 17), torch.ones(32 << 18))


@needs_linux
def test_peak_memory_is_what_a_call_allocates_in_pytorch_or_elsewhere():
    # Linux counts the pages of a process in batches, per CPU.
    assert peak_mib([allocates_in_pytorch, allocates_in_numpy], "cpu") == pytest.approx([64, 80], abs=1)


COLUMNS = {
    "op": {"map", "native ms", "native backward ms", "blocked ms", "dense SDPA ms", "masked SDPA ms"}
    | {"blocked / native", "dense SDPA / native", "masked SDPA / native"}
    | {"forward, of GEMM", "both, of GEMM", "GEMM GFLOP/s"},
    "layer": {"input", "NAT ms", "Swin ms", "projections ms", "Swin / NAT"}
    | {"NAT forward MiB", "Swin forward MiB", "NAT / Swin forward", "NAT both MiB", "Swin both MiB", "NAT / Swin both"},
    "model": {"model", "family", "top-1", "ms", "images/s", "over convnext_tiny"},
    "step": {"model", "ms", "images/s", "speed over nat_mini"},
    "memory": {"model", "forward MiB", "step MiB", "forward / nat_mini", "step / nat_mini"},
    "growth": {"model", "px", "ms", "ns / pixel", "above least"},
    "gemm": {"model", "model ms", "layers", "layers ms", "model / layers"},
    "dtype": {"model", "float32 images/s", "bfloat16 images/s", "bfloat16 over float32"}
    | {"largest logit", "largest difference"},
    "segmentation": {"backbone", "form", "ms", "of eager", "of Swin's eager", "peak MiB"},
    "detection": {"backbone", "system", "form", "ms", "of eager", "of Swin's eager", "peak MiB"},
    "tiles": {"map", "4 x 4 ms", "7 x 7 ms", "whole map ms"},
}
ROWS = {"model": 4, "growth": 2, "tiles": 2, "segmentation": 6, "detection": 8}  # where it is not one
SUITES = [
    pytest.param("op", marks=pytest.mark.skipif(not native.available()[0], reason="the native kernel was not built")),
    *(pytest.param(suite, marks=needs_linux) for suite in ("layer", "memory")),
    *(pytest.param(suite, marks=[needs_linux, pytest.mark.slow]) for suite in ("segmentation", "detection")),
    *("model", "step", "growth", "gemm", "dtype", "tiles"),
]


class Run(NamedTuple):
    content: dict
    printed: str
    folder: Path


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """Runs a suite once, without peers that may be missing."""

    @functools.cache
    def run(suite: str) -> Run:
        folder = tmp_path_factory.mktemp(suite)
        flags = ["--seconds", "0.01", "--json", f"{folder / 'rows.json'}"]
        if suite in script.PLOTS:
            flags += ["--plot", f"{folder / 'rows.png'}"]
        if suite in suites.MODELS:
            flags += ["--models", *(["convnext_tiny", "nat_tiny", "resnet18"] if suite == "model" else []), "nat_mini"]
        with no_peers(), redirect_stdout(io.StringIO()) as printed:
            script.main([suite, *flags])
        content = json.loads((folder / "rows.json").read_text(), parse_constant=pytest.fail)  # NaN is no JSON
        return Run(content, printed.getvalue(), folder)

    return run


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_prints_its_table_and_writes_json_and_plot(suite, ran):
    content, printed, folder = ran(suite)
    assert content["suite"] == content["arguments"][0] == suite
    assert "batch 1" in content["about"]
    rows = content["rows"]
    assert [set(row) for row in rows] == [COLUMNS[suite]] * ROWS.get(suite, 1)
    assert all(x is None or isinstance(x, str) or x >= 0 for row in rows for x in row.values())
    assert all(column in printed for column in COLUMNS[suite])
    assert all(note in printed for note in content["notes"])
    files = {"rows.json"}
    if suite in script.PLOTS:
        assert Image.open(folder / "rows.png").format == "PNG"
        files.add("rows.png")
    assert {path.name for path in folder.iterdir()} == files


def test_ratios_are_to_peers_of_equal_or_lower_published_accuracy(ran):
    content = ran("model").content
    rows = {row["model"]: row for row in content["rows"]}
    assert rows["nat_mini"]["over convnext_tiny"] is None  # 81.8 < 82.1
    expected = rows["nat_tiny"]["images/s"] / rows["convnext_tiny"]["images/s"]
    assert rows["nat_tiny"]["over convnext_tiny"] == pytest.approx(expected)
    assert rows["resnet18"]["over convnext_tiny"] is None
    assert content["notes"] == ["resnet18 has no published top-1 here: it is neither compared nor drawn"]


def test_gemm_counts_every_call_of_a_layer(ran):
    # 4 linear layers in each of 18 blocks, 2 convolutions of the stem, 3 between levels, the head.
    assert ran("gemm").content["rows"][0]["layers"] == 18 * 4 + 2 + 3 + 1


def test_growth_is_relative_to_the_fastest_size(ran):
    rows = ran("growth").content["rows"]
    per_pixel = [row["ms"] * 1e6 / row["px"] ** 2 for row in rows]
    assert max(row["above least"] for row in rows) == pytest.approx(max(per_pixel) / min(per_pixel) - 1)


@needs_linux
def test_a_step_needs_memory_for_its_gradients(ran):
    row = ran("memory").content["rows"][0]
    gradients = 4 * 19_984_174 / 2**20
    assert row["forward MiB"] < 10 < gradients < row["step MiB"] < 2 * gradients  # at 32 px there is little else


def optional_peers() -> tuple[dict, list[str]]:
    args = script.parse_args(["op"])
    qkv, _, rpb = suites._inputs(args, 8, 9, 2)
    with torch.no_grad():
        return suites._optional_peers(args, *qkv.unbind(3), rpb), args.notes


def test_a_peer_that_is_missing_or_fails_is_named_with_its_reason():
    with no_peers():
        peers, notes = optional_peers()
    assert peers == {}
    assert notes[0] == "flex is left out at [1, 8, 9, 2, 32]: RuntimeError: no compiler"
    assert notes[1].startswith("NATTEN is left out at [1, 8, 9, 2, 32]: ModuleNotFoundError: ")


def test_flex_computes_the_operator(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)  # the same, in a second
    assert "flex" in optional_peers()[0]


def test_natten_computes_the_operator(monkeypatch):
    pytest.importorskip("natten")
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    assert "NATTEN" in optional_peers()[0]


def test_a_peer_that_computes_something_else_is_left_out(monkeypatch):
    monkeypatch.setattr(suites, "_natten", lambda q, k, v: lambda: v)
    with no_peers():
        peers, notes = optional_peers()
    assert peers == {}
    assert notes[1] == "NATTEN is left out at [1, 8, 9, 2, 32]: AssertionError: Tensor-likes are not close!"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["gemm", "--plot", "x.png"],
            "--plot is for op, layer, model, field, step, memory, growth, segmentation, detection; gemm has none.",
        ),
        (["op", "--models", "nat_mini"], "op runs no networks."),
        (["op", "--json", "nowhere/x.json"], "there is no folder nowhere for x.json."),
        (["dtype", "--dtype", "float32"], "compares another --dtype with float32."),
        (["runtime", "--dtype", "bfloat16"], "--dtype must be float32 for runtime, got bfloat16."),
        (["field", "--dtype", "float16"], "--dtype must be float32 or bfloat16 for field, got float16."),
        (["field", "--device", "cuda"], "--device must be cpu for field, got cuda."),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.slow
@needs_linux
def test_segmenters_are_compared_with_the_peer_and_with_their_own_eager_form(ran):
    pytest.importorskip("transformers", reason="transformers is not installed")
    rows = {(row["backbone"], row["form"]): row for row in ran("segmentation").content["rows"]}
    peer, ours = rows[segmentation.PEER, "eager"], rows["nat_mini", "fused"]
    assert ours["of Swin's eager"] == pytest.approx(ours["ms"] / peer["ms"])
    assert ours["of eager"] == pytest.approx(ours["ms"] / rows["nat_mini", "eager"]["ms"])


def test_the_peer_gives_logits_of_the_same_form():
    pytest.importorskip("transformers", reason="transformers is not installed")
    args = script.parse_args(["segmentation"])
    with torch.no_grad():
        theirs = segmentation._segmenter(segmentation.PEER, "eager", segmentation.WORK, args)().logits
        ours = segmentation._segmenter("nat_mini", "bfloat16", segmentation.WORK, args)()
    assert theirs.shape == ours.shape == (1, 150, 64, 64)
    assert (theirs.dtype, ours.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.slow
@needs_linux
def test_detectors_are_compared_with_the_peer_and_with_their_own_eager_form(ran):
    content = ran("detection").content
    rows = {(row["system"], row["backbone"], row["form"]): row for row in content["rows"]}
    peer, ours = rows[detection.MASK, detection.PEER, "eager"], rows[detection.CASCADE, "nat_mini", "fused"]
    assert ours["of Swin's eager"] == pytest.approx(ours["ms"] / peer["ms"])
    assert ours["of eager"] == pytest.approx(ours["ms"] / rows[detection.CASCADE, "nat_mini", "eager"]["ms"])
    assert content["notes"] == []  # each has its number of detections


@pytest.mark.parametrize("name", [detection.PEER, "nat_mini"])
@torch.no_grad()
def test_detectors_have_the_same_number_of_boxes_to_do(name):
    seen = []
    network = detection._detector(detection.MASK, name, detection.WORK).eval()
    box_head, mask_head = (
        next(m for key, m in network.roi_heads.named_modules() if key.rpartition(".")[2] == part)
        for part in ("box_head", "mask_head")
    )
    for head in (box_head, mask_head):
        head.register_forward_pre_hook(lambda module, inputs: seen.append(list(inputs[0].shape)))
    network([torch.rand(3, 64, 96)])
    assert seen == [[4, 256, 7, 7], [6, 256, 14, 14]]
