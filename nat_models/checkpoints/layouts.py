"""The three key layouts of published checkpoints, and the maps between them.

- "nat_models": this package's state dicts.
- "original": the authors' nat_*.pth. Levels end with their downsampling, ours start with it.
- "transformers": the repositories on the Hub (NatForImageClassification). query, key and value are apart, the two layer
  scales together.

A key is read as its path, split at the dots. Keys that no layout knows are kept as they are, for the loader to report.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError

LAYOUTS = ("nat_models", "original", "transformers")

_StateDict = dict[str, Tensor]

# original -> transformers; what follows in a path (weight, bias, an index) is kept.
_STEM_AND_HEAD = {
    "patch_embed.proj": "nat.embeddings.patch_embeddings.projection",
    "patch_embed.norm": "nat.embeddings.norm",
    "norm": "nat.layernorm",
    "head": "classifier",
}
_BLOCK = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.rpb": "attention.self.rpb",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_QKV = ("query", "key", "value")  # attention.self.* of transformers, the rows of attn.qkv in this order


def _rename(names: list[str], table: Mapping[str, str]) -> str | None:
    """Replaces the start of a path, whole names only, by the table; None for a path that no entry starts."""
    for end in range(len(names), 0, -1):
        if (new := table.get(".".join(names[:end]))) is not None:
            return ".".join([new, *names[end:]])
    return None


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in table.items()}


def _shift_downsampling(state_dict: Mapping[str, Tensor], by: int, rename: Callable[[list[str]], list[str]]):
    """Moves each level's downsampling to the level `by` further on, and renames the rest of the keys."""
    out = {}
    for key, value in state_dict.items():
        match key.split("."):
            case ["levels", level, "downsample", *rest] if level.isdecimal():
                path = ["levels", str(int(level) + by), "downsample", *rest]
            case path:
                path = rename(path)
        out[".".join(path)] = value
    return out


def _original_from_ours(state_dict: Mapping[str, Tensor]) -> _StateDict:
    def rename(path: list[str]) -> list[str]:
        match path:
            case ["head", "fc", *rest]:
                return ["head", *rest]
            case [*block, "ls1" | "ls2" as scale, "gamma"]:
                return [*block, f"gamma{scale[-1]}"]
        return path

    return _shift_downsampling(state_dict, -1, rename)


def _ours_from_original(state_dict: Mapping[str, Tensor]) -> _StateDict:
    def rename(path: list[str]) -> list[str]:
        match path:
            case ["head", *rest]:
                return ["head", "fc", *rest]
            case [*block, "gamma1" | "gamma2" as gamma]:
                return [*block, f"ls{gamma[-1]}", "gamma"]
        return path

    return _shift_downsampling(state_dict, 1, rename)


def _transformers_from_original(state_dict: Mapping[str, Tensor]) -> _StateDict:
    out = {}
    for key, value in state_dict.items():
        match key.split("."):
            case ["levels", level, "blocks", block, *rest]:
                prefix = f"nat.encoder.levels.{level}.layers.{block}"
                match rest:
                    case ["attn", "qkv", name]:
                        parts = zip(_QKV, value.chunk(3), strict=True)
                        out |= {f"{prefix}.attention.self.{part}.{name}": rows for part, rows in parts}
                    case ["gamma1"]:
                        out[f"{prefix}.layer_scale_parameters"] = torch.stack([value, _second_gamma(state_dict, key)])
                    case ["gamma2"]:
                        pass  # stacked with gamma1
                    case _:
                        new = _rename(rest, _BLOCK)
                        out[key if new is None else f"{prefix}.{new}"] = value
            case ["levels", level, "downsample", *rest]:
                out[".".join(["nat.encoder.levels", level, "downsample", *rest])] = value
            case path:
                out[_rename(path, _STEM_AND_HEAD) or key] = value
    return out


def _second_gamma(state_dict: Mapping[str, Tensor], first: str) -> Tensor:
    second = first.removesuffix("1") + "2"
    if second not in state_dict:
        raise CheckpointError(f"The checkpoint has {first} without {second}; transformers keeps the two together.")
    return state_dict[second]


def _original_from_transformers(state_dict: Mapping[str, Tensor]) -> _StateDict:
    # A backbone saved without its classification model lacks the prefix.
    state_dict = {k if k.startswith(("nat.", "classifier.")) else f"nat.{k}": v for k, v in state_dict.items()}
    stem_and_head, names_in_block = _inverse(_STEM_AND_HEAD), _inverse(_BLOCK)
    out = {}
    for key, value in state_dict.items():
        match key.split("."):
            case ["nat", "encoder", "levels", level, "layers", block, *rest]:
                prefix = f"levels.{level}.blocks.{block}"
                match rest:
                    case ["attention", "self", "query", name]:
                        parts = [state_dict.get(key.replace(".query.", f".{part}.")) for part in _QKV]
                        if all(part is not None for part in parts):
                            out[f"{prefix}.attn.qkv.{name}"] = torch.cat(parts)
                    case ["attention", "self", "key" | "value", _]:
                        pass  # joined with query
                    case ["layer_scale_parameters"]:
                        out |= {f"{prefix}.gamma{i}": scale for i, scale in enumerate(value.unbind(), start=1)}
                    case _:
                        new = _rename(rest, names_in_block)
                        out[key if new is None else f"{prefix}.{new}"] = value
            case ["nat", "encoder", "levels", level, "downsample", *rest]:
                out[".".join(["levels", level, "downsample", *rest])] = value
            case path:
                out[_rename(path, stem_and_head) or key] = value
    return out


def detect_layout(state_dict: Mapping[str, Tensor]) -> str:
    """Names the layout of a state dict: one of LAYOUTS.

    Raises:
        CheckpointError: The keys are of none of them.
    """
    keys = [key.removeprefix("nat.") for key in state_dict]
    if any(re.match(r"embeddings\.|encoder\.levels\.\d+\.layers\.", key) for key in keys):
        return "transformers"
    if any(key.startswith("patch_embed.proj.0.") for key in keys):
        marks = ("levels.0.downsample.", "head.weight", "head.bias")
        original = any(key.startswith(marks) or key.endswith((".gamma1", ".gamma2")) for key in keys)
        return "original" if original else "nat_models"
    raise CheckpointError(
        "The checkpoint is not a NAT in a known layout. Found keys such as "
        f"{', '.join(map(repr, list(state_dict)[:4])) or '(none)'}; expected patch_embed.proj.0.weight, "
        "levels.0.blocks.0.attn.qkv.weight, ... (nat_models and original layout) or "
        "nat.embeddings.patch_embeddings.projection.0.weight, ... (transformers layout)."
    )


def convert_state_dict(state_dict: Mapping[str, Tensor], layout: str) -> dict[str, Tensor]:
    """Renames, splits and joins the tensors of a state dict from whichever layout it has to `layout`.

    Keys that no layout knows are kept as they are, for the loader to report.

    Raises:
        ValueError: `layout` is not in LAYOUTS.
        CheckpointError: The state dict is in none of them.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout=}.")
    source = detect_layout(state_dict)
    if source == layout:
        return dict(state_dict)
    to_original = {"nat_models": _original_from_ours, "transformers": _original_from_transformers, "original": dict}
    from_original = {"nat_models": _ours_from_original, "transformers": _transformers_from_original, "original": dict}
    return from_original[layout](to_original[source](state_dict))
