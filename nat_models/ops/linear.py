"""Linear layers on CPUs through one operation of oneDNN, the one that Inductor uses.

For float32 PyTorch calls MKL, which is slower on the CPU measured; for bfloat16 it calls oneDNN, after a copy of the
bias to every row. And what follows a layer is another pass over the map, where oneDNN takes it along.
"""

import functools
import platform
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .backends import autocast_enabled
from .tracing import is_observed, is_plain


def linear(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`: the same function, its numbers by rounding, its first derivatives in less time.

    What is not a plain nn.Linear, has hooks, computes elsewhere, in another dtype or without gradients, or is watched
    by a compiler, a tracer, a dispatch mode, a transform of torch.func or autocast, is called as a module.

    Args:
        layer: Most often an nn.Linear.
        x: [..., in_features].
    """
    if not torch.is_grad_enabled() or is_observed() or not is_plain(layer, nn.Linear) or not supports(x):
        return layer(x)
    weight, bias = layer.weight, layer.bias
    if not match(x, (weight,) if bias is None else (weight, bias)) or x.shape[-1] != weight.shape[1]:
        return layer(x)
    if autocast_enabled(x) or weight.numel() == 0:  # autocast keeps the weights that it has cast
        return layer(x)
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    """x [..., in_features], weight [out_features, in_features], bias [out_features] or None -> [..., out_features]."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        grad = grad.contiguous()
        rows, grads = x.reshape(-1, x.shape[-1]), grad.view(-1, grad.shape[-1])
        x_grad = weight_grad = None
        if for_x:
            # With create_graph the gradient needs a derivative itself.
            x_grad = grad @ weight if torch.is_grad_enabled() else product(grad, weight.t())
        if for_weight:
            # MKL is faster where the rows of a product are the longer side.
            wide = weight.shape[0] >= weight.shape[1]
            weight_grad = grads.t() @ rows if wide else (rows.t() @ grads).t()
        return x_grad, weight_grad, grads.sum(0) if for_bias else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gelu: str | None = None) -> Tensor:
    """x [..., in_features] @ weight.T + bias -> [..., out_features], without a derivative.

    Args:
        x: What `supports` takes.
        weight: [out_features, in_features], of x's dtype.
        bias: [out_features].
        gelu: Of the result, GELU: "none" or "tanh", how it is approximated.
    """
    after = ("none", [], "") if gelu is None else ("gelu", [], gelu)
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, *after)


def add_product(residual: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """residual [..., out_features] + product(x, weight, bias)."""
    return torch.ops.mkldnn._linear_pointwise.binary(x, residual, weight, bias, "add")


def supports(x: Tensor) -> bool:
    """Whether x is a tensor that the operation takes, on this CPU and with this PyTorch."""
    return type(x) is Tensor and x.is_cpu and torch._C._get_mkldnn_enabled() and _has_dtype(x.dtype) and x.numel() > 0


def match(x: Tensor, parameters: Iterable[Tensor]) -> bool:
    """Whether parameters are tensors of x's dtype on the CPU, and not quantised or sharded ones."""
    dtype = x.dtype
    return all(type(p) in (nn.Parameter, Tensor) and p.dtype == dtype and p.is_cpu for p in parameters)


@functools.cache
def _has_dtype(dtype: torch.dtype) -> bool:
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False  # nobody has measured it on other processors
    if dtype not in (torch.float32, torch.bfloat16):
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()
