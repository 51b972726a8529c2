"""What networks cost as the papers count, and the operator's cost as fvcore and deepspeed count it."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from nat_models import NeighborhoodAttention1d, na2d
from nat_models.cli import main
from nat_models.complexity import count, fvcore_handles, tell_counters
from nat_models.networks import cascade_rcnn, mask_rcnn
from nat_models.networks.upernet import PUBLISHED, upernet
from nat_models.ops import use_backend
from tests.ops.conftest import make_inputs


def test_fvcore_and_the_flop_counter_agree():
    flop_count = pytest.importorskip("fvcore.nn", reason="fvcore is not installed").FlopCountAnalysis

    class Attend(torch.nn.Module):
        def forward(self, query, key, value, rpb):
            return na2d(query, key, value, kernel_size=(3, 5), rpb=rpb)

    inputs = make_inputs(2, 9, 12, 3, 8, (3, 5), torch.float32)
    operations = flop_count(Attend(), tuple(inputs)).set_op_handle(**fvcore_handles).total()
    with FlopCounterMode(display=False) as counter:
        Attend()(*inputs)
    assert 2 * operations == counter.get_total_flops()


def _macs(model: torch.nn.Module, image: torch.Tensor) -> float:
    with FlopCounterMode(display=False) as counter:
        model(image)
    return counter.get_total_flops() / 2


# 96 px: the last two levels are padded, and count as they are computed.
@pytest.mark.parametrize("size", [224, 96])
def test_deepspeeds_table_gets_a_hook_that_counts_the_operator(size, monkeypatch):
    profiler = SimpleNamespace(MODULE_HOOK_MAPPING={})  # all of deepspeed that is asked for
    monkeypatch.setitem(sys.modules, "deepspeed.profiling.flops_profiler.profiler", profiler)
    model, image = timm.create_model("nat_mini").eval(), torch.zeros(1, 3, size, size)
    layers = [module for module in model.modules() if type(module) in profiler.MODULE_HOOK_MAPPING]
    for layer in layers:
        layer.__flops__ = layer.__macs__ = 0
        layer.register_forward_hook(profiler.MODULE_HOOK_MAPPING[type(layer)])
    with FlopCounterMode(display=False) as counter:
        model(image)
    flops = counter.get_flop_counts()["Global"]
    expected = sum(n for operator, n in flops.items() if "na2d" in str(operator))
    assert sum(layer.__flops__ for layer in layers) == 2 * sum(layer.__macs__ for layer in layers) == expected > 0


@pytest.mark.parametrize("length", [20, 3])  # the second is padded
def test_deepspeeds_table_counts_sequences_too(length, monkeypatch):
    profiler = SimpleNamespace(MODULE_HOOK_MAPPING={})
    monkeypatch.setitem(sys.modules, "deepspeed.profiling.flops_profiler.profiler", profiler)
    tell_counters()
    layer = NeighborhoodAttention1d(16, 2, kernel_size=5)
    layer.__flops__ = layer.__macs__ = 0
    layer.register_forward_hook(profiler.MODULE_HOOK_MAPPING[NeighborhoodAttention1d])
    layer(torch.zeros(3, length, 16))
    assert layer.__flops__ == 2 * layer.__macs__ == 2 * 2 * 3 * max(length, 5) * 5 * 16  # QK^T and PV


@pytest.mark.parametrize("backend", [None, "blocked"])
def test_deepspeed_counts_the_published_cost(backend):
    profiler = pytest.importorskip("deepspeed.profiling.flops_profiler", reason="deepspeed is not installed")
    model = timm.create_model("nat_mini").eval()
    with use_backend(backend):
        _, macs, _ = profiler.get_model_profile(model, (1, 3, 224, 224), print_profile=False, as_string=False)
    assert macs == _macs(model, torch.zeros(1, 3, 224, 224))


def test_counters_are_told_and_never_imported():
    code = "import sys, timm, nat_models; timm.create_model('nat_mini', device='meta'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"fvcore", "deepspeed"} & set(loaded)


# Parameters in M, GFLOPs: NAT's of arXiv:2204.07143, DiNAT's and DiNAT_s' of arXiv:2209.15001.
SYSTEMS = {
    "nat_mini": (50, 900),
    "nat_tiny": (58, 934),
    "nat_small": (82, 1010),
    "nat_base": (123, 1137),
    "dinat_mini": (50, 900),
    "dinat_tiny": (58, 934),
    "dinat_small": (82, 1010),
    "dinat_base": (123, 1137),
    "dinat_large": (238, 2335),
    "dinat_s_tiny": (60, 941),
    "dinat_s_small": (81, 1030),
    "dinat_s_base": (121, 1173),
    "dinat_s_large": (234, 2465),  # 2465.35; the paper prints 2466
}


def _rows(printed: str) -> dict[str, list[str]]:
    """By the network's name, its columns: height, "x", width, parameters in M, GFLOPs, GMACs."""
    rows = {}
    for line in printed.splitlines()[1:]:
        words = line.split()
        rows[" ".join(words[:-6])] = words[-6:]
    return rows


MASK_RCNNS = {
    "nat_mini": (40, 225),
    "nat_tiny": (48, 258),
    "nat_small": (70, 330),
    "dinat_mini": (40, 225),
    "dinat_tiny": (48, 258),
    "dinat_small": (70, 330),
    "dinat_s_tiny": (48, 263),
    "dinat_s_small": (69, 350),
}
CASCADES = {
    "nat_mini": (77, 704),
    "nat_tiny": (85, 737),
    "nat_small": (108, 809),
    "nat_base": (147, 931),
    "dinat_mini": (77, 704),
    "dinat_tiny": (85, 737),
    "dinat_small": (108, 809),
    "dinat_base": (147, 931),
    "dinat_large": (258, 1276),
    "dinat_s_tiny": (86, 742),
    "dinat_s_small": (107, 829),
    "dinat_s_base": (145, 966),
    "dinat_s_large": (253, 1357),
}


@pytest.mark.parametrize(
    ("system", "figures", "published"),
    [
        ("upernet", SYSTEMS, PUBLISHED),
        ("mask_rcnn", MASK_RCNNS, mask_rcnn.PUBLISHED),
        pytest.param("cascade_mask_rcnn", CASCADES, cascade_rcnn.PUBLISHED, marks=pytest.mark.slow),
    ],
)
def test_the_systems_of_the_papers_cost_what_the_papers_print(system, figures, published, capsys):
    assert main(["complexity", system]) == 0
    rows = _rows(capsys.readouterr().out)
    found = {name: (round(float(row[3])), round(float(row[4]))) for name, row in rows.items()}
    assert found == {f"{system} {name}": each for name, each in figures.items()}
    assert set(figures) == set(published)


def test_a_detector_costs_what_its_parts_do(capsys):
    """Per pixel of the pyramid, per RoI and per mask, not per box that an image happens to have."""
    names = ["complexity", "mask_rcnn", "nat_mini", "--img-size", "64", "128"]
    assert main([*names, "--model-kwargs", "masks=False", "in_chans=1"]) == 0
    ((height, _, width, parameters, _, macs),) = _rows(capsys.readouterr().out).values()
    model = mask_rcnn.mask_rcnn("nat_mini", masks=False, in_chans=1).eval()
    assert (height, width) == ("64", "128")
    assert float(parameters) == round(sum(p.numel() for p in model.parameters()) / 1e6, 3)
    heads = 1000 * (256 * 49 * 1024 + 1024 * 1024 + 1024 * (81 + 320))
    pixels = [h * w for h, w in ((16, 32), (8, 16), (4, 8), (2, 4), (1, 2))]
    pyramid = sum(n * 256 * (c + 9 * 256) for n, c in zip(pixels[:4], (64, 128, 256, 512), strict=True))
    proposals = sum(pixels) * 256 * (9 * 256 + 3 + 12)
    body = _macs(model.backbone.body, torch.zeros(1, 1, 64, 128))
    assert float(macs) == pytest.approx((body + pyramid + proposals + heads) / 1e9, abs=0.005)


def test_any_network_at_any_size(capsys):
    assert main(["complexity", "nat_tiny", "vitrpb_small", "--img-size", "224"]) == 0
    rows = _rows(capsys.readouterr().out)
    assert [(row[0], row[2], float(row[3]), round(float(row[5]), 1)) for row in rows.values()] == [
        ("224", "224", 27.902, 4.3),
        ("224", "224", 22.08, 4.6),
    ]
    assert main(["complexity", "upernet", "nat_tiny", "--img-size", "96", "160", "--num-classes", "2"]) == 0
    ((height, _, width, parameters, flops, macs),) = _rows(capsys.readouterr().out).values()
    assert (height, width) == ("96", "160") and float(parameters) < 57.697
    model = upernet("nat_tiny", 2).eval()
    assert float(macs) == pytest.approx(_macs(model, torch.zeros(1, 3, 96, 160)) / 1e9, abs=0.005)
    assert float(flops) > float(macs)


def test_flops_are_fvcores():
    fvcore = pytest.importorskip("fvcore.nn", reason="fvcore is not installed")
    model = upernet("dinat_mini", 5, 16, embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8)).eval()
    image = torch.zeros(1, 3, 24, 24)  # all levels smaller than the window: of larger ones a trace pads a token more
    analysis = fvcore.FlopCountAnalysis(model, image).set_op_handle(**fvcore_handles)
    by_operator = analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).by_operator()
    pooling = by_operator["adaptive_avg_pool2d"]  # which the papers' figures are without, as far as they are printed
    assert count(model, image.shape[1:]).flops == sum(by_operator.values()) - pooling


def test_counting_needs_no_extra():
    extras = ["fvcore", "accelerate", "matplotlib", "rich", "torchmetrics", "transformers"]
    code = (
        f"import sys\nfor name in {extras}: sys.modules[name] = None\n"
        "from nat_models.cli import main; sys.exit(main(['complexity', 'upernet', 'nat_mini']))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert _rows(run.stdout)["upernet nat_mini"][3:] == ["49.780", "900.44", "898.60"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["upernet", "nat_tny"], "Unknown backbone 'nat_tny', near to nat_tiny"),
        (["upernet", "nat_isotropic_small"], "maps at strides"),
        (["mask_rcnn", "nat_tny"], "Unknown backbone 'nat_tny', near to nat_tiny"),
        (["cascade_mask_rcnn", "nat_tiny", "--channels", "8"], "--channels is of UPerNet's head"),
        (["mask_rcnn", "nat_tiny", "--model-kwargs", "mask=False"], "unexpected keyword argument 'mask'"),
        (["nat_tiny", "--img-size", "1", "2", "3"], "--img-size takes a height and a width, got 3 numbers."),
        (["nat_tny"], "Unknown model 'nat_tny'"),
    ],
)
def test_what_cannot_be_counted_is_one_line(argv, message, capsys):
    assert main(["complexity", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
