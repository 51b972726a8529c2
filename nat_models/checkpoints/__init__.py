"""Checkpoints: the layouts they come in, and loading that is never partial."""

from ..errors import CheckpointError
from .files import read_checkpoint
from .layouts import LAYOUTS, convert_state_dict, detect_layout
from .loading import fit_state_dict, load_weights
from .manifest import Weights, list_weights
from .unwrapping import find_network, unwrap

__all__ = [
    "LAYOUTS",
    "CheckpointError",
    "Weights",
    "convert_state_dict",
    "detect_layout",
    "find_network",
    "fit_state_dict",
    "list_weights",
    "load_weights",
    "read_checkpoint",
    "unwrap",
]
