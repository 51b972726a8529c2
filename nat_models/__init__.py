"""Neighborhood Attention Transformers for timm: importing this package registers the models, nothing else happens."""

from . import nat
from .inference import fuse
from .layers import NeighborhoodAttention2d
from .ops import na2d

__all__ = ["NeighborhoodAttention2d", "fuse", "na2d", "nat"]
__version__ = "0.1.0"
