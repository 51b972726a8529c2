"""Who looks on while a call runs: exporters, transforms of torch.func, forward-mode differentiation, modes, hooks."""

import sys

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _of_all_modules

_NEW = torch.__version__ >= "2.12"  # a TorchVersion, which compares by number

# What the register_module_*_hook functions fill, in PyTorch 2.6 too.
_GLOBAL_HOOKS = (
    _of_all_modules._global_forward_hooks,
    _of_all_modules._global_forward_pre_hooks,
    _of_all_modules._global_backward_hooks,
    _of_all_modules._global_backward_pre_hooks,
)


def is_exporting() -> bool:
    """Whether torch.export, not torch.compile, traces this call: torch.compiler.is_exporting as it is from 2.12 on.

    Before it torch.compiler.is_exporting is true under torch.compile too (pytorch/pytorch#176499); 2.6 has none.
    """
    if not _NEW and torch.compiler.is_dynamo_compiling():
        return _dynamo_exports()
    if hasattr(torch.compiler, "is_exporting"):
        return torch.compiler.is_exporting()
    return torch.compiler.is_compiling()  # without Dynamo, only torch.export sets it


@torch.compiler.assume_constant_result  # so Dynamo runs it, while it traces
def _dynamo_exports() -> bool:
    from torch._dynamo.symbolic_convert import InstructionTranslator

    return InstructionTranslator.current_tx().export


@torch.compiler.assume_constant_result  # Dynamo enters the transforms that it traces, and guards on those around it
def is_transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp) or a forward-mode dual level surrounds this call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def is_converting() -> bool:
    """Whether a torch.jit.trace is for a converter that knows PyTorch's operators alone: torch.onnx's or OpenVINO's."""
    return torch.onnx.is_in_onnx_export() or _openvino_traces()


def _openvino_traces() -> bool:
    """Whether OpenVINO's decoder is among the callers; it leaves no other sign, and is asked during traces only."""
    if "openvino" not in sys.modules:
        return False
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals.get("__name__", "").startswith("openvino.frontend.pytorch."):
            return True
        frame = frame.f_back
    return False


def is_observed() -> bool:
    """Whether a compiler, a tracer, a dispatch mode (a FLOP counter) or a transform is to see PyTorch's operators."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch._C._len_torch_dispatch_stack() > 0 or is_transformed() or any(_GLOBAL_HOOKS)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a call of the module computes what its class says, and nothing else happens."""
    if type(module) is not kind:
        return False
    own = module.__dict__
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return not hooks and "forward" not in own
