"""A small network, and random checkpoints of it in every layout."""

import torch
from timm.models import create_model

import nat_models  # noqa: F401  registers the models
from nat_models.checkpoints import convert_state_dict

SMALL = dict(embed_dim=16, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), init_values=1e-5)


def small_network(**kwargs):
    return create_model("nat_mini", **(SMALL | kwargs)).eval()


def random_state_dict(layout: str, **kwargs) -> dict[str, torch.Tensor]:
    """A checkpoint of the small model in one of the layouts, every tensor random."""
    state_dict = {k: torch.randn_like(v) for k, v in small_network(**kwargs).state_dict().items()}
    return convert_state_dict(state_dict, layout)


def load_file(path, **kwargs):
    """The small network as timm makes it from a local file."""
    return create_model("nat_mini", pretrained=True, pretrained_cfg_overlay=dict(file=str(path)), **(SMALL | kwargs))


def same_tensors(model, state_dict, without=()) -> bool:
    """Whether a network holds the tensors of a state dict of any layout, but for what starts with `without`."""
    ours, loaded = convert_state_dict(state_dict, "nat_models"), model.state_dict()
    return all(torch.equal(loaded[k], v) for k, v in ours.items() if not k.startswith(without))
