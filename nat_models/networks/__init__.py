"""The networks; importing them registers them with timm."""

from .nat import NAT

__all__ = ["NAT"]
