"""What the limits of a backend depend on."""

from typing import NamedTuple

import torch


class Call(NamedTuple):
    """One kind of call of na2d, described without its tensors, so that limits can be asked about beforehand."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    scale: float
    rpb: bool
    requires_grad: bool  # of query, key, value or rpb
    compiling: bool  # torch.compile traces the call
