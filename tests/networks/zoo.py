"""Every registered model, at a size that tests can afford."""

from collections.abc import Mapping

import torch
from timm.models import create_model, list_models
from torch import Tensor, nn

import nat_models  # noqa: F401  registers the models
from tests.conftest import original_state_dict, tensor

MODELS = list_models(module="nat") + list_models(module="dinat")
_LEVELS = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8))
_ONE_RESOLUTION = dict(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))


def is_isotropic(name: str) -> bool:
    return "isotropic" in name or name.startswith("vitrpb")


def tiny(name: str, **kwargs) -> nn.Module:
    """The real class and the variant's own data, but for widths and depths."""
    return create_model(name, **((_ONE_RESOLUTION if is_isotropic(name) else _LEVELS) | kwargs))


def published(variant: str, **kwargs) -> nn.Module:
    """The network with the fixtures' weights, which come in the authors' layout."""
    overlay = dict(state_dict=original_state_dict(variant), hf_hub_id=None, url="")
    return create_model(variant, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()


def golden_cases(golden: Mapping[str, Tensor]) -> list[str]:
    """Of a file of fixtures: "VARIANT/HEIGHTxWIDTH" of each of its logits."""
    return [name.removesuffix("/logits") for name in golden if name.endswith("/logits")]


def assert_golden_logits(golden: Mapping[str, Tensor], case: str) -> None:
    variant, size = case.split("/")
    height, width = map(int, size.split("x"))
    with torch.no_grad():
        logits = published(variant)(tensor(f"image_{size}", (1, 3, height, width)))
    torch.testing.assert_close(logits[0], golden[f"{case}/logits"], rtol=0, atol=2e-5)
