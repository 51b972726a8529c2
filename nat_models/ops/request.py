"""One kind of call of na2d, without its tensors: what the choice of a backend depends on."""

from typing import NamedTuple

import torch


class Request(NamedTuple):
    """What a backend's limits are asked about, before anything runs."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    scale: float
    kernel_size: tuple[int, int] = (7, 7)
    rpb: bool = True
    requires_grad: bool = False  # of query, key, value or rpb
    dropout: bool = False  # attention weights are dropped
    compiling: bool = False  # torch.compile or torch.export traces the call
    exporting: bool = False  # torch.export does, or torch.jit.trace for an exporter to ONNX or OpenVINO
    transformed: bool = False  # torch.func or forward-mode differentiation works on it
    traced: bool = False  # torch.jit.trace looks on
    observed: bool = False  # torch.jit.trace or a TorchDispatchMode looks on and must see one operator
    empty: bool = False  # no elements or no data: nothing to compute, the operator knows the result's shape
    stage: str = "call"  # "operator" inside torch.ops.nat_models, "backward" inside its backward
