"""Checkpoints: the layouts they come in, and loading that is never partial."""

from ..errors import CheckpointError
from .layouts import LAYOUTS, convert_state_dict, detect_layout
from .loading import fit_state_dict, load_weights, unwrap
from .manifest import Weights, list_weights

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "Weights",
    "convert_state_dict",
    "detect_layout",
    "fit_state_dict",
    "list_weights",
    "load_weights",
    "unwrap",
]
