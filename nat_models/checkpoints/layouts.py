"""The three key layouts of published checkpoints, and the maps between them.

- "nat_models": this package's state dicts.
- "original": the authors' nat_*.pth and dinat_*.pth. Levels end with their downsampling, ours start with it. DiNAT_s
  and the isotropic networks call levels "layers"; the latter's layers are our levels of one block. A backbone's norms
  are norm0, norm1, ..., ours output_norms.0 and so on.
- "transformers": the repositories on the Hub (NatForImageClassification, DinatForImageClassification and backbones).
  query, key and value are apart, the two layer scales together. Without a head, names have no prefix.

A key is read as its path, split at the dots. Keys that no layout knows are kept as they are, for the loader to report.
"""

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..errors import CheckpointError

LAYOUTS = ("nat_models", "original", "transformers")
MODEL_TYPES = ("nat", "dinat")  # prefixes of transformers' names

_StateDict = dict[str, Tensor]

# original -> transformers; what follows in a path (weight, bias, an index) is kept.
STEM_AND_HEAD_NAMES = {
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "patch_embed.norm": "embeddings.norm",
    "norm": "layernorm",
    "head": "classifier",
}
BLOCK_NAMES = {
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.rpb": "attention.self.rpb",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_OUTPUT_NORM = re.compile(r"norm(\d+)")
_PREFIX = re.compile(r"^(?:di)?nat\.")
QKV_NAMES = ("query", "key", "value")  # attention.self.* of transformers, the rows of attn.qkv in this order


def _rename(names: list[str], table: Mapping[str, str]) -> str | None:
    """Replaces the start of a path, whole names only, by the table; None for a path that no entry starts."""
    for end in range(len(names), 0, -1):
        if (new := table.get(".".join(names[:end]))) is not None:
            return ".".join([new, *names[end:]])
    return None


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    return {new: old for old, new in table.items()}


def _shift_downsampling(
    state_dict: Mapping[str, Tensor], by: int, rename: Callable[[list[str]], list[str]], levels: str = "levels"
) -> _StateDict:
    """Moves each level's downsampling to the level `by` further on, and renames the rest of the keys."""
    out = {}
    for key, value in state_dict.items():
        match key.split("."):
            case ["levels" | "layers", level, "downsample", *rest] if level.isdecimal():
                path = [levels, str(int(level) + by), "downsample", *rest]
            case path:
                path = rename(path)
        out[".".join(path)] = value
    return out


def _original_from_ours(state_dict: Mapping[str, Tensor]) -> _StateDict:
    patches = "patch_embed.proj.weight" in state_dict
    isotropic = patches and not any(".downsample." in key for key in state_dict)
    levels = "layers" if patches else "levels"

    def rename(path: list[str]) -> list[str]:
        match path:
            case ["head", "fc", *rest]:
                return ["head", *rest]
            case ["output_norms", level, *rest]:
                return [f"norm{level}", *rest]
            case [*block, "ls1" | "ls2" as scale, "gamma"]:
                return rename([*block, f"gamma{scale[-1]}"])
            case ["levels", level, "blocks", "0", *rest] if isotropic:
                return [levels, level, *rest]
            case ["levels", *rest]:
                return [levels, *rest]
        return path

    return _shift_downsampling(state_dict, -1, rename, levels)


def _ours_from_original(state_dict: Mapping[str, Tensor]) -> _StateDict:
    def rename(path: list[str]) -> list[str]:
        match path:
            case ["head", *rest]:
                return ["head", "fc", *rest]
            case [name, *rest] if level := _OUTPUT_NORM.fullmatch(name):
                return ["output_norms", level[1], *rest]
            case [*block, "gamma1" | "gamma2" as gamma]:
                return rename([*block, f"ls{gamma[-1]}", "gamma"])
            case ["layers", level, "blocks", *rest]:
                return ["levels", level, "blocks", *rest]
            case ["layers", level, *rest]:
                return ["levels", level, "blocks", "0", *rest]
        return path

    # An index that ViT-rpb's classes keep beside the table it follows from.
    kept = {key: value for key, value in state_dict.items() if not key.endswith(".attn.relative_position_index")}
    return _shift_downsampling(kept, 1, rename)


def _transformers_from_original(state_dict: Mapping[str, Tensor], model_type: str) -> _StateDict:
    if "patch_embed.proj.weight" in state_dict:
        raise CheckpointError("transformers has no layout for networks of patches (DiNAT_s, isotropic, ViT-rpb).")
    network = f"{model_type}." if any(key.startswith("head.") for key in state_dict) else ""
    out = {}
    for key, value in state_dict.items():
        match key.split("."):
            case ["levels", level, "blocks", block, *rest]:
                prefix = f"{network}encoder.levels.{level}.layers.{block}"
                match rest:
                    case ["attn", "qkv", name]:
                        parts = zip(QKV_NAMES, value.chunk(3), strict=True)
                        out |= {f"{prefix}.attention.self.{part}.{name}": rows for part, rows in parts}
                    case ["gamma1"]:
                        out[f"{prefix}.layer_scale_parameters"] = torch.stack([value, _second_gamma(state_dict, key)])
                    case ["gamma2"]:
                        pass  # stacked with gamma1
                    case _:
                        new = _rename(rest, BLOCK_NAMES)
                        out[key if new is None else f"{prefix}.{new}"] = value
            case ["levels", level, "downsample", *rest]:
                out[".".join([f"{network}encoder.levels", level, "downsample", *rest])] = value
            case [name, *rest] if level := _OUTPUT_NORM.fullmatch(name):
                out[".".join([f"{network}hidden_states_norms.stage{int(level[1]) + 1}", *rest])] = value
            case ["head", *_] as path:
                out[_rename(path, STEM_AND_HEAD_NAMES)] = value
            case path:
                new = _rename(path, STEM_AND_HEAD_NAMES)
                out[key if new is None else f"{network}{new}"] = value
    return out


def _second_gamma(state_dict: Mapping[str, Tensor], first: str) -> Tensor:
    second = first.removesuffix("1") + "2"
    if second not in state_dict:
        raise CheckpointError(f"The checkpoint has {first} without {second}; transformers keeps the two together.")
    return state_dict[second]


def _original_from_transformers(state_dict: Mapping[str, Tensor]) -> _StateDict:
    stem_and_head, names_in_block = _inverse(STEM_AND_HEAD_NAMES), _inverse(BLOCK_NAMES)
    out = {}
    for key, value in state_dict.items():
        match _PREFIX.sub("", key).split("."):  # which a backbone saved without a head lacks
            case ["encoder", "levels", level, "layers", block, *rest]:
                prefix = f"levels.{level}.blocks.{block}"
                match rest:
                    case ["attention", "self", "query", name]:
                        parts = [state_dict.get(key.replace(".query.", f".{part}.")) for part in QKV_NAMES]
                        if all(part is not None for part in parts):
                            out[f"{prefix}.attn.qkv.{name}"] = torch.cat(parts)
                    case ["attention", "self", "key" | "value", _]:
                        pass  # joined with query
                    case ["layer_scale_parameters"]:
                        out |= {f"{prefix}.gamma{i}": scale for i, scale in enumerate(value.unbind(), start=1)}
                    case _:
                        new = _rename(rest, names_in_block)
                        out[key if new is None else f"{prefix}.{new}"] = value
            case ["encoder", "levels", level, "downsample", *rest]:
                out[".".join(["levels", level, "downsample", *rest])] = value
            case ["hidden_states_norms", stage, *rest] if stage.removeprefix("stage").isdecimal():
                out[".".join([f"norm{int(stage.removeprefix('stage')) - 1}", *rest])] = value
            case path:
                out[_rename(path, stem_and_head) or key] = value
    return out


def detect_layout(state_dict: Mapping[str, Tensor]) -> str:
    """Names the layout of a state dict: one of LAYOUTS.

    Raises:
        CheckpointError: The keys are of none of them.
    """
    keys = [_PREFIX.sub("", key) for key in state_dict]
    if any(re.match(r"embeddings\.|encoder\.levels\.\d+\.layers\.", key) for key in keys):
        return "transformers"
    if any(key.startswith(("patch_embed.proj.0.", "patch_embed.proj.weight")) for key in keys):
        marks = re.compile(r"levels\.0\.downsample\.|layers\.|head\.(weight|bias)$|norm\d+\.|.*\.gamma[12]$")
        original = any(marks.match(key) for key in keys)
        return "original" if original else "nat_models"
    raise CheckpointError(
        "The checkpoint is not a NAT in a known layout. Found keys such as "
        f"{', '.join(map(repr, list(state_dict)[:4])) or '(none)'}; expected patch_embed.proj.0.weight or "
        "patch_embed.proj.weight, levels.0.blocks.0.attn.qkv.weight, ... (nat_models and original layout) or "
        "nat.embeddings.patch_embeddings.projection.0.weight, ... (transformers layout)."
    )


def convert_state_dict(state_dict: Mapping[str, Tensor], layout: str, *, model_type: str = "nat") -> dict[str, Tensor]:
    """Renames, splits and joins the tensors of a state dict from whichever layout it has to `layout`.

    Keys that no layout knows are kept as they are, for the loader to report. Of ViT-rpb the index beside each bias
    table is left out on the way to ours.

    Args:
        state_dict: In any of LAYOUTS.
        layout: One of LAYOUTS.
        model_type: "nat" or "dinat", the prefix of names in transformers' layout; keys alone do not tell.

    Raises:
        ValueError: `layout` is not in LAYOUTS, or model_type is another.
        CheckpointError: The state dict is in none of them, or the network has no such layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout=}.")
    if model_type not in MODEL_TYPES:
        raise ValueError(f"model_type must be one of {MODEL_TYPES}, got {model_type=}.")
    source = detect_layout(state_dict)
    if source == layout:
        return dict(state_dict)
    to_original = {"nat_models": _original_from_ours, "transformers": _original_from_transformers, "original": dict}
    original = to_original[source](state_dict)
    if layout == "transformers":
        return _transformers_from_original(original, model_type)
    return _ours_from_original(original) if layout == "nat_models" else original
