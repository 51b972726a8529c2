"""Neighborhood Attention Transformers for timm: importing this package registers the models, nothing else happens."""

from . import networks
from .checkpoints import list_weights
from .fuse import fuse
from .layers import NeighborhoodAttention2d
from .ops import na2d

__all__ = ["NeighborhoodAttention2d", "fuse", "list_weights", "na2d", "networks"]
__version__ = "0.1.0"
