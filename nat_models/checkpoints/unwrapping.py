"""Finding a network in a training checkpoint by its keys, at any depth and after any prefix."""

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from .files import read_checkpoint
from .layouts import detect_layout

# The first convolution, whole or split by an adapter or a parametrization: a NAT has it in every layout, and after the
# prefix of its key stand the network's other keys. An optimizer's state goes on after the name and is not meant.
_STEM = re.compile(
    r"(?<![^.])(?:patch_embed\.proj\.0|(?P<patches>patch_embed\.proj)"
    r"|(?:(?:di)?nat\.)?embeddings\.patch_embeddings\.projection\.0)"
    r"\.(?:(?:weight|bias|weight_orig)$|base_layer\.|parametrizations\.)"
)
_BIAS = ".attn.rpb"  # by it a network of patches is told from other vision transformers
# What torch.compile, checkpoint_wrapper and FSDP put into the path of any module.
_WRAPPERS = re.compile(r"(?<![^.])(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")
_AVERAGE = {"ema", "swa", "avg", "average", "averaged", "averaging"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
_AVERAGES_FIRST, _THEN = ("state_dict_ema", "model_ema"), ("state_dict", "model")  # timm's order


class Network(NamedTuple):
    """A network's tensors within a checkpoint."""

    tensors: dict[str, Tensor]
    place: str  # such as checkpoint['state_dict']['model.*']; empty where the checkpoint is the state dict
    beside: dict[str, Tensor]  # what else the mapping holds: a loss, a decoder, another network
    rank: int


def unwrap(checkpoint: object) -> dict[str, Tensor]:
    """The state dict of the network in a training checkpoint, as find_network finds it."""
    return find_network(checkpoint).tensors


def find_network(checkpoint: object) -> Network:
    """Finds the one network in a training checkpoint.

    Every mapping at any depth is searched for a NAT's first convolution; the keys that share its prefix are the
    network. Averaged weights (ema, swa, ...) come first, then an entry state_dict, then model: timm's order.

    Args:
        checkpoint: A state dict, or mappings, lists and modules that hold one.

    Raises:
        CheckpointError: There is none, or several that differ and of which none comes first.
    """
    found = sorted(_networks(checkpoint), key=lambda network: network.rank)
    if not found:
        return _unmarked(checkpoint)
    first = found[0]
    for other in found[1:]:
        if other.rank == first.rank and not _equal(first.tensors, other.tensors):
            places = " and ".join(network.place or "checkpoint" for network in (first, other))
            raise CheckpointError(
                f"The checkpoint holds networks that differ, in {places}; which one is meant is not said.\n"
                "Save the one you want alone, its keys without the prefix: torch.save({...}, 'weights.pth')"
            )
    return first


def _networks(checkpoint: object) -> Iterator[Network]:
    for path, tensors in mappings(checkpoint):
        stems = {key[: match.start()]: match for key in tensors if (match := _STEM.search(key))}
        prefixes = [prefix for prefix, match in stems.items() if not match["patches"] or _has_bias(tensors, prefix)]
        for prefix in prefixes:
            inner = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
            own = {
                key.removeprefix(prefix): value
                for key, value in tensors.items()
                if key.startswith(prefix) and not key.startswith(inner)
            }
            own = {key: value for key, value in own.items() if not _is_counter(key, value)}
            beside = {key: value for key, value in tensors.items() if not key.startswith(prefix)}
            yield Network(own, _place(path, prefix), beside, _rank(path, prefix))


def _has_bias(tensors: Mapping[str, Tensor], prefix: str) -> bool:
    return any(key.startswith(prefix) and key.endswith(_BIAS) for key in tensors)


def mappings(value: object, path: tuple = ()) -> Iterator[tuple[tuple, dict[str, Tensor]]]:
    """Every mapping in a checkpoint with its path: its tensors, without the wrappers' names."""
    if isinstance(value, nn.Module):
        value = value.state_dict()
    if isinstance(value, Mapping):
        tensors = {}
        for key, tensor in value.items():
            if isinstance(key, str) and isinstance(tensor, Tensor):
                name = _WRAPPERS.sub("", key)
                if name in tensors and not _equal({"": tensors[name]}, {"": tensor}):
                    raise CheckpointError(f"The checkpoint holds two tensors that differ for {name}; one is at {key}.")
                tensors[name] = tensor
        if tensors:
            yield path, tensors
    elif not isinstance(value, list | tuple):
        return
    for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
        yield from mappings(inner, (*path, key))


def marked(weights: str | Path | Mapping, marks: Collection[str]) -> list[dict[str, Tensor]]:
    """The networks in a file, or in what it holds, that have one of the keys: all of their tensors, at any depth and
    after any prefix, which is taken off.

    Raises:
        CheckpointError: The file cannot be read.
        FileNotFoundError: There is no such file.
    """
    checkpoint = weights if isinstance(weights, Mapping) else read_checkpoint(weights)
    return [
        {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        for _, tensors in mappings(checkpoint)
        for prefix in sorted({key.removesuffix(mark) for key in tensors for mark in marks if _ends(key, mark)})
    ]


def _ends(key: str, mark: str) -> bool:
    return key == mark or key.endswith(f".{mark}")


def _is_counter(key: str, value: Tensor) -> bool:
    """Whether it is what averaging keeps beside the weights (n_averaged, updates, decay): no NAT has scalars there."""
    return value.ndim == 0 and "." not in key and (not value.is_floating_point() or key == "decay")


def _rank(path: tuple, prefix: str) -> int:
    top = path[0] if path else None
    words = {word.lower() for part in (*path, prefix) for word in _WORD.findall(str(part))}
    if words & _AVERAGE:
        return _AVERAGES_FIRST.index(top) if top in _AVERAGES_FIRST else 2
    return 3 + _THEN.index(top) if top in _THEN else 5


def _place(path: tuple, prefix: str) -> str:
    parts = [*path, *([f"{prefix}*"] if prefix else [])]
    return "checkpoint" + "".join(f"[{part!r}]" for part in parts) if parts else ""


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[key] is b[key] or torch.equal(a[key], b[key]) for key in a)


def _unmarked(checkpoint: object) -> Network:
    """What has no stem: a part of a NAT, which fitting then lists as incomplete, or another network, refused here."""
    path, tensors = max(mappings(checkpoint), key=lambda found: len(found[1]), default=((), {}))
    if not tensors:
        held = list(checkpoint) if isinstance(checkpoint, Mapping) else type(checkpoint).__name__
        raise CheckpointError(f"The checkpoint holds no tensors with names, but {held}.")
    try:
        detect_layout(tensors)
    except CheckpointError as e:
        raise CheckpointError(f"{e} (In {_place(path, '')}.)" if path else str(e)) from None
    return Network(tensors, _place(path, ""), {}, 0)
