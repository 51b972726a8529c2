"""Every registered model, at a size that tests can afford."""

from timm.models import create_model, list_models
from torch import nn

import nat_models  # noqa: F401  registers the models

MODELS = list_models(module="nat") + list_models(module="dinat")
_LEVELS = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
_ONE_RESOLUTION = dict(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))


def is_isotropic(name: str) -> bool:
    return "isotropic" in name or name.startswith("vitrpb")


def tiny(name: str, **kwargs) -> nn.Module:
    """The real class and the variant's own data, but for widths and depths."""
    return create_model(name, **((_ONE_RESOLUTION if is_isotropic(name) else _LEVELS) | kwargs))
