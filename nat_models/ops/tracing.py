"""Whether torch.export traces a call: torch.compiler.is_exporting as it is from PyTorch 2.12 on, for every version."""

import torch

_NEW = torch.__version__ >= "2.12"  # a TorchVersion, which compares by number


def is_exporting() -> bool:
    """Whether torch.export, not torch.compile, traces this call.

    Before 2.12 torch.compiler.is_exporting is true under torch.compile too (pytorch/pytorch#176499); 2.6 has none.
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
