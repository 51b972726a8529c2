"""Checkpoints of UPerNet: mmsegmentation's, transformers' and ours, and fitting one to a network."""

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from ..errors import CheckpointError
from .layouts import LAYOUTS, convert_state_dict
from .loading import complete
from .unwrapping import marked

_BACKBONE = "backbone."
_CLASSIFIERS = ("decode_head.conv_seg", "auxiliary_head.conv_seg")
_MARKS = ("decode_head.conv_seg.weight", "decode_head.classifier.weight")
# mmsegmentation's and our names, and those of transformers.
_NAMES = {"bn": "batch_norm", "conv_seg": "classifier"}


def read_upernet(weights: str | Path | Mapping) -> dict[str, Tensor]:
    """The tensors of a UPerNet, in our layout, out of a file or what it holds.

    Raises:
        CheckpointError: It cannot be read, or holds no UPerNet or several.
        FileNotFoundError: There is no such file.
    """
    found = marked(weights, _MARKS)
    if len(found) != 1:
        held = "no UPerNet" if not found else f"{len(found)} UPerNets"
        raise CheckpointError(f"The checkpoint holds {held}; expected one with decode_head.conv_seg.weight.")
    return convert_upernet(found[0], "nat_models")


def convert_upernet(state_dict: Mapping[str, Tensor], layout: str, *, model_type: str = "nat") -> dict[str, Tensor]:
    """A UPerNet's tensors in another layout; no number changes.

    Args:
        state_dict: In any of LAYOUTS; "original" is mmsegmentation's, "transformers" UperNetForSemanticSegmentation's.
        layout: One of LAYOUTS.
        model_type: "nat" or "dinat", as in convert_state_dict.

    Raises:
        ValueError: `layout` is not in LAYOUTS.
        CheckpointError: The backbone is in no known layout, or has none in transformers.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout=}.")
    backbone = {k.removeprefix(_BACKBONE): v for k, v in state_dict.items() if k.startswith(_BACKBONE)}
    backbone = convert_state_dict(backbone, layout, model_type=model_type)
    names = _NAMES if layout == "transformers" else {theirs: ours for ours, theirs in _NAMES.items()}
    heads = {
        ".".join(names.get(name, name) for name in key.split(".")): value
        for key, value in state_dict.items()
        if not key.startswith(_BACKBONE)
    }
    return {f"{_BACKBONE}{key}": value for key, value in backbone.items()} | heads


def num_classes_of(state_dict: Mapping[str, Tensor]) -> int:
    """Of a UPerNet's tensors in our layout."""
    return len(state_dict[f"{_CLASSIFIERS[0]}.weight"])


def fit_upernet(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Exactly the keys and shapes of a network, or an error.

    Where the network has another number of classes, its own, new classifiers take the place of the checkpoint's. The
    stem is adapted to other input channels as timm does. Counters of batches, which nothing reads, may be missing.

    Args:
        state_dict: In our layout.
        model: A UPerNet; left as it is.

    Raises:
        CheckpointError: Keys are missing or unexpected, shapes differ; how many and which.
    """
    target = model.state_dict()
    fitted = dict(state_dict)
    if num_classes_of(state_dict) != model.num_classes:
        fitted |= {key: target[key] for key in (f"{head}.{x}" for head in _CLASSIFIERS for x in ("weight", "bias"))}
    complete(fitted, target, _BACKBONE)
    return fitted
