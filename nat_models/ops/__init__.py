"""na2d, 2-D neighborhood attention: the operator, its registration with PyTorch and the choice of backend.

The kernels of the operator torch.ops.nat_models.na2d are `native` and `blocked`. The other backends bring an autograd
of their own and are called before it, so that torch.compile sees into them.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from . import blocked, cpu, flex, natten, reference, traced
from .call import Call
from .window import window_pair

__all__ = ["BACKENDS", "explain", "fvcore_handles", "na2d", "na2d_packed", "use_backend"]

BACKENDS = {
    "native": "the C++ kernel, forward and backward; CPU",
    "natten": "NATTEN's fused kernels, without rpb; CUDA",
    "flex": "flex_attention with rpb as its score_mod, compiled; CUDA and XPU",
    "blocked": "tiles of queries against their halo through scaled_dot_product_attention; any device",
    "traced": "blocked in operations that know no size; what torch.export writes down",
    "reference": "every key gathered, in plain autograd; slow, the meaning of the operator",
}

# In order of preference. natten and flex run on a CPU too, for tests: slowly and without gradients.
_AUTOMATIC = {"cpu": ("native", "blocked")}
_AUTOMATIC_ELSEWHERE = ("natten", "flex", "blocked")
_OUTSIDE = {"natten": natten, "flex": flex, "traced": traced, "reference": reference}

_requested: str | None = os.environ.get("NAT_MODELS_BACKEND") or None


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Runs na2d on one backend inside a `with` block, in every thread of the process; None means automatic choice.

    The environment variable NAT_MODELS_BACKEND sets the same for a whole process.

    Raises:
        ValueError: No backend has that name.
    """
    global _requested
    if name is not None:
        _check_backend(name)
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def _check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"The backend asked for, {name!r}, does not exist; known are {', '.join(BACKENDS)}.")


def _why_not(name: str, call: Call) -> str | None:
    """Why a backend cannot run a kind of call; None if it can."""
    if name in ("natten", "flex"):
        return _OUTSIDE[name].why_not(call)
    return _why_not_native(call.device) if name == "native" else None


def _why_not_native(device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"it runs on the CPU, not on {device.type}"
    available, reason = cpu.available()
    return None if available else reason


def _automatic(device: torch.device) -> tuple[str, ...]:
    return _AUTOMATIC.get(device.type, _AUTOMATIC_ELSEWHERE)


def _backend(call: Call) -> str:
    if _requested is None:
        return next(name for name in _automatic(call.device) if _why_not(name, call) is None)
    _check_backend(_requested)
    if why := _why_not(_requested, call):
        raise _refusal(why)
    return _requested


def _refusal(why: str) -> RuntimeError:
    return RuntimeError(f"The backend {_requested!r} was asked for and cannot run: {why}.")


def explain(
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    rpb: bool = True,
    requires_grad: bool = False,
    compiling: bool = False,
    head_dim: int = 32,
    scale: float | None = None,
) -> str:
    """What na2d would run on, what the other backends are, and why those that cannot run cannot.

    `python -m nat_models` prints it. Nothing runs: limits are asked about beforehand, here as in na2d. Two things are
    left out. Under torch.export the automatic choice is traced. In torch.jit.trace and under a TorchDispatchMode such
    as FlopCounterMode it is among native and blocked, so that what looks on sees the operator as one node.

    Args:
        device: Where query, key and value are.
        dtype: Of query, key and value.
        rpb: Whether there is a relative position bias.
        requires_grad: Whether a gradient is wanted, of rpb or any other input.
        compiling: Whether the call is traced by torch.compile.
        head_dim: Channels of a head.
        scale: As in na2d.
    """
    scale = head_dim**-0.5 if scale is None else scale
    call = Call(torch.device(device), dtype, head_dim, scale, rpb, requires_grad, compiling)
    reasons = {name: _why_not(name, call) for name in BACKENDS}
    order = _automatic(call.device)
    chosen = _requested or next(name for name in order if reasons[name] is None)
    _check_backend(chosen)
    if _requested is None:
        origin = f"chosen automatically, the first that can of {', '.join(order)}"
    else:
        origin = "asked for by NAT_MODELS_BACKEND or use_backend"
    kind = [str(dtype).removeprefix("torch."), "with rpb" if rpb else "without rpb"]
    kind += ["with gradient"] * requires_grad + ["under torch.compile"] * compiling
    verb = "runs on" if reasons[chosen] is None else "raises an error on"
    lines = [f"On {call.device} ({', '.join(kind)}), na2d {verb} {chosen}, {origin}."]
    for name, what in BACKENDS.items():
        lines.append(f"  {'*' if name == chosen else ' '} {name:10} {what}")
        if reasons[name] is not None:
            lines.append(f"{'':14} cannot run: {reasons[name]}")
        elif name == "native":
            lines.append(f"{'':14} instruction set and threads: {cpu.available()[1]}")
    return "\n".join(lines)


def _outside(inputs: Sequence[Tensor], rpb: bool, scale: float):
    """The module of the backend that a call runs on; None for the operator, whose kernels are native and blocked."""
    if _requested is None and torch.compiler.is_exporting():
        return traced  # an exported graph must run without this package
    query = inputs[0]  # or a packed qkv
    if query.device.type in ("cpu", "meta") and _requested in (None, "native", "blocked"):
        return None
    compiling = torch.compiler.is_compiling()
    # Nothing to compute: the operator makes the empty result, or the fake one.
    if query.numel() == 0 or query.device.type == "meta" or (not compiling and isinstance(query, FakeTensor)):
        return None
    # What looks on sees one node; explain tells.
    if _requested is None and not compiling and (torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack()):
        return None
    requires_grad = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    call = Call(query.device, query.dtype, query.shape[-1], scale, rpb, requires_grad, compiling)
    return _OUTSIDE.get(_backend(call))


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """2-D neighborhood attention: every token attends to its K_h x K_w nearest tokens.

    At a border the window is shifted inward, never cut, so each query has exactly K_h * K_w keys. Under autocast,
    query, key and value are cast to its dtype and rpb is not: the bias is added to logits kept in float32 or wider.

    Args:
        query: [B, H, W, num_heads, head_dim]; may be a view into a packed qkv.
        key: Shape, dtype and device of query.
        value: Shape, dtype and device of query.
        kernel_size: Odd, at least 3; an int serves both axes.
        dilation: At least 1; kernel_size * dilation must fit in (H, W). Nothing is padded here.
        rpb: [num_heads, 2*K_h-1, 2*K_w-1], added to the scaled logits; its centre is offset (0, 0). query's dtype or
            float32.
        scale: Multiplies the logits; None means head_dim ** -0.5, and 0.0 is honoured.

    Returns:
        [B, H, W, num_heads, head_dim], contiguous, query's dtype.

    Raises:
        ValueError: Shapes, dtypes or devices differ; kernel_size even; window larger than the map.
        RuntimeError: The backend that was asked for cannot run here; the message says why.

    Source: Hassani et al., CVPR 2023, arXiv:2204.07143, section 3; dilation arXiv:2209.15001.
    """
    query, key, value = map(_autocast, (query, key, value))
    if query.ndim != 5:
        raise ValueError(f"query must be [B, H, W, num_heads, head_dim], got shape {tuple(query.shape)}.")
    for name, x in (("key", key), ("value", value)):
        if (x.shape, x.dtype, x.device) != (query.shape, query.dtype, query.device):
            raise ValueError(
                f"{name} must match query in shape, dtype and device, got {name} {tuple(x.shape)} {x.dtype} "
                f"on {x.device} and query {tuple(query.shape)} {query.dtype} on {query.device}."
            )
    window = _window("query", query, rpb, kernel_size, dilation, scale)
    inputs = (query, key, value) if rpb is None else (query, key, value, rpb)
    if backend := _outside(inputs, rpb is not None, window[-1]):
        with _autocast_off(query):
            return backend.na2d(query, key, value, rpb, *window)
    return torch.ops.nat_models.na2d.default(query, key, value, rpb, *window)


def na2d_packed(
    qkv: Tensor,
    *,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int] = 1,
    rpb: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`na2d` of the query, key and value in one tensor, [B, H, W, 3, num_heads, head_dim], as a projection makes it.

    The same result; its gradient is packed too, where that of three views would be three tensors and a copy.
    """
    qkv = _autocast(qkv)
    if qkv.ndim != 6 or qkv.shape[3] != 3:
        raise ValueError(f"qkv must be [B, H, W, 3, num_heads, head_dim], got shape {tuple(qkv.shape)}.")
    window = _window("qkv", qkv, rpb, kernel_size, dilation, scale)
    if backend := _outside((qkv,) if rpb is None else (qkv, rpb), rpb is not None, window[-1]):
        with _autocast_off(qkv):
            return backend.na2d(*qkv.unbind(3), rpb, *window)
    if _directly(qkv, rpb):
        kernel_size, dilation, scale = window
        return torch.ops.nat_models.na2d_qkvpacked_inference.default(
            qkv, cpu.as_rpb(rpb, qkv.dtype), *kernel_size, *dilation, scale
        )
    return torch.ops.nat_models.na2d_packed.default(qkv, rpb, *window)


def _directly(qkv: Tensor, rpb: Tensor | None) -> bool:
    """Whether na2d_qkvpacked_inference serves: on a CPU, automatically or as `native`, without a gradient.

    Never in torch.jit.trace, which traces with gradients and checks what it traced without.
    """
    if qkv.device.type != "cpu" or rpb is None or _requested not in (None, "native"):
        return False
    if not torch.compiler.is_compiling() and torch.jit.is_tracing():
        return False
    return qkv.stride(-1) == 1 and not (torch.is_grad_enabled() and (qkv.requires_grad or rpb.requires_grad))


def _autocast_enabled(x: Tensor) -> bool:
    return torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)


def _autocast(x: Tensor) -> Tensor:
    if not _autocast_enabled(x) or x.dtype == torch.float64:
        return x
    return x.to(torch.get_autocast_dtype(x.device.type))


def _autocast_off(x: Tensor) -> AbstractContextManager:
    """Inside the operator dtypes are settled: an autocast left on would round the mask to its dtype."""
    return torch.autocast(x.device.type, enabled=False) if _autocast_enabled(x) else nullcontext()


def _window(
    name: str,
    x: Tensor,
    rpb: Tensor | None,
    kernel_size: int | Sequence[int],
    dilation: int | Sequence[int],
    scale: float | None,
) -> tuple[tuple[int, int], tuple[int, int], float]:
    """Checks what query and a packed qkv have in common; returns kernel_size and dilation as pairs, and the scale."""
    kernel_size, dilation = window_pair(kernel_size, dilation)
    dtype, shape = x.dtype, x.shape
    if not dtype.is_floating_point:
        raise ValueError(f"{name} must be of a floating-point dtype, got {dtype}.")
    if shape[1] < kernel_size[0] * dilation[0] or shape[2] < kernel_size[1] * dilation[1]:
        raise ValueError(
            f"kernel_size * dilation must fit in the map, got a map of {shape[1]} x {shape[2]} with "
            f"{kernel_size=}, {dilation=}. NeighborhoodAttention2d pads smaller maps, na2d does not."
        )
    if rpb is not None:
        expected = (shape[-2], 2 * kernel_size[0] - 1, 2 * kernel_size[1] - 1)
        if rpb.shape != expected or rpb.device != x.device or rpb.dtype not in (dtype, torch.float32):
            raise ValueError(
                f"rpb must be [num_heads, 2*K_h-1, 2*K_w-1] = {expected}, {dtype} or torch.float32, on "
                f"{x.device}, got {tuple(rpb.shape)} {rpb.dtype} on {rpb.device}."
            )
    return kernel_size, dilation, shape[-1] ** -0.5 if scale is None else scale


_WINDOW = "int[2] kernel_size, int[2] dilation, float scale"
# na2d_packed is na2d on the views of a packed qkv [B, H, W, 3, num_heads, head_dim]; its gradient stays packed, which
# saves the layer a copy. The gradient of rpb has no elements where rpb is None: a schema returns no optional tensor.
_SCHEMAS = {
    "na2d": f"(Tensor query, Tensor key, Tensor value, Tensor? rpb, {_WINDOW}) -> Tensor",
    "na2d_backward": f"(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor? rpb, {_WINDOW})"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    "na2d_packed": f"(Tensor qkv, Tensor? rpb, {_WINDOW}) -> Tensor",
    "na2d_packed_backward": f"(Tensor grad_output, Tensor qkv, Tensor? rpb, {_WINDOW}) -> (Tensor, Tensor)",
    # na2d_packed without autograd, whose way leads through Python, and with types that a C function takes. cpu.py
    # registers its kernel when it loads the library, and from then on a call in a network reaches it without Python.
    "na2d_qkvpacked_inference": "(Tensor qkv, Tensor rpb, int kernel_height, int kernel_width, int dilation_height,"
    " int dilation_width, float scale) -> Tensor",
}
for _name, _schema in _SCHEMAS.items():
    torch.library.define(f"nat_models::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)


def _kernels(query: Tensor):
    """The module of the operator's own kernel."""
    if _requested is not None:
        _check_backend(_requested)
    why = _why_not_native(query.device)
    if why and _requested == "native":
        raise _refusal(why)
    return blocked if why or _requested == "blocked" else cpu


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _rpb_gradient(rpb: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if rpb is None else _empty(rpb)


def _forward(query, key, value, rpb, kernel_size, dilation, scale):
    if _requested in _OUTSIDE and query.numel():
        raise _refusal("torch.ops.nat_models has native and blocked kernels, nat_models.na2d reaches the others")
    with _autocast_off(query):
        return _kernels(query).na2d(query, key, value, rpb, tuple(kernel_size), tuple(dilation), scale)


def _backward(grads, grad_output, query, key, value, rpb, kernel_size, dilation, scale):
    with _autocast_off(query):
        rpb_grad = _kernels(query).na2d_backward(
            grad_output, query, key, value, rpb, tuple(kernel_size), tuple(dilation), scale, grads
        )
    return _rpb_gradient(None, query) if rpb is None else rpb_grad


@torch.library.impl("nat_models::na2d", "CompositeExplicitAutograd")
def _na2d(*args):
    return _forward(*args)


@torch.library.impl("nat_models::na2d_backward", "CompositeExplicitAutograd")
def _na2d_backward(grad_output, query, key, value, *args):
    grads = [_empty(x) for x in (query, key, value)]
    return *grads, _backward(grads, grad_output, query, key, value, *args)


@torch.library.impl("nat_models::na2d_packed", "CompositeExplicitAutograd")
def _na2d_packed(qkv, *args):
    return _forward(*qkv.unbind(3), *args)


@torch.library.impl("nat_models::na2d_qkvpacked_inference", "CompositeExplicitAutograd")
def _na2d_qkvpacked_inference(qkv, rpb, kernel_height, kernel_width, dilation_height, dilation_width, scale):
    return _forward(*qkv.unbind(3), rpb, (kernel_height, kernel_width), (dilation_height, dilation_width), scale)


@torch.library.impl("nat_models::na2d_packed_backward", "CompositeExplicitAutograd")
def _na2d_packed_backward(grad_output, qkv, *args):
    grad = _empty(qkv)
    return grad, _backward(grad.unbind(3), grad_output, *qkv.unbind(3), *args)


@torch.library.register_fake("nat_models::na2d")
def _na2d_fake(query, key, value, rpb, kernel_size, dilation, scale):
    return _empty(query)


@torch.library.register_fake("nat_models::na2d_backward")
def _na2d_backward_fake(grad_output, query, key, value, rpb, kernel_size, dilation, scale):
    return _empty(query), _empty(key), _empty(value), _rpb_gradient(rpb, query)


@torch.library.register_fake("nat_models::na2d_packed")
@torch.library.register_fake("nat_models::na2d_qkvpacked_inference")
def _na2d_packed_fake(qkv, *args):
    return _empty(qkv.select(3, 0))


@torch.library.register_fake("nat_models::na2d_packed_backward")
def _na2d_packed_backward_fake(grad_output, qkv, rpb, kernel_size, dilation, scale):
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


for _name in ("na2d", "na2d_packed"):
    torch.library.register_autograd(
        f"nat_models::{_name}", _autograd_of(f"{_name}_backward"), setup_context=_setup_context
    )


def _pair_flops(shape: Sequence[int], kernel_size: Sequence[int]) -> int:
    """FLOPs of one product over all query-key pairs, a multiply and an add each."""
    batch, height, width, num_heads, head_dim = shape
    return 2 * batch * height * width * num_heads * kernel_size[0] * kernel_size[1] * head_dim


def _head_shape(packed: Sequence[int]) -> list[int]:
    return [*packed[:3], *packed[4:]]


@register_flop_formula(torch.ops.nat_models.na2d)
def _na2d_flops(query_shape, key_shape, value_shape, rpb_shape, kernel_size, *args, **kwargs) -> int:
    return 2 * _pair_flops(query_shape, kernel_size)  # QK^T and PV


@register_flop_formula(torch.ops.nat_models.na2d_backward)
def _na2d_backward_flops(grad_shape, query_shape, key_shape, value_shape, rpb_shape, kernel_size, *a, **kw) -> int:
    return 5 * _pair_flops(query_shape, kernel_size)  # QK^T again, then dV, dP, dQ, dK


@register_flop_formula(torch.ops.nat_models.na2d_packed)
def _na2d_packed_flops(qkv_shape, rpb_shape, kernel_size, *args, **kwargs) -> int:
    return 2 * _pair_flops(_head_shape(qkv_shape), kernel_size)


@register_flop_formula(torch.ops.nat_models.na2d_qkvpacked_inference)
def _na2d_qkvpacked_inference_flops(qkv_shape, rpb_shape, kernel_height, kernel_width, *args, **kwargs) -> int:
    return 2 * _pair_flops(_head_shape(qkv_shape), (kernel_height, kernel_width))


@register_flop_formula(torch.ops.nat_models.na2d_packed_backward)
def _na2d_packed_backward_flops(grad_shape, qkv_shape, rpb_shape, kernel_size, *args, **kwargs) -> int:
    return 5 * _pair_flops(_head_shape(qkv_shape), kernel_size)


def _fvcore_handle(head_shape):
    def handle(inputs: list, outputs: list) -> int:
        """Operations of one call in a torch.jit graph; fvcore counts a multiply and an add as one."""
        kernel_size = [x.toIValue() for x in inputs[-3].node().inputs()]
        return _pair_flops(head_shape(inputs[0].type().sizes()), kernel_size)  # QK^T and PV, 2 FLOPs per operation

    return handle


# For fvcore: FlopCountAnalysis(model, image).set_op_handle(**fvcore_handles)
fvcore_handles = {"nat_models::na2d": _fvcore_handle(list), "nat_models::na2d_packed": _fvcore_handle(_head_shape)}
