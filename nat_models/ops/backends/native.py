"""The C++ kernel: found, loaded at first use and called through its C ABI (ops/csrc/abi.h)."""

import ctypes
import functools
import itertools
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
_ISA_VARIABLE = "NAT_MODELS_CPU_ISA"  # one of _ISAS; unset: the best this CPU has
_ISAS = "baseline, avx2, avx512 and avx512_bf16"

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
    "nat_torch_size": (ctypes.c_int64, []),
    "nat_torch_function": (ctypes.c_char_p, [ctypes.c_int64]),
    "nat_register": (ctypes.c_int32, [ctypes.c_void_p]),
}

# torch's own parallel_for and the number of its threads, so that torch.set_num_threads holds.
_THREADS = ("torch_parallel_for", "torch_get_num_threads")

# What a user whose kernel is missing or stale can do about it.
_REINSTALL = "pip install --force-reinstall --no-deps ."
_MEND = f"install a C++ compiler (`apt install g++`, `xcode-select --install`), then `{_REINSTALL}` in the clone"


def library_path() -> Path:
    """Where the library is; raises a FileNotFoundError where it was not built."""
    # An editable install leaves the sources where they are and puts what it built among the installed packages.
    built = Path(sysconfig.get_path("platlib"), *__package__.split(".")[:-1])
    folders = dict.fromkeys([Path(__file__).parents[1], built])
    for folder in folders:
        if (folder / _LIBRARY).exists():
            return folder / _LIBRARY
    raise FileNotFoundError(
        f"{_LIBRARY} was not built, most likely for want of a C++ compiler: {_MEND}."
        f" Looked in {', '.join(map(str, folders))}"
    )


@functools.cache
def _load() -> ctypes.CDLL:
    # PyDLL would hold the GIL; CDLL lets other Python threads run meanwhile.
    path = library_path()
    library = ctypes.CDLL(str(path))
    for name, (restype, argtypes) in _SIGNATURES.items():
        function = getattr(library, name, None)
        if function is None:
            raise RuntimeError(f"{path} was built for another version: it has no {name}; `{_REINSTALL}` in the clone")
        function.restype, function.argtypes = restype, argtypes
    registration = _registration_functions(library)
    sizes = {
        "nat_na2d_call": (library.nat_call_size(), _CALL.size),
        "nat_torch": (library.nat_torch_size(), len(registration) * ctypes.sizeof(ctypes.c_void_p)),
    }
    for name, (actual, expected) in sizes.items():
        if actual != expected:
            raise RuntimeError(
                f"{path} was built for another version: its {name} takes {actual} bytes, not {expected};"
                f" `{_REINSTALL}` in the clone"
            )
    isa = os.environ.get(_ISA_VARIABLE, "")
    status = library.nat_select_isa(isa.encode())
    if status:
        why = "unknown to this build" if status == 1 else "beyond this CPU"
        raise RuntimeError(f"{_ISA_VARIABLE}={isa!r} is {why}, known are {_ISAS}")
    library.nat_set_threads(*_torch_functions(_THREADS))
    if all(registration):
        library.nat_register((ctypes.c_void_p * len(registration))(*registration))
    return library


def _registration_functions(library: ctypes.CDLL) -> tuple[int | None, ...]:
    """The library's nat_torch: what its registered operator needs of torch, in the library's order."""
    names = map(library.nat_torch_function, itertools.count())
    return _torch_functions(tuple(name.decode() for name in itertools.takewhile(bool, names)))


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
    except (OSError, RuntimeError) as error:
        return False, str(error)
    shared = all(_torch_functions(_THREADS))
    threads = "torch threads" if shared else "one thread, since PyTorch shares its own from 2.10 on"
    return True, f"{library.nat_isa().decode()}, {threads}"


def _dense_last(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def as_rpb(rpb: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias as the kernel reads it beside tensors of a dtype."""
    if rpb is None:
        return None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return rpb if rpb.dtype == wide and rpb.is_contiguous() else rpb.to(wide).contiguous()


def as_inference_rpb(rpb: Tensor, dtype: torch.dtype) -> Tensor:
    """The same for na2d_qkvpacked_inference, whose kernel widens bfloat16 itself: one operation less in each layer."""
    return rpb if rpb.dtype == dtype == torch.bfloat16 and rpb.is_contiguous() else as_rpb(rpb, dtype)


def _check(status: int) -> None:
    if status == 1:
        raise MemoryError("na2d: no memory for scratch")
    if status:  # shapes and dtypes are checked before
        raise RuntimeError(f"na2d: the data of all tensors must be there, and aligned to its dtype ({status=}).")


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
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device)  # not the default device
    if out.numel():
        query, key, value = _dense_last(query), _dense_last(key), _dense_last(value)
        bias = as_rpb(rpb, query.dtype)
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
