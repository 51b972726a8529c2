"""Parts of a network that are not trained."""

import re

from timm.models import group_parameters
from torch import nn

from ..errors import UserError


def freeze(network: nn.Module, what: str) -> None:
    """Takes the gradients from a part of a timm model.

    Args:
        network: A timm model with a `group_matcher`.
        what: backbone (all but the classifier), stem, levelN, or a stretch such as stem..level2 or level0..level1;
            levels are counted from 0, as the keys of a checkpoint count them.

    Raises:
        UserError: The model has no such part.
    """
    if what == "backbone":
        kept = {id(p) for p in head_parameters(network)}
        frozen = [p for p in network.parameters() if id(p) not in kept]
    else:
        groups = group_parameters(network, network.group_matcher(coarse=True), return_values=True)
        names = ["stem", *(f"level{i}" for i in range(len(groups) - 2))]  # the last group is the norm and the head
        match = re.fullmatch(r"(\w+)(?:\.\.(\w+))?", what)
        ends = [] if match is None else [match[1], match[2] or match[1]]
        if not ends or not set(ends) <= set(names) or names.index(ends[0]) > names.index(ends[1]):
            raise UserError(
                f"freeze must be backbone, one of {', '.join(names)}, or a stretch such as stem..{names[-1]}; "
                f"got {what!r}."
            )
        frozen = [p for i in range(names.index(ends[0]), names.index(ends[1]) + 1) for p in groups[i]]
    for parameter in frozen:
        parameter.requires_grad = False


def head_parameters(network: nn.Module) -> list[nn.Parameter]:
    head = list(network.get_classifier().parameters())
    if not head:
        raise UserError("The model has no classifier that could be trained alone.")
    return head


def set_training(network: nn.Module) -> None:
    """Training mode, but not where nothing is trained: a frozen block drops no paths and keeps its statistics."""
    network.train()
    for module in network.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
