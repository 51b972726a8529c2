"""The operator's cost for counters that know PyTorch's operations alone: fvcore's and deepspeed's.

A network tells those that are imported when it is made; timm's benchmark.py does both in this order. Of the operator
outside a network fvcore learns by FlopCountAnalysis(model, image).set_op_handle(**fvcore_handles). PyTorch's own
FlopCounterMode needs nothing: it knows the formulas registered with the operator.
"""

import sys

from torch import Tensor

from .layers import NeighborhoodAttention1d, NeighborhoodAttention2d
from .ops.registration import heads_shape, pair_flops

__all__ = ["fvcore_handles", "tell_counters"]


def _fvcore_handle(shape_of):
    def handle(inputs: list, outputs: list) -> int:
        """Operations of one call in a torch.jit graph; fvcore counts a multiply and an add as one."""
        kernel_size = [x.toIValue() for x in inputs[-3].node().inputs()]
        return pair_flops(shape_of(inputs[0].type().sizes()), kernel_size)  # QK^T and PV, 2 FLOPs per operation

    return handle


fvcore_handles = {"nat_models::na2d": _fvcore_handle(list), "nat_models::na2d_qkvpacked": _fvcore_handle(heads_shape)}


def _deepspeed_hook(layer: NeighborhoodAttention2d, inputs: tuple[Tensor], output: Tensor) -> None:
    """A forward hook that adds the operator's cost; deepspeed counts the layer's projections, modules of their own."""
    batch, *size, _ = output.shape
    size = [1, *size][-2:]  # a sequence is a map of one row
    padded = [max(n, k * d) for n, k, d in zip(size, layer.kernel_size, layer.dilation, strict=True)]
    flops = 2 * pair_flops([batch, *padded, layer.num_heads, layer.head_dim], layer.kernel_size)  # QK^T and PV
    layer.__flops__ += flops
    layer.__macs__ += flops // 2


def tell_counters() -> None:
    """Adds the operator to the tables of the counters that are imported; imports none."""
    if (fvcore := sys.modules.get("fvcore.nn.flop_count")) is not None:
        fvcore._DEFAULT_SUPPORTED_OPS.update(fvcore_handles)
    if (deepspeed := sys.modules.get("deepspeed.profiling.flops_profiler.profiler")) is not None:
        for layer in (NeighborhoodAttention1d, NeighborhoodAttention2d):
            deepspeed.MODULE_HOOK_MAPPING[layer] = _deepspeed_hook
