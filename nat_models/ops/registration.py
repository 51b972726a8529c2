"""torch.ops.nat_models: the operators' schemas, fakes, autograd, kernels and FLOP formulas.

    na2d                     query, key and value apart
    na2d_qkvpacked           the views of a packed qkv [B, H, W, 3, num_heads, head_dim]; its gradient stays packed,
                             which saves the layer a copy
    na2d_qkvpacked_inference the same without gradients

The kernels are the backends `native` and `blocked`; `selection` says which.
"""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from .backends import BACKENDS, autocast_off
from .checks import check_apart, check_packed
from .request import Request
from .selection import select

_WINDOW = "int[2] kernel_size, int[2] dilation, float scale"
# The gradient of rpb has no elements where rpb is None: a schema returns no optional tensor.
_SCHEMAS = {
    "na2d": f"(Tensor query, Tensor key, Tensor value, Tensor? rpb, {_WINDOW}) -> Tensor",
    "na2d_backward": f"(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? rpb, {_WINDOW})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "na2d_qkvpacked": f"(Tensor qkv, Tensor? rpb, {_WINDOW}) -> Tensor",
    "na2d_qkvpacked_backward": f"(Tensor grad_output, Tensor qkv, Tensor? rpb, {_WINDOW}) -> (Tensor, Tensor)",
    # No derivative: a formula would route every call through Python. The types are those that a C function takes:
    # backends/native.py registers the kernel when it loads the library, and from then on a call in a network reaches it
    # without Python.
    "na2d_qkvpacked_inference": "(Tensor qkv, Tensor rpb, int kernel_height, int kernel_width, int dilation_height,"
    " int dilation_width, float scale) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"nat_models::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)


# No address space holds more. An expanded tensor can claim it, and a plan for it would fill the memory first.
_MAX_ELEMENTS = 1 << 48


def _kernel(query: Tensor, scale: float, stage: str):
    """The backend that runs inside the operator."""
    elements = query.numel()
    if elements > _MAX_ELEMENTS:
        raise ValueError(f"The result would have {tuple(query.shape)} elements, more than any memory holds.")
    request = Request(query.device, query.dtype, query.shape[-1], scale, empty=elements == 0, stage=stage)
    return BACKENDS[select(request)]


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rpb_gradient(rpb: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if rpb is None else _empty(rpb)


def _forward(query, key, value, rpb, kernel_size, dilation, scale):
    kernel = _kernel(query, scale, "operator")
    with autocast_off(query):
        return kernel.na2d(query, key, value, rpb, kernel_size, dilation, scale)


def _backward(grads, grad_output, query, key, value, rpb, kernel_size, dilation, scale):
    kernel = _kernel(query, scale, "backward")
    args = (grad_output, query, key, value, rpb, kernel_size, dilation, scale, grads)
    # Only a direct call comes with gradients on.
    with torch.no_grad() if torch.is_grad_enabled() else nullcontext(), autocast_off(query):
        rpb_grad = kernel.na2d_backward(*args)
    return _rpb_gradient(None, query) if rpb is None else rpb_grad


# Anyone can call an operator, with anything: kernels and fakes check what they are given.
@torch.library.impl("nat_models::na2d", "CompositeExplicitAutograd")
def _na2d(query, key, value, rpb, kernel_size, dilation, scale):
    window = check_apart(query, key, value, rpb, kernel_size, dilation)
    return _forward(query, key, value, rpb, *window, scale)


@torch.library.impl("nat_models::na2d_backward", "CompositeExplicitAutograd")
def _na2d_backward(grad_output, query, key, value, rpb, kernel_size, dilation, scale):
    window = check_apart(query, key, value, rpb, kernel_size, dilation, grad_output)
    grads = [_empty(x) for x in (query, key, value)]
    return *grads, _backward(grads, grad_output, query, key, value, rpb, *window, scale)


def _forward_packed(qkv, rpb, kernel_size, dilation, scale):
    window = check_packed(qkv, rpb, kernel_size, dilation)
    return _forward(*qkv.unbind(3), rpb, *window, scale)


@torch.library.impl("nat_models::na2d_qkvpacked", "CompositeExplicitAutograd")
def _na2d_qkvpacked(*args):
    return _forward_packed(*args)


@torch.library.impl("nat_models::na2d_qkvpacked_inference", "CompositeExplicitAutograd")
def _na2d_qkvpacked_inference(qkv, rpb, kernel_height, kernel_width, dilation_height, dilation_width, scale):
    return _forward_packed(qkv, rpb, (kernel_height, kernel_width), (dilation_height, dilation_width), scale)


@torch.library.impl("nat_models::na2d_qkvpacked_backward", "CompositeExplicitAutograd")
def _na2d_qkvpacked_backward(grad_output, qkv, rpb, kernel_size, dilation, scale):
    window = check_packed(qkv, rpb, kernel_size, dilation, grad_output)
    grad = _empty(qkv)
    return grad, _backward(grad.unbind(3), grad_output, *qkv.unbind(3), rpb, *window, scale)


# Without this, PyTorch would give zeros for the derivatives of a direct call, after a warning or none. `functional`
# passes it by, for it costs a call through Python.
@torch.library.impl("nat_models::na2d_qkvpacked_inference", "Autograd")
def _na2d_qkvpacked_inference_has_no_derivative(qkv, rpb, *window):
    tensors = [x for x in (qkv, rpb) if x is not None]  # the kernel says what it takes
    if (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)) or _has_tangent(*tensors):
        raise RuntimeError(
            "na2d_qkvpacked_inference has no derivative: call nat_models.ops.na2d_qkvpacked, which has, or call under"
            " torch.no_grad() and without forward-mode tangents."
        )
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.nat_models.na2d_qkvpacked_inference.default(qkv, rpb, *window)


def _has_tangent(*tensors: Tensor) -> bool:
    if forward_ad._current_level < 0:  # no forward-mode differentiation goes on
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


@torch.library.register_fake("nat_models::na2d")
def _na2d_fake(query, key, value, rpb, kernel_size, dilation, scale):
    check_apart(query, key, value, rpb, kernel_size, dilation)
    return _empty(query)


@torch.library.register_fake("nat_models::na2d_backward")
def _na2d_backward_fake(grad_output, query, key, value, rpb, kernel_size, dilation, scale):
    check_apart(query, key, value, rpb, kernel_size, dilation, grad_output)
    return _empty(query), _empty(key), _empty(value), _rpb_gradient(rpb, query)


@torch.library.register_fake("nat_models::na2d_qkvpacked")
def _na2d_qkvpacked_fake(qkv, rpb, kernel_size, dilation, scale):
    check_packed(qkv, rpb, kernel_size, dilation)
    return _empty(qkv.select(3, 0))


@torch.library.register_fake("nat_models::na2d_qkvpacked_inference")
def _na2d_qkvpacked_inference_fake(qkv, rpb, kernel_height, kernel_width, dilation_height, dilation_width, scale):
    return _na2d_qkvpacked_fake(qkv, rpb, (kernel_height, kernel_width), (dilation_height, dilation_width), scale)


@torch.library.register_fake("nat_models::na2d_qkvpacked_backward")
def _na2d_qkvpacked_backward_fake(grad_output, qkv, rpb, kernel_size, dilation, scale):
    check_packed(qkv, rpb, kernel_size, dilation, grad_output)
    return _empty(qkv), _rpb_gradient(rpb, qkv)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.kernel_size, ctx.dilation, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def _autograd_of(backward_name: str):
    def backward(ctx, grad_output):
        tensors = ctx.saved_tensors  # once: checkpointing hands them out a single time
        op = getattr(torch.ops.nat_models, backward_name)
        *grads, rpb_grad = op(grad_output, *tensors, ctx.kernel_size, ctx.dilation, ctx.scale)
        return *grads, None if tensors[-1] is None else rpb_grad, None, None, None

    return backward


for _name in ("na2d", "na2d_qkvpacked"):
    torch.library.register_autograd(
        f"nat_models::{_name}", _autograd_of(f"{_name}_backward"), setup_context=_setup_context
    )


def pair_flops(shape: Sequence[int], kernel_size: Sequence[int]) -> int:
    """FLOPs of one product over all query-key pairs, a multiply and an add each."""
    batch, height, width, num_heads, head_dim = shape
    return 2 * batch * height * width * num_heads * kernel_size[0] * kernel_size[1] * head_dim


def heads_shape(packed: Sequence[int]) -> list[int]:
    """[B, H, W, 3, num_heads, head_dim] -> [B, H, W, num_heads, head_dim]."""
    return [*packed[:3], *packed[4:]]


@register_flop_formula(torch.ops.nat_models.na2d)
def _na2d_flops(query_shape, key_shape, value_shape, rpb_shape, kernel_size, *args, **kwargs) -> int:
    return 2 * pair_flops(query_shape, kernel_size)  # QK^T and PV


@register_flop_formula(torch.ops.nat_models.na2d_backward)
def _na2d_backward_flops(grad_shape, query_shape, key_shape, value_shape, rpb_shape, kernel_size, *a, **kw) -> int:
    return 5 * pair_flops(query_shape, kernel_size)  # QK^T again, then dV, dP, dQ, dK


@register_flop_formula(torch.ops.nat_models.na2d_qkvpacked)
def _na2d_qkvpacked_flops(qkv_shape, rpb_shape, kernel_size, *args, **kwargs) -> int:
    return 2 * pair_flops(heads_shape(qkv_shape), kernel_size)


@register_flop_formula(torch.ops.nat_models.na2d_qkvpacked_inference)
def _na2d_qkvpacked_inference_flops(qkv_shape, rpb_shape, kernel_height, kernel_width, *args, **kwargs) -> int:
    return 2 * pair_flops(heads_shape(qkv_shape), (kernel_height, kernel_width))


@register_flop_formula(torch.ops.nat_models.na2d_qkvpacked_backward)
def _na2d_qkvpacked_backward_flops(grad_shape, qkv_shape, rpb_shape, kernel_size, *args, **kwargs) -> int:
    return 5 * pair_flops(heads_shape(qkv_shape), kernel_size)
