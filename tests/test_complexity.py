"""The operator's cost as fvcore and deepspeed count it."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from nat_models import NeighborhoodAttention1d, na2d
from nat_models.complexity import fvcore_handles, tell_counters
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
