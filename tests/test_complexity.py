"""The operator's cost as fvcore counts it."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nat_models import na2d
from nat_models.complexity import fvcore_handles
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
