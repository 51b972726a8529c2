"""The C++ kernel: found, loaded at first use and called through its C ABI (ops/csrc)."""

import ctypes
import functools
import os
import struct
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..request import Request

SUMMARY = "the C++ kernel, forward and backward; CPU"

_LIBRARY = "nat_cpu.so"
_ISA_VARIABLE = "NAT_MODELS_CPU_ISA"  # baseline, avx2 or avx512; unset: the best this CPU has

_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}

# nat_na2d_call: eight tensors (data, stride of B, H, W, heads), rpb and its gradient, sizes, dtype, scale.
_CALL = struct.Struct("@" + 8 * "P4q" + "2P" + "5q" + "2q2q" + "q" + "d")
_NO_TENSOR = (0, 0, 0, 0, 0)

_SIGNATURES = {
    "nat_na2d_forward": (ctypes.c_int32, [ctypes.c_char_p]),
    "nat_na2d_backward": (ctypes.c_int32, [ctypes.c_char_p]),
    "nat_set_threads": (None, [ctypes.c_void_p, ctypes.c_void_p]),
    "nat_select_isa": (ctypes.c_int32, [ctypes.c_char_p]),
    "nat_isa": (ctypes.c_char_p, []),
    "nat_call_size": (ctypes.c_int64, []),
    "nat_register": (ctypes.c_int32, [ctypes.c_void_p]),
}

# torch's own parallel_for and the number of its threads, so that torch.set_num_threads holds.
_THREADS = ("torch_parallel_for", "torch_get_num_threads")
_REGISTRATION = (  # nat_torch of csrc/na2d.h
    "aoti_torch_library_init_impl",
    "aoti_torch_library_impl",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_get_dtype",
    "aoti_torch_get_data_ptr",
    "aoti_torch_empty_strided",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_device_type_cpu",
    "aoti_torch_dtype_float32",
    "aoti_torch_dtype_float64",
    "aoti_torch_dtype_bfloat16",
    "aoti_torch_dtype_float16",
)


def _find() -> Path:
    # An editable install leaves the sources where they are and puts what it built among the installed packages.
    package = __package__.split(".")[:-1]
    folders = [Path(__file__).parents[1], Path(sysconfig.get_path("platlib"), *package)]
    for folder in folders:
        if (folder / _LIBRARY).exists():
            return folder / _LIBRARY
    raise FileNotFoundError(
        f"{_LIBRARY} was not built: the install found no C++ compiler. Looked in {', '.join(map(str, folders))}"
    )


@functools.cache
def _load() -> ctypes.CDLL:
    # PyDLL would hold the GIL; CDLL lets other Python threads run meanwhile.
    path = _find()
    library = ctypes.CDLL(str(path))
    for name, (restype, argtypes) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = restype, argtypes
    if library.nat_call_size() != _CALL.size:
        raise RuntimeError(
            f"{path} was built for another version: its calls take {library.nat_call_size()} bytes, not {_CALL.size}"
        )
    isa = os.environ.get(_ISA_VARIABLE, "")
    status = library.nat_select_isa(isa.encode())
    if status:
        why = "unknown to this build" if status == 1 else "beyond this CPU"
        raise RuntimeError(f"{_ISA_VARIABLE}={isa!r} is {why}, known are baseline, avx2 and avx512")
    library.nat_set_threads(*_torch_functions(_THREADS))
    if all(registration := _torch_functions(_REGISTRATION)):
        library.nat_register((ctypes.c_void_p * len(registration))(*registration))
    return library


@functools.cache
def _torch_functions(names: tuple[str, ...]) -> tuple[int | None, ...]:
    """Addresses of C functions of torch, None for each that this torch lacks."""
    for library in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        path = Path(torch.__file__).parent / "lib" / library
        if path.exists():
            functions = [getattr(ctypes.CDLL(str(path)), name, None) for name in names]
            return tuple(function and ctypes.cast(function, ctypes.c_void_p).value for function in functions)
    return (None,) * len(names)


def why_not(request: Request) -> str | None:
    """Why the kernel cannot run a kind of call; None if it can."""
    if request.device.type != "cpu":
        return f"it runs on the CPU, not on {request.device.type}"
    if request.dropout:
        return "it drops no attention weights"
    return _why_not_available()


@torch.compiler.assume_constant_result
def _why_not_available() -> str | None:
    found, reason = available()
    return None if found else reason


@functools.cache
def available() -> tuple[bool, str]:
    """Whether the kernel can run, and what it runs on or why it cannot."""
    try:
        library = _load()
    except (OSError, RuntimeError, AttributeError) as error:
        return False, str(error)
    return True, f"{library.nat_isa().decode()}, {'torch threads' if all(_torch_functions(_THREADS)) else 'one thread'}"


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def as_rpb(rpb: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias as the kernel reads it beside tensors of a dtype."""
    if rpb is None:
        return None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return rpb if rpb.dtype == wide and rpb.is_contiguous() else rpb.to(wide).contiguous()


def _check(status: int) -> None:
    if status:
        raise MemoryError("na2d: no memory for scratch") if status == 1 else RuntimeError(f"na2d: {status=}")


def _call(
    out: Tensor | None,
    grad_output: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    grads: Sequence[Tensor | None] = (None, None, None),
    grad_rpb: Tensor | None = None,
) -> bytes:
    """A nat_na2d_call: forward with `out`, backward with `grad_output` and `grads`."""
    tensors = []
    for x in (query, key, value, out, grad_output, *grads):
        tensors += _NO_TENSOR if x is None else (x.data_ptr(), *x.stride()[:4])
    return _CALL.pack(
        *tensors,
        *(0 if x is None else x.data_ptr() for x in (rpb, grad_rpb)),
        *query.shape,
        *kernel_size,
        *dilation,
        _DTYPES[query.dtype],
        scale,
    )


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
) -> Tensor:
    """Neighborhood attention of checked CPU tensors [B, H, W, num_heads, head_dim]; see `nat_models.na2d`."""
    library = _load()
    query, key, value = _dense_last(query), _dense_last(key), _dense_last(value)
    bias = as_rpb(rpb, query.dtype)
    out = torch.empty(query.shape, dtype=query.dtype)
    if out.numel():
        _check(library.nat_na2d_forward(_call(out, None, query, key, value, bias, kernel_size, dilation, scale)))
    return out


def na2d_backward(
    grad_output: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rpb: Tensor | None,
    kernel_size: tuple[int, int],
    dilation: tuple[int, int],
    scale: float,
    grads: Sequence[Tensor],
) -> Tensor | None:
    """Writes the gradients of query, key and value into `grads` (any strides, dense last axis); returns that of rpb."""
    library = _load()
    query, key, value, grad_output = map(_dense_last, (query, key, value, grad_output))
    bias = as_rpb(rpb, query.dtype)
    grad_rpb = None if bias is None else torch.zeros_like(bias)
    if query.numel():
        tensors = (None, grad_output, query, key, value, bias)
        call = _call(*tensors, kernel_size, dilation, scale, grads, grad_rpb)
        _check(library.nat_na2d_backward(call))
    return None if grad_rpb is None else grad_rpb.to(rpb.dtype)
