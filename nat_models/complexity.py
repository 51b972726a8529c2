"""What a network costs, as papers count it, and the operator's cost for others' counters: fvcore's and deepspeed's.

A network tells those that are imported when it is made; timm's benchmark.py does both in this order. Of the operator
outside a network fvcore learns by FlopCountAnalysis(model, image).set_op_handle(**fvcore_handles). PyTorch's own
FlopCounterMode needs nothing: it knows the formulas registered with the operator.
"""

import copy
import sys
from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .layers import NeighborhoodAttention1d, NeighborhoodAttention2d
from .ops.registration import heads_shape, pair_flops

__all__ = ["Cost", "count", "fvcore_handles", "tell_counters"]


class Cost(NamedTuple):
    """What a network has and does.

    Attributes:
        parameters: Of all of it, also of what only training runs.
        macs: Multiplications with an addition, of convolutions, linear layers and attention.
        flops: The same and what fvcore adds to it: 5 for each element that LayerNorm makes, 2 for BatchNorm in
            evaluation, 4 for bilinear resizing.
    """

    parameters: int
    macs: int
    flops: int


def _per_input(each: int):
    return lambda shape, *args, out_shape=None, **kwargs: each * prod(shape)


def _per_output(each: int):
    return lambda *args, out_shape=None, **kwargs: each * prod(out_shape)


_aten = torch.ops.aten
_BATCH_NORMS = (_aten._native_batch_norm_legit_no_training, _aten.native_batch_norm)  # of newer and older PyTorch
_ADDED = {
    _aten.native_layer_norm: _per_input(5),
    **dict.fromkeys(_BATCH_NORMS, _per_input(2)),
    _aten.upsample_bilinear2d: _per_output(4),
}


@torch.no_grad()
def count(model: nn.Module, shape: Sequence[int]) -> Cost:
    """Counts what a forward in evaluation computes for one image; shapes are followed and nothing is computed.

    A level smaller than its window is padded and counts as it is computed. What such counters leave out is left out
    here: softmax, activations, additions, pooling.

    Args:
        model: On any device, also "meta". It is left as it is.
        shape: [in_chans, H, W] of the image, pixels.

    Source: the conventions of fvcore.nn.FlopCountAnalysis, by which the NAT and DiNAT papers count.
    """
    traced = copy.deepcopy(model).to("meta").eval()
    with FlopCounterMode(display=False, custom_mapping=_ADDED) as counter:
        # A detector chooses boxes by numbers, which are none here: it says what is run.
        getattr(traced, "forward_for_counting", traced)(torch.empty(1, *shape, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    added = sum(n for operation, n in counts.items() if operation in _ADDED)
    macs = (sum(counts.values()) - added) // 2
    return Cost(sum(p.numel() for p in model.parameters()), macs, macs + added)


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
