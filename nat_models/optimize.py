"""The fastest form of a network in PyTorch, for inference alone, by one call."""

import copy
import time

import torch
from torch import Tensor, nn

from .errors import UserError
from .fuse import fuse
from .networks.blocks import NATBlock

_DTYPES = (torch.float32, torch.bfloat16)


class Optimized(nn.Module):
    """What `optimize` returns: a callable with the outputs of the model it was made of, for inference alone.

    Its weights are constants of compiled code: it has no parameters and no state dict, and cannot be trained, moved or
    cast.

    Attributes:
        report: What was done, in a line.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        from .export import LowPrecision  # with torch.export, which `import nat_models` does without

        super().__init__()
        compiled = torch.compile(LowPrecision(network, dtype), fullgraph=True)
        self._run = lambda image: compiled(image)  # a module in an attribute would be a child, with parameters
        self._seen: set[tuple] = set()
        self.report = ""
        self.training = False

    @torch.no_grad()
    def forward(self, image: Tensor) -> Tensor:
        """What the model gives for `image` [B, C, H, W], in float32; a shape that is new may compile.

        Raises:
            ValueError: A gradient of the image is wanted.
        """
        if image.requires_grad:
            raise ValueError("an optimised model is for inference alone: image.requires_grad must be False.")
        key = (image.shape, image.stride(), image.dtype, image.device)
        if key in self._seen:
            return self._run(image)
        # Read while a graph is compiled: among the options of torch.compile it comes too late and does nothing.
        with torch._inductor.config.patch(freezing=True):
            output = self._run(image)
        self._seen.add(key)
        return output

    def train(self, mode: bool = True) -> "Optimized":
        """Raises a ValueError for True."""
        if mode:
            raise ValueError("an optimised model is for inference alone: train the model it was made of.")
        return self

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        raise ValueError("an optimised model stays on its device and in its dtype: optimise the model again.")


def optimize(model: nn.Module, example: Tensor, *, dtype: torch.dtype | None = None) -> Optimized:
    """The model fused, with its weights packed by Inductor's freezing, compiled, and warmed up on the example.

    Compiling takes half a minute or so. Another shape of image compiles once more when it is first seen; the second
    batch size makes the batch a symbol, and those after it do not compile. No setting of PyTorch is left changed.

    Args:
        model: A NAT, or any module that maps one image tensor to tensors; left as it is. Of a module without NAT
            blocks nothing is fused.
        example: [B, C, H, W] in float32, of the shape that is used most; where it lies, the result computes.
        dtype: Of the weights and the computation: None or float32, or bfloat16, which rounds to 8 bits in every layer
            (cosine of logits 0.9999 or so with those of float32). Input and output are float32 all the same.

    Raises:
        ValueError: The example is no float32 tensor [B, C, H, W], or the dtype is another one.
        UserError: There is no C++ compiler, which PyTorch's compiler needs on a CPU.
    """
    if not isinstance(example, Tensor) or example.ndim != 4 or example.dtype != torch.float32:
        got = f"{example.dtype} {[*example.shape]}" if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"example must be a float32 tensor [B, C, H, W], got {got}.")
    dtype = torch.float32 if dtype is None else dtype
    if dtype not in _DTYPES:
        raise ValueError(f"dtype must be None, torch.float32 or torch.bfloat16, got {dtype}.")
    if example.device.type == "cpu":
        _require_compiler()
    started = time.perf_counter()
    blocks = sum(isinstance(module, NATBlock) for module in model.modules())
    network = fuse(model, freezing=True) if blocks else copy.deepcopy(model).eval()
    optimized = Optimized(network.to(example.device), dtype)
    for _ in range(2):  # the first one compiles
        optimized(example)
    name, seconds = str(dtype).removeprefix("torch."), time.perf_counter() - started
    optimized.report = (
        f"{blocks} blocks fused, weights frozen, compiled for {[*example.shape]} in {name}, {seconds:.0f} s"
    )
    return optimized


def _require_compiler() -> None:
    """Raises a UserError where PyTorch finds no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        raise UserError(
            "optimize needs a C++ compiler, and PyTorch found none: install one (`apt install g++`, "
            "`xcode-select --install`) or name it in the environment variable CXX."
        ) from None
