"""Neighborhood Attention Transformers for timm: importing this package registers the models, nothing else happens."""

from . import networks
from .checkpoints import list_weights
from .fuse import fuse
from .layers import NeighborhoodAttention1d, NeighborhoodAttention2d
from .onnx_operator import custom_ops_library
from .ops import na1d, na2d
from .optimize import optimize

__all__ = [
    "NeighborhoodAttention1d",
    "NeighborhoodAttention2d",
    "custom_ops_library",
    "fuse",
    "list_weights",
    "na1d",
    "na2d",
    "networks",
    "optimize",
]
__version__ = "0.1.0"
