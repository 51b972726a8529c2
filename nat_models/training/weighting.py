"""Weights of classes in a loss."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import UserError, unknown


def class_weights(setting: str | None, counts: Mapping[int, int], total: int, names: Sequence[str]) -> Tensor | None:
    """A weight per class; "balanced" ones have a mean of 1 over what is counted.

    Args:
        setting: "balanced", or classes and weights as in cat=2,dog=0.5; None for none.
        counts: Of each class, by its index: images, or pixels.
        total: Of all.
        names: The classes.

    Raises:
        UserError: The setting is neither "balanced" nor a list of classes and weights.
    """
    if setting is None:
        return None
    if setting == "balanced":
        return torch.tensor([total / (len(names) * max(1, counts[i])) for i in range(len(names))])
    weights = torch.ones(len(names))
    for pair in setting.split(","):
        name, _, weight = pair.partition("=")
        if name.strip() not in names:
            raise unknown("class in class_weights", name.strip(), names)
        try:
            weights[list(names).index(name.strip())] = float(weight)
        except ValueError:
            raise UserError(f"class_weights must be balanced, or as in cat=2,dog=0.5; got {setting!r}.") from None
    if not (torch.isfinite(weights) & (weights >= 0)).all():
        raise UserError(f"class_weights must be at least 0, got {setting!r}.")
    return weights
