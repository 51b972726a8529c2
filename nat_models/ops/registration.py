"""torch.ops.nat_models: the operators' schemas, fakes, autograd, kernels and FLOP formulas.

    na2d                     query, key and value apart
    na2d_qkvpacked           the views of a packed qkv [B, H, W, 3, num_heads, head_dim]; its gradient stays packed,
                             which saves the layer a copy
    na2d_qkvpacked_inference the same without gradients

The kernels are the backends `native` and `blocked`; `selection` says which. They compute the operator and its first
derivatives. Above those (double backward, forward mode, torch.func's transforms) the operator is the plain operations
of `exportable`, which PyTorch differentiates and batches to any order.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from .backends import BACKENDS, autocast_off, exportable
from .checks import check_apart, check_packed
from .request import Request
from .selection import select
from .tracing import is_transformed

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


def _plain(query, key, value, rpb, kernel_size, dilation, scale):
    """na2d in plain operations, in place of a kernel."""
    window = check_apart(query, key, value, rpb, kernel_size, dilation)
    if query.numel() == 0:
        return _empty(query)
    with autocast_off(query):
        return exportable.na2d(query, key, value, rpb, *window, scale)


def _plain_backward(grad_output, query, key, value, rpb, kernel_size, dilation, scale):
    window = check_apart(query, key, value, rpb, kernel_size, dilation, grad_output)
    if query.numel() == 0:
        return *map(_empty, (query, key, value)), _rpb_gradient(None, query) if rpb is None else torch.zeros_like(rpb)
    with autocast_off(query):
        *grads, rpb_grad = exportable.na2d_gradients(grad_output, query, key, value, rpb, *window, scale)
    return *grads, _rpb_gradient(None, query) if rpb is None else rpb_grad


def _plain_qkvpacked(qkv, rpb, kernel_size, dilation, scale):
    check_packed(qkv, rpb, kernel_size, dilation)
    return _plain(*qkv.unbind(3), rpb, kernel_size, dilation, scale)


def _plain_qkvpacked_backward(grad_output, qkv, rpb, kernel_size, dilation, scale):
    check_packed(qkv, rpb, kernel_size, dilation, grad_output)
    *grads, rpb_grad = _plain_backward(grad_output, *qkv.unbind(3), rpb, kernel_size, dilation, scale)
    return torch.stack(grads, 3), rpb_grad


class _Differentiable(torch.autograd.Function):
    """A kernel's value, whose derivative is another operator or that of plain operations."""

    @staticmethod
    def forward(ctx, operator: "_Operator", keyset, *args):
        ctx.operator, ctx.window = operator, args[-3:]
        ctx.save_for_backward(*args[:-3])
        return operator.below_autograd(keyset, *args)

    @staticmethod
    def backward(ctx, *grads):
        tensors = ctx.saved_tensors  # once: checkpointing hands them out a single time
        wanted = ctx.needs_input_grad[2 : 2 + len(tensors)]
        return None, None, *ctx.operator.derivative(grads, tensors, ctx.window, wanted), None, None, None


class _Operator:
    """What an operator does at the keys above its kernel.

    Args:
        name: Of the operator.
        plain: The same in plain operations.
        backward: The operator that computes its gradients; None where `plain` is differentiated for them.
    """

    def __init__(self, name: str, plain: Callable, backward: str | None) -> None:
        self.name, self.plain, self.backward = name, plain, backward
        self.op = getattr(torch.ops.nat_models, name).default

    def register(self, library: torch.library.Library) -> None:
        library.impl(self.name, self._autograd, "Autograd", with_keyset=True)
        library.impl(self.name, self.plain, "FuncTorchBatched")

    def _autograd(self, keyset, *args):
        if is_transformed():
            return self.plain(*args)
        if torch.is_grad_enabled() and any(x.requires_grad for x in args[:-3] if x is not None):
            return _Differentiable.apply(self, keyset, *args)
        return self.below_autograd(keyset, *args)

    def below_autograd(self, keyset, *args):
        with torch._C._AutoDispatchBelowAutograd():
            return self.op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    def derivative(self, grads, tensors, window, wanted):
        """The gradients of `tensors`, None for those not wanted."""
        if self.backward is None:
            return self._derivative_of_plain(grads, tensors, window, wanted)
        *found, rpb_grad = getattr(torch.ops.nat_models, self.backward)(*grads, *tensors, *window)
        return *found, None if tensors[-1] is None else rpb_grad

    def _derivative_of_plain(self, grads, tensors, window, wanted):
        with torch.enable_grad():
            # Views, because one tensor may stand in several places.
            inputs = [x if x is None or not want else x.view_as(x) for x, want in zip(tensors, wanted, strict=True)]
            outputs = self.plain(*inputs, *window)
        used = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if output.requires_grad]
        sought = [x for x, want in zip(inputs, wanted, strict=True) if want]
        if not used:  # an empty map
            return [None] * len(tensors)
        outputs, grads = zip(*used, strict=True)
        found = iter(
            torch.autograd.grad(outputs, sought, grads, create_graph=torch.is_grad_enabled(), allow_unused=True)
        )
        return [next(found) if want else None for want in wanted]


_LIBRARY = torch.library.Library("nat_models", "FRAGMENT")
for _operator in (
    _Operator("na2d", _plain, "na2d_backward"),
    _Operator("na2d_qkvpacked", _plain_qkvpacked, "na2d_qkvpacked_backward"),
    _Operator("na2d_backward", _plain_backward, None),
    _Operator("na2d_qkvpacked_backward", _plain_qkvpacked_backward, None),
):
    _operator.register(_LIBRARY)


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
