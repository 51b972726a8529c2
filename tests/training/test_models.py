"""Promises of models by name."""

import pytest
import timm
import torch
from safetensors.torch import load_file

from nat_models.training.models import began_from, make_model, published_as
from tests.training.conftest import TINY


def test_a_checkpoint_file_is_where_training_starts(run):
    file = run[0] / "last" / "model.safetensors"
    kwargs = dict(checkpoint=str(file), model_kwargs=TINY["model_kwargs"])
    model, weights = make_model("nat_mini", num_classes=3, **kwargs), load_file(file)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
    other_head = make_model("nat_mini", num_classes=5, **kwargs)
    assert torch.equal(other_head.patch_embed.proj[0].weight, weights["patch_embed.proj.0.weight"])
    assert other_head.num_classes == 5


@pytest.mark.parametrize(
    ("kwargs", "began", "published"),
    [
        ({}, True, True),
        (dict(num_classes=10), True, False),
        (dict(kernel_size=5), True, False),
        (dict(pretrained_cfg_overlay=dict(file="own.pth")), False, False),
        (dict(pretrained_cfg_overlay=dict(hf_hub_id="someone/nat")), False, False),
    ],
)
def test_published_figures_are_those_of_the_published_network_alone(kwargs, began, published):
    model = timm.create_model("nat_mini", device="meta", **kwargs)
    assert (began_from(model) is not None, published_as(model) is not None) == (began, published)
