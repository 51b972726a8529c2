"""The backends of na2d: an ordered table of modules.

Each module has SUMMARY, `why_not(request)` (why it cannot run a kind of call, None if it can) and `na2d(query, key,
value, rpb, kernel_size, dilation, scale)` for checked tensors, with `dropout_p` where it can drop attention weights.
Those in KERNELS also have `na2d_backward` and run inside the operator torch.ops.nat_models.na2d; the others bring an
autograd of their own and are called instead of the operator, so that torch.compile sees into them.
"""

from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

import torch
from torch import Tensor

from . import blocked, exportable, flex, native, natten_fused, reference

BACKENDS: dict[str, ModuleType] = {
    "native": native,
    "natten_fused": natten_fused,
    "flex": flex,
    "blocked": blocked,
    "exportable": exportable,
    "reference": reference,
}
KERNELS = ("native", "blocked")


@torch.compiler.assume_constant_result  # before PyTorch 2.12 Dynamo cannot trace it
def _autocast_available(device_type: str) -> bool:
    return torch.amp.is_autocast_available(device_type)


def autocast_enabled(x: Tensor) -> bool:
    return _autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def autocast_off(x: Tensor) -> AbstractContextManager:
    """Inside a backend dtypes are settled: an autocast left on would round the mask to its dtype."""
    return torch.autocast(x.device.type, enabled=False) if autocast_enabled(x) else nullcontext()
