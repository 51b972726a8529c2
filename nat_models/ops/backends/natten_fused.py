"""NATTEN's fused kernels, for calls without rpb: NATTEN dropped the bias in its rewrite, version 0.20."""

import functools
import importlib.metadata
import importlib.util
import sys

import torch
from torch import Tensor

from ...errors import version_numbers
from ..request import Request

SUMMARY = "NATTEN's fused kernels, without rpb; CUDA"


def why_not(request: Request) -> str | None:
    """Why NATTEN cannot run a kind of call; None if it can."""
    device = request.device.type
    if request.rpb:
        return "NATTEN has no relative position bias"
    if request.dropout:
        return "NATTEN drops no attention weights"
    if request.transformed:
        return "NATTEN has neither forward mode nor batching rules"
    if 1 in request.kernel_size:
        return f"NATTEN takes a kernel_size of at least 2 on each axis, not {request.kernel_size}"
    if request.scale == 0.0:
        return "NATTEN takes a scale of 0.0 for none given"
    if device not in ("cpu", "cuda"):
        return f"NATTEN runs on CUDA and the CPU, not on {device}"
    if why := _why_not_installed(device, request.compiling):
        return why
    if request.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"NATTEN computes in float32, bfloat16 and float16, not in {request.dtype}"
    if device == "cuda":
        return (
            f"NATTEN's kernels take a head_dim divisible by 8, not {request.head_dim}" if request.head_dim % 8 else None
        )
    # On a CPU, NATTEN calls flex_attention, uncompiled.
    if request.requires_grad:
        return "NATTEN has no backward on the CPU"
    if request.head_dim not in (32, 64, 128, 256, 512):  # NATTEN 0.20; later versions take 8 and 16 too
        return f"on the CPU NATTEN takes a head_dim that is a power of two from 32 to 512, not {request.head_dim}"
    return None


@torch.compiler.assume_constant_result
def _why_not_installed(device: str, compiling: bool) -> str | None:
    if getattr(sys.modules.get("natten"), "is_nat_models", False):  # it would call this package back
        return "integrations.natten_legacy.install() put its own functions at natten"
    return _why_no_natten(device, compiling)


@functools.cache
def _why_no_natten(device: str, compiling: bool) -> str | None:
    if importlib.util.find_spec("natten") is None:
        return "the package natten is not installed"
    version = importlib.metadata.version("natten")
    number = version_numbers(version)
    if number < (0, 20):
        return f"natten {version} is installed, its kernels have this form from 0.20 on"
    if device == "cpu":
        return "torch.compile cannot trace what NATTEN does on a CPU" if compiling else None
    if compiling and number < (0, 21, 5):
        return f"natten {version} is installed, torch.compile can trace it from 0.21.5 on"
    if not torch.cuda.is_available():
        return "there is no cuda device here"
    try:
        import natten
    except (ImportError, OSError, RuntimeError) as error:
        return f"natten {version} cannot be imported: {error}"
    # Without its library NATTEN would call flex_attention here too, uncompiled.
    return None if natten.HAS_LIBNATTEN else f"natten {version} was built without its CUDA kernels"


# What NATTEN's backward computes has no history: a second derivative would take it for constant. Where one may follow,
# a node that refuses it ties the gradients to all that they depend on.
class _Refused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad_output, query, key, value, *grads):
        return tuple(x.view_as(x) for x in grads)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "NATTEN's backward has no derivative; use_backend('blocked') of nat_models.ops has every one."
        )


class _Inputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad_output, query, key, value):
        ctx.grad_output = grad_output
        ctx.save_for_backward(query, key, value)
        return tuple(x.view_as(x) for x in (query, key, value))

    @staticmethod
    def backward(ctx, *grads):
        grad_output = ctx.grad_output.pop()
        return None, *(_Refused.apply(grad_output, *ctx.saved_tensors, *grads) if torch.is_grad_enabled() else grads)


class _Output(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad_output, output):
        ctx.grad_output = grad_output
        return output.view_as(output)

    @staticmethod
    def backward(ctx, grad):
        ctx.grad_output.append(grad)
        return None, grad


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> Tensor:
    """Neighborhood attention of checked tensors [B, H, W, num_heads, head_dim]; see `nat_models.na2d`."""
    import natten

    attend = functools.partial(natten.na2d, kernel_size=kernel_size, dilation=dilation, scale=scale)
    if torch.compiler.is_compiling():  # compiled code refuses a second derivative by itself
        return attend(query, key, value).contiguous()
    grad_output: list[Tensor] = []
    output = attend(*_Inputs.apply(grad_output, query, key, value))
    return _Output.apply(grad_output, output).contiguous()
