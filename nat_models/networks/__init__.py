"""The networks; importing them registers them with timm."""

from . import dinat  # noqa: F401  registers DiNAT, DiNAT_s and the isotropic networks
from .nat import NAT

__all__ = ["NAT"]
