"""NATTEN's names up to 0.17, which 0.20 removed, on this package's operator: any device, any PyTorch, every derivative.

    natten1dqkrpb, natten1dqk, natten1dav, natten2dqkrpb, natten2dqk, natten2dav      all versions
    NATTEN1DQKRPBFunction, NATTEN1DAVFunction, NATTEN2DQKRPBFunction, NATTEN2DAVFunction   0.14; `.apply`
    na1d_qk_with_bias, na2d_qk_with_bias                                              0.15
    na1d_qk, na1d_av, na2d_qk, na2d_av, na1d, na2d                                    0.17
    NeighborhoodAttention1D, NeighborhoodAttention2D                                  with the defaults of 0.14 or 0.17

Arguments stand in their old order. Tensors have heads before the map, [B, num_heads, H, W, head_dim], but those of na1d
and na2d, which have them last; attention is [B, num_heads, H, W, K_h*K_w]. No scale is applied to logits, again but for
na1d and na2d. There is no 3-D, no causal mask and no additional keys: what asks for those is refused.

Code that cannot be edited finds all this at `natten` after `install(version=...)`.

Source: NATTEN's functional.py and modules, releases 0.14.6, 0.15.1 and 0.17.5; arXiv:2204.07143, section 3.
"""

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from torch import Tensor

from .. import ops
from ..layers import NeighborhoodAttention1d, NeighborhoodAttention2d
from ..ops.backends import autocast_off

_Ints = int | Sequence[int]


def natten2dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: _Ints, dilation: _Ints) -> Tensor:
    """The logits of 2-D neighborhood attention, unscaled, with a bias.

    Args:
        query: [B, num_heads, H, W, head_dim], scaled by the caller.
        key: Shape, dtype and device of query.
        rpb: [num_heads, 2*K_h-1, 2*K_w-1], query's dtype or float32; None for no bias.
        kernel_size: Odd; an int serves both axes.
        dilation: At least 1; an int serves both axes.

    Returns:
        [B, num_heads, H, W, K_h*K_w], contiguous, query's dtype, under autocast too.

    Raises:
        ValueError: Shapes, dtypes or devices differ; kernel_size even; a map smaller than kernel_size * dilation.
    """
    query, key = _heads_last(query, "query", 2), _heads_last(key, "key", 2)
    with autocast_off(query):  # NATTEN computed in the dtype it was given
        logits = ops.na2d_qk(query, key, kernel_size=kernel_size, dilation=dilation, rpb=rpb, scale=1.0)
    return _heads_first(logits)


def natten2dqk(query: Tensor, key: Tensor, kernel_size: _Ints, dilation: _Ints) -> Tensor:
    """`natten2dqkrpb` without a bias."""
    return natten2dqkrpb(query, key, None, kernel_size, dilation)


def natten2dav(attn: Tensor, value: Tensor, kernel_size: _Ints, dilation: _Ints) -> Tensor:
    """Weighted sums over the windows of 2-D neighborhood attention; the weights may be anything.

    Args:
        attn: [B, num_heads, H, W, K_h*K_w]; cast to value's dtype.
        value: [B, num_heads, H, W, head_dim].
        kernel_size: Odd; an int serves both axes.
        dilation: At least 1; an int serves both axes.

    Returns:
        [B, num_heads, H, W, head_dim], contiguous, value's dtype, under autocast too.

    Raises:
        ValueError: attn does not fit value; kernel_size even; a map smaller than kernel_size * dilation.
    """
    attn, value = _heads_last(attn, "attn", 2).to(value.dtype), _heads_last(value, "value", 2)
    with autocast_off(value):
        return _heads_first(ops.na2d_av(attn, value, kernel_size=kernel_size, dilation=dilation))


def natten1dqkrpb(query: Tensor, key: Tensor, rpb: Tensor | None, kernel_size: _Ints, dilation: _Ints) -> Tensor:
    """The logits of 1-D neighborhood attention, unscaled, with a bias.

    Args:
        query: [B, num_heads, L, head_dim], scaled by the caller.
        key: Shape, dtype and device of query.
        rpb: [num_heads, 2*K-1], query's dtype or float32; None for no bias.
        kernel_size: Odd; an int, or one in a sequence.
        dilation: At least 1; an int, or one in a sequence.

    Returns:
        [B, num_heads, L, K], contiguous, query's dtype, under autocast too.

    Raises:
        ValueError: Shapes, dtypes or devices differ; kernel_size even; a length below kernel_size * dilation.
    """
    query, key = _heads_last(query, "query", 1), _heads_last(key, "key", 1)
    window = dict(kernel_size=_single(kernel_size), dilation=_single(dilation))
    with autocast_off(query):
        return _heads_first(ops.na1d_qk(query, key, rpb=rpb, scale=1.0, **window))


def natten1dqk(query: Tensor, key: Tensor, kernel_size: _Ints, dilation: _Ints) -> Tensor:
    """`natten1dqkrpb` without a bias."""
    return natten1dqkrpb(query, key, None, kernel_size, dilation)


def natten1dav(attn: Tensor, value: Tensor, kernel_size: _Ints, dilation: _Ints) -> Tensor:
    """Weighted sums over the windows of 1-D neighborhood attention; the weights may be anything.

    Args:
        attn: [B, num_heads, L, K]; cast to value's dtype.
        value: [B, num_heads, L, head_dim].
        kernel_size: Odd; an int, or one in a sequence.
        dilation: At least 1; an int, or one in a sequence.

    Returns:
        [B, num_heads, L, head_dim], contiguous, value's dtype, under autocast too.

    Raises:
        ValueError: attn does not fit value; kernel_size even; a length below kernel_size * dilation.
    """
    attn, value = _heads_last(attn, "attn", 1).to(value.dtype), _heads_last(value, "value", 1)
    with autocast_off(value):
        return _heads_first(ops.na1d_av(attn, value, kernel_size=_single(kernel_size), dilation=_single(dilation)))


def na2d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: _Ints,
    dilation: _Ints = 1,
    additional_keys: Tensor | None = None,
    is_causal: bool | Sequence[bool] = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """`natten2dqkrpb` in 0.17's order. NotImplementedError: additional_keys or is_causal is set."""
    _refuse(is_causal, additional_keys)
    return natten2dqkrpb(query, key, rpb, kernel_size, dilation)


def na2d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: _Ints,
    dilation: _Ints = 1,
    additional_values: Tensor | None = None,
    is_causal: bool | Sequence[bool] = False,
) -> Tensor:
    """`natten2dav` in 0.17's order. NotImplementedError: additional_values or is_causal is set."""
    _refuse(is_causal, additional_values)
    return natten2dav(attn, value, kernel_size, dilation)


def na1d_qk(
    query: Tensor,
    key: Tensor,
    kernel_size: _Ints,
    dilation: _Ints = 1,
    additional_keys: Tensor | None = None,
    is_causal: bool | Sequence[bool] = False,
    rpb: Tensor | None = None,
) -> Tensor:
    """`natten1dqkrpb` in 0.17's order. NotImplementedError: additional_keys or is_causal is set."""
    _refuse(is_causal, additional_keys)
    return natten1dqkrpb(query, key, rpb, kernel_size, dilation)


def na1d_av(
    attn: Tensor,
    value: Tensor,
    kernel_size: _Ints,
    dilation: _Ints = 1,
    additional_values: Tensor | None = None,
    is_causal: bool | Sequence[bool] = False,
) -> Tensor:
    """`natten1dav` in 0.17's order. NotImplementedError: additional_values or is_causal is set."""
    _refuse(is_causal, additional_values)
    return natten1dav(attn, value, kernel_size, dilation)


def na2d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: _Ints,
    dilation: _Ints,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`natten2dqkrpb` by 0.15's name. NotImplementedError: additional_keys is set."""
    return na2d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na1d_qk_with_bias(
    query: Tensor,
    key: Tensor,
    bias: Tensor | None,
    kernel_size: _Ints,
    dilation: _Ints,
    additional_keys: Tensor | None = None,
) -> Tensor:
    """`natten1dqkrpb` by 0.15's name. NotImplementedError: additional_keys is set."""
    return na1d_qk(query, key, kernel_size, dilation, additional_keys, rpb=bias)


def na2d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: _Ints,
    dilation: _Ints = 1,
    is_causal: bool | Sequence[bool] = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`nat_models.na2d` in 0.17's order: [B, H, W, num_heads, head_dim]. NotImplementedError: is_causal is set."""
    _refuse(is_causal)
    with autocast_off(query):
        return ops.na2d(query, key, value, kernel_size=kernel_size, dilation=dilation, rpb=rpb, scale=scale)


def na1d(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kernel_size: _Ints,
    dilation: _Ints = 1,
    is_causal: bool | Sequence[bool] = False,
    rpb: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """`nat_models.na1d` in 0.17's order: [B, L, num_heads, head_dim]. NotImplementedError: is_causal is set."""
    _refuse(is_causal)
    window = dict(kernel_size=_single(kernel_size), dilation=_single(dilation))
    with autocast_off(query):
        return ops.na1d(query, key, value, rpb=rpb, scale=scale, **window)


def _heads_last(x: Tensor, name: str, axes: int) -> Tensor:
    if x.dim() != axes + 3:
        last = "head_dim" if name != "attn" else "K" if axes == 1 else "K_h*K_w"
        shape = f"[B, num_heads, {'L' if axes == 1 else 'H, W'}, {last}]"
        raise ValueError(f"{name} must be {shape}, got shape {tuple(x.shape)}.")
    return x.movedim(1, -2)


def _heads_first(x: Tensor) -> Tensor:
    return x.movedim(-2, 1).contiguous()


def _single(size: _Ints) -> _Ints:
    """0.17 took the sizes of a sequence as tuples of one, too."""
    return size[0] if isinstance(size, Sequence) and len(size) == 1 else size


def _refuse(is_causal: bool | Sequence[bool], additional: Tensor | None = None) -> None:
    if any(is_causal) if isinstance(is_causal, Sequence) else is_causal:
        raise NotImplementedError(f"There are no causal masks here, got {is_causal=}.")
    if additional is not None:
        raise NotImplementedError("Keys and values beyond those of the map are not attended to here, got some.")


# What the modules of a version take after dilation, in its order, as arguments of this package's layers.


def _natten_014(bias=True, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0) -> dict:
    return dict(rel_pos_bias=bias, qkv_bias=qkv_bias, scale=qk_scale, attn_drop=attn_drop, proj_drop=proj_drop)


def _natten_017(
    is_causal=False, rel_pos_bias=False, qkv_bias=True, qk_scale=None, attn_drop=0.0, proj_drop=0.0
) -> dict:
    _refuse(is_causal)
    return _natten_014(rel_pos_bias, qkv_bias, qk_scale, attn_drop, proj_drop)


_ARGUMENTS: dict[str, Callable[..., dict]] = {"0.14": _natten_014, "0.17": _natten_017}
_RELEASES = {"0.14": "0.14.6", "0.17": "0.17.5"}  # the last of each, for natten.__version__


def _check_version(version: str) -> None:
    if version not in _ARGUMENTS:
        raise ValueError(f"version must be one of {', '.join(map(repr, _ARGUMENTS))}, got {version=}.")


class _Module:
    """What the modules of both dimensions have in common, before this package's layer in the order of classes."""

    version = "0.14"
    axes: int  # of the map

    def __init__(self, dim, num_heads, kernel_size, dilation=1, *args, version=None, **kwargs) -> None:
        version = self.version if version is None else version
        _check_version(version)
        arguments = _ARGUMENTS[version](*args, **kwargs)
        dilation = 1 if dilation is None else dilation  # as 0.14's own networks pass it
        super().__init__(dim, num_heads, kernel_size=_single(kernel_size), dilation=_single(dilation), **arguments)
        self.version = version

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() != self.axes + 2:
            expected = "[B, L, C]" if self.axes == 1 else "[B, H, W, C]"
            raise ValueError(f"x must be {expected}, got shape {tuple(x.shape)}.")
        kernel_size, dilation = self.kernel_size[-self.axes :], self.dilation[-self.axes :]
        sizes = zip(x.shape[1:-1], kernel_size, dilation, strict=True)
        if self.version == "0.17" and any(n < k * d for n, k, d in sizes):
            raise ValueError(
                f"kernel_size * dilation must fit in the map, got x {tuple(x.shape)} with {kernel_size=}, {dilation=}. "
                'NATTEN 0.17 does not pad; version="0.14" does.'
            )
        return super().forward(x)


class NeighborhoodAttention2D(_Module, NeighborhoodAttention2d):
    """NATTEN's module for maps, [B, H, W, C] -> [B, H, W, C], with its arguments, defaults and state dict.

    Parameters are qkv.weight, qkv.bias, rpb, proj.weight and proj.bias. Attributes are those of this package's layer.

    Args:
        dim, num_heads, kernel_size, dilation: As there.
        *args, **kwargs: Those of the version: for "0.14" bias=True (that is, rpb), qkv_bias=True, qk_scale=None,
            attn_drop=0.0, proj_drop=0.0, and a map smaller than the window is padded; for "0.17" is_causal=False,
            rel_pos_bias=False, then the same, and such a map is an error.
        version: "0.14" or "0.17"; None means the class's own, which is "0.14" but after `install`.

    Raises:
        ValueError: version is neither; what the layer refuses; a small map, with version 0.17.
        TypeError: An argument that the version did not have.
        NotImplementedError: is_causal is set.
    """

    axes = 2


class NeighborhoodAttention1D(_Module, NeighborhoodAttention1d):
    """NATTEN's module for sequences, [B, L, C] -> [B, L, C]; rpb is [num_heads, 2*K-1].

    Arguments, defaults and errors are those of NeighborhoodAttention2D.
    """

    axes = 1


def _function(function: Callable[..., Tensor]) -> type:
    """0.14's autograd functions, which some call by `.apply`: only that is there."""
    name = f"{function.__name__.upper()}Function"
    return type(name, (), {"apply": staticmethod(function), "__module__": __name__, "__doc__": function.__doc__})


NATTEN1DQKRPBFunction = _function(natten1dqkrpb)
NATTEN1DAVFunction = _function(natten1dav)
NATTEN2DQKRPBFunction = _function(natten2dqkrpb)
NATTEN2DAVFunction = _function(natten2dav)


def use_fused_na(mode: bool = True, kv_parallel: bool = False) -> None:
    """Nothing: it chose among NATTEN's kernels. `nat_models.ops.use_backend` chooses among ours."""


def use_autotuner(*args, **kwargs) -> None:
    """Nothing: it tuned NATTEN's kernels."""


_FUNCTIONS = (
    *(natten1dqkrpb, natten1dqk, natten1dav, natten2dqkrpb, natten2dqk, natten2dav),
    *(na1d_qk, na1d_av, na2d_qk, na2d_av, na1d_qk_with_bias, na2d_qk_with_bias, na1d, na2d),
    *(NATTEN1DQKRPBFunction, NATTEN1DAVFunction, NATTEN2DQKRPBFunction, NATTEN2DAVFunction),
)


def install(version: str) -> None:
    """Puts all this at `natten`, for code that imports it and cannot be edited; call it before that code is imported.

    `natten`, `natten.functional`, `natten.natten1d` and `natten.natten2d` are there, and with 0.17 `natten.context`, by
    which code tells the versions apart. A NATTEN that is installed is hidden for the rest of the process: the backend
    natten_fused then declines.

    Args:
        version: "0.14" or "0.17", whose defaults the modules have; `natten.__version__` is its last release.

    Raises:
        ValueError: version is neither.
        RuntimeError: The real natten is imported already, or another version was installed here.
    """
    _check_version(version)
    present = sys.modules.get("natten")
    if present is not None:
        found = getattr(present, "__version__", "of an unknown version")
        if not getattr(present, "is_nat_models", False):
            raise RuntimeError(f"natten {found} is imported already: call install before anything imports it.")
        if found != _RELEASES[version]:
            raise RuntimeError(f"natten {found} was installed here already, got {version=}: one process has one.")
        return
    modules = [
        type(cls.__name__, (cls,), {"version": version, "__module__": "natten", "__doc__": cls.__doc__})
        for cls in (NeighborhoodAttention1D, NeighborhoodAttention2D)
    ]
    switches = (use_fused_na, use_autotuner)
    natten = _module("natten", *modules, *switches, na1d, na2d)
    natten.__version__ = _RELEASES[version]
    natten.is_nat_models = True
    parts = [_module("natten.functional", *_FUNCTIONS)]
    parts += [_module(f"natten.natten{axes}d", cls) for axes, cls in enumerate(modules, 1)]
    if version == "0.17":
        parts.append(_module("natten.context", *switches))
    for part in parts:
        setattr(natten, part.__name__.rpartition(".")[2], part)
    sys.modules.update({part.__name__: part for part in (natten, *parts)})


def _module(name: str, *contents: Callable) -> ModuleType:
    module = ModuleType(name, __doc__)
    module.__spec__ = ModuleSpec(name, None)  # importlib.util.find_spec raises where there is none
    for x in contents:
        setattr(module, x.__name__, x)
    return module
