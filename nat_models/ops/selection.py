"""Which backend runs a call: one decision for na2d, the layer, the operator and explain."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .backends import BACKENDS, KERNELS, native
from .request import Request
from .window import window_pair

# In order of preference, by device. natten_fused and flex run on a CPU on request, slowly and without gradients.
# exportable stands last for attention dropout under torch.compile, which blocked cannot have traced.
_AUTOMATIC = {"cpu": ("native", "blocked", "exportable")}
_AUTOMATIC_ELSEWHERE = ("natten_fused", "flex", "blocked", "exportable")

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
        _check_exists(name)
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def _check_exists(name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"The backend asked for, {name!r}, does not exist; known are {', '.join(BACKENDS)}.")


def candidates(request: Request) -> tuple[str, ...]:
    """The backends to try in turn; one alone where a backend was asked for.

    A backend that was asked for concerns calls. It does not concern what has no elements or no data, nor the backward
    of calls that already ran: both stay with the operator.
    """
    if request.empty or (request.stage == "backward" and _requested not in KERNELS):
        return KERNELS
    if _requested is not None:
        _check_exists(_requested)
        return (_requested,)
    if request.exporting or request.transformed:
        return ("exportable",)  # an exported graph must run without this package, a transform needs plain operations
    if request.observed or request.stage != "call":
        return KERNELS
    return _AUTOMATIC.get(request.device.type, _AUTOMATIC_ELSEWHERE)


def why_not(name: str, request: Request) -> str | None:
    """Why a backend cannot run a kind of call; None if it can."""
    if request.stage != "call" and name not in KERNELS:
        return "torch.ops.nat_models has native and blocked kernels, nat_models.na2d reaches the others"
    return BACKENDS[name].why_not(request)


def select(request: Request) -> str:
    """The name of the backend that runs a kind of call.

    Raises:
        RuntimeError: A backend was asked for and cannot run it; the message says why.
        ValueError: NAT_MODELS_BACKEND names no backend.
    """
    for name in candidates(request):
        reason = why_not(name, request)
        if reason is None:
            return name
    raise RuntimeError(f"The backend {name!r} was asked for and cannot run: {reason}.")


def explain(
    device: str | torch.device = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    rpb: bool = True,
    requires_grad: bool = False,
    dropout: bool = False,
    compiling: bool = False,
    exporting: bool = False,
    transformed: bool = False,
    head_dim: int = 32,
    scale: float | None = None,
    kernel_size: int | Sequence[int] = 7,
) -> str:
    """What na2d would run on, what the other backends are, and why those that cannot run cannot.

    `nat-models info` prints it. Nothing runs: limits are asked about beforehand, here as in na2d. One thing is left
    out: torch.jit.trace and a TorchDispatchMode such as FlopCounterMode must see one operator, so under them the
    automatic choice is among native and blocked.

    Args:
        device: Where query, key and value are.
        dtype: Of query, key and value.
        rpb: Whether there is a relative position bias.
        requires_grad: Whether a gradient is wanted, of rpb or any other input.
        dropout: Whether attention weights are dropped.
        compiling: Whether the call is traced by torch.compile.
        exporting: Whether it is traced by torch.export.
        transformed: Whether torch.func's grad, vmap or jvp, or a forward-mode dual level surrounds it.
        head_dim: Channels of a head.
        scale: As in na2d.
        kernel_size: As in na2d.
    """
    request = Request(
        torch.device(device),
        dtype,
        head_dim,
        head_dim**-0.5 if scale is None else scale,
        window_pair(kernel_size, 1)[0],
        rpb=rpb,
        requires_grad=requires_grad,
        dropout=dropout,
        compiling=compiling or exporting,
        exporting=exporting,
        transformed=transformed,
    )
    order = candidates(request)
    reasons = {name: why_not(name, request) for name in BACKENDS}
    chosen = next((name for name in order if reasons[name] is None), order[0])
    if _requested is not None:
        origin = "asked for by NAT_MODELS_BACKEND or use_backend"
    else:
        origin = f"chosen automatically, the first that can of {', '.join(order)}"
    kind = [str(dtype).removeprefix("torch."), "with rpb" if rpb else "without rpb"]
    kind += ["with gradient"] * requires_grad + ["with dropout"] * dropout
    kind += ["under torch.export"] if exporting else ["under torch.compile"] * compiling
    kind += ["under torch.func or forward mode"] * transformed
    verb = "runs on" if reasons[chosen] is None else "raises an error on"
    lines = [f"On {request.device} ({', '.join(kind)}), na2d {verb} {chosen}, {origin}."]
    for name, backend in BACKENDS.items():
        lines.append(f"  {'*' if name == chosen else ' '} {name:12} {backend.SUMMARY}")
        if reasons[name] is not None:
            lines.append(f"{'':16} cannot run: {reasons[name]}")
        elif name == "native":
            lines.append(f"{'':16} instruction set and threads: {native.available()[1]}")
    return "\n".join(lines)
