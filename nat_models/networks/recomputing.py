"""Activations that autograd would keep for backward, and that are cheap to compute again from what it keeps anyway."""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops.tracing import is_transformed

# PyTorch before 2.7 does not tell whether hooks are there.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def recomputing_gelu(x: Tensor, hidden: Tensor) -> AbstractContextManager:
    """In which `x`, wherever it is kept for backward, is not kept but computed from `hidden` when it is asked for.

    Where `x` is not GELU of `hidden`, nothing changes; nor where others decide what is kept: in checkpointing and
    offloading, compilers, traces and transforms of torch.func.

    Args:
        x: GELU of `hidden`.
        hidden: What GELU's own backward keeps.
    """
    if torch.compiler.is_compiling() or not _is_gelu(x, hidden) or torch.jit.is_tracing() or is_transformed():
        return nullcontext()
    if _top_hooks is None or _top_hooks(True) is not None:
        return nullcontext()
    address, size, dtype = x.data_ptr(), x.numel(), x.dtype
    hidden, approximate = hidden.detach(), x.grad_fn._saved_approximate

    def pack(kept: Tensor) -> Tensor | torch.Size:
        is_x = kept.data_ptr() == address and kept.numel() == size and kept.dtype == dtype and kept.is_contiguous()
        return kept.shape if is_x else kept

    def unpack(packed: Tensor | torch.Size) -> Tensor:
        return packed if isinstance(packed, Tensor) else F.gelu(hidden, approximate=approximate).reshape(packed)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _is_gelu(x: Tensor, hidden: Tensor) -> bool:
    """Whether autograd, being on, recorded that x is GELU of `hidden`."""
    if type(x) is not Tensor or not torch.is_grad_enabled() or x.grad_fn is None:
        return False
    return x.grad_fn.name() == "GeluBackward0" and x.grad_fn.next_functions[0][0] is hidden.grad_fn
