"""The operator's cost for fvcore: FlopCountAnalysis(model, image).set_op_handle(**fvcore_handles).

PyTorch's own FlopCounterMode needs nothing: it knows the formulas registered with the operator.
"""

from .ops.registration import heads_shape, pair_flops

__all__ = ["fvcore_handles"]


def _fvcore_handle(shape_of):
    def handle(inputs: list, outputs: list) -> int:
        """Operations of one call in a torch.jit graph; fvcore counts a multiply and an add as one."""
        kernel_size = [x.toIValue() for x in inputs[-3].node().inputs()]
        return pair_flops(shape_of(inputs[0].type().sizes()), kernel_size)  # QK^T and PV, 2 FLOPs per operation

    return handle


fvcore_handles = {"nat_models::na2d": _fvcore_handle(list), "nat_models::na2d_qkvpacked": _fvcore_handle(heads_shape)}
